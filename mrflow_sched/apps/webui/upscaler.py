"""Our fast super-resolution as upscalers of the host: one entry "<name> (MrFlow)" for each ESRGAN-type file it has.

The host's own path cuts a picture into small tiles and works in 8 bits between repeats. Here the whole frame goes
through the model at once, in half precision where the device profits, and in tiles only where memory runs out. The
weights are on the device while a picture is made and in main memory between pictures, so that nothing has to be
unloaded when a job ends.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched.upscaling.fit import upscale_to
from mrflow_sched.upscaling.load import SUFFIXES, load_upscaler
from mrflow_sched.upscaling.model import ModelUpscaler

__all__ = ["MARK", "FastScaler", "add_fast_upscalers", "pick_automatic", "register", "scale_in_name"]

logger = logging.getLogger("mrflow")

MARK = " (MrFlow)"
"""How the name of each of our upscalers ends."""

HINT = (
    "No x2 super-resolution model was found, so {stand_in}; put an ESRGAN-type x2 file such as RealESRGAN_x2plus.pth "
    "into the WebUI's models/ESRGAN folder and reload the page."
)
_SCALES = (2, 4)
# "4x-UltraSharp", "2xNomos", "RealESRGAN_x2plus", "DAT x4"; not the sizes in "512x512" or "1x2x".
_SCALE = re.compile(r"(?<![0-9])(?:(?P<before>[1-9])x(?![0-9])|(?<![0-9])x(?P<after>[1-9])(?![0-9x]))", re.IGNORECASE)
# Networks that look at the whole picture: minutes where an ESRGAN takes a second. Never chosen for the user.
_HEAVY = re.compile(
    r"(?:DAT|HAT|ATD|DRCT|RGT)(?![a-zA-Z])|(?<![a-z])(?:dat|hat|atd)2?(?![a-z])|(?i:swin|ldsr|scunet|supir)"
)
_REAL_ESRGAN = re.compile(r"r(eal)?[-_ ]?esrgan", re.IGNORECASE)


# ------------------------------------------------------------------------------------------------------------- choosing


def scale_in_name(name: str) -> int | None:
    """The factor an upscaler's name tells ("4x-UltraSharp", "RealESRGAN_x2plus"), None where it tells none."""
    found = _SCALE.search(name)
    return int(found["before"] or found["after"]) if found else None


def pick_automatic(names: Iterable[str]) -> tuple[str, str | None]:
    """The upscaler for "automatic" among a host's `names`, and a sentence for the user where a better one is missing.

    x2 models come first, because a x4 model does four times the work and half of it is thrown away; ours before the
    host's path to the same file; general models before those for drawings; slow transformer networks never. Without
    any model it is the host's Lanczos: "Lanczos", or Forge Neo's "None", which resizes with Lanczos.
    """
    known = list(names)
    usable = [name for name in known if scale_in_name(name) in _SCALES and not _HEAVY.search(name)]
    if not usable:
        plain = next((name for name in ("Lanczos", "None") if name in known), "None")
        return plain, HINT.format(stand_in="the picture is enlarged with Lanczos, which leaves fine detail soft")
    best = min(usable, key=_rank)
    if scale_in_name(best) == 2:
        return best, None
    return best, HINT.format(stand_in="a x4 model is used, which takes four times as long")


def _rank(name: str) -> tuple[bool, bool, bool, bool]:
    drawn = "anime" in name.lower()
    return scale_in_name(name) != 2, not name.endswith(MARK), drawn, not _REAL_ESRGAN.search(name)


# -------------------------------------------------------------------------------------------------------------- running


@dataclass
class FastScaler:
    """What a host calls a scaler: it makes one picture larger with the model file at a path.

    `device` is asked at each picture; `half` False keeps float32 (the host's --no-half). `cancelled` is polled between
    tiles. `make_room` runs before the device is used, `tidy` after. One model is kept, in main memory.
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
        """`img` enlarged by `scale` to exactly the rounded size; the host's entry point.

        A file that cannot be used costs detail, not the job: the picture is then enlarged with Lanczos and one
        sentence says why. A cancelled picture comes back as it was, which is what hosts expect.
        """
        return self._enlarge(img, selected_model, scale)

    def do_upscale(self, img: Image.Image, selected_model: str) -> Image.Image:
        """`img` enlarged by the model's own scale."""
        return self._enlarge(img, selected_model, None)

    def load_model(self, path: str) -> ModelUpscaler:
        """The model at `path`, from main memory where it was the last one used. Raises as `load_upscaler`."""
        return self._load(path, "auto" if self.half else "float32")

    def take_sentences(self) -> list[str]:
        """What went otherwise than expected since the last call, one sentence each."""
        said, self.sentences[:] = list(self.sentences), []
        return said

    def _enlarge(self, img: Image.Image, path: str, scale: float | None) -> Image.Image:
        picture = img.convert("RGB")
        try:
            model = self.load_model(path)
            return self._run(picture, scale or model.scale, model, path)
        except Cancelled:
            return img
        except Exception as error:
            if isinstance(error, (ValueError, OSError, MemoryError)):
                reason = str(error)
            else:
                logger.exception("The upscaler %s failed.", path)
                reason = f"the upscaler {Path(path).stem} failed ({type(error).__name__}: {first_line(error)})."
            self._say(f"{reason[:1].upper()}{reason[1:]} The picture was enlarged with Lanczos instead.")
        size = _size(picture, scale or scale_in_name(Path(path).stem) or 2)
        return picture.resize(size, Image.Resampling.LANCZOS)

    def _run(self, picture: Image.Image, scale: float, model: ModelUpscaler, path: str) -> Image.Image:
        try:
            return self._on_device(picture, scale, model)
        except ValueError:  # half precision overflowed; float32 does not
            if model.dtype == torch.float32:
                raise
        return self._on_device(picture, scale, self._load(path, "float32"))

    def _on_device(self, picture: Image.Image, scale: float, model: ModelUpscaler) -> Image.Image:
        device = self.device()
        width, height = _size(picture, scale)
        self.make_room()
        try:
            _move(model, device)
            pixels = _to_tensor(picture).to(device)
            with torch.inference_mode():
                result = upscale_to(pixels, width, height, model, cancel=self.cancelled, warn=self._say)
            return _to_picture(result)
        finally:
            _move(model, torch.device("cpu"))
            self.tidy()

    def _load(self, path: str, dtype: str) -> ModelUpscaler:
        file = Path(path)
        device = self.device()
        key = (str(file), file.stat().st_mtime_ns if file.exists() else None, device.type, dtype)
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        self._kept = None  # the old one leaves before the new one comes
        self.make_room()
        with torch.inference_mode(False):
            upscaler = load_upscaler(file, device=device, dtype=dtype)
        if not isinstance(upscaler, ModelUpscaler):  # never for a path; says so to the type checker
            raise MrFlowError(f"the upscaler file {path!r} holds no model; give an ESRGAN-type file.")
        self._kept = (key, upscaler)
        return upscaler

    def _say(self, sentence: str) -> None:
        logger.warning("%s", sentence)
        self.sentences.append(sentence)


