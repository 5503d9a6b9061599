"""How well an image fits its text, by a model of a local folder: the score "clip:FOLDER".

CLIP, SigLIP, and preference models that are built as CLIP (PickScore, HPS); and BLIP, which reads image and text
together, as ImageReward does. The folder is judged as a part of a model is before anything reads it: no code of it
runs, only safetensors are read, and nothing is downloaded.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.device import resolve_device
from mrflow_sched._runtime.errors import MissingFileError, MrFlowError, first_line, quoted, shown
from mrflow_sched._runtime.memory import is_memory_error
from mrflow_sched.engines.diffusers.files import (
    TRANSFORMERS_STEM,
    check_part,
    missing_files,
    read_object,
    refuse,
    weights_of,
)
from mrflow_sched.engines.diffusers.parts import check_size, load_part, part_class, quiet_loading, skeleton

__all__ = ["Preprocessing", "load_similarity"]

_TOGETHER = 16
"""Images that go through the network at once."""
_LARGEST_SIDE = 4096


@dataclass(frozen=True)
class _Kind:
    """What differs between the kinds of model.

    Attributes:
        model: Its class in transformers.
        tokenizer: That of its tokenizer, where the folder names none.
        padded: Texts are filled up to the full length, without a mask, as SigLIP was trained.
        together: Image and text go through the network together, which tells whether they match.
    """

    model: str
    tokenizer: str
    padded: bool = False
    together: bool = False


_KINDS: Mapping[str, _Kind] = {
    "clip": _Kind("CLIPModel", "CLIPTokenizer"),
    "siglip": _Kind("SiglipModel", "SiglipTokenizer", padded=True),
    "blip": _Kind("BlipForImageTextRetrieval", "BertTokenizer", together=True),
}


_OF_MODEL = re.compile(r"\Amodel is (?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"), ")


def load_similarity(
    folder: str | Path, *, device: str | torch.device = "cpu"
) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """A model that tells how well images fit their texts.

    Args:
        folder: A local folder as transformers saves it: config.json, model.safetensors, preprocessor_config.json and
            the files of the tokenizer.
        device: Where it runs.

    Returns:
        A function of images (B, 3, H, W), floats in [0, 1], and B texts, which gives (B,) cosine similarities from -1
        to 1, or of BLIP the logarithms of the odds that image and text match, with a graph where the images require
        gradients. Texts are cut at the length of the model (77 tokens for CLIP, 64 for SigLIP, 512 for BLIP).

    Raises:
        MissingFileError: There is no such folder.
        MrFlowError: It holds no such model, or is damaged or hostile.
    """
    try:
        return _loaded(folder, device)
    except MrFlowError as error:  # as of a part of a model
        said = _OF_MODEL.sub("", str(error))
        if said == str(error):
            raise
        raise MrFlowError(f"score is {quoted(f'clip:{folder}', 200)}, {said}") from error


def _loaded(folder: str | Path, device: str | torch.device) -> Callable[[Tensor, Sequence[str]], Tensor]:
    where, place = resolve_device(device), Path(os.path.expanduser(folder))
    if not os.path.isdir(place):  # also where the text is no path at all
        raise MissingFileError(
            f"score is {quoted(f'clip:{folder}', 200)}, which names no folder here; download a CLIP-type model first "
            "(hf download NAME --local-dir DIR), or give the folder where it lies."
        )
    place = place.resolve()
    home, name = place.parent, place.name
    check_part(home, name)
    if not (place / "config.json").is_file():
        refuse(home, f"whose {shown(name)} has no config.json; give the folder of a CLIP, SigLIP or BLIP model")
    config = read_object(home, place / "config.json")
    kind = _KINDS.get(str(config.get("model_type")))
    if kind is None:
        refuse(
            home,
            f"whose {shown(name)} is of the type {quoted(config.get('model_type'), 60)}; a score needs one of "
            f"{', '.join(_KINDS)}",
        )
    missing = missing_files(home, {name: TRANSFORMERS_STEM})
    if missing:
        refuse(home, f"lacks {shown(missing[0], 120)}; only safetensors are read, download it whole")
    preprocessing = Preprocessing.of(home, place)
    with quiet_loading():
        model_class = part_class(home, name, ("transformers", kind.model))
        held = weights_of(home, name, TRANSFORMERS_STEM)
        check_size(home, name, skeleton(home, name, model_class, held), held)
        tokenizer = load_part(home, name, _tokenizer_class(home, place, kind), None)
        model = load_part(home, name, model_class, torch.float32).to(where)
    found = _Similarity(model, tokenizer, preprocessing, kind, where)
    try:
        tried = found(torch.full((1, 3, 8, 8), 0.5), ["a"])
    except Exception as error:  # whatever parts that do not fit each other make of an image and a text
        if is_memory_error(error):
            raise
        refuse(home, f"whose {shown(name)} cannot read an image ({first_line(error)}); download it again", error)
    if not bool(tried.isfinite().all()):
        refuse(home, f"whose {shown(name)} gives NaN; download it again")
    return found


def _tokenizer_class(home: Path, place: Path, kind: _Kind) -> Any:
    import transformers

    file = place / "tokenizer_config.json"
    named = read_object(home, file).get("tokenizer_class") if file.is_file() else None
    chosen = named if isinstance(named, str) else kind.tokenizer
    library = cast("Any", transformers)
    if (place / "tokenizer.json").is_file() and hasattr(library, f"{chosen}Fast"):
        chosen += "Fast"  # transformers 4: the one that reads tokenizer.json
    lacking = getattr(getattr(library, chosen, None), "_backends", None)  # of a stand-in for what cannot be imported
    if lacking:
        needed = ", ".join(map(str, lacking))
        refuse(home, f"whose {shown(place.name)} has a tokenizer that needs {needed}; pip install {needed}")
    return part_class(home, "tokenizer", ("transformers", chosen))


@dataclass(frozen=True)
class _Similarity:
    model: Any
    tokenizer: Any
    preprocessing: Preprocessing
    kind: _Kind
    device: torch.device

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            return self._read(images, prompts)

    def _read(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        found: list[Tensor] = []
        for first in range(0, len(images), _TOGETHER):
            texts = prompts[first : first + _TOGETHER]
            pixels = self.preprocessing(images[first : first + _TOGETHER].to("cpu", torch.float32)).to(self.device)
            if self.kind.together:
                odds = self.model(pixel_values=pixels, **self._tokens(list(texts)), use_itm_head=True).itm_score
                found.append((odds[:, 1] - odds[:, 0]).float().cpu())
                continue
            unique = list(dict.fromkeys(texts))
            given = self.model(pixel_values=pixels, **self._tokens(unique))
            rows = torch.tensor([unique.index(text) for text in texts], device=self.device)
            seen, meant = functional.normalize(given.image_embeds), functional.normalize(given.text_embeds)
            found.append((seen * meant[rows]).sum(1).float().cpu())
        return torch.cat(found)

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        length = int(self.model.config.text_config.max_position_embeddings)
        how = "max_length" if self.kind.padded else True
        given = self.tokenizer(texts, padding=how, truncation=True, max_length=length, return_tensors="pt")
        if int(given["input_ids"].max()) >= int(self.model.config.text_config.vocab_size):
            raise MrFlowError(
                "score clip has a tokenizer with words that its network does not have; download the whole model again."
            )
        names = ("input_ids",) if self.kind.padded else ("input_ids", "attention_mask")
        return {name: given[name].to(self.device) for name in names}


# ------------------------------------------------------------------------------------------------------- preprocessing

_MODES: Mapping[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
"""Numbers of resampling filters, as PIL has them."""


@dataclass(frozen=True)
class Preprocessing:
    """How images are brought to a network, as preprocessor_config.json says it, without rounding to bytes.

    Attributes:
        size: Height and width that images are resized to; (n, 0): the shorter side to n.
        crop: Height and width of the middle that is cut out; None: nothing is cut.
        mode: Filter of the resizing.
        mean: Taken from each colour.
        std: What each colour is then divided by.
    """

    size: tuple[int, int]
    crop: tuple[int, int] | None
    mode: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, home: Path, place: Path) -> Preprocessing:
        """Read it from a model's folder.

        Args:
            home: The folder in which the model's lies, for sentences.
            place: The model's folder.

        Returns:
            What its file says.

        Raises:
            MrFlowError: There is no such file, or it says what no CLIP-type model needs.
        """
        name = shown(place.name)
        files = [place / "preprocessor_config.json", place / "processor_config.json"]
        file = next((each for each in files if each.is_file()), None)
        said = {} if file is None else read_object(home, file)
        said = said.get("image_processor", said)
        if not isinstance(said, dict) or "size" not in said:
            refuse(home, f"whose {name} has no preprocessor_config.json with a size; download it whole")
        settings = cast("dict[str, Any]", said)
        size = _size_of(settings["size"], shortest=True)
        crop = _size_of(settings.get("crop_size"), shortest=False) if settings.get("do_center_crop") else None
        if size is None or (settings.get("do_center_crop") and crop is None) or (not size[1] and crop is None):
            said = {key: settings.get(key) for key in ("size", "do_center_crop", "crop_size")}
            refuse(home, f"whose {name} prepares images by {quoted(said, 120)}, which leads to no one size")
        if crop is not None and (crop[0] > size[0] or crop[1] > (size[1] or size[0])):
            refuse(home, f"whose {name} cuts {crop[0]}x{crop[1]} out of an image of {size[0]} pixels")
        mode, factor = settings.get("resample", 3), settings.get("rescale_factor", 1 / 255)
        if mode not in _MODES:
            refuse(home, f"whose {name} resizes by {quoted(mode, 60)}; 2 (bilinear) and 3 (bicubic) can be done")
        if settings.get("do_rescale", True) is not True or not _near(factor, 1 / 255):
            refuse(home, f"whose {name} scales bytes by {quoted(factor, 60)}; 1/255 is what can be done")
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if settings.get("do_normalize", True):
            mean, std = (_three(settings.get(key)) for key in ("image_mean", "image_std"))
        if mean is None or std is None or min(std) <= 0:
            refuse(home, f"whose {name} has no three numbers above 0 as image_mean and image_std")
        return cls(size, crop, _MODES[mode], mean, std)

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare images.

        Args:
            images: (B, 3, H, W), floats in [0, 1], on the CPU.

        Returns:
            What the network takes, of one size.
        """
        height, width = images.shape[-2:]
        size = self.size
        if not size[1]:
            short, long = size[0], int(size[0] * max(height, width) / min(height, width))
            size = (short, long) if height <= width else (long, short)
        found = functional.interpolate(images, size, mode=self.mode, antialias=True, align_corners=False).clamp(0, 1)
        if self.crop is not None:
            top, left = (size[0] - self.crop[0]) // 2, (size[1] - self.crop[1]) // 2
            found = found[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (self.mean, self.std))
        return (found - mean) / std


