"""MrFlow's own nodes in ComfyUI's graph: the options of a plan that they were set to.

In their widgets 0, "family" and "auto" leave a number to the plan; such values are not taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.images.foreign.graph import NUMBERS, inputs_of, kind_of, link_of, node, prompt, reached, value, way
from mrflow_sched.images.foreign.run import ForeignRun, NodeSettings, scale, text, unusable, whole
from mrflow_sched.plan.checks import MAX_SEED, MAX_SIDE, MAX_STAGES
from mrflow_sched.plan.families import FAMILIES
from mrflow_sched.plan.notes import OF_STAGE_1
from mrflow_sched.plan.options import OPTIONS, PlanOptions

__all__ = ["read_mrflow_nodes"]

_MOST_MAKERS = 8
_MOST_BATCH = 4096
_DEMO = "MrFlowDemoModel"
# Widgets that are options of a plan under the same name.
_OF_STAGE_1 = ("preset", "factor", "stages", "low_steps", "solver", "noise")
_OF_LATER = ("sigma", "refine_steps")
_FILES = ("unet_name", "ckpt_name", "model_name", "gguf_name", "lora_name")
# Kinds of node, by how their names begin, that show, save or pass on.
_CARRY = ("MrFlow", "Save", "Preview", "Reroute", "VAE")
_MIX = ("ConditioningAverage", "ConditioningCombine", "ConditioningConcat", "ConditioningSet", "ControlNet")
_OF_A_STAGE = ("SamplerCustomAdvanced",)
_IS_DRAFT = "its being a draft (the whole image is made)"
_PRESET = re.compile(r"[a-z]{1,20}|[0-9]{1,4}(\+[0-9]{1,4}){1,7}")

Inputs = dict[str, Any]
Graph = Mapping[str, Any]


def read_mrflow_nodes(graph: Graph) -> ForeignRun | None:
    """Read the run of MrFlow's nodes behind the saved image.

    Args:
        graph: Nodes by name.

    Returns:
        The run; None where none of them is there, or no prompt leads to it.
    """
    makers = [(name, passed) for name, passed in reached(graph) if kind_of(graph[name]) in _MAKERS][:_MOST_MAKERS]
    for name, passed in makers:
        kind = kind_of(graph[name])
        found = _MAKERS[kind](graph, name)
        if found is not None and found.nodes is not None:
            later = [*_worked_on(graph, passed, () if kind != "MrFlowPlan" else _OF_A_STAGE)]
            if any(other != name and name not in way for other, way in makers):
                later.append("which of the graph's runs made it (the first is taken)")
            return replace(found, nodes=replace(found.nodes, left=(*found.nodes.left, *later)))
    return None


def _worked_on(graph: Graph, passed: Iterable[str], own: tuple[str, ...]) -> Iterator[str]:
    """What other nodes did to the image before it was saved, in words; `own` belong to the run."""
    for kind in dict.fromkeys(kind_of(graph[name]) for name in passed):
        if not kind.startswith(_CARRY) and kind not in own:
            yield f"what the node {quoted(kind, 40)} did to the image"


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass
class _Found:
    """What is read of a run, node by node.

    Attributes:
        options: Options of the plan.
        bad: What was given and cannot be used, by name.
        left: What cannot be read from the file, in words.
    """

    graph: Graph
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    bad: dict[str, tuple[Any, Any]] = field(default_factory=dict[str, tuple[Any, Any]])
    left: list[str] = field(default_factory=list[str])

    def number(self, inputs: Inputs, name: str) -> Any:
        return value(self.graph, inputs.get(name), (*NUMBERS, name))

    def take(self, inputs: Inputs, names: Iterable[str]) -> None:
        # Take widgets that are options of the plan by the same name.
        for name in names:
            self.option(name, self.number(inputs, name))

    def option(self, name: str, given: Any) -> None:
        # Take a value of an option, where it is one.
        if given in (None, 0, "", "family"):
            return
        try:
            plain = isinstance(given, (int, float)) or (isinstance(given, str) and len(given) <= 40)
            if not plain or (name == "preset" and not _PRESET.fullmatch(str(given))):
                raise MrFlowError("no value of a widget")
            self.options[name] = OPTIONS[name].checked(given)
        except MrFlowError:
            self.bad[f"the {name.replace('_', ' ')}"] = (given, None)

    def whole(self, inputs: Inputs, name: str, low: int, high: int, default: int | None = None) -> int | None:
        given = self.number(inputs, name)
        found = whole(given, low, high)
        self.bad |= {f"the {name.replace('_', ' ')}": (given, found)}
        return default if found is None else found

    def scale(self, inputs: Inputs, name: str) -> float | None:
        # A scale of CFG; None where it is 0, the plan's own.
        given = self.number(inputs, name)
        found = scale(given)
        self.bad |= {f"the {name.replace('_', ' ')}": (given, found)}
        return found or None

    def chosen(self, inputs: Inputs, batch: int) -> tuple[int, int]:
        # How many images of a batch go on to a handoff, and the first one's number.
        index = self.whole(inputs, "index", 0, _MOST_BATCH - 1, 0) or 0
        kind, pick = node(self.graph, inputs.get("image")) or ("", {})
        counted = pick if kind == "MrFlowPick" else inputs
        count = self.whole(counted, "count", 0, _MOST_BATCH, 0 if kind != "MrFlowPick" else 1)
        return count or max(batch - index, 1), index

    def shift(self, inputs: Inputs) -> None:
        given = value(self.graph, inputs.get("shift"), ("value", "shift"))
        if given == "final":
            self.options["shift_tokens"] = "final"
        elif given == "model":
            self.left.append("the shift that the model has in ComfyUI")

    def first_sigmas(self, inputs: Inputs) -> None:
        # Stage 1's own sigmas, which take the place of its steps and its shift.
        if inputs.get("low_sigmas") is None:
            return
        source = node(self.graph, inputs["low_sigmas"])
        words = text(value(self.graph, source[1].get("sigmas"), ("value", "string"))) if source else None
        numbers = re.findall(r"[0-9]*\.?[0-9]+", words) if words and re.fullmatch(r"[0-9., \n]{3,4000}", words) else []
        try:
            self.options["sigmas"] = OPTIONS["sigmas"].checked([float(number) for number in numbers] or None)
        except (MrFlowError, ValueError):
            self.left.append("the sigmas of stage 1 (low_sigmas)")
            return
        self.options = {name: each for name, each in self.options.items() if name not in ("low_steps", "shift_tokens")}

    def model(self, inputs: Inputs) -> None:
        # Say what the file names and does not hold: model, LoRAs, what else changed the model, upscaler.
        for kind, each in way(self.graph, inputs.get("model"), "model"):
            file = next((text(each[name]) for name in _FILES if isinstance(each.get(name), str)), None)
            if kind == _DEMO:
                continue
            if "lora" in kind.lower():
                self.left.append(f"the LoRA {quoted(file, 60)} (see --lora)")
            elif isinstance(each.get("model"), list):
                self.left.append(f"what the node {quoted(kind, 40)} did to the model")
            else:
                self.left.append(f"the model {quoted(file or kind, 60)} (see --model)")

    def upscaler(self, inputs: Inputs) -> None:
        if "upscale_model" not in inputs:
            self.left.append("the upscaler, which was Lanczos (see --upscaler)")
            return
        kind, each = node(self.graph, inputs["upscale_model"]) or ("", {})
        if kind != _DEMO:
            self.left.append(f"the upscaler {quoted(text(each.get('model_name')) or kind, 60)} (see --upscaler)")

    def run(self, shown: Inputs, numbers: Inputs, later: Inputs | None = None, **settings: Any) -> ForeignRun | None:
        # `shown` leads to the conditioning of stage 1, `later` to that of the others (None: the same), `numbers` holds
        # seed, size and family. `settings` are those of `NodeSettings`, and `first`, which is added to the seed. None
        # where no prompt is there.
        link = shown.get("positive", shown.get("conditioning"))
        words, embedded = prompt(self.graph, link, "positive")
        if not words:
            return None
        kinds = dict.fromkeys(kind for kind, _ in way(self.graph, link, "positive", "conditioning_1", "conditioning"))
        self.left += [f"what the node {quoted(kind, 40)} did to the prompt" for kind in kinds if kind.startswith(_MIX)]
        negative, _ = prompt(self.graph, shown.get("negative"), "negative")
        other = prompt(self.graph, later.get("positive", later.get("conditioning")), "positive")[0] if later else None
        first = settings.pop("first", 0)
        seed = self.whole(numbers, "seed", 0, MAX_SEED - first)
        # 0: from the image's size and the factor.
        width, height = (self.whole(numbers, name, 0, MAX_SIDE) or None for name in ("width", "height"))
        if settings.get("from_image"):
            self.options = {name: each for name, each in self.options.items() if name not in OF_STAGE_1}
        family = value(self.graph, numbers.get("family"), ("value", "family"))
        own = NodeSettings(
            options=cast("PlanOptions", self.options),
            family=family if isinstance(family, str) and family in FAMILIES else None,
            refine_prompt=other if other != words else None,
            left=tuple(dict.fromkeys(self.left)),
            **settings,
        )
        return ForeignRun(
            program="ComfyUI",
            prompt=words,
            negative=negative or None,
            seed=None if seed is None else seed + first,
            width=width,
            height=height,
            guidance=embedded,
            unusable=unusable(self.bad),
            nodes=own,
        )


# ---------------------------------------------------------------------------------------------- the nodes of whole runs


def _sampler(graph: Graph, name: str) -> ForeignRun | None:
    inputs, found = inputs_of(graph[name]), _Found(graph)
    found.take(inputs, (*_OF_STAGE_1, *_OF_LATER))
    found.shift(inputs)
    found.first_sigmas(inputs)
    found.model(inputs)
    found.upscaler(inputs)
    outputs = [each for other in graph.values() for each in inputs_of(other).values() if link_of(each) == name]
    if [name, 1] in outputs and [name, 0] not in outputs:
        found.left.append(_IS_DRAFT)
    return found.run(
        inputs,
        inputs,
        cfg=found.scale(inputs, "cfg"),
        refine_cfg=found.scale(inputs, "refine_cfg"),
        batch=found.whole(inputs, "batch_size", 1, _MOST_BATCH, 1),
    )


def _draft(graph: Graph, name: str) -> ForeignRun | None:
    inputs, found = inputs_of(graph[name]), _Found(graph)
    _first_stage(found, inputs)
    found.model(inputs)
    found.left.append(_IS_DRAFT)
    batch = found.whole(inputs, "batch_size", 1, _MOST_BATCH, 1)
    return found.run(inputs, inputs, cfg=found.scale(inputs, "cfg"), batch=batch)


def _first_stage(found: _Found, inputs: Inputs) -> None:
    found.take(inputs, _OF_STAGE_1)
    found.shift(inputs)
    found.first_sigmas(inputs)


def _finish(graph: Graph, name: str) -> ForeignRun | None:
    inputs, found = inputs_of(graph[name]), _Found(graph)
    planned = node(graph, inputs.get("plan"))
    if planned is None or planned[0] not in ("MrFlowDraft", "MrFlowPlan"):
        return None
    kind, numbers = planned
    shown = numbers if kind == "MrFlowDraft" else inputs
    _first_stage(found, numbers)
    found.take(inputs, _OF_LATER)
    found.model(inputs)
    found.upscaler(inputs)
    batch, index = found.chosen(inputs, found.whole(numbers, "batch_size", 1, _MOST_BATCH, 1) or 1)
    return found.run(
        shown,
        numbers,
        inputs,
        cfg=found.scale(numbers, "cfg"),
        refine_cfg=found.scale(inputs, "refine_cfg"),
        batch=batch,
        first=index,
        from_image=kind == "MrFlowPlan" and "image" in numbers,
    )


def _refine(graph: Graph, name: str) -> ForeignRun | None:
    """A refined image: the run that made the image, where MrFlow's nodes did, else a run from that image."""
    inputs, found = inputs_of(graph[name]), _Found(graph)
    before = link_of(inputs.get("image")) or ""
    if kind_of(graph.get(before)) == "MrFlowDecode":
        before = link_of(inputs_of(graph[before]).get("plan")) or ""
    if kind_of(graph.get(before)) in ("MrFlowSampler", "MrFlowFinish", "MrFlowPlan"):
        first = _MAKERS[kind_of(graph[before])](graph, before)
        if first is not None and first.nodes is not None:
            left = (*first.nodes.left, "its being enlarged again by MrFlow Refine")
            return replace(first, nodes=replace(first.nodes, left=left))
    found.take(inputs, ("preset", "factor", *_OF_LATER))
    found.model(inputs)
    found.upscaler(inputs)
    return found.run(inputs, inputs, cfg=found.scale(inputs, "cfg"), from_image=True)


