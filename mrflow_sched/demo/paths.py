"""Where the files of the embedded model lie."""

from __future__ import annotations

from pathlib import Path

__all__ = ["turbo_path", "upscaler_path", "weights_path"]


def weights_path() -> Path:
    """The folder of the embedded model.

    Returns:
        A diffusers `FluxPipeline` folder within the package.
    """
    return Path(__file__).parent / "weights"


def turbo_path() -> Path:
    """The file of the embedded model's few-step LoRA, which the preset "turbo" puts on in stage 1.

    Returns:
        A LoRA of a `FluxPipeline` in safetensors within the package.
    """
    return weights_path() / "turbo" / "lora.safetensors"


def upscaler_path() -> Path:
    """The file of the embedded x2 super-resolution network.

    Returns:
        An ESRGAN in safetensors within the package.
    """
    return weights_path() / "upscaler" / "x2.safetensors"
