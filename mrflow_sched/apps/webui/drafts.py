"""Drafts: images of stage 1 alone, which a later job finishes at full size.

A draft is a PNG. Its pixels are those that the host's hires pass would have upscaled (8 bits a channel, as in a run
that goes on at once), and its metadata are those of the whole run. So whoever has the file can finish it: from the
gallery, from a file on another day, or through the API.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from PIL import Image

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.apps.webui import infotext
from mrflow_sched.apps.webui.controls import FIELDS, Controls
from mrflow_sched.apps.webui.host import HostApi
from mrflow_sched.apps.webui.job import Run, change, change_known, override
from mrflow_sched.images.formats import check_bytes, check_room, reader_of, refusing

__all__ = ["FINISH", "Draft", "asked_drafts", "checksum", "read_draft", "set_job"]

FINISH = "finish"
"""Name of the script's last argument: the drafts to finish."""

MAX_DRAFTS = 100
_LONGEST_TEXT = 10**6
_PARAMETERS = "parameters"
_NEGATIVE = "Negative prompt:"
# What the drafts of one job must share: the rest is set for each image.
_EACH = ("Prompt", "Negative prompt", "Seed", "Variation seed", infotext.DRAFT)
_SHARED = ("Size-1", "Size-2", "CFG scale", "Distilled CFG Scale", "Shift", "Sampler", "Schedule type", "Model hash")


@dataclass(frozen=True)
class Draft:
    """One draft, as it is finished.

    Attributes:
        image: Its pixels; None where only its metadata were given, and stage 1 runs again.
        params: Its metadata, as the host reads them.
        prompt: Its prompt, as it was used: styles and wildcards are filled in.
        negative: Its negative prompt.
        size: (width, height) of the final image in pixels.
        changed: The pixels are not those that were made.
    """

    image: Image.Image | None
    params: Mapping[str, Any]
    prompt: str
    negative: str
    size: tuple[int, int]
    changed: bool

    @property
    def controls(self) -> Controls:
        """What was chosen when it was made, to be run to the end."""
        return replace(infotext.read(self.params), draft=False)

    @property
    def pinned(self) -> Controls:
        """The same with the numbers and the upscaler that were decided then."""
        return replace(infotext.ran(self.params), draft=False)


# ------------------------------------------------------------------------------------------------------------- reading


def asked_drafts(p: Any, args: Sequence[Any], host: HostApi) -> tuple[Draft, ...]:
    """Return the drafts that a job is to finish.

    Args:
        p: The job. With MrFlow on, an image from the gallery's upscale button that is a draft is one to finish.
        args: The script's arguments: an object with "finish", or a list that goes on behind the controls.
        host: The WebUI, which reads metadata.

    Returns:
        The drafts in order; empty for all other jobs.

    Raises:
        MrFlowError: What was given is no draft, or the drafts cannot be finished in one job.
    """
    given: Any = None
    if args and isinstance(args[0], Mapping):
        named = dict(cast("Mapping[Any, Any]", args[0]))
        given = named.pop(FINISH, None)
        if named.pop("enabled", True) is False:
            return ()
        if given and named:
            raise MrFlowError(
                f"finish takes its settings from the draft; leave {', '.join(map(quoted, named))} out, or generate "
                "without finish."
            )
    elif len(args) > len(FIELDS) and args[0] is True:
        given = args[len(FIELDS)]
    if given:
        sources = cast("list[Any]", given) if isinstance(given, (list, tuple)) else [given]
        if len(sources) > MAX_DRAFTS:
            raise MrFlowError(f"finish takes at most {MAX_DRAFTS} drafts in a job, got {len(sources)}.")
        return _checked(tuple(read_draft(source, host) for source in sources))
    image = getattr(p, "firstpass_image", None)
    on = bool(args) and (args[0] is True or isinstance(args[0], Mapping))
    if on and isinstance(image, Image.Image) and infotext.DRAFT in str(image.info.get(_PARAMETERS, "")):
        return (read_draft(image, host),)
    return ()


def read_draft(source: Any, host: HostApi) -> Draft:
    """Read a draft.

    Args:
        source: An image, a file of the page's upload box, a draft's file in base64, or its metadata as text.
        host: The WebUI, which reads metadata.

    Returns:
        The draft.

    Raises:
        MrFlowError: It is none of these, cannot be read, or its metadata are not those of a draft.
    """
    if isinstance(source, Image.Image):
        image, text = source, str(source.info.get(_PARAMETERS, ""))
    elif hasattr(source, "name"):
        name = os.path.basename(str(source.name))
        with refusing(f"the draft {quoted(name)}"):
            check_bytes(os.stat(source.name).st_size)
            with open(source.name, "rb") as file:
                image, text = _opened(file.read(), f"the draft {quoted(name)}")
    elif isinstance(source, str) and source.strip():
        image, text = _of_text(source)
    else:
        raise MrFlowError(f"finish must be a draft's image in base64, or its metadata as text, got {quoted(source)}.")
    params = host.read_parameters(text) if 0 < len(text) <= _LONGEST_TEXT else {}
    if infotext.DRAFT not in params or infotext.KEY not in params:
        raise MrFlowError(
            'finish needs a draft: an image made with MrFlow\'s "Draft" on, with its metadata; this one has none that '
            "say so."
        )
    size = _whole(params.get("Size-1"), "Size"), _whole(params.get("Size-2"), "Size")
    if image is not None and image.mode not in ("RGB", "RGBA"):  # some models draw transparency
        image = image.convert("RGB")
    changed = image is not None and checksum(np.asarray(image)) != str(params[infotext.DRAFT])
    return Draft(image, params, *_prompts(text), size, changed)


