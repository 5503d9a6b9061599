"""Which previews keep their word on a model: native runs, every kind of preview of them, and how near those are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.images.alpha import on_white
from mrflow_sched.measure.metrics import paired_t, psnr, ssim
from mrflow_sched.measure.preview_kinds import FEW_STEPS, KINDS
from mrflow_sched.measure.previews import preview, preview_plan, shrunk
from mrflow_sched.methods.previews import DownSelector
from mrflow_sched.sampler import sample_staged
from mrflow_sched.sampling.noise import stage_seed

if TYPE_CHECKING:
    from mrflow_sched.plan.stages import StagedPlan
    from mrflow_sched.sampling.engine import Engine
    from mrflow_sched.sampling.progress import Progress

__all__ = ["SEEDS", "Checked", "PreviewCheck", "check_previews"]

SEEDS = 2
"""Seeds of each prompt: the least that tell one seed's image from another's."""

# Of a paired t over N prompts, two-sided 5 %: Student's distribution with N - 1 degrees of freedom.
_ENOUGH = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)
_ENOUGH_OF_MANY = 2.09
_LEAST_SIDE = 11  # pixels, of the window of SSIM
_MOST_DB = 99.0


@dataclass(frozen=True)
class Checked:
    """How near a kind of preview is to the shrunk native images, in the mean over prompts and seeds.

    Attributes:
        kind: A key of `preview_kinds.KINDS`.
        psnr: In dB.
        ssim: At most 1.
        own_seed: Share of previews that are nearer, by SSIM, to the image of their own seed than to the other one's.
        cost: Work of the network, in evaluations at the full size.
        seconds: Wall-clock seconds of one preview.
        ideal: PSNR of D x1, the finished latents shrunk by the chain's own D; None for kinds without a D.
        gain: Paired t of its PSNR over that of "nested", over the prompts.
        ideal_gain: Likewise for `ideal`.
        enough: What a paired t over so many prompts must pass to be no chance.
        refusal: Why this model cannot be previewed so, in place of all numbers; else None.
    """

    kind: str
    psnr: float = 0.0
    ssim: float = 0.0
    own_seed: float = 0.0
    cost: float = 0.0
    seconds: float = 0.0
    ideal: float | None = None
    gain: float | None = None
    ideal_gain: float | None = None
    enough: float = _ENOUGH_OF_MANY
    refusal: str | None = None

    @property
    def keeps_its_word(self) -> bool | None:
        """Whether chain and D x1 are nearer than a nested run, by a paired t above `enough`; None without a D."""
        if self.ideal is None or self.gain is None or self.ideal_gain is None:
            return None
        return min(self.gain, self.ideal_gain) > self.enough


@dataclass(frozen=True)
class PreviewCheck:
    """What was found.

    Attributes:
        plan: The native plan.
        prompts: How many prompts were run, at `SEEDS` seeds each.
        native_seconds: Wall-clock seconds of one native run.
        floor: (PSNR, SSIM) of the native image of the other seed: what says nothing of the seed.
        rows: The kinds, in the order of `KINDS`.
    """

    plan: StagedPlan
    prompts: int
    native_seconds: float
    floor: tuple[float, float]
    rows: tuple[Checked, ...]


def check_previews(
    engine: Engine,
    plan: StagedPlan,
    prompts: Sequence[str],
    *,
    steps: int = FEW_STEPS,
    negative_prompt: str | None = None,
    callback: Callable[[str, Progress], object] | None = None,
) -> PreviewCheck:
    """Run native images and all kinds of previews of them, and compare.

    Args:
        engine: The model.
        plan: The native plan.
        prompts: Two or more; more prompts tell smaller differences.
        steps: Steps of the kind "few".
        negative_prompt: For all of them.
        callback: Called with what is being made and its `Progress`; may raise.

    Returns:
        The kinds with their numbers; one that the model or the size does not allow has its refusal.

    Raises:
        MrFlowError: Fewer than two prompts, a staged plan, or images too small to compare.
    """
    if len(prompts) < 2:
        raise MrFlowError(f"prompts must hold two or more, got {len(prompts)}; differences are tested over prompts.")
    small = preview_plan(engine.family, plan)
    if min(small.requested_width, small.requested_height) < _LEAST_SIDE:
        raise MrFlowError(
            f"the previews of {plan.requested_width}x{plan.requested_height} are smaller than {_LEAST_SIDE} pixels, "
            "too small to compare; choose a larger size."
        )
    done = [_Natives(engine, plan, small, prompt, negative_prompt, callback) for prompt in prompts]
    floor = [(psnr(each.native, each.other), ssim(each.native, each.other)) for each in done]
    nested: Tensor | None = None
    rows: list[Checked] = []
    for kind in ("nested", *(kind for kind in KINDS if kind != "nested")):
        row, each = _checked(kind, done, steps, nested)
        nested = each if kind == "nested" else nested
        rows.append(row)
    rows.sort(key=lambda row: list(KINDS).index(row.kind))
    means = tuple(float(torch.cat([pair[index] for pair in floor]).double().mean()) for index in range(2))
    seconds = sum(each.seconds for each in done) / len(done) / SEEDS
    return PreviewCheck(plan, len(prompts), seconds, (means[0], means[1]), tuple(rows))


class _Natives:
    """The native images of one prompt, and the way to its previews."""

    def __init__(
        self,
        engine: Engine,
        plan: StagedPlan,
        small: StagedPlan,
        prompt: str,
        negative: str | None,
        callback: Callable[[str, Progress], object] | None,
    ) -> None:
        """Make them.

        Args:
            engine: The model.
            plan: The native plan.
            small: The plan of a preview.
            prompt: Of all of them.
            negative: Likewise, or None.
            callback: Called with what is made and its progress, or None.

        Raises:
            MrFlowError: They contain NaN or infinity.
        """
        self._engine, self._plan, self._small, self._callback = engine, plan, small, callback
        seeds = [stage_seed(plan.seed, image, 0, plan.seed_rule) for image in range(SEEDS)]
        self._asked: dict[str, Any] = {"prompt": [prompt] * SEEDS, "seeds": seeds}
        self._asked["negative_prompt"] = negative
        result = sample_staged(engine, plan, callback=self._follow("native"), **self._asked)
        self.seconds = sum(timing.seconds for timing in result.timings)
        if result.latents is None:
            raise MrFlowError("the native images contain NaN or infinity; try --dtype float32.")
        self._latents = result.latents
        self.native = on_white(shrunk(result.images, small.requested_width, small.requested_height).float().cpu())
        self.other = self.native.roll(1, 0)

    def preview(self, kind: str, steps: int) -> Any:
        return preview(self._engine, self._plan, kind=kind, steps=steps, callback=self._follow(kind), **self._asked)

    def ideal(self, kind: str) -> Tensor:
        # What D of the finished latents decodes to, (B, 3, h, w) on the CPU.
        engine, latents, stage = self._engine, self._latents, self._small.stages[0]
        if kind == "chain-pixels":
            small = engine.encode(shrunk(engine.decode(latents), stage.width, stage.height))
        elif kind == "chain-average":
            rows, columns = engine.latent_shape(stage.width, stage.height)[-2:]
            small = functional.interpolate(latents, (rows, columns), mode="area")
        else:
            small = DownSelector(2, 0).down(latents).contiguous()
        return on_white(engine.decode(small)[(..., *self._small.asked_area)].float().cpu())

    def _follow(self, name: str) -> Callable[[Progress], object] | None:
        callback = self._callback
        return None if callback is None else lambda step: callback(name, step)


@torch.no_grad()
def _checked(kind: str, done: Sequence[_Natives], steps: int, nested: Tensor | None) -> tuple[Checked, Tensor | None]:
    """A kind's numbers, and its PSNR of each prompt."""
    decibel, likeness, other, ideal = (list[Tensor]() for _ in range(4))
    cost = seconds = 0.0
    try:
        for each in done:
            found = each.preview(kind, steps)
            images = on_white(found.images.float().cpu())
            cost, seconds = found.cost, seconds + found.seconds / len(done) / SEEDS
            decibel.append(psnr(images, each.native).clamp(max=_MOST_DB))
            likeness.append(ssim(images, each.native))
            other.append(ssim(images, each.other))
            if kind.startswith("chain-"):
                ideal.append(psnr(each.ideal(kind), each.native).clamp(max=_MOST_DB))
    except MrFlowError as error:
        return Checked(kind, refusal=str(error)), None
    by_prompt = torch.stack(decibel).mean(1)
    best = torch.stack(ideal).mean(1) if ideal else None
    near, far = torch.stack(likeness), torch.stack(other)
    row = Checked(
        kind,
        psnr=float(by_prompt.mean()),
        ssim=float(near.mean()),
        own_seed=float((near > far).double().mean()),
        cost=cost,
        seconds=seconds,
        ideal=None if best is None else float(best.mean()),
        gain=None if nested is None else paired_t(by_prompt - nested),
        ideal_gain=None if nested is None or best is None else paired_t(best - nested),
        enough=_ENOUGH[len(done) - 2] if len(done) - 2 < len(_ENOUGH) else _ENOUGH_OF_MANY,
    )
    return row, by_prompt
