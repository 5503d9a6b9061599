"""A worker of `mrflow batch`: loads the model once, and makes images, drafts and finished drafts as bytes of files."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.cli.inputs import LoraChoice
from mrflow_sched.apps.cli.load import Job, Loaded, find_upscaler, load, make_record
from mrflow_sched.apps.cli.options import ModelChoices
from mrflow_sched.images.parameters import PARAMETERS, parameters_text
from mrflow_sched.images.record import KEY, RunRecord
from mrflow_sched.plan.stages import StagedPlan

if TYPE_CHECKING:
    from mrflow_sched.batch.items import Kind
    from mrflow_sched.batch.sharing import ContextParallel
    from mrflow_sched.measure.scores import Score
    from mrflow_sched.sampler import StagedResult


@dataclass(frozen=True)
class Task:
    """What a worker is given.

    Attributes:
        kind: What is made.
        plan: Of the first image, on one line.
        prompt: What the images show.
        negative: What they should not show, or None.
        refine_prompt: What the later stages show instead, or None.
        refine_negative: What those should not show instead, or None.
        loras: The LoRAs on the model.
        batch: How many images are sampled together.
        wanted: Which of them are kept, counted from 0.
        draft: The file of the draft whose later stages are run; None: the run begins with noise.
    """

    kind: Kind
    plan: str
    prompt: str
    negative: str | None
    refine_prompt: str | None
    refine_negative: str | None
    loras: tuple[LoraChoice, ...]
    batch: int
    wanted: tuple[int, ...]
    draft: bytes | None = None


@dataclass(frozen=True)
class MadeFile:
    """What a worker gives for one image.

    Attributes:
        number: Which of the task's images, counted from 0.
        data: The bytes of its file; None: it was not made.
        seconds: Its share of the time.
        scores: Name -> value, of a draft.
        reason: Why it was not made.
        warnings: What the run had to say, one sentence each.
    """

    number: int
    data: bytes | None
    seconds: float
    scores: dict[str, float]
    reason: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelMaker:
    """Loads the model for a worker; it is sent to processes and machines.

    Attributes:
        model: The model, the upscaler and what they run on.
        first: The plan of the first images, on one line.
        suffix: Ending of the finished images.
        scores: Names of the scores that drafts get.
        shared: How the worker's processes share every forward; None: it has one.
    """

    model: ModelChoices
    first: str
    suffix: str
    scores: tuple[str, ...] = ()
    shared: ContextParallel | None = None

    def __call__(self, device: str | None, threads: int | None) -> Making:
        """Load the model.

        Args:
            device: Where to; None: where `model` says.
            threads: CPU threads of torch; None: as many as torch takes.

        Returns:
            What does the tasks.

        Raises:
            MrFlowError: The model, the upscaler or a score cannot be used.
        """
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        model = self.model if device is None else replace(self.model, device=device)
        return Making(model, self, StagedPlan.from_string(self.first))


class Making:
    """A loaded model, and what is made with it."""

    def __init__(self, model: ModelChoices, maker: ModelMaker, plan: StagedPlan) -> None:
        """Load.

        Args:
            model: The model and its device.
            maker: Says the rest.
            plan: Of the first images.
        """
        from mrflow_sched._runtime.device import resolve_device
        from mrflow_sched.drafts import TextMemory
        from mrflow_sched.measure.scores import get_score

        self._model, self._suffix, self._shared = model, maker.suffix, maker.shared
        self._scores: list[Score] = [get_score(name, device=resolve_device(model.device)) for name in maker.scores]
        self._texts = TextMemory()
        self._loras: tuple[LoraChoice, ...] | None = None
        self._staged = False
        self._loaded: Loaded | None = None
        self._record: RunRecord | None = None
        self._load(plan, model.loras)

    def __call__(self, task: Task, cancel: Callable[[], bool]) -> tuple[MadeFile, ...] | None:
        """Do a task.

        Args:
            task: The task.
            cancel: Polled at every step.

        Returns:
            A value for each wanted image; None where it was cancelled.

        Raises:
            MrFlowError: Its forwards cannot be shared.
        """
        if self._shared is None:
            return self._done(task, cancel)
        from mrflow_sched.engines.diffusers.context_parallel import sharing_refusal

        try:
            return self._done(task, cancel)
        except Exception as error:
            refused = sharing_refusal(error)
            if refused is None:
                raise
            raise refused from error

    def _done(self, task: Task, cancel: Callable[[], bool]) -> tuple[MadeFile, ...] | None:
        began = time.perf_counter()
        plan = StagedPlan.from_string(task.plan)
        loaded, record = self._load(plan, task.loras)
        record = replace(
            record,
            plan=plan.to_string(),
            prompt=task.prompt,
            negative=task.negative,
            refine_prompt=task.refine_prompt,
            refine_negative=task.refine_negative,
            seed=plan.seed,
            batch=task.batch,
        )
        if len(plan.stages) == 1:
            record = replace(record, upscaler="none", upscaler_sha256=None)
        if task.kind == "draft":
            return self._draft(task, plan, loaded, record, cancel, began)
        result = self._sampled(task, plan, loaded, cancel)
        if result.cancelled:
            return None
        if result.unfinished and not any(result.faults):
            raise MemoryError(result.warnings[-1] if result.warnings else "memory ran out")
        files: list[MadeFile] = []
        seconds = (time.perf_counter() - began) / len(task.wanted)
        for number in task.wanted:
            fault = result.faults[number]
            reason = "" if fault is None else fault.sentence(number + 1, kept=False)
            data = self._file(result, number, record) if fault is None else None
            files.append(MadeFile(number, data, seconds, {}, reason, result.warnings))
        return tuple(files)

    def _load(self, plan: StagedPlan, loras: tuple[LoraChoice, ...]) -> tuple[Loaded, RunRecord]:
        """The model with these LoRAs, loaded anew where it has others; the upscaler once a plan needs it."""
        staged = self._staged or len(plan.stages) > 1
        if self._loaded is None or self._record is None or loras != self._loras or staged != self._staged:
            from mrflow_sched.drafts import TextMemory
            from mrflow_sched.engines.diffusers.context_parallel import enable_context_parallel

            self._loaded = self._record = None  # the old weights make room
            self._texts = TextMemory()
            model = replace(self._model, loras=loras)
            job = Job(plan, "")
            loaded = load(model, job, find_upscaler(model))
            if self._shared is not None:
                enable_context_parallel(loaded.engine.network, self._shared.ulysses, self._shared.ring)
            self._loaded, self._record = loaded, make_record(model, job, loaded)
            self._loras, self._staged = loras, staged
        return self._loaded, self._record

    def _sampled(self, task: Task, plan: StagedPlan, loaded: Loaded, cancel: Callable[[], bool]) -> StagedResult:
        engine: Any = self._texts.reading(loaded.engine)
        if task.draft is not None:
            from mrflow_sched.drafts import draft_of, finish, fitted
            from mrflow_sched.images.drafts import read_draft

            with tempfile.TemporaryDirectory(prefix="mrflow-") as folder:
                path = Path(folder, "draft.png")
                path.write_bytes(task.draft)
                found = read_draft(path)
            draft = fitted(draft_of("the draft", found.record, found.image, found.latents), loaded.engine)
            return finish(engine, draft, upscaler=loaded.upscaler, cancel=cancel)
        from mrflow_sched.sampler import sample_staged

        return sample_staged(
            *(engine, plan, task.prompt),
            negative_prompt=task.negative,
            refine_prompt=task.refine_prompt,
            refine_negative_prompt=task.refine_negative,
            batch=task.batch,
            upscaler=loaded.upscaler,
            cancel=cancel,
        )

    def _draft(
        self,
        task: Task,
        plan: StagedPlan,
        loaded: Loaded,
        record: RunRecord,
        cancel: Callable[[], bool],
        began: float,
    ) -> tuple[MadeFile, ...] | None:
        from mrflow_sched.drafts import draft
        from mrflow_sched.images.drafts import draft_bytes

        engine: Any = self._texts.reading(loaded.engine)
        made = draft(
            *(engine, plan, task.prompt),
            seeds=[plan.seed],
            negative_prompt=task.negative,
            refine_prompt=task.refine_prompt,
            refine_negative_prompt=task.refine_negative,
            cancel=cancel,
        )
        if not made:
            if cancel():
                return None
            raise MrFlowError("no draft was made, because of NaN or infinity; try --dtype float32.")
        image = made[0].image
        scores = {score.name: float(score(image[None], [task.prompt])[0]) for score in self._scores}
        data = draft_bytes(image, made[0].latents, record)
        return (MadeFile(0, data, time.perf_counter() - began, scores, warnings=made[0].warnings),)

    def _file(self, result: StagedResult, number: int, record: RunRecord) -> bytes:
        from mrflow_sched.apps.cli.results import holds_alpha
        from mrflow_sched.images.alpha import on_white
        from mrflow_sched.images.files import image_bytes

        own = replace(record, image=number)
        image = result.images[number]
        text = {PARAMETERS: parameters_text(own), KEY: own.to_json()}
        return image_bytes(image if holds_alpha(self._suffix) else on_white(image), text, self._suffix)