def checksum(pixels: Any) -> str:
    """Sum up an image's pixels, so that a changed one is noticed.

    Args:
        pixels: (h, w, 3 or 4) uint8.

    Returns:
        Their CRC-32, eight hexadecimal digits.
    """
    return f"{zlib.crc32(np.ascontiguousarray(pixels).tobytes()):08x}"


def _of_text(text: str) -> tuple[Image.Image | None, str]:
    """Return what is in base64, with or without the head of a data address; any other text is metadata."""
    head, comma, rest = text.partition(",")
    packed = rest if comma and head.startswith("data:") else text
    try:
        data = base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError):
        return None, text
    return _opened(data, "the draft in finish")


def _opened(data: bytes, what: str) -> tuple[Image.Image, str]:
    with refusing(what):
        check_bytes(len(data))
        file = io.BytesIO(data)
        reader = reader_of(file)
        if reader is None:
            raise MrFlowError(f"{what} is no image; give the PNG that was saved.")
        image = reader(file)
        check_room(*image.size)
        image.load()
    return image, str(image.info.get(_PARAMETERS, ""))


def _prompts(text: str) -> tuple[str, str]:
    """Return the prompt and the negative prompt as they stand in the text: hosts may take styles out of them."""
    lines = [line.strip() for line in text.strip().split("\n")[:-1]]
    at = next((number for number, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    return "\n".join(lines[:at]), "\n".join(lines[at:]).removeprefix(_NEGATIVE).strip()


def _checked(drafts: tuple[Draft, ...]) -> tuple[Draft, ...]:
    """Refuse drafts that one job cannot finish together."""
    for draft in drafts[1:]:
        first = drafts[0].params
        names = {*_SHARED, *(name for name in (*first, *draft.params) if name.startswith(infotext.PREFIX))}
        differing = sorted(
            name for name in (infotext.KEY, *names) if name not in _EACH and first.get(name) != draft.params.get(name)
        )
        if differing:
            raise MrFlowError(f"The drafts in finish differ in {', '.join(differing)}; finish them one by one.")
    return drafts


# ------------------------------------------------------------------------------------------------------------- the job


def set_job(run: Run, p: Any, host: HostApi) -> None:
    """Give a job the prompts, seeds and settings of the drafts that it finishes.

    Args:
        run: The job's run with its drafts, which keeps what was set before.
        p: The job.
        host: The WebUI, whose settings are overridden for this job where the drafts had others.
    """
    drafts, first = run.drafts, run.drafts[0].params

    def each(values: list[Any]) -> Any:
        return values if len(values) > 1 else values[0]

    fields: dict[str, Any] = {
        "prompt": each([draft.prompt for draft in drafts]),
        "negative_prompt": each([draft.negative for draft in drafts]),
        "seed": each([_whole(draft.params.get("Seed"), "Seed") for draft in drafts]),
        "subseed": each([_whole(draft.params.get("Variation seed", 0), "Variation seed") for draft in drafts]),
        "subseed_strength": _number(first.get("Variation seed strength", 0), "Variation seed strength"),
        "seed_resize_from_w": _whole(first.get("Seed resize from-1", 0), "Seed resize from"),
        "seed_resize_from_h": _whole(first.get("Seed resize from-2", 0), "Seed resize from"),
        "n_iter": len(drafts),
        "batch_size": 1,
        "styles": [],
        "cfg_scale": _number(first.get("CFG scale", p.cfg_scale), "CFG scale"),
        "sampler_name": str(first.get("Sampler", p.sampler_name)),
        "hr_prompt": str(first.get("Hires prompt", "")),
        "hr_negative_prompt": str(first.get("Hires negative prompt", "")),
        "firstpass_image": drafts[0].image,
        # The button's own way leaves the model and the batch as the page has them.
        "txt2img_upscale": False,
    }
    for name, value in fields.items():
        change(run, p, name, value)
    change_known(run, p, "refiner_checkpoint", None)
    change_known(run, p, "scheduler", str(first.get("Schedule type", "Automatic")))
    guidance = first.get("Distilled CFG Scale", first.get("Shift"))
    if guidance is not None:
        change_known(run, p, "distilled_cfg_scale", _number(guidance, "Distilled CFG Scale"))
    settings: dict[str, Any] = p.override_settings or {}
    checkpoint = str(settings.get("sd_model_checkpoint") or getattr(host.opts, "sd_model_checkpoint", None) or "")
    for key, value in host.settings_of(first).items():
        if key != "sd_model_checkpoint" or not _same_model(first, checkpoint):
            override(run, p, host, key, value)


def _same_model(params: Mapping[str, Any], checkpoint: str) -> bool:
    """Return whether the checkpoint of a host's menu, "name.safetensors [hash]", is the one that a draft names."""
    named = str(params.get("Model hash") or params.get("Model") or "")
    return named == "" or named in checkpoint


def _whole(value: Any, name: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise MrFlowError(f"The draft's {name} must be a whole number, got {quoted(value)}.") from error


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
        # The page gives whole numbers as such, and that is how the metadata write them.
        return int(value) if str(value).isdigit() else number
    except (TypeError, ValueError) as error:
        raise MrFlowError(f"The draft's {name} must be a number, got {quoted(value)}.") from error
