"""The names that `MrFlow` and its call take, with an answer to those that they do not take; and its upscaler."""

from __future__ import annotations

import difflib
import os
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from mrflow_sched._runtime.errors import MrFlowError, shown
from mrflow_sched.plan.checks import UpscalerKind
from mrflow_sched.plan.options import CallOptions
from mrflow_sched.upscaling.load import LANCZOS, check_upscaler_dtype, load_upscaler, read_scale
from mrflow_sched.upscaling.model import ModelUpscaler, as_upscaler, checked_tile_side
from mrflow_sched.upscaling.role import kind_of

if TYPE_CHECKING:
    from mrflow_sched.upscaling.role import PixelUpscaler

__all__ = ["DECIDED", "PLAN_OPTIONS", "FileUpscaler", "unknown_argument", "unknown_option", "upscaler_of"]

PLAN_OPTIONS = frozenset(CallOptions.__annotations__)
"""Options of a plan that the call takes by these names. A pipeline's `sigmas` are shifted, a plan's are not: neither is
accepted, so that neither is mistaken for the other."""
DECIDED = {
    "num_inference_steps": "low_steps and refine_steps",
    "sigmas": "low_steps, refine_steps and sigma",
    "timesteps": "low_steps, refine_steps and sigma",
    "denoising_end": "low_steps and refine_steps",
    "denoising_start": "image with strength to start from an image",
    "intermediate_timesteps": "low_steps, refine_steps and sigma",
    "max_timesteps": "low_steps, refine_steps and sigma",
    "original_inference_steps": "low_steps and refine_steps",
    "latents": "seed, or image with strength to start from an image",
    "return_dict": "the images of what the call returns",
    "max_area": "width and height",
    "num_frames": "the pipeline itself for videos: MrFlow makes one frame, as a picture",
    "num_videos_per_prompt": "num_images_per_prompt",
    "native": "the pipeline itself for native sampling",
    "steps": "low_steps and refine_steps",
    "upscaler_kind": "MrFlow(pipe, upscaler=...)",
}
"""Arguments of a pipeline's call, or options of a plan, that the call decides; and what to use in their place."""
# What users of diffusers write, and what it is called here.
_HABITS = {
    "torch_dtype": "say dtype",
    "device_map": "say device, or offload=True",
    "variant": "leave it out, as the folder's own files are read",
    "use_safetensors": "leave it out, as nothing else is read",
    "local_files_only": "leave it out, as nothing is downloaded",
    "trust_remote_code": "leave it out, as no code of a model is run",
}


def unknown_option(name: str, known: Set[str]) -> str:
    """The refusal of a keyword that `MrFlow.from_pretrained` does not take.

    Args:
        name: The keyword.
        known: Those that it takes.

    Returns:
        One sentence.
    """
    near = difflib.get_close_matches(name, sorted(known), n=1)
    advice = _HABITS.get(name) or (f"did you mean {near[0]}" if near else f"it takes {', '.join(sorted(known))}")
    return f"{shown(name)} is no option of MrFlow.from_pretrained; {advice}."


def unknown_argument(name: str, own: Set[str], asked: Set[str], pipe: str) -> str:
    """The refusal of a name that neither a plan nor a pipeline's call knows.

    Args:
        name: The name.
        own: Options of `MrFlow` itself.
        asked: Arguments of its call and of the pipeline's.
        pipe: The pipeline's class.

    Returns:
        One sentence.
    """
    if name in own:
        return f"{name} is an option of MrFlow itself, not of its call; say MrFlow(pipe, {name}=...)."
    near = difflib.get_close_matches(name, sorted({*PLAN_OPTIONS, *asked} - set(DECIDED)), n=3)
    hint = f"did you mean {' or '.join(near)}" if near else f"a plan's options are {', '.join(sorted(PLAN_OPTIONS))}"
    return f"{shown(name)} is neither a plan option nor an argument of {pipe}; {hint}."


@dataclass
class FileUpscaler:
    """The upscaler in a file, read where it is first to run, and anew where the pipeline has moved.

    Attributes:
        file: Its path, or "lanczos".
        dtype: As in `load_upscaler`.
        tile: Likewise.
        loaded: What was read last.
    """

    file: str | os.PathLike[str]
    dtype: str | torch.dtype
    tile: int | None
    loaded: PixelUpscaler | None = None

    @property
    def name(self) -> str:
        """Its name in messages."""
        return Path(self.file).stem if self.loaded is None else self.loaded.name

    @property
    def kind(self) -> UpscalerKind:
        """Its kind, told without loading it; a file that will be refused counts as a network."""
        if self.loaded is not None:
            return kind_of(self.loaded)
        if self.file == LANCZOS:
            return "interpolation"
        try:
            return "interpolation" if read_scale(self.file) == 1 else "network"
        except MrFlowError:
            return "network"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "loaded": None}  # read again from its file in another process

    def on(self, device: torch.device) -> PixelUpscaler:
        """The upscaler on a device.

        Args:
            device: Where it is to run.

        Returns:
            What `load_upscaler` makes of the file.
        """
        moved = isinstance(self.loaded, ModelUpscaler) and self.loaded.device.type != device.type
        if self.loaded is None or moved:
            self.loaded = load_upscaler(self.file, device=device, dtype=self.dtype, tile=self.tile)
        return self.loaded


def upscaler_of(upscaler: Any, dtype: Any, tile: Any) -> FileUpscaler | PixelUpscaler | None:
    """What was given as an upscaler, checked; a file is not read yet.

    Args:
        upscaler: A path, an upscaler, or None.
        dtype: For a file: as in `load_upscaler`.
        tile: Likewise.

    Returns:
        A `FileUpscaler`, the upscaler, or None.

    Raises:
        MrFlowError: It is none, or `dtype` or `tile` is not allowed.
    """
    if isinstance(upscaler, FileUpscaler):
        return upscaler
    check_upscaler_dtype(dtype, "upscaler_dtype")
    tile = checked_tile_side(tile, "upscaler_tile")
    if isinstance(upscaler, (str, os.PathLike)):
        return FileUpscaler(cast("str | os.PathLike[str]", upscaler), dtype, tile)
    if dtype != "auto" or tile is not None:
        raise MrFlowError(
            "upscaler_dtype and upscaler_tile are for an upscaler that is loaded from a file; give its path as "
            "upscaler, or leave them out."
        )
    return as_upscaler(upscaler)
