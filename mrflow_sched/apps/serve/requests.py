"""What a client sends, read and checked: fields of OpenAI's image API, fields of ours, and options of a plan."""

from __future__ import annotations

import difflib
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any, cast

from mrflow_sched._runtime.errors import MrFlowError, first_line, quoted, shown
from mrflow_sched.apps.serve.limits import Limits, Refused
from mrflow_sched.apps.serve.served import Format, ImageRequest, Offered
from mrflow_sched.images.record import MAX_PROMPT
from mrflow_sched.plan.checks import MAX_SEED
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.options import OPTIONS, check_options

__all__ = ["FIELDS", "read_request"]

FIELDS = (
    "prompt",
    "negative_prompt",
    "refine_prompt",
    "refine_negative_prompt",
    "n",
    "size",
    "seed",
    "response_format",
    "model",
    "mrflow",
)
"""Fields of a request."""

_ELSEWHERE = {
    "seed": "seed is a field of the request itself; put it beside mrflow.",
    "upscaler_kind": "upscaler_kind follows from the upscaler that the server has; leave it out.",
}
_RANDOM_SEEDS = 2**32
_SIZE = re.compile(r"([0-9]{1,6})[x×]([0-9]{1,6})", re.IGNORECASE)


def read_request(data: bytes, served: Offered, limits: Limits) -> ImageRequest:
    """Read a request and make its plan.

    Args:
        data: The body: a JSON object.
        served: The model.
        limits: What is taken at most.

    Returns:
        The request; its seed is settled.

    Raises:
        Refused: It is no JSON object (400), is larger than the server allows (413), or asks for what cannot be done
            (422).
    """
    given = _object(data)
    _check_model(given.get("model"), served)
    count = _whole(given.get("n", 1), "n", 1, limits.images, 413)
    seed = given.get("seed")
    seed = secrets.randbelow(_RANDOM_SEEDS) if seed is None else _whole(seed, "seed", 0, MAX_SEED - count + 1)
    prompt = _prompt(given)
    width, height = _sides(given.get("size"), served, limits)
    options = _options(given.get("mrflow"))
    refine = _text(given, "refine_prompt"), _text(given, "refine_negative_prompt")
    try:
        kind = {} if options.get("native") else {"upscaler_kind": served.upscaler_kind}
        plan = make_plan(served.family, width, height, **cast("Any", {**kind, **options, "seed": seed}))
        served.check(plan)
    except MrFlowError as error:
        raise Refused(422, "invalid", str(error)) from error
    if len(plan.stages) == 1:
        _check_later(refine)
    return ImageRequest(plan, prompt, _text(given, "negative_prompt"), *refine, count, _format(given))


def _object(data: bytes) -> dict[str, Any]:
    """The fields that are given; null is the same as leaving a field out."""

    def refuse_number(text: str) -> float:
        raise ValueError(f"{text} is no number of JSON")

    try:
        found: Any = json.loads(data, parse_constant=refuse_number)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "not_json", f"the request is not JSON ({first_line(error)}); send an object.") from error
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise Refused(400, "not_json", f'the request is a JSON {kind}; send an object such as {{"prompt": "a star"}}.')
    given = cast("dict[str, Any]", found)
    unknown = next((name for name in given if name not in FIELDS), None)
    if unknown is not None:
        raise _wrong(unknown, f"{shown(unknown)} is no field of a request; {_near(unknown, FIELDS)}")
    return {name: value for name, value in given.items() if value is not None}


def _prompt(given: Mapping[str, Any]) -> str:
    prompt = _text(given, "prompt")
    if prompt is None or not prompt.strip():
        raise _wrong("prompt", "prompt is missing or empty; say what the image shows.")
    return prompt.strip()


def _check_later(refine: tuple[str | None, str | None]) -> None:
    """Refuse texts of later stages where there are none."""
    for name, text in zip(("refine_prompt", "refine_negative_prompt"), refine, strict=True):
        if text is not None:
            raise _wrong(name, f"{name} is for the stages after the first, and this plan has one; leave it out.")


def _check_model(name: object, served: Offered) -> None:
    if name is not None and name != served.name:
        raise _wrong("model", f"model is {quoted(name)}, and this server has {served.name!r} alone; leave it out.")


def _whole(value: object, name: str, low: int, high: int, above: int = 422) -> int:
    """A whole number from `low` to `high`; `above`: the status where it is larger."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        large = isinstance(value, int) and value > high and above == 413
        status, code = (413, "too_large") if large else (422, "invalid")
        sentence = f"{name} must be a whole number from {low} to {high}, got {quoted(value)}."
        raise Refused(status, code, sentence, param=name)
    return value


def _text(given: Mapping[str, Any], name: str) -> str | None:
    """A text that an image's record can hold; None where it is left out."""
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise _wrong(name, f"{name} must be text, got {quoted(value)}.")
    if len(value) > MAX_PROMPT:
        raise _wrong(name, f"{name} has {len(value)} letters; shorten it to {MAX_PROMPT}.")
    if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in value):
        raise _wrong(name, f"{name} holds a NUL or half of a surrogate pair, which no text has; send it as UTF-8.")
    return value


def _sides(size: object, served: Offered, limits: Limits) -> tuple[int, int]:
    """The size that is asked for; the family's usual one where it is left out."""
    if size is None or size == "auto":
        return served.family.default_size or served.family.native_size
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if found is None:
        raise _wrong("size", f"size must be WIDTHxHEIGHT in pixels, such as '1024x768', got {quoted(size)}.")
    width, height = int(found[1]), int(found[2])
    if width * height > limits.pixels:
        raise Refused(
            413,
            "too_large",
            f"size is {width}x{height}, {width * height / 1e6:.3g} megapixels; this server makes at most "
            f"{limits.pixels / 1e6:.3g} megapixels, so choose a smaller size.",
            param="size",
        )
    return width, height


def _options(value: object) -> dict[str, Any]:
    """The options of a plan that are given."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong("mrflow", f'mrflow must be an object such as {{"preset": "12+1"}}, got {quoted(value)}.')
    given = cast("dict[str, Any]", value)
    elsewhere = next((name for name in given if name in _ELSEWHERE), None)
    if elsewhere is not None:
        raise _wrong(f"mrflow.{elsewhere}", _ELSEWHERE[elsewhere])
    known = [name for name in OPTIONS if name not in _ELSEWHERE]
    for name, each in given.items():
        if name not in known:
            raise _wrong("mrflow", f"{shown(name)} is no option of a plan; {_near(name, known)}")
        try:
            check_options({name: each}, "mrflow")
        except MrFlowError as error:
            raise _wrong(f"mrflow.{name}", str(error)) from error
    return {name: each for name, each in given.items() if each is not None}


def _format(given: Mapping[str, Any]) -> Format:
    value = given.get("response_format", "b64_json")
    if value not in ("b64_json", "url"):
        raise _wrong("response_format", f"response_format must be 'b64_json' or 'url', got {quoted(value)}.")
    return value


def _near(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}."


def _wrong(param: str, sentence: str) -> Refused:
    return Refused(422, "invalid", sentence, param=shown(param))
