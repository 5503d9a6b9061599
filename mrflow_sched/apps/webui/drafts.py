"""Drafts: images of stage 1 alone, which a later job finishes at full size.

A draft is a PNG. Its pixels are those that the host's hires pass would have upscaled (8 bits a channel, as in a run
that goes on at once), and its metadata are those of the whole run. So whoever has the file can finish it: from the
gallery, from a file on another day, or through the API.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.apps.webui import infotext
from mrflow_sched.apps.webui.controls import FIELDS, Controls
from mrflow_sched.apps.webui.host import HostApi
from mrflow_sched.apps.webui.job import Run, change, change_known, override
from mrflow_sched.images.drafts import RGBA, mark
from mrflow_sched.images.formats import check_bytes, check_room, reader_of, refusing
from mrflow_sched.images.parameters import PARAMETERS, read_parameters

__all__ = ["FINISH", "Draft", "asked_drafts", "mark", "read_draft", "set_job"]

FINISH = "finish"
"""Name of the script's last argument: the drafts to finish."""

MAX_DRAFTS = 100
_LONGEST_TEXT = 10**6
_PNG = "iVBORw0KGgo"  # how every PNG begins in base64
# What drafts of one job may differ in; everything else in their metadata must be the same.
_EACH = ("Seed", "Variation seed", "Lora hashes", "TI hashes", "Version", "User", "MrFlow version", infotext.DRAFT)
_MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Draft:
    """One draft, as it is finished.

    Attributes:
        image: Its pixels; None where only its metadata were given, and stage 1 runs again.
        text: Its metadata.
        params: Their last line by key.
        prompt: Its prompt, as it was used: styles and wildcards are filled in.
        negative: Its negative prompt.
        size: (width, height) of the final image in pixels.
        changed: The pixels are not those that were made.
    """

    image: Image.Image | None
    text: str
    params: Mapping[str, str]
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


