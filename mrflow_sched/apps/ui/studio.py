"""What the page is given: a loaded model, and how the command line reads, checks and saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mrflow_sched.upscaling.role import kind_of

if TYPE_CHECKING:
    from torch import Tensor

    from mrflow_sched.images.record import RunRecord
    from mrflow_sched.plan.checks import UpscalerKind
    from mrflow_sched.plan.families import Family
    from mrflow_sched.plan.stages import StagedPlan
    from mrflow_sched.sampler import StagedResult
    from mrflow_sched.sampling.engine import Engine
    from mrflow_sched.upscaling.role import PixelUpscaler


class Start(Protocol):
    """An image file that a run starts from."""

    @property
    def pixels(self) -> Tensor:
        """(3, H, W), float32 in [0, 1]."""
        ...

    def size(self, factor: float) -> tuple[int, int]:
        """The size of the upscaled image.

        Args:
            factor: Side of the final image over that of this one.

        Returns:
            (width, height) in pixels.
        """
        ...

    def check_shape(self, plan: StagedPlan) -> None:
        """Refuse an image of which little is left on the model's grid.

        Args:
            plan: The plan of the run.
        """
        ...

    def notes(self, plan: StagedPlan) -> tuple[str, ...]:
        """The notes of a plan that hold for a run from this image.

        Args:
            plan: The plan of the run.

        Returns:
            Sentences for the user.
        """
        ...


@dataclass(frozen=True)
class Wish:
    """One image to make.

    Attributes:
        plan: All numbers of the run.
        prompt: What the image shows.
        negative: What it should not show, or None.
        start: The image that takes the place of stage 1, or None.
        refine_prompt: The prompt of the stages after the first; None: `prompt`.
        refine_negative: Their negative prompt; None: `negative`.
    """

    plan: StagedPlan
    prompt: str
    negative: str | None = None
    start: Start | None = None
    refine_prompt: str | None = None
    refine_negative: str | None = None


@dataclass(frozen=True)
class Studio:
    """The loaded model, and what the command line does around a run.

    Attributes:
        engine: The model.
        upscaler: What upscales between stages; None means Lanczos.
        family: The model's family.
        title: The model's name for the user.
        embedded: It is the model that ships with the package, whose words are known.
        previews: Whether images may be decoded while stage 1 runs; not where parts wait on the CPU meanwhile.
        folder: Where images are saved; it exists.
        check: Refuses a plan that does not fit into memory.
        check_draft: Refuses the record of a draft, by the name of its file, that another model or upscaler made.
        read_start: Reads an image file to upscale.
        save: Writes the image of a run with its record and returns the file; refuses an image with NaN or infinity.
        refusal: The sentence for the user where an error is a refusal or a limit of the machine; None: it is a fault.
    """

    engine: Engine
    upscaler: PixelUpscaler | None
    family: Family
    title: str
    embedded: bool
    previews: bool
    folder: Path
    check: Callable[[StagedPlan], None]
    check_draft: Callable[[str, RunRecord], None]
    read_start: Callable[[Path], Start]
    save: Callable[[Wish, StagedResult], Path]
    refusal: Callable[[BaseException], str | None]

    @property
    def upscaler_kind(self) -> UpscalerKind:
        """What plans are made for."""
        return kind_of(self.upscaler)

    @property
    def upscaler_name(self) -> str:
        """Name of the upscaler for the user."""
        return "Lanczos" if self.upscaler is None else self.upscaler.name
