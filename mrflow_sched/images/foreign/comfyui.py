"""ComfyUI's graph of nodes: what made the image that it stands in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, cast

from mrflow_sched.images.foreign.graph import NUMBERS, inputs_of, kind_of, node, prompt, value, way
from mrflow_sched.images.foreign.mrflow_nodes import read_mrflow_nodes
from mrflow_sched.images.foreign.run import ForeignRun, scale, sides, unusable, whole
from mrflow_sched.plan.checks import MAX_SEED, MAX_STEPS

__all__ = ["read_comfyui"]

_MOST_SAMPLERS = 8
_SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
_LATENTS = ("latent_image", "samples", "latent", "pixels", "image")


def read_comfyui(text: str) -> ForeignRun | None:
    """Read a run: that of MrFlow's nodes where they made the image, else that of ComfyUI's own samplers.

    Args:
        text: The graph as JSON.

    Returns:
        The run; None where the graph is damaged, or holds no prompt that leads to a sampler.
    """
    try:
        graph: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(graph, dict):
        return None
    nodes = cast("dict[str, Any]", graph)
    staged = read_mrflow_nodes(nodes)
    if staged is not None:
        return staged
    samplers = islice(_samplers(nodes), _MOST_SAMPLERS)
    found = [run for sampler in samplers if (run := _run_of(nodes, sampler)) is not None]
    # The first pass starts from an empty latent; later passes go on from its result.
    return next((run for run in found if run.width is not None), found[0] if found else None)


def _samplers(graph: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The inputs of each sampler."""
    return (inputs_of(each) for each in graph.values() if kind_of(each) in _SAMPLERS)


def _run_of(graph: Mapping[str, Any], sampler: dict[str, Any]) -> ForeignRun | None:
    """What leads to one sampler; None where no prompt does."""
    parts = [node(graph, sampler.get(name)) for name in ("noise", "sigmas", "guider")]
    inputs = {name: given for _, each in filter(None, parts) for name, given in each.items()} | sampler
    text, embedded = prompt(graph, inputs.get("positive", inputs.get("conditioning")), "positive")
    if not text:
        return None
    negative, _ = prompt(graph, inputs.get("negative"), "negative")
    given_seed = value(graph, inputs.get("seed", inputs.get("noise_seed")), NUMBERS)
    given_size = _first_size(graph, sampler.get("latent_image"))
    seed, (width, height) = whole(given_seed, 0, MAX_SEED), sides(given_size)
    cfg = scale(value(graph, inputs.get("cfg"), ("value", "float", "cfg")))
    return ForeignRun(
        program="ComfyUI",
        prompt=text,
        negative=negative or None,
        seed=seed,
        width=width,
        height=height,
        steps=whole(value(graph, inputs.get("steps"), ("value", "int", "steps")), 1, MAX_STEPS),
        guidance=cfg if embedded is None else embedded,
        unusable=unusable({"the seed": (given_seed, seed), "the size": (given_size, width)}),
    )


def _first_size(graph: Mapping[str, Any], link: Any) -> str | None:
    """WIDTHxHEIGHT of the empty latent from which a sampler starts; none where another sampler comes before."""
    for kind, inputs in way(graph, link, *_LATENTS):
        if kind in _SAMPLERS:
            break
        if "Empty" in kind:
            width, height = (value(graph, inputs.get(name), (*NUMBERS, name)) for name in ("width", "height"))
            return f"{width}x{height}"
    return None