def _move(model: ModelUpscaler, device: torch.device) -> None:
    # Hosts call from inside inference mode or outside it; weights made in one cannot be moved in the other.
    with torch.inference_mode(False):
        model.model.to(device)


def _size(picture: Image.Image, scale: float) -> tuple[int, int]:
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))


def _to_tensor(picture: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) float32 in [0, 1]."""
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2).float() / 255


def _to_picture(images: torch.Tensor) -> Image.Image:
    """The first of (B, 3, H, W) in [0, 1], rounded to 8 bits."""
    values = images[0].clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu()
    return Image.fromarray(values.numpy(), "RGB")


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
    """How the host frees device memory before a model that its manager does not know; nothing where it has no way."""
    try:
        return import_module("modules_forge.utils").prepare_free_memory
    except (ImportError, AttributeError):
        return lambda: None


def add_fast_upscalers(entries: list[Any], scaler: FastScaler, make_entry: Callable[..., Any]) -> list[str]:
    """Append an entry to the host's list for each x2 or x4 file that it knows or has in its ESRGAN folders.

    `make_entry(name, path, upscaler=, scale=)` is the host's `UpscalerData`. Entries of an earlier call are replaced.
    Returns the names added. It is no subclass of the host's `Upscaler`: A1111 and Forge would build one more of it by
    themselves, Forge Neo none.
    """
    entries[:] = [entry for entry in entries if not str(entry.name).endswith(MARK)]
    added: list[str] = []
    for name, file in _files(entries):
        scale = scale_in_name(name) or scale_in_name(file.stem) or _scale_in_file(file)
        title = f"{name}{MARK}"
        if scale in _SCALES and title not in added:
            scaler.scalers.append(make_entry(title, str(file), upscaler=scaler, scale=scale))
            added.append(title)
    entries.extend(scaler.scalers)
    return added


def _files(entries: Sequence[Any]) -> Iterator[tuple[str, Path]]:
    """Name and path of each ESRGAN-type file: those in the list, then what else lies in the same folders."""
    seen: set[Path] = set()
    folders: dict[Path, None] = {}
    for entry in entries:
        if not _is_esrgan(entry):
            continue
        for folder in (getattr(entry.scaler, "user_path", None), getattr(entry.scaler, "model_path", None)):
            if folder:
                folders[Path(folder)] = None
        file = _local_file(entry)
        if file is not None and file.resolve() not in seen:
            seen.add(file.resolve())
            yield str(entry.name), file
    for folder in folders:
        for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if file.suffix.lower() in SUFFIXES and file.is_file() and file.resolve() not in seen:
                seen.add(file.resolve())
                yield file.stem, file


def _is_esrgan(entry: Any) -> bool:
    """Whether a host's entry belongs to its ESRGAN or Real-ESRGAN scaler, or lies in a folder of that name."""
    owner = f"{getattr(entry.scaler, 'name', '')} {type(entry.scaler).__name__}"
    return "esrgan" in owner.lower() or Path(str(entry.data_path or "")).parent.name.lower() == "esrgan"


def _local_file(entry: Any) -> Path | None:
    """The file behind a host's entry, where it is on this machine already."""
    for path in (getattr(entry, "local_data_path", None), entry.data_path):
        if path and not str(path).startswith("http"):
            file = Path(path)
            if file.suffix.lower() in SUFFIXES and file.is_file():
                return file
    return None


def _scale_in_file(file: Path) -> int | None:
    """The scale of the model in `file`, for names that tell none; None where it is no model that can be used."""
    try:
        return load_upscaler(file, device="cpu", dtype="float32").scale
    except Exception as error:  # somebody else's file: it stays with the host's own upscalers
        logger.debug("%s is left to the host: %s", file, error)
        return None