def asked_drafts(p: Any, args: Sequence[Any]) -> tuple[Draft, ...]:
    """Return the drafts that a job is to finish.

    Args:
        p: The job. With MrFlow on, an image from the gallery's upscale button that is a draft is one to finish.
        args: The script's arguments: an object with "finish", or a list that goes on behind the controls.

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
        if given is not None and not given:
            raise MrFlowError(_needed(given))
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
        return _checked(tuple(_numbered(sources)))
    image = getattr(p, "firstpass_image", None)
    on = bool(args) and (args[0] is True or isinstance(args[0], Mapping))
    if on and isinstance(image, Image.Image) and infotext.DRAFT in str(image.info.get(PARAMETERS, "")):
        return (read_draft(image),)
    return ()


def _numbered(sources: Sequence[Any]) -> Iterator[Draft]:
    """Read drafts; a refusal says which of several it is about."""
    for number, source in enumerate(sources, 1):
        try:
            yield read_draft(source)
        except MrFlowError as error:
            if len(sources) == 1:
                raise
            raise MrFlowError(f"Draft {number} of {len(sources)}: {error}") from error


def read_draft(source: Any) -> Draft:
    """Read a draft.

    Args:
        source: An image, a file of the page's upload box, a draft's file in base64, or its metadata as text.

    Returns:
        The draft.

    Raises:
        MrFlowError: It is none of these, cannot be read, or its metadata are not those of a draft.
    """
    if isinstance(source, Image.Image):
        image, text = source, str(source.info.get(PARAMETERS, ""))
    elif hasattr(source, "name"):
        name = os.path.basename(str(source.name))
        with refusing(f"the draft {quoted(name)}"):
            check_bytes(os.stat(source.name).st_size)
            image, text = _opened(Path(source.name).read_bytes(), f"the draft {quoted(name)}")
    elif isinstance(source, str) and source.strip():
        image, text = _of_text(source)
    else:
        raise MrFlowError(_needed(source))
    parts = read_parameters(text if len(text) <= _LONGEST_TEXT else "")
    params = parts.values
    if infotext.DRAFT not in params or not infotext.read(params).enabled:
        raise MrFlowError(
            'finish needs a draft: an image made with MrFlow\'s "Draft" on, with its metadata; this one has none that '
            "say so."
        )
    size = _sides(params.get("Size"), "Size")
    changed = False
    if image is not None:
        low = _sides(params.get("MrFlow size"), "MrFlow size")
        if image.size != low:  # before its pixels are decoded: the file may declare any number of them
            raise MrFlowError(
                f"The draft is {image.width}x{image.height}, and its metadata say {low[0]}x{low[1]}; give the file as "
                "it was saved."
            )
        with refusing("the draft in finish"):
            # Only few models draw transparency; hosts and editors add it to files of the others.
            image = image.convert("RGBA" if params[infotext.DRAFT].endswith(RGBA) else "RGB")
        changed = mark(np.asarray(image)) != params[infotext.DRAFT]
    return Draft(image, text, params, parts.prompt, parts.negative, size, changed)


def _needed(given: Any) -> str:
    return f"finish must be a draft's image in base64, or its metadata as text, got {quoted(given)}."


def _of_text(text: str) -> tuple[Image.Image | None, str]:
    """Return what is in base64, with or without the head of a data address; any other text is metadata."""
    head, comma, rest = text.partition(",")
    joined = "".join(text.split())
    packed = joined if joined.startswith(_PNG) else text
    if comma and head.startswith("data:"):
        packed = "".join(rest.split())
    try:
        data = base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError):
        if packed.startswith(_PNG):
            raise MrFlowError("the draft in finish is damaged: its base64 is cut off or not clean.") from None
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
    return image, str(image.info.get(PARAMETERS, ""))


def _checked(drafts: tuple[Draft, ...]) -> tuple[Draft, ...]:
    """Refuse drafts that one job cannot finish together."""
    first = drafts[0].params
    for draft in drafts[1:]:
        names = dict.fromkeys((*first, *draft.params))
        differing = [name for name in names if name not in _EACH and first.get(name) != draft.params.get(name)]
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

    variations = [_whole(draft.params.get("Variation seed", 0), "Variation seed", _MAX_SEED) for draft in drafts]
    resized = _sides(first.get("Seed resize from", "0x0"), "Seed resize from")
    fields: dict[str, Any] = {
        "prompt": each([draft.prompt for draft in drafts]),
        "negative_prompt": each([draft.negative for draft in drafts]),
        "seed": each([_whole(draft.params.get("Seed"), "Seed", _MAX_SEED) for draft in drafts]),
        "subseed": each(variations),
        "subseed_strength": _number(first.get("Variation seed strength", 0), "Variation seed strength"),
        "seed_resize_from_w": resized[0],
        "seed_resize_from_h": resized[1],
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
    for key, value in host.settings_of(drafts[0].text).items():
        override(run, p, host, key, value)
    _set_checkpoint(run, p, host, first)


def _set_checkpoint(run: Run, p: Any, host: HostApi, params: Mapping[str, str]) -> None:
    """Let the host load the draft's checkpoint, where another one is chosen."""
    settings: dict[str, Any] = p.override_settings or {}
    chosen = str(settings.get("sd_model_checkpoint") or getattr(host.opts, "sd_model_checkpoint", None) or "")
    named = params.get("Model hash") or params.get("Model") or ""
    if named in chosen:  # a title of the host's menu, "name.safetensors [hash]"; or the draft names none
        return
    if not host.has_checkpoint(named):
        raise MrFlowError(
            f"The draft was made with the checkpoint {params.get('Model', named)} ({named}), which is not installed "
            "here; install it, and finish the draft then."
        )
    override(run, p, host, "sd_model_checkpoint", named)


def _whole(value: Any, name: str, most: int) -> int:
    if str(value).isdecimal() and len(str(value)) <= 20 and int(value) <= most:
        return int(value)
    raise MrFlowError(f"The draft's {name} must be a whole number up to {most}, got {quoted(value)}.")


def _sides(value: Any, name: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", str(value))
    if match is None:
        raise MrFlowError(f"The draft's {name} must be two whole numbers such as 512x768, got {quoted(value)}.")
    return int(match[1]), int(match[2])


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
        if math.isfinite(number):
            # The page gives whole numbers as such, and that is how the metadata write them.
            return int(value) if str(value).isdecimal() else number
    except (TypeError, ValueError):
        pass
    raise MrFlowError(f"The draft's {name} must be a number, got {quoted(value)}.")