def _size_of(value: Any, *, shortest: bool) -> tuple[int, int] | None:
    """Height and width out of what transformers writes for a size; None where it is none."""
    if isinstance(value, dict):
        said = cast("dict[str, Any]", value)
        if shortest and set(_set(said)) == {"shortest_edge"}:
            value = [said["shortest_edge"], 0]
        else:
            value = [said.get("height"), said.get("width")]
    elif _is_side(value):
        value = [value, 0 if shortest else value]
    pair = cast("list[Any]", value if isinstance(value, list) else [])
    fits = len(pair) == 2 and _is_side(pair[0]) and (_is_side(pair[1]) or (shortest and pair[1] == 0))
    return (pair[0], pair[1]) if fits else None


def _set(values: Mapping[str, Any]) -> list[str]:
    return [key for key, value in values.items() if value is not None]


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST_SIDE


def _near(value: Any, target: float) -> bool:
    return isinstance(value, float) and math.isclose(value, target, rel_tol=1e-3)


def _three(value: Any) -> tuple[float, float, float] | None:
    numbers = cast("list[Any]", value if isinstance(value, list) else [])
    fits = len(numbers) == 3 and all(type(each) in (int, float) and math.isfinite(each) for each in numbers)
    return (float(numbers[0]), float(numbers[1]), float(numbers[2])) if fits else None
