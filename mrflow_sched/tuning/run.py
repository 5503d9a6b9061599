"""`tune`: a LoRA that raises a reward, watched by a second one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched._runtime.memory import free_memory, is_memory_error
from mrflow_sched._runtime.write import write_whole
from mrflow_sched.measure.metrics import psnr
from mrflow_sched.measure.scores import Score, get_score
from mrflow_sched.sampler import sample_staged
from mrflow_sched.sampling.engine import capabilities_of
from mrflow_sched.sampling.noise import stage_seed
from mrflow_sched.tuning.adapter import Adapter
from mrflow_sched.tuning.processes import Processes
from mrflow_sched.tuning.report import Story, check_line, write_images, write_report
from mrflow_sched.tuning.rewards import try_reward
from mrflow_sched.tuning.sampled import Batch, Teacher
from mrflow_sched.tuning.settings import TuneSettings
from mrflow_sched.tuning.state import Check, State, fingerprint

if TYPE_CHECKING:
    from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
    from mrflow_sched.methods.reward import Surrogate
    from mrflow_sched.plan.stages import StagedPlan
    from mrflow_sched.upscaling.role import PixelUpscaler

__all__ = ["LORA", "RECORD", "Tuned", "tune"]

LORA = "lora.safetensors"
"""Name of the result in a run's folder."""
RECORD = "tune.json"
"""Name of the record there."""
_TOGETHER = 8
"""Held-out images that are sampled at once."""
_NOISE_STREAM = 7


@dataclass(frozen=True)
class Tuned:
    """A finished or stopped tuning run.

    Attributes:
        file: The LoRA; None: the run was stopped before there was one that the guard lets through.
        report: The page with curves and images.
        update: The updates that are in the file.
        updates: The updates that were done.
        stopped: "" (all were done), "guard" or "cancelled".
        checks: All looks at the held-out prompts; the first is of the model as it was.
        full: The same for the final images of the whole plan, before and after; empty where there is no file.
    """

    file: Path | None
    report: Path
    update: int
    updates: int
    stopped: str
    checks: tuple[Check, ...]
    full: tuple[Check, ...]

    def to_dict(self) -> dict[str, Any]:
        """The run as numbers, strings and lists: what tune.json holds.

        Returns:
            Keys that stay the same from version to version.
        """
        return {
            "lora": None if self.file is None else str(self.file),
            "report": str(self.report),
            "update": self.update,
            "updates": self.updates,
            "stopped": self.stopped,
            "checks": [check.to_dict() for check in self.checks],
            "full": [check.to_dict() for check in self.full],
        }

    def at(self, update: int) -> Check:
        """The look after so many updates.

        Args:
            update: Of one of `checks`.

        Returns:
            It.
        """
        return next(check for check in self.checks if check.update == update)


