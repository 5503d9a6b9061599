"""What images of other programs say of their making: A1111's `parameters` text and ComfyUI's graph of nodes.

Anyone can write such texts: each is cut to a size before it is parsed, links are followed for a limited way, and a
value that is out of range counts as missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from mrflow_sched._runtime.errors import quoted
from mrflow_sched.images.parameters import PARAMETERS, read_parameters
from mrflow_sched.plan.checks import MAX_GUIDANCE, MAX_SEED, MAX_SIDE, MAX_STEPS

MAX_TEXT = 8_000_000
"""Characters above which a text is not looked at."""

_LONGEST_WAY = 32  # links in a row; graphs that people draw have a dozen
_MOST_SAMPLERS = 8
_SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
# Inputs that hold a node's text, its number, or lead on to them.
_TEXTS = ("text", "t5xxl", "text_g", "clip_l", "clip_g", "text_l", "prompt", "string", "value")
_NUMBERS = ("value", "seed", "noise_seed", "int", "number")
_ONWARDS = ("conditioning", "conditioning_to", "conditioning_1", "positive")
_LATENTS = ("latent_image", "samples", "latent", "pixels", "image")


@dataclass(frozen=True)
class ForeignRun:
    """How another program made an image, as far as its texts say.

    Attributes:
        program: "A1111" (which Forge and others write like) or "ComfyUI".
        prompt: What was asked for.
        negative: The negative prompt; None where there was none.
        seed: The image's seed, 0 to 2^63 - 1.
        width: Of its first pass in pixels, 1 to 32768.
        height: Likewise.
        steps: Steps of its first pass, 1 to 1000.
        guidance: The guidance scale, 0 to 100; the embedded one where the model has one.
        unusable: What the texts say of seed and size that is out of range or no number, as in "the seed '-1'".
    """

    program: str
    prompt: str
    negative: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    unusable: tuple[str, ...] = ()


def read_foreign(texts: Mapping[str, str]) -> ForeignRun | None:
    """How another program made an image.

    Args:
        texts: The texts of its file, as `files.read_text` gives them.

    Returns:
        What they say; None where they say nothing that is understood, or are damaged.
    """
    parameters, graph = texts.get(PARAMETERS, ""), texts.get("prompt", "")
    found = _a1111(parameters) if parameters.strip() and len(parameters) <= MAX_TEXT else None
    if found is None and graph.lstrip().startswith("{") and len(graph) <= MAX_TEXT:
        found = _comfyui(graph)
    return found


def _a1111(text: str) -> ForeignRun | None:
    parts = read_parameters(text)
    values, prompt, negative = parts.values, _text(parts.prompt.strip()), _text(parts.negative.strip())
    if not prompt:
        return None
    seed, (width, height) = _whole(values.get("Seed"), 0, MAX_SEED), _sides(values.get("Size"))
    return ForeignRun(
        program="A1111",
        prompt=prompt,
        negative=negative or None,
        seed=seed,
        width=width,
        height=height,
        steps=_whole(values.get("Steps"), 1, MAX_STEPS),
        guidance=_scale(values.get("Distilled CFG Scale") or values.get("CFG scale")),
        unusable=_unusable(values.get("Seed"), seed, values.get("Size"), width),
    )


# -------------------------------------------------------------------------------------------------------------- ComfyUI


def _comfyui(text: str) -> ForeignRun | None:
    try:
        graph: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(graph, dict):
        return None
    nodes = cast("dict[str, Any]", graph)
    samplers = islice(_samplers(nodes), _MOST_SAMPLERS)
    found = [run for sampler in samplers if (run := _run_of(nodes, sampler)) is not None]
    # The first pass starts from an empty latent; later passes go on from its result.
    return next((run for run in found if run.width is not None), found[0] if found else None)


def _samplers(graph: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The inputs of each sampler."""
    for node in graph.values():
        if isinstance(node, dict) and cast("dict[str, Any]", node).get("class_type") in _SAMPLERS:
            yield _inputs(node)


def _node(graph: Mapping[str, Any], link: Any) -> tuple[str, dict[str, Any]] | None:
    """Class and inputs of the node that a link [name, output] leads to; None where it is no link or leads nowhere."""
    name: Any = cast("list[Any]", link)[0] if isinstance(link, list) and link else None
    node: Any = graph.get(name) if isinstance(name, str) else None
    if not isinstance(node, dict):
        return None
    return str(cast("dict[str, Any]", node).get("class_type")), _inputs(node)


