"""`load_upscaler`: a super-resolution model from a file, with nothing in the file run."""

# spandrel ships its types without the marker that says so.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mrflow_sched._runtime.cancel import Cancel
from mrflow_sched._runtime.device import has_bfloat16, resolve_device
from mrflow_sched._runtime.errors import FileError, MissingFileError, MrFlowError, first_line, shown
from mrflow_sched.plan.checks import checked_whole
from mrflow_sched.upscaling.build import SMALL, build, rehearse_build, weights_table
from mrflow_sched.upscaling.contents import check_declared, read_contents, read_tensors
from mrflow_sched.upscaling.lanczos import LanczosUpscaler
from mrflow_sched.upscaling.model import CHANNELS_LAST, ModelUpscaler, checked_tile_side, place
from mrflow_sched.upscaling.pickles import Declared

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")
LANCZOS = "lanczos"
"""The word that stands for Lanczos resampling where a file's path is expected."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Height and width of small images that half precision is tried on. Networks with attention windows keep a mask for
# square images of one size and take another path for all others, so one of them is no square. Where there are only
# convolutions, a few pixels tell as much.
_TRIED = (8, 8), (8, 24)
_TRIED_CONVOLUTIONS = ((4, 4),)
# Bytes of small tensors that are read to tell a model's scale.
_MOST_SMALL = 1 << 20

T = TypeVar("T")


# -------------------------------------------------------------------------------------------------------------- loading


def load_upscaler(
    path: str | os.PathLike[str] | None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    tile: int | None = None,
    overlap: int = 32,
    cancel: Cancel | None = None,
) -> LanczosUpscaler | ModelUpscaler:
    """Load an ESRGAN-type super-resolution model from a file; nothing in the file is executed.

    The first bytes decide what a file is, not its name. Names and shapes are read first, of pickles too without
    running them, and compared with the bytes that the file has; only then are values read. A grey network enlarges the
    luminance, and the colours are enlarged with bicubic resampling.

    Args:
        path: A .pth, .pt, .ckpt or .safetensors file of a model of any scale up to 16; None or "lanczos": Lanczos
            resampling, without a model.
        device: Where it runs: "auto" (CUDA where there is one), or as torch spells it.
        dtype: "auto" is half precision where model and device gain by it, see `choose_dtype`. Half precision is tried
            on small images; where that fails, "auto" is float32.
        tile: Largest side in input pixels that the model is given at once, 16 or more; None: the whole image, and tiles
            only where memory runs out.
        overlap: Input pixels that two neighbouring tiles share, 0 or more.
        cancel: Polled before every tile in every call.

    Returns:
        An upscaler, ready to run.

    Raises:
        MissingFileError: There is no such file.
        MrFlowError: The file is not a super-resolution model of RGB or grey images, the model fails in the dtype that
            was asked for, or another argument is out of range.
    """
    tile, overlap = checked_tile_side(tile), checked_whole(overlap, "overlap", 0)
    if path is None or (isinstance(path, str) and path.lower() == LANCZOS):
        return LanczosUpscaler()
    file = _find(path)
    where = resolve_device(device)
    model = _judged(file, _model_in)
    precision = choose_dtype(where, model.supports_half, model.supports_bfloat16, dtype)
    upscaler = ModelUpscaler(
        file.stem, place(model, where, precision), tile, overlap, cancel, lambda: _judged(file, _model_in)
    )
    sizes = _TRIED_CONVOLUTIONS if str(model.architecture.id) in CHANNELS_LAST else _TRIED
    failure = None if precision == torch.float32 else upscaler.failure(sizes)
    if failure is not None and dtype != "auto":
        raise MrFlowError(
            f"dtype is {str(precision)[6:]!r}, in which the upscaler {_quoted(file.name)} fails ({failure}); "
            "use 'auto' or 'float32'."
        )
    if failure is not None:
        upscaler.to_float32()
    return upscaler


def read_scale(path: str | os.PathLike[str]) -> int:
    """Tell the scale of the model in a file from its names and shapes, whatever the file's size.

    Args:
        path: A file that `load_upscaler` takes.

    Returns:
        Output side over input side.

    Raises:
        MissingFileError: There is no such file.
        MrFlowError: The file is no super-resolution model, or one whose scale cannot be told without its values.
    """
    return _judged(_find(path), _scale_in)


def choose_dtype(
    device: torch.device, supports_half: bool, supports_bfloat16: bool, dtype: str | torch.dtype = "auto"
) -> torch.dtype:
    """The dtype to run a model in: what the model supports and the device computes fast.

    Args:
        device: Where the model runs.
        supports_half: The model works in float16.
        supports_bfloat16: The model works in bfloat16.
        dtype: A name ("float32", "float16", "bfloat16"), a torch dtype, or "auto". On CUDA "auto" is float16, which has
            eight times bfloat16's resolution, else bfloat16. On a CPU it is bfloat16 only where the CPU has the
            instructions (AVX512-BF16 or AMX): an RRDBNet then takes half the time of float32, while float16 takes ten
            times as long. Anywhere else it is float32.

    Returns:
        float32, float16 or bfloat16.

    Raises:
        MrFlowError: The name is unknown, or the model does not support the dtype.
    """
    if dtype == "auto":
        if device.type == "cuda" and supports_half:
            return torch.float16
        return torch.bfloat16 if supports_bfloat16 and has_bfloat16(device) else torch.float32
    check_upscaler_dtype(dtype)
    chosen = _DTYPES[dtype] if isinstance(dtype, str) else dtype
    if (chosen == torch.float16 and not supports_half) or (chosen == torch.bfloat16 and not supports_bfloat16):
        raise MrFlowError(f"dtype is {dtype!r}, which this upscaler does not support; use 'auto' or 'float32'.")
    return chosen


def check_upscaler_dtype(dtype: object, name: str = "dtype") -> None:
    """Refuse a dtype in which no upscaler runs.

    Args:
        dtype: A name, "auto" among them, or a torch dtype.
        name: The argument's name, for the refusal.

    Raises:
        MrFlowError: It is none of those that `choose_dtype` takes.
    """
    if not (isinstance(dtype, (str, torch.dtype)) and dtype in ("auto", *_DTYPES, *_DTYPES.values())):
        raise MrFlowError(f"{name} must be 'auto', 'float32', 'float16' or 'bfloat16', got {shown(repr(dtype))}.")


# ---------------------------------------------------------------------------------------------------------------- files


def _find(path: str | os.PathLike[str]) -> Path:
    """The file at a path that may begin with "~". Raises MrFlowError in one sentence."""
    given: Any = path
    if not isinstance(given, (str, os.PathLike)) or not str(path):
        raise MrFlowError(
            f"upscaler must be the path of an ESRGAN-type file, got {shown(repr(path))}; or None, for Lanczos."
        )
    file = Path(path)
    try:
        file = file.expanduser()
        there, regular = file.exists(), file.is_file()
    except (RuntimeError, ValueError):  # a home folder that nobody has, or a name that no file can have
        there = regular = False
    except OSError as error:
        raise FileError(f"the upscaler file {_quoted(file)} cannot be read ({first_line(error)}).") from error
    if not there:
        raise MissingFileError(f"there is no upscaler file {_quoted(file)}; check the path.")
    if not regular:
        raise MrFlowError(
            f"upscaler is {_quoted(file)}, which is not a file; give an ESRGAN-type .safetensors or .pth file."
        )
    if file.suffix.lower() not in SUFFIXES:
        raise MrFlowError(f"upscaler is {_quoted(file)}, but its name must end in one of {', '.join(SUFFIXES)}.")
    return file


def _quoted(path: object) -> str:
    return shown(repr(str(path)), 300)


def _judged(file: Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of a file. Raises MrFlowError in one sentence that names the file and says what is wrong."""
    try:
        return read(file)
    except MrFlowError as error:
        raise MrFlowError(
            f"the upscaler file {_quoted(file)} cannot be used: {error}; download it again, or give another "
            "ESRGAN-type file."
        ) from error
    except OSError as error:
        raise FileError(f"the upscaler file {_quoted(file)} cannot be read ({first_line(error)}).") from error


def _model_in(file: Path) -> ImageModelDescriptor[torch.nn.Module]:
    """The model in a file, in float32 on the CPU."""
    contents = read_contents(file)
    table = weights_table(contents.table)
    check_declared(contents, table)
    return build(read_tensors(file, contents, table))


def _scale_in(file: Path) -> int:
    contents = read_contents(file)
    table = weights_table(contents.table)
    check_declared(contents, table)
    small: dict[str, Declared] = {}
    left = _MOST_SMALL
    for name, found in table.items():
        if found.numel <= SMALL and found.numel * found.dtype.itemsize <= left:
            small[name] = found
            left -= found.numel * found.dtype.itemsize
    known = read_tensors(file, contents, small)
    shapes = {
        name: known[name] if name in known else torch.empty(found.shape, dtype=found.dtype, device="meta")
        for name, found in table.items()
    }
    model = rehearse_build(shapes)
    if model is None:
        raise MrFlowError("its scale cannot be told without reading it whole")
    return model.scale