# ---------------------------------------------------------------------------------------------- a run of single nodes


@dataclass(frozen=True)
class _StageNodes:
    """The nodes that lead to the sampler of one stage, by the sampler's inputs: class and inputs of each."""

    number: int
    parts: Mapping[str, tuple[str, Inputs]]

    def inputs(self, part: str, kind: str | None = None) -> Inputs:
        found = self.parts.get(part, ("", {}))
        return found[1] if kind in (None, found[0]) else {}


def _composed(graph: Graph, name: str) -> ForeignRun | None:
    inputs, found = inputs_of(graph[name]), _Found(graph)
    stages = sorted(_stages(found, name), key=lambda stage: stage.number)
    if not stages:
        return None
    _first_stage(found, inputs)
    later = [stage for stage in stages if stage.number > 1]
    first = None if stages[0].number > 1 else stages[0]
    if first is not None:
        _first_sampler(found, first)
    _later_samplers(found, later)
    guided = stages[0].inputs("guider")
    cfg = found.scale(guided, "cfg") if first is not None else None
    if not later or _saves_first(graph, name):
        found.left.append(_IS_DRAFT)
    found.model(guided or inputs)
    empty = first.inputs("latent_image") if first is not None else {}
    batch, index = found.whole(empty, "batch_size", 1, _MOST_BATCH, 1) or 1, 0
    handoff = next((each for each in _handoffs(graph, name)), None)
    if handoff is not None:
        found.upscaler(handoff)
        batch, index = found.chosen(handoff, batch)
    return found.run(
        guided,
        inputs,
        later[0].inputs("guider") if later else None,
        cfg=cfg or found.scale(inputs, "cfg"),
        refine_cfg=found.scale(later[0].inputs("guider"), "cfg") if later else None,
        batch=batch,
        first=index,
        from_image=first is None or "image" in inputs,
    )


