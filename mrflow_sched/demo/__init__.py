"""The embedded model: a FLUX.1 pipeline of nine million weights that draws the scenes of `mrflow_sched.demo.scenes`.

It exists so that the method can be seen, tested and measured anywhere. What it knows is the caption grammar of the
scenes and nothing else: `example_prompts` shows it, docs/demo-model.md describes it. The folder `weights/` loads in
diffusers' `FluxPipeline` as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from mrflow_sched.demo.paths import turbo_path, upscaler_path, weights_path

if TYPE_CHECKING:
    import torch

    from mrflow_sched.engines.diffusers.pipeline import PipelineEngine

__all__ = ["example_prompts", "load_engine", "turbo_path", "upscaler_path", "weights_path"]


def load_engine(
    *, device: str | torch.device = "auto", dtype: str | torch.dtype | Mapping[str, str] = "auto"
) -> PipelineEngine:
    """The embedded model, ready to sample.

    Args:
        device: "auto" (CUDA where there is one), or as torch spells it.
        dtype: As in `PipelineEngine.from_folder`.

    Returns:
        An engine of the family "demo". It warns of words and sentences in a prompt that it does not know, and runs
        plans of the preset "turbo" with its few-step LoRA.

    Raises:
        MrFlowError: The device or the dtype is unknown.
    """
    from mrflow_sched.demo.engine import EmbeddedEngine

    return EmbeddedEngine.from_folder(weights_path(), device=device, dtype=dtype, family="demo")


def example_prompts(kind: Literal["full", "open", "fine"] = "full") -> tuple[str, ...]:
    """Prompts that the embedded model understands.

    Args:
        kind: "full": they say what is to be seen, without fine detail; "open": they leave most of it to the seed;
            "fine": they name detail that only an image of 256 pixels holds.

    Returns:
        A few of that kind. Weights without the words of fine detail do not know the last.
    """
    return {"full": _FULL, "open": _OPEN, "fine": _FINE}[kind]


_FULL = (
    "a red striped circle and a blue star over green hills under an orange sky, the word FLOW",
    "a purple dotted heart and a yellow triangle over grey mountains under a pink sky",
    "the word MAGIC in white letters on a blue wall",
    "many small yellow windows on purple behind a red star",
    "many small orange flowers on green",
    "a smooth pink sky over blue waves with a sun on the left",
)
_OPEN = (
    "a star",
    "the word FLOW",
    "hills under a sky with a moon",
    "a striped circle and a heart over white snow",
    "many small windows behind a ring",
)
_FINE = (
    "a small happy face with red hair and blue eyes and a small sad face with black hair and green eyes on a red wall",
    "the word FLOW in white letters on a blue wall above the tiny word SLOW",
    "a red outlined star over green hills under a blue sky with three birds, the small word BIRD",
    "a thin red grid six apart on white",
    "a surprised face",
)
