"""`load_upscaler`: a super-resolution model from a file, with nothing in the file run."""

# spandrel ships its types without the marker that says so.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import os
import pickle
import re
import tarfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from mrflow_sched._runtime.device import has_bfloat16, resolve_device
from mrflow_sched._runtime.errors import MissingFileError, MrFlowError, first_line
from mrflow_sched._runtime.torchvision_ops import ensure_ops

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor, ModelBase
from mrflow_sched._runtime.cancel import Cancel
from mrflow_sched.upscaling.lanczos import LanczosUpscaler
from mrflow_sched.upscaling.model import CHANNELS_LAST, ModelUpscaler, check_tile_and_overlap

SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# A name in a file may claim any layer number, and the layers up to it would be built; no real model comes near this.
_MAX_LAYER = 256
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


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

    A .safetensors file holds no code, and pickles are read with torch's weights-only reader.

    Args:
        path: A .pth, .pt, .ckpt or .safetensors file of a model of any scale; None: Lanczos resampling, without a
            model.
        device: Where it runs: "auto" (CUDA where there is one), or as torch spells it.
        dtype: "auto" is half precision where model and device gain by it, see `choose_dtype`.
        tile: Largest side in input pixels that the model is given at once, 16 or more; None: the whole image, and tiles
            only where memory runs out.
        overlap: Input pixels that two neighbouring tiles share, 0 or more.
        cancel: Polled before every tile in every call.

    Returns:
        An upscaler, ready to run.

    Raises:
        MissingFileError: There is no such file.
        MrFlowError: The file is not a super-resolution model of RGB images, or another argument is out of range.
    """
    check_tile_and_overlap(tile, overlap)
    if path is None:
        return LanczosUpscaler()
    file = Path(path).expanduser()
    model = _build(file, _read_weights(file))
    where = resolve_device(device)
    precision = choose_dtype(where, model.supports_half, model.supports_bfloat16, dtype)
    model.to(where, precision).eval()
    if str(model.architecture.id) in CHANNELS_LAST:
        model.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue, reportUnknownMemberType]
    model.model.requires_grad_(False)
    return ModelUpscaler(file.stem, model, tile, overlap, cancel)


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
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in _DTYPES.values():
        raise MrFlowError(f"dtype must be 'auto', 'float32', 'float16' or 'bfloat16', got {dtype!r}.")
    if (chosen == torch.float16 and not supports_half) or (chosen == torch.bfloat16 and not supports_bfloat16):
        raise MrFlowError(f"dtype is {dtype!r}, which this upscaler does not support; use 'auto' or 'float32'.")
    return chosen


def _read_weights(file: Path) -> dict[str, Any]:
    """The tensors in `file`, on the CPU. Raises MrFlowError in one sentence that names the file."""
    if not file.exists():
        raise MissingFileError(f"there is no upscaler file {str(file)!r}; check the path.")
    if not file.is_file():
        raise MrFlowError(
            f"upscaler is {str(file)!r}, which is not a file; give an ESRGAN-type .safetensors or .pth file."
        )
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise MrFlowError(f"upscaler is {str(file)!r}, but its name must end in one of {', '.join(SUFFIXES)}.")
    try:
        weights = _read_safetensors(file) if suffix == ".safetensors" else _read_pickle(file)
    except Exception as error:
        raise MrFlowError(
            f"the upscaler file {str(file)!r} cannot be read as {suffix} weights ({first_line(error)}); it is empty, "
            "cut short, of another format, or holds more than weights; download it again, as .safetensors if you can."
        ) from error
    if not isinstance(weights, dict):
        raise MrFlowError(f"the upscaler file {str(file)!r} holds no table of weights; give an ESRGAN-type file.")
    return cast("dict[str, Any]", weights)


def _read_safetensors(file: Path) -> object:
    from safetensors import torch as reader

    return reader.load_file(file)  # pyright: ignore[reportUnknownMemberType]


def _read_pickle(file: Path) -> object:
    # Before torch 2.6 the weights-only reader could be led around its checks through the tar format of torch 0.1
    # (CVE-2025-32434), and no upscaler is that old.
    if tarfile.is_tarfile(file):
        raise MrFlowError("it is a tar archive")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own sentence advises to read the file without the check; that advice must not reach a user.
        asked = _REFUSED.search(str(error))
        reason = f"it asks to run {asked.group(1)}, which was refused" if asked else "it holds no table of weights"
        raise MrFlowError(reason) from error
    except LookupError as error:  # bytes that are no pickle: the reader looks up what was never stored
        raise MrFlowError("it holds no table of weights") from error


def _build(file: Path, weights: dict[str, Any]) -> ImageModelDescriptor[torch.nn.Module]:
    """The model that fits `weights`. Raises MrFlowError in one sentence that names the file."""
    ensure_ops()
    import spandrel

    try:
        table = spandrel.canonicalize_state_dict(weights)
        _check_layers(table)
        _rehearse(table)
        model = spandrel.ModelLoader("cpu").load_from_state_dict(table)
    except spandrel.UnsupportedModelError as error:
        raise MrFlowError(
            f"the upscaler file {str(file)!r} holds weights of no known super-resolution model; "
            "give an ESRGAN-type file."
        ) from error
    except Exception as error:
        raise MrFlowError(
            f"the upscaler file {str(file)!r} looks like a model but its weights do not fit together "
            f"({first_line(error)}); download it again, or give another ESRGAN-type file."
        ) from error
    return _checked_model(file, model)


def _checked_model(file: Path, model: ModelBase[torch.nn.Module]) -> ImageModelDescriptor[torch.nn.Module]:
    import spandrel

    if not isinstance(model, spandrel.ImageModelDescriptor) or model.purpose not in ("SR", "Restoration"):
        raise MrFlowError(
            f"the upscaler file {str(file)!r} is a {model.architecture.name} model for {model.purpose}, which does not "
            "upscale whole images; give an ESRGAN-type file."
        )
    if (model.input_channels, model.output_channels) != (3, 3):
        raise MrFlowError(
            f"the upscaler file {str(file)!r} takes {model.input_channels} and returns {model.output_channels} "
            "channels; give one for RGB images."
        )
    return model


def _check_layers(table: Mapping[Any, Any]) -> None:
    """Refuse layer numbers that no file with this many weights can mean: every layer up to them would be built."""
    most = min(2 * len(table), _MAX_LAYER)
    for name in table:
        if not isinstance(name, str) or any(len(number) > 9 or int(number) > most for number in _LAYER.findall(name)):
            raise MrFlowError(f"the entry {str(name)[:60]!r} names no layer of a real model")


def _rehearse(table: Mapping[str, Any]) -> None:
    """Build the model without memory first, so that shapes which do not fit are found before gigabytes are allocated.

    The builder sizes every layer by a few tensors of the file. Raises what `load_state_dict` raises for weights that do
    not fit. A model that cannot be built without memory is left to the real attempt.
    """
    import spandrel

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # torch warns, once per weight, that copying to the meta device does nothing
        try:
            spandrel.MAIN_REGISTRY.load(dict(table))
        except Exception as error:
            if isinstance(error, spandrel.UnsupportedModelError) or "loading state_dict" in str(error):
                raise