def _saves_first(graph: Graph, plan: str) -> bool:
    """Whether what is saved of a plan's run is the image of its first stage."""
    passed = next((passed for name, passed in reached(graph) if name == plan), ())
    decoded = (inputs_of(graph[name]) for name in passed if kind_of(graph[name]) == "MrFlowDecode")
    return any(whole(inputs.get("stage"), 1, 1) == 1 for inputs in decoded)


def _handoffs(graph: Graph, plan: str) -> Iterator[Inputs]:
    """The inputs of a plan's handoffs."""
    found = (inputs_of(each) for each in graph.values() if kind_of(each) == "MrFlowHandoff")
    return (inputs for inputs in found if link_of(inputs.get("plan")) == plan)


def _stages(found: _Found, plan: str) -> Iterator[_StageNodes]:
    """The samplers whose noise, guider or sigmas come from a plan."""
    for each in found.graph.values():
        if kind_of(each) != "SamplerCustomAdvanced":
            continue
        names = ("noise", "guider", "sampler", "sigmas", "latent_image")
        parts = {name: part for name in names if (part := node(found.graph, inputs_of(each).get(name)))}
        own = [part for _, part in parts.values() if link_of(part.get("plan")) == plan and "stage" in part]
        if own:
            number = whole(found.number(own[0], "stage"), 1, MAX_STAGES)
            yield _StageNodes(number or 1, parts)


