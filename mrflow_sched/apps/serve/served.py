"""The model that is served, and how it makes one image of a request."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched._runtime.memory import free_memory, is_memory_error
from mrflow_sched.apps.serve.limits import Refused
from mrflow_sched.images.convert import picture_of, to_8_bit
from mrflow_sched.images.formats import encode
from mrflow_sched.images.parameters import PARAMETERS, parameters_text
from mrflow_sched.images.record import KEY
from mrflow_sched.sampler import sample_staged
from mrflow_sched.upscaling.role import kind_of

if TYPE_CHECKING:
    from mrflow_sched.images.record import RunRecord
    from mrflow_sched.plan.checks import UpscalerKind
    from mrflow_sched.plan.families import Family
    from mrflow_sched.plan.stages import StagedPlan
    from mrflow_sched.sampler import StagedResult
    from mrflow_sched.sampling.engine import Engine
    from mrflow_sched.sampling.progress import Progress
    from mrflow_sched.upscaling.role import PixelUpscaler

__all__ = [
    "FAULT",
    "Format",
    "ImageRequest",
    "Made",
    "Offer",
    "Offered",
    "Served",
    "failure_elsewhere",
    "failure_of",
    "make_image",
]

Format = Literal["b64_json", "url"]

FAULT = "this is a fault of the server, or of a library or model that it uses; its terminal shows what went wrong."
"""What is told of a fault."""


@dataclass(frozen=True)
class ImageRequest:
    """Images to make, checked.

    Attributes:
        plan: All numbers of the first image's run; each further one has the next seed.
        prompt: What they show.
        negative: What they should not show, or None.
        refine_prompt: The prompt of the stages after the first; None: `prompt`.
        refine_negative: Their negative prompt; None: `negative`.
        count: How many.
        form: How an answer holds them: in itself, or as links.
    """

    plan: StagedPlan
    prompt: str
    negative: str | None = None
    refine_prompt: str | None = None
    refine_negative: str | None = None
    count: int = 1
    form: Format = "b64_json"


@dataclass(frozen=True)
class Made:
    """An image that was made.

    Attributes:
        png: The file, with its record.
        seed: Its own seed.
        notes: Sentences for the user.
    """

    png: bytes
    seed: int
    notes: tuple[str, ...]


class Offered(Protocol):
    """What must be known of a model to read requests; it may be loaded elsewhere."""

    @property
    def family(self) -> Family:
        """The model's family."""
        ...

    @property
    def name(self) -> str:
        """The model's name for clients."""
        ...

    @property
    def upscaler_kind(self) -> UpscalerKind:
        """What plans are made for."""
        ...

    @property
    def check(self) -> Callable[[StagedPlan], None]:
        """Refuses a plan that cannot be run."""
        ...


@dataclass(frozen=True)
class Offer:
    """A model that is loaded elsewhere.

    Attributes:
        family: As in `Offered`, and so are the others.
        name: Likewise.
        upscaler_kind: Likewise.
        check: Likewise.
    """

    family: Family
    name: str
    upscaler_kind: UpscalerKind
    check: Callable[[StagedPlan], None]


@dataclass(frozen=True)
class Served:
    """A loaded model, and what the command line knows of it.

    Attributes:
        engine: The model.
        upscaler: What upscales between stages; None means Lanczos.
        family: The model's family.
        name: The model's name for clients.
        check: Refuses a plan that does not fit into memory, or needs a package that is missing.
        record: Makes the record of an image from its request and its plan.
        refusal: The sentence for the user where an error is a refusal or a limit of the machine; None: it is a fault.
    """

    engine: Engine
    upscaler: PixelUpscaler | None
    family: Family
    name: str
    check: Callable[[StagedPlan], None]
    record: Callable[[ImageRequest, StagedPlan], RunRecord]
    refusal: Callable[[BaseException], str | None]

    @property
    def upscaler_kind(self) -> UpscalerKind:
        """What plans are made for."""
        return kind_of(self.upscaler)


def make_image(
    served: Served,
    asked: ImageRequest,
    index: int,
    tell: Callable[[Progress], object],
    cancel: Callable[[], bool],
) -> Made:
    """Make one image of a request: that of a run by itself, whatever else the request asks for.

    Args:
        served: The model.
        asked: The request.
        index: Which image, from 0.
        tell: Is told how far it is.
        cancel: Asked between parts and steps; True ends the run.

    Returns:
        The image.

    Raises:
        Cancelled: `cancel` answered True.
        Refused: The image has NaN or infinity, or memory ran out before it was finished.
    """
    plan = replace(asked.plan, seed=asked.plan.seed + index)
    result = sample_staged(
        served.engine,
        plan,
        asked.prompt,
        negative_prompt=asked.negative,
        refine_prompt=asked.refine_prompt,
        refine_negative_prompt=asked.refine_negative,
        upscaler=None if len(plan.stages) == 1 else served.upscaler,
        callback=tell,
        cancel=cancel,
    )
    if result.cancelled:
        raise Cancelled
    _check_whole(result, plan)
    record = served.record(asked, plan)
    texts = {PARAMETERS: parameters_text(record), KEY: record.to_json()}
    png = encode(picture_of(to_8_bit(result.images[0])), ".png", texts)
    return Made(png, plan.seed, tuple(dict.fromkeys((*result.notes, *result.warnings))))


def _check_whole(result: StagedResult, plan: StagedPlan) -> None:
    """Refuse an image that is not what was asked for: another size, or no image at all."""
    said = " ".join(result.warnings)
    if result.faults[0] is not None or not bool(result.images.isfinite().all()):
        raise Refused(500, "nan", f"the image of seed {plan.seed} was not finished: {said or 'it contains NaN.'}")
    if result.unfinished:
        raise Refused(422, "out_of_memory", f"the image of seed {plan.seed} was not finished: {said}")


def failure_of(served: Served, error: BaseException) -> Refused:
    """What is told of a job that an error ended; of a fault, the terminal gets the traceback.

    Args:
        served: The model; memory that its device keeps for reuse is given back.
        error: What was raised.

    Returns:
        The answer.
    """
    if isinstance(error, Refused):
        return error
    sentence = served.refusal(error)
    if is_memory_error(error):
        free_memory(torch.device(served.engine.device))
        return Refused(422, "out_of_memory", sentence or "there is not enough memory for this image.")
    return failure_elsewhere(error) if sentence is None else Refused(422, "refused", sentence)


def failure_elsewhere(error: BaseException) -> Refused:
    """What is told of a job that an error ended where no model is loaded: all but a refusal is a fault.

    Args:
        error: What was raised.

    Returns:
        The answer.
    """
    if isinstance(error, Refused):
        return error
    traceback.print_exception(error, file=sys.stderr)
    return Refused(500, "fault", FAULT)
