"""Our fast super-resolution as upscalers of the host: one entry "<name> (MrFlow)" for each ESRGAN-type file it has.

The host's own code cuts an image into small tiles and works in 8 bits between repeats. Here the whole image goes
through the model at once, in half precision where that is faster, and in tiles only where memory runs out. The weights
are on the device while an image is upscaled and in main memory otherwise, so that nothing has to be unloaded when a
job ends.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched._runtime.errors import MrFlowError, first_line, shown
from mrflow_sched.images.alpha import split_alpha
from mrflow_sched.images.convert import to_pil
from mrflow_sched.images.pixels import read_pixels
from mrflow_sched.upscaling.fit import upscale_to
from mrflow_sched.upscaling.load import SUFFIXES, load_upscaler, read_scale
from mrflow_sched.upscaling.model import ModelUpscaler

__all__ = [
    "MARK",
    "FastScaler",
    "add_fast_upscalers",
    "is_interpolation",
    "pick_automatic",
    "register",
    "scale_in_name",
]

logger = logging.getLogger("mrflow")

MARK = " (MrFlow)"
"""The end of the name of each of our upscalers."""

HINT = (
    "No x2 super-resolution model was found, so {stand_in}; put an ESRGAN-type x2 file such as RealESRGAN_x2plus.pth "
    "into the WebUI's models/ESRGAN folder and use Reload UI in the settings."
)
_INTERPOLATION = re.compile(r"none|lanczos|nearest|bicubic|bilinear|latent( \(.*\))?", re.IGNORECASE)
_SCALES = (2, 4)
# "4x-UltraSharp", "2xNomos", "RealESRGAN_x2plus", "DAT x4"; not the sizes in "512x512" or "1x2x".
_SCALE = re.compile(r"(?<![0-9])(?:(?P<before>[1-9])x(?![0-9])|(?<![0-9])x(?P<after>[1-9])(?![0-9x]))", re.IGNORECASE)
# Networks that look at the whole image: minutes where an ESRGAN takes a second. Never chosen for the user.
_HEAVY = re.compile(
    r"(?:DAT|HAT|ATD|DRCT|RGT)(?![a-zA-Z])|(?<![a-z])(?:dat|hat|atd)2?(?![a-z])|(?i:swin|ldsr|scunet|supir)"
)
_REAL_ESRGAN = re.compile(r"r(eal)?[-_ ]?esrgan", re.IGNORECASE)


# ------------------------------------------------------------------------------------------------------------- choosing


def scale_in_name(name: str) -> int | None:
    """Read the scale from an upscaler's name.

    Args:
        name: A name such as "4x-UltraSharp" or "RealESRGAN_x2plus".

    Returns:
        The scale, 1 to 9; None where the name tells none.
    """
    found = _SCALE.search(name)
    return int(found["before"] or found["after"]) if found else None


def is_interpolation(name: str) -> bool:
    """Tell by its name whether an upscaler of the host only resizes, without a network.

    Args:
        name: A name of the host's list, or one of its latent modes ("Latent (bicubic antialiased)").

    Returns:
        True for "None", "Lanczos", "Nearest", "Bicubic" and the latent modes.
    """
    return _INTERPOLATION.fullmatch(name) is not None


def pick_automatic(names: Iterable[str]) -> tuple[str, str | None]:
    """Choose the upscaler for "automatic".

    x2 models come first, because an x4 model does four times the work for pixels that are mostly thrown away; ours
    before the host's own entry for the same file; general models before those for drawings; slow transformer networks
    never. Without any model it is the host's Lanczos: "Lanczos", or Forge Neo's "None", which resizes with Lanczos.

    Args:
        names: Names of the host's upscalers.

    Returns:
        The chosen name, and a sentence for the user where no x2 model was found, else None.
    """
    known = list(names)
    usable = [name for name in known if scale_in_name(name) in _SCALES and not _HEAVY.search(name)]
    if not usable:
        plain = next((name for name in ("Lanczos", "None") if name in known), "None")
        return plain, HINT.format(stand_in="the image is upscaled with Lanczos, which leaves fine detail soft")
    best = min(usable, key=_rank)
    if scale_in_name(best) == 2:
        return best, None
    return best, HINT.format(stand_in="an x4 model is used, which takes four times as long")


def _rank(name: str) -> tuple[bool, bool, bool, bool]:
    drawn = "anime" in name.lower()
    return scale_in_name(name) != 2, not name.endswith(MARK), drawn, not _REAL_ESRGAN.search(name)


# -------------------------------------------------------------------------------------------------------------- running


@dataclass
class FastScaler:
    """What a host calls a scaler: it upscales one image with the model file at a path.

    The last model is kept in main memory.

    Attributes:
        device: Returns the device to run on; called for each image.
        cancelled: Returns whether the user interrupted; called between tiles.
        make_room: Frees device memory; called before the device is used.
        tidy: Called after the device was used.
        half: Use half precision where that is faster; False keeps float32 (the host's --no-half).
        name: Name of the scaler.
        model_name: Read by hosts; always None.
        model_path: Read by hosts; always None.
        model_url: Read by hosts; always None.
        scalers: Our entries of the host's list.
        sentences: What `take_sentences` will return.
    """

    device: Callable[[], torch.device]
    cancelled: Callable[[], bool]
    make_room: Callable[[], object]
    tidy: Callable[[], object]
    half: bool = True
    name: str = "MrFlow"
    model_name: str | None = None  # hosts list these of every scaler
    model_path: str | None = None
    model_url: str | None = None
    scalers: list[Any] = field(default_factory=list[Any])
    sentences: list[str] = field(default_factory=list[str])
    _kept: tuple[tuple[Any, ...], ModelUpscaler] | None = field(default=None, repr=False)

    def upscale(self, img: Image.Image, scale: float, selected_model: str) -> Image.Image:
        """Upscale an image by a scale; the host's entry point.

        A file that cannot be used costs detail, not the job: the image is then upscaled with Lanczos, and
        `take_sentences` says why.

        Args:
            img: The image, of any mode; its transparency is dropped.
            scale: Output side over input side; 0 takes the model's own.
            selected_model: Path of the model's file.

        Returns:
            An RGB image of exactly the rounded size; `img` itself where the user interrupted, as hosts expect.
        """
        return self._upscale(img, selected_model, scale)

    def do_upscale(self, img: Image.Image, selected_model: str) -> Image.Image:
        """Upscale an image by the model's own scale.

        Args:
            img: The image, of any mode; its transparency is dropped.
            selected_model: Path of the model's file.

        Returns:
            As `upscale`.
        """
        return self._upscale(img, selected_model, None)

    def load_model(self, path: str) -> ModelUpscaler:
        """Load a model, from main memory where it was the last one used.

        Args:
            path: Its file.

        Returns:
            The model, in half precision where `half` is set and the device and the model profit, else in float32.
            Where half precision fails later, it stays in float32.

        Raises:
            MrFlowError: The file holds no model that can be used.
        """
        file, device, dtype = Path(path), self.device(), "auto" if self.half else "float32"
        key = (str(file), file.stat().st_mtime_ns if file.exists() else None, device.type, dtype)
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        self._kept = None  # the old one leaves before the new one comes
        self.make_room()
        with torch.inference_mode(False):
            upscaler = load_upscaler(file, device=device, dtype=dtype)
        if not isinstance(upscaler, ModelUpscaler):  # never for a path; for the type checker
            raise MrFlowError(f"the upscaler file {path!r} holds no model; give an ESRGAN-type file.")
        self._kept = (key, upscaler)
        return upscaler

    def take_sentences(self) -> list[str]:
        """Return and forget what the user should know since the last call.

        Returns:
            Sentences, such as that tiles were needed or that a file could not be used.
        """
        said, self.sentences[:] = list(self.sentences), []
        return said

    def _upscale(self, img: Image.Image, path: str, scale: float | None) -> Image.Image:
        pixels = split_alpha(read_pixels(img, self._say)[None])[0]
        try:
            model = self.load_model(path)
            return self._on_device(pixels, scale or model.scale, model)
        except Cancelled:
            return img
        except Exception as error:
            if isinstance(error, (MrFlowError, OSError, MemoryError)):
                reason = str(error)
            else:
                logger.exception("The upscaler %s failed.", path)
                reason = f"the upscaler {shown(Path(path).stem)} failed ({type(error).__name__}: {first_line(error)})."
            self._say(f"{reason[:1].upper()}{reason[1:]} The image was upscaled with Lanczos instead.")
        size = _size(pixels, scale or scale_in_name(Path(path).stem) or 2)
        return to_pil(pixels[0]).resize(size, Image.Resampling.LANCZOS)

    def _on_device(self, pixels: Tensor, scale: float, model: ModelUpscaler) -> Image.Image:
        device = self.device()
        width, height = _size(pixels, scale)
        self.make_room()
        try:
            _move(model, device)
            with torch.inference_mode():
                result = upscale_to(pixels.to(device), width, height, model, cancel=self.cancelled, warn=self._say)
            return to_pil(result[0])
        finally:
            _move(model, torch.device("cpu"))
            self.tidy()

    def _say(self, sentence: str) -> None:
        logger.warning("%s", sentence)
        self.sentences.append(sentence)


def _move(model: ModelUpscaler, device: torch.device) -> None:
    # Hosts call from inside inference mode or outside it; weights made in one cannot be moved in the other.
    with torch.inference_mode(False):
        model.model.to(device)


def _size(pixels: Tensor, scale: float) -> tuple[int, int]:
    return max(1, round(pixels.shape[-1] * scale)), max(1, round(pixels.shape[-2] * scale))


# ---------------------------------------------------------------------------------------------------------- registering


def register() -> None:
    """Add our upscalers to the running host's list; a hook for `on_before_ui`, safe to run again after a reload."""
    shared = import_module("modules.shared")
    devices = import_module("modules.devices")
    entry = import_module("modules.upscaler").UpscalerData
    scaler = FastScaler(
        device=lambda: getattr(devices, "device_esrgan", None) or devices.device,
        cancelled=lambda: bool(shared.state.interrupted),
        make_room=_make_room(),
        tidy=devices.torch_gc,
        half=not getattr(shared.cmd_opts, "no_half", False),
    )
    add_fast_upscalers(shared.sd_upscalers, scaler, entry)


def _make_room() -> Callable[[], object]:
    """Return the host's function that frees device memory for models it does not manage, or one that does nothing."""
    try:
        return import_module("modules_forge.utils").prepare_free_memory
    except (ImportError, AttributeError):
        return lambda: None


def add_fast_upscalers(entries: list[Any], scaler: FastScaler, make_entry: Callable[..., Any]) -> list[str]:
    """Add an entry to the host's list for each x2 or x4 file that it knows or has in its ESRGAN folders.

    No file is read whole. One that cannot be used is left out, and the log says why.

    Entries of an earlier call are replaced. `scaler` is no subclass of the host's `Upscaler`: A1111 and Forge would
    build one more of it by themselves, Forge Neo none.

    Args:
        entries: The host's list, which is changed.
        scaler: What runs the models; our entries are also listed in its `scalers`.
        make_entry: The host's `UpscalerData`, called as `make_entry(name, path, upscaler=scaler, scale=scale)`.

    Returns:
        The names added.
    """
    entries[:] = [entry for entry in entries if not str(entry.name).endswith(MARK)]
    added: dict[str, Path] = {}
    for name, file in _files(entries):
        title = f"{name}{MARK}"
        try:
            scale = scale_in_name(name) or scale_in_name(file.stem) or read_scale(file)
            reason = f"it is x{scale}, and x2 and x4 are listed" if scale not in _SCALES else None
        except Exception as error:  # somebody else's file must not cost the start: it stays with the host
            scale, reason = 0, str(error)
        if title in added:
            reason = f"its name is that of {added[title]}"
        if reason is not None:
            logger.warning("No (MrFlow) upscaler for %s: %s", shown(file, 200), shown(reason, 400))
            continue
        scaler.scalers.append(make_entry(title, str(file), upscaler=scaler, scale=scale))
        added[title] = file
    entries.extend(scaler.scalers)
    return list(added)


def _files(entries: Sequence[Any]) -> Iterator[tuple[str, Path]]:
    """Yield name and path of each ESRGAN-type file: those in the list, then the others in the same folders."""
    seen: set[str] = set()
    folders: dict[Path, None] = {}
    for entry in entries:
        if not _is_esrgan(entry):
            continue
        for folder in (getattr(entry.scaler, "user_path", None), getattr(entry.scaler, "model_path", None)):
            if folder:
                folders[Path(folder)] = None
        file = _local_file(entry)
        if file is not None and os.path.realpath(file) not in seen:
            seen.add(os.path.realpath(file))
            yield str(entry.name), file
    for folder in folders:
        for file in _model_files(folder):
            if os.path.realpath(file) not in seen:
                seen.add(os.path.realpath(file))
                yield file.stem, file


def _model_files(folder: Path) -> list[Path]:
    """Return the files of a folder and below with the name of a model, sorted; what cannot be looked into is left."""
    found = [Path(place) / name for place, _, names in os.walk(folder) for name in names]
    return sorted(file for file in found if file.suffix.lower() in SUFFIXES and os.path.isfile(file))


def _is_esrgan(entry: Any) -> bool:
    """Return whether a host's entry belongs to its ESRGAN or Real-ESRGAN scaler, or lies in a folder of that name."""
    owner = f"{getattr(entry.scaler, 'name', '')} {type(entry.scaler).__name__}"
    return "esrgan" in owner.lower() or Path(str(entry.data_path or "")).parent.name.lower() == "esrgan"


def _local_file(entry: Any) -> Path | None:
    """Return the file of a host's entry; None where it is not on this machine yet."""
    for path in (getattr(entry, "local_data_path", None), entry.data_path):
        if path and not str(path).startswith("http"):
            file = Path(path)
            if file.suffix.lower() in SUFFIXES and os.path.isfile(file):
                return file
    return None