def _first_sampler(found: _Found, stage: _StageNodes) -> None:
    sigmas = stage.inputs("sigmas", "MrFlowSigmas")
    if sigmas:
        found.option("low_steps", found.number(sigmas, "steps"))
    else:
        found.left.append("the sigmas of stage 1")
    if not stage.inputs("noise", "MrFlowNoise"):
        found.left.append("the noise of stage 1")
    solver, core = stage.inputs("sampler", "MrFlowSolver"), stage.inputs("sampler", "KSamplerSelect")
    if solver:
        found.take(solver, ("solver",))
    elif core.get("sampler_name") == "euler":
        found.options["solver"] = "euler"
    else:
        found.left.append("the sampler of stage 1")


def _later_samplers(found: _Found, stages: list[_StageNodes]) -> None:
    """Sigma, steps and curve of the later stages: one value for all of them, as a plan's option is."""
    sigmas = [stage.inputs("sigmas", "MrFlowSigmas") for stage in stages]
    for widget, option in (("sigma", "sigma"), ("steps", "refine_steps"), ("curve", "refine_curve")):
        given = [found.number(each, widget) for each in sigmas]
        if given and all(each == given[0] for each in given):
            found.option(option, given[0])
        elif given:
            found.left.append(f"the {option.replace('_', ' ')} of each later stage, which differ")
    if not all(sigmas):
        found.left.append("the sigmas of the later stages")


_MAKERS: Mapping[str, Callable[[Graph, str], ForeignRun | None]] = {
    "MrFlowSampler": _sampler,
    "MrFlowDraft": _draft,
    "MrFlowFinish": _finish,
    "MrFlowRefine": _refine,
    "MrFlowPlan": _composed,
}
