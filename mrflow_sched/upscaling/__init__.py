"""Super-resolution in pixel space, to an exact size."""

from mrflow_sched.upscaling.fit import NO_MODEL, upscale_to
from mrflow_sched.upscaling.lanczos import LanczosUpscaler, resize_lanczos
from mrflow_sched.upscaling.load import choose_dtype, load_upscaler
from mrflow_sched.upscaling.model import ModelUpscaler
from mrflow_sched.upscaling.role import PixelUpscaler, kind_of

__all__ = [
    "NO_MODEL",
    "LanczosUpscaler",
    "ModelUpscaler",
    "PixelUpscaler",
    "choose_dtype",
    "kind_of",
    "load_upscaler",
    "resize_lanczos",
    "upscale_to",
]