def _way(graph: Mapping[str, Any], link: Any, *onwards: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The nodes from a link on, each reached through the first of its inputs `onwards` that is a link."""
    for _ in range(_LONGEST_WAY):
        node = _node(graph, link)
        if node is None:
            return
        yield node
        link = next((node[1][name] for name in onwards if isinstance(node[1].get(name), list)), None)


def _value(graph: Mapping[str, Any], given: Any, names: tuple[str, ...]) -> Any:
    """A value, or what the nodes that it is linked to hold under one of the names."""
    for _, inputs in _way(graph, given, *names):
        found = next((inputs[name] for name in names if isinstance(inputs.get(name), (str, int, float))), None)
        if found is not None:
            return found
    return given


def _inputs(node: Any) -> dict[str, Any]:
    inputs: Any = cast("dict[str, Any]", node).get("inputs")
    return cast("dict[str, Any]", inputs) if isinstance(inputs, dict) else {}


def _run_of(graph: Mapping[str, Any], sampler: dict[str, Any]) -> ForeignRun | None:
    """What leads to one sampler; None where no prompt does."""
    guider = _node(graph, sampler.get("guider"))
    noise = _node(graph, sampler.get("noise"))
    sigmas = _node(graph, sampler.get("sigmas"))
    inputs = {
        **(noise[1] if noise else {}),
        **(sigmas[1] if sigmas else {}),
        **(guider[1] if guider else {}),
        **sampler,
    }
    prompt, embedded = _prompt(graph, inputs.get("positive", inputs.get("conditioning")), "positive")
    if not prompt:
        return None
    negative, _ = _prompt(graph, inputs.get("negative"), "negative")
    given_seed = _value(graph, inputs.get("seed", inputs.get("noise_seed")), _NUMBERS)
    given_size = _first_size(graph, sampler.get("latent_image"))
    seed, (width, height) = _whole(given_seed, 0, MAX_SEED), _sides(given_size)
    scale = _scale(_value(graph, inputs.get("cfg"), ("value", "float", "cfg")))
    return ForeignRun(
        program="ComfyUI",
        prompt=prompt,
        negative=negative or None,
        seed=seed,
        width=width,
        height=height,
        steps=_whole(_value(graph, inputs.get("steps"), ("value", "int", "steps")), 1, MAX_STEPS),
        guidance=scale if embedded is None else embedded,
        unusable=_unusable(given_seed, seed, given_size, width),
    )


def _prompt(graph: Mapping[str, Any], link: Any, side: str) -> tuple[str | None, float | None]:
    """The text behind a conditioning, and the embedded guidance set on the way."""
    embedded: float | None = None
    for kind, inputs in _way(graph, link, side, *_ONWARDS):
        if kind == "ConditioningZeroOut":
            return None, embedded
        if "guidance" in inputs and embedded is None:
            embedded = _scale(_value(graph, inputs["guidance"], ("value", "float", "guidance")))
        for name in _TEXTS:
            text = _text(_value(graph, inputs.get(name), _TEXTS))
            if text:
                return text, embedded
    return None, embedded


def _first_size(graph: Mapping[str, Any], link: Any) -> str | None:
    """WIDTHxHEIGHT of the empty latent from which a sampler starts; none where another sampler comes before."""
    for kind, inputs in _way(graph, link, *_LATENTS):
        if kind in _SAMPLERS:
            break
        if "Empty" in kind:
            width, height = (_value(graph, inputs.get(name), (*_NUMBERS, name)) for name in ("width", "height"))
            return f"{width}x{height}"
    return None


# --------------------------------------------------------------------------------------------------------------- values


def _text(value: Any) -> str | None:
    """Text that can be written as UTF-8, else None."""
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        return None
    return value


def _whole(value: Any, low: int, high: int) -> int | None:
    if isinstance(value, str):
        value = int(value) if re.fullmatch(r"[0-9]{1,20}", value) else None
    return value if type(value) is int and low <= value <= high else None


def _sides(text: str | None) -> tuple[int, int] | tuple[None, None]:
    width, _, height = (text or "").partition("x")
    sides = _whole(width, 1, MAX_SIDE), _whole(height, 1, MAX_SIDE)
    return (None, None) if sides[0] is None or sides[1] is None else (sides[0], sides[1])


def _unusable(given_seed: Any, seed: int | None, given_size: str | None, width: int | None) -> tuple[str, ...]:
    """What was given and not taken, in words."""
    values = ("the seed", given_seed, seed), ("the size", given_size, width)
    return tuple(f"{name} {quoted(given, 40)}" for name, given, taken in values if given is not None and taken is None)


def _scale(value: Any) -> float | None:
    if isinstance(value, str):
        value = float(value) if re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,20})?", value) else None
    return float(value) if type(value) in (int, float) and 0 <= value <= MAX_GUIDANCE else None