def tune(
    engine: PipelineEngine,
    prompts: Sequence[str],
    held_out: Sequence[str],
    *,
    plan: StagedPlan,
    reward: object,
    guard: object,
    folder: str | os.PathLike[str],
    upscaler: PixelUpscaler | None = None,
    settings: TuneSettings | None = None,
    processes: Processes | None = None,
    tell: Callable[[str], object] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Tuned:
    """Train a LoRA that raises a reward of a plan's images.

    Stage 1 is sampled in Euler's steps without gradients, its image (or the refined one) rewarded, and the reward led
    back by a surrogate path (`methods.reward`; FlowBP, arXiv 2606.11075). Every few updates the held-out prompts are
    sampled as the plan says: where the guard falls there, tuning stops, and the last weights that it let through are
    the result. The run goes on from the state in its folder, if there is one. The engine is left as it was.

    Args:
        engine: Of a flow model; its network is given a LoRA while tuning.
        prompts: What is trained on, at least one.
        held_out: What is only looked at, at least two, none of them in `prompts`.
        plan: Of the images. Its stage 1 must see all tokens in the model's own precision, with one guidance scale.
        reward: What is raised: a name as `measure.scores.get_score` takes it, or a function of images (B, 3, H, W) in
            [0, 1] and their prompts that keeps a graph.
        guard: What must not fall: another score.
        folder: Where everything goes; made where it is missing.
        upscaler: Of the plan's hand-off; None: Lanczos.
        settings: How; None: the defaults.
        processes: Those that tune together; None: this one alone.
        tell: Receives a line at each look at the held-out prompts.
        cancel: Polled before each update; once it answers True, the state is saved, and the run ends.

    Returns:
        The files, and what was measured.

    Raises:
        MrFlowError: An argument cannot be used; the sentence says which and why.
        MemoryError: Not even one image fits into memory.
        OSError: A file cannot be written.
    """
    asked = _Asked(
        engine,
        tuple(prompts),
        tuple(held_out),
        plan,
        get_score(reward, device=engine.device),
        get_score(guard, device=engine.device),
        upscaler,
        settings or TuneSettings(),
        Path(folder),
        processes or Processes(),
        tell or _ignore,
        cancel or _never,
    )
    _check(asked)
    asked.folder.mkdir(parents=True, exist_ok=True)
    adapter = Adapter(engine, asked.settings.rank, asked.settings.seed)
    try:
        return _Run(asked, adapter).done()
    finally:
        adapter.remove()


def _ignore(_: str) -> None:
    """Tell nobody."""


def _never() -> bool:
    """Go on."""
    return False


@dataclass(frozen=True)
class _Asked:
    """The arguments of `tune`, all given."""

    engine: PipelineEngine
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    plan: StagedPlan
    reward: Score
    guard: Score
    upscaler: PixelUpscaler | None
    settings: TuneSettings
    folder: Path
    processes: Processes
    tell: Callable[[str], object]
    cancel: Callable[[], bool]


def _check(asked: _Asked) -> None:
    """Refuse what cannot be tuned, before anything is sampled."""
    engine, plan, reward, guard, settings = asked.engine, asked.plan, asked.reward, asked.guard, asked.settings
    prompts, held_out, processes = asked.prompts, asked.held_out, asked.processes
    family, stage = engine.family, plan.stages[0]
    if family.prediction != "flow" or not capabilities_of(engine).gradients:
        raise MrFlowError(
            f"a model of the family {family.name} cannot be tuned; it takes a flow model whose calls keep a graph."
        )
    if not prompts or len(held_out) < 2:
        raise MrFlowError(
            f"there are {len(prompts)} prompts to train on and {len(held_out)} held out; give at least 1 and 2."
        )
    both = [prompt for prompt in held_out if prompt in set(prompts)]
    if both:
        raise MrFlowError(f"the held-out prompt {quoted(both[0])} is trained on too; leave it out of one of the lists.")
    if reward.name.lstrip("-") == guard.name.lstrip("-"):
        raise MrFlowError(
            f"guard is {quoted(guard.name)}, as the reward is; give another score, which shows what the reward costs."
        )
    odd = {
        "a share of the tokens (--method)": bool(stage.shares),
        f"precision {stage.precision}": stage.precision != "own",
        "renoise": stage.renoise > 0,
        "a guidance interval": not stage.always_guided,
        f"noise {plan.noise}": plan.noise != "own",
    }
    unusual = [name for name, is_so in odd.items() if is_so]
    if unusual:
        raise MrFlowError(f"plan has {unusual[0]} in stage 1, which tuning does not follow; leave it out.")
    if settings.handoff is not None and len(plan.stages) != 2:
        raise MrFlowError(
            f"through is {settings.through!r}, which needs a plan of two stages, got {len(plan.stages)}; use low."
        )
    if settings.batch % processes.count:
        raise MrFlowError(
            f"batch is {settings.batch}, which {processes.count} processes cannot share; give a multiple of it."
        )
    try_reward(reward, prompts[0])
    for score in (reward, guard):
        for prompt in (*prompts, *held_out):
            score(torch.full((1, 3, 64, 64), 0.5), [prompt])


class _Run:
    def __init__(self, asked: _Asked, adapter: Adapter) -> None:
        self.asked, self.adapter, self.settings, self.processes = asked, adapter, asked.settings, asked.processes
        self.engine, self.plan, self.folder = asked.engine, asked.plan, asked.folder
        settings = self.settings
        self.optimiser = torch.optim.AdamW(adapter.parameters, lr=settings.rate, weight_decay=0.0)
        self.teacher = Teacher(self.engine, self.plan, asked.reward, asked.upscaler, settings.handoff, settings.target)
        self.surrogate, self.together = settings.surrogate(), settings.batch // self.processes.count
        self.made_of = self._made_of()
        weights = adapter.weights()
        self.state = State(0, 0.0, weights, weights, self.optimiser.state_dict(), weights, 0)

    def done(self) -> Tuned:
        """Go through the run, from where its folder stands.

        Returns:
            What came of it.
        """
        settings = self.settings
        with self._keeping_less() if settings.checkpointing else contextlib.nullcontext():
            self._begin()
            while not self.state.stopped and self.state.update < settings.updates:
                if self.processes.told(float(self.asked.cancel())):
                    self._save()
                    return self._ended("cancelled")
                self._update()
                if self.state.update % settings.check_every == 0 or self.state.update == settings.updates:
                    self._look()
                    self._save()
            return self._ended(self.state.stopped)

    # ------------------------------------------------------------------------------------------------------- the start

    def _made_of(self) -> dict[str, str]:
        settings = self.settings.to_dict()
        told = ", ".join(f"{name}={value}" for name, value in settings.items() if name != "updates")
        names = {"reward": self.asked.reward.name, "guard": self.asked.guard.name}
        named = {"settings": told, "plan": self.plan.to_string(), **names}
        lists = {"prompts": self.asked.prompts, "held-out prompts": self.asked.held_out}
        return fingerprint(self.engine.network, named, lists)

    def _begin(self) -> None:
        found = State.load(self.folder, self.made_of)
        if found is None:
            self._look()
            self._save()
            return
        self.state = found
        self.adapter.load(found.weights)
        self.optimiser.load_state_dict(found.optimiser)
        if self.processes.first:
            self.asked.tell(f"Going on after {found.update} updates.")

    @contextlib.contextmanager
    def _keeping_less(self) -> Generator[None, None, None]:
        network: Any = self.engine.network
        if not hasattr(network, "enable_gradient_checkpointing"):
            raise MrFlowError(f"{type(network).__name__} has no gradient checkpointing; leave it out.")
        before = bool(network.is_gradient_checkpointing)
        network.enable_gradient_checkpointing()
        try:
            yield
        finally:
            if not before:
                network.disable_gradient_checkpointing()

    # ---------------------------------------------------------------------------------------------------- the updates

    def _batch(self) -> Batch:
        """The images of the next update, by its number alone: a run that goes on sees what it would have seen."""
        settings, first = self.settings, self.state.update * self.settings.batch
        mine = range(first + self.processes.rank, first + settings.batch, self.processes.count)
        seeds = tuple(stage_seed(settings.seed, number, _NOISE_STREAM, "hash") for number in mine)
        draws = stage_seed(settings.seed, self.state.update, self.processes.rank, "hash")
        return Batch(tuple(self.asked.prompts[self._place(number)] for number in mine), seeds, draws)

    def _place(self, number: int) -> int:
        again, place = divmod(number, len(self.asked.prompts))
        return int(np.random.default_rng([self.settings.seed, again]).permutation(len(self.asked.prompts))[place])

    def _update(self) -> None:
        state, begin = self.state, time.perf_counter()
        rewards = self._gradients(self._batch())
        self.processes.average(self.adapter.parameters)
        nn.utils.clip_grad_norm_(self.adapter.parameters, 1.0)
        cast("Any", self.optimiser).step()
        self.optimiser.zero_grad(set_to_none=True)
        mean = self.processes.total(rewards.mean()) / self.processes.count
        if not math.isfinite(float(mean)) or not all(bool(each.isfinite().all()) for each in self.adapter.parameters):
            raise MrFlowError(
                f"update {state.update + 1} gave NaN or infinity; lower --rate, or use --dtype float32. What the "
                "last look saved is kept."
            )
        state.recent.append(float(mean))
        state.update += 1
        state.weights = self.adapter.weights()
        keep = min(self.settings.ema, (1 + state.update) / (10 + state.update))
        state.average = {name: each.lerp(state.weights[name], 1 - keep) for name, each in state.average.items()}
        state.seconds += time.perf_counter() - begin

    def _gradients(self, batch: Batch) -> Tensor:
        """Gradients of a batch on the LoRA, in parts that fit into memory; the rewards of its images."""
        while True:
            rewards = self._attempt(batch)
            if rewards is not None:
                return rewards
            self.optimiser.zero_grad(set_to_none=True)
            free_memory(self.engine.device)
            if self.together > 1:
                self.together = (self.together + 1) // 2
                self.asked.tell(f"Memory ran out, so {self.together} images are followed at once.")
            else:
                self.surrogate = self._smaller()

    def _smaller(self) -> Surrogate:
        fallback = self.settings.fallback()
        if fallback is None or fallback == self.surrogate:
            raise MemoryError(
                "memory ran out while one image was tuned; use --checkpointing, --backward leap, a smaller --size or "
                "fewer --low-steps."
            )
        self.asked.tell(f"Memory ran out with one image, so its gradient is led back by {fallback.path} from here on.")
        return fallback

    def _attempt(self, batch: Batch) -> Tensor | None:
        rewards: list[Tensor] = []
        try:
            for part in batch.parts(self.together):
                with torch.enable_grad():
                    loss, found = self.teacher.loss(part, self.surrogate)
                    cast("Any", loss * (len(part.seeds) / len(batch.seeds))).backward()
                rewards.append(found)
        except Exception as error:
            if not is_memory_error(error):
                raise
            return None
        return torch.cat(rewards)

    # ----------------------------------------------------------------------------------------- the held-out prompts

    def _look(self) -> None:
        """Look at the held-out prompts with the averaged weights, and stop where the guard fell."""
        state = self.state
        if self.processes.first:
            images = self._sampled(state.average)
            if state.base is None:
                state.base = (images * 255).round().byte()
            state.checks.append(self._checked(images, state.base, state.recent))
            write_images(self.folder, f"update-{state.update:04d}" if state.update else "before", images)
            names = self.asked.reward.name, self.asked.guard.name
            self.asked.tell(check_line(state.checks[0], state.checks[-1], self.settings.updates, *names))
        state.recent = []
        fell = self.processes.told(float(self.processes.first and self._fell(state.checks)))
        if fell:
            state.stopped = "guard"
        else:
            state.good, state.good_update = dict(state.average), state.update
        self._report()

    def _checked(self, images: Tensor, base: Tensor, recent: Sequence[float]) -> Check:
        prompts = list(self.asked.held_out)
        rewards, guards = (_numbers(score(images, prompts)) for score in (self.asked.reward, self.asked.guard))
        apart = _numbers(psnr((images * 255).round() / 255, base.float() / 255))
        trained = sum(recent) / len(recent) if recent else None
        return Check(self.state.update, self.state.seconds, rewards, guards, apart, trained)

    def _sampled(self, weights: Mapping[str, Tensor], *, whole: bool = False) -> Tensor:
        """What the plan makes of the held-out prompts with those weights: (n, 3, H, W) on the CPU."""
        until = None if whole or self.settings.handoff is not None else 1
        done: list[Tensor] = []
        with self.adapter.holding(weights):
            for first in range(0, len(self.asked.held_out), _TOGETHER):
                part = list(self.asked.held_out[first : first + _TOGETHER])
                seeds = [self.plan.seed + first + row for row in range(len(part))]
                found = sample_staged(
                    self.engine, self.plan, part, upscaler=self.asked.upscaler, until=until, seeds=seeds
                )
                done.append(found.images.cpu())
        return torch.cat(done)

    def _fell(self, checks: Sequence[Check]) -> bool:
        before, now = (torch.tensor(each.guards, dtype=torch.float64) for each in (checks[0], checks[-1]))
        return float((before - now).mean()) > self.settings.guard_drop * float(before.std()) + 1e-12

    def _report(self, full: tuple[Check, ...] = (), stopped: str = "") -> Path:
        state, asked = self.state, self.asked
        if not self.processes.first:
            return self.folder
        told = tuple(f"{name}: {value}" for name, value in self.settings.to_dict().items())
        story = Story(
            asked.reward.name,
            asked.guard.name,
            len(asked.prompts),
            asked.held_out,
            (*told, f"plan: {self.plan.to_string()}"),
            tuple(state.checks),
            state.good_update,
            stopped or state.stopped,
            self.settings.guard_drop,
            full,
        )
        return write_report(self.folder, story)

    def _save(self) -> None:
        if not self.processes.first:
            return
        self.state.weights, self.state.optimiser = self.adapter.weights(), self.optimiser.state_dict()
        self.state.save(self.folder, self.made_of)
        if self.state.good_update:
            write_whole(self.folder / LORA, self.adapter.file(self.state.good))

    # --------------------------------------------------------------------------------------------------------- the end

    def _ended(self, stopped: str) -> Tuned:
        state, made = self.state, self.state.good_update > 0
        whole = self.processes.first and made and stopped != "cancelled"
        full = self._whole_plan() if whole else ()
        file = self.folder / LORA if made else None
        report = self._report(full, stopped)
        found = Tuned(file, report, state.good_update, state.update, stopped, tuple(state.checks), full)
        if self.processes.first:
            write_whole(self.folder / RECORD, json.dumps(found.to_dict(), indent=2).encode())
        return found

    def _whole_plan(self) -> tuple[Check, ...]:
        """The final images of the held-out prompts, before and after."""
        with self.adapter.off():
            before = self._sampled(self.state.good, whole=True)
        base = (before * 255).round().byte()
        after = self._sampled(self.state.good, whole=True)
        first = replace(self._checked(before, base, ()), update=0)
        return first, replace(self._checked(after, base, ()), update=self.state.good_update)


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(map(float, values))
