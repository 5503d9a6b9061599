"""Graphs in API form: what the tests queue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from mrflow_sched.plan.stages import StagedPlan

from .process import X2_NAME, kinds

Link = list[Any]
PROMPT = "a red striped circle and a blue star over green hills under an orange sky, the word FLOW"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


@dataclass(frozen=True)
class Node:
    """A node of a graph; `node[0]` is a link to its first output."""

    identity: str

    def __getitem__(self, output: int) -> Link:
        return [self.identity, output]


@dataclass
class Graph:
    """Nodes by number; a widget that is not given has its default, as on the page.

    Attributes:
        info: What `/object_info` says.
        api: The graph as it is queued.
    """

    info: Mapping[str, Any]
    api: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, kind: str, /, **inputs: Any) -> Node:
        """Add a node; inputs that are None are left out."""
        given = {name: value for name, value in inputs.items() if value is not None}
        defaults = {
            name: default_of(definition)
            for name, definition in self.info[kind]["input"].get("required", {}).items()
            if name not in given and is_widget(definition)
        }
        node = Node(str(len(self.api) + 1))
        self.api[node.identity] = {"class_type": kind, "inputs": {**defaults, **given}}
        return node

    def save(self, link: Link, name: str) -> Node:
        """Save a value under a name."""
        return self.add("RecorderSave", value=link, name=name)


def is_widget(definition: list[Any]) -> bool:
    """Whether an input of `/object_info` is a widget, not a socket."""
    options = definition[1] if len(definition) > 1 else {}
    return (isinstance(definition[0], list) or definition[0] in WIDGETS) and not options.get("forceInput")


def default_of(definition: list[Any]) -> Any:
    """What the page puts into a widget."""
    options = definition[1] if len(definition) > 1 else {}
    if "default" in options:
        return options["default"]
    kind: Any = definition[0]
    choices: Any = kind if isinstance(kind, list) else options.get("options", [])
    if choices:
        return choices[0]
    return {"STRING": "", "BOOLEAN": False}.get(str(kind), 0)


@dataclass
class Parts:
    """What every graph starts with, as links."""

    model: Link
    positive: Link
    negative: Link | None
    vae: Link
    upscale_model: Link | None

    @property
    def sockets(self) -> dict[str, Link | None]:
        """By the names that the expanding nodes have for them."""
        return dict(vars(self))


def doubled(graph: Graph, kind: str = "Flux", *, seconds: float = 0.0, answer: str = "turn") -> Parts:
    """A model without weights of one of ComfyUI's classes, watched, and the demo model's upscaler."""
    if kind not in kinds():
        pytest.skip(f"this ComfyUI has no {kind}")
    made = graph.add("RecorderModel", kind=kind, answer=answer)
    watched = graph.add("RecorderWatch", model=made[0], seconds=seconds)
    upscaler = graph.add("UpscaleModelLoader", model_name=X2_NAME)
    return Parts(watched[0], made[1], made[1], made[2], upscaler[0])


def demo(graph: Graph, prompt: str = PROMPT) -> Parts:
    """The demo model, watched."""
    made = graph.add("MrFlowDemoModel")
    watched = graph.add("RecorderWatch", model=made[0])
    text = graph.add("CLIPTextEncode", clip=made[1], text=prompt)
    guided = graph.add("FluxGuidance", conditioning=text[0], guidance=3.5)
    return Parts(watched[0], guided[0], None, made[2], made[3])


def staged(graph: Graph, parts: Parts, name: str, **inputs: Any) -> Node:
    """The one node, its three outputs saved as NAME, NAME-draft and NAME-plan."""
    chosen = {"width": 256, "height": 256, "preset": "12+1", "cfg": 1.0, **inputs}
    node = graph.add("MrFlowSampler", **{**parts.sockets, **chosen})
    graph.save(node[0], name)
    graph.save(node[1], f"{name}-draft")
    graph.save(node[2], f"{name}-plan")
    return node


def composed(graph: Graph, parts: Parts, name: str, stages: int = 2, **inputs: Any) -> None:
    """The composable path, all of `staged`'s inputs at the nodes that take them; saved as NAME."""
    of_plan = ("width", "height", "seed", "preset", "cfg", "family", "factor", "stages", "low_steps", "solver", "noise")
    chosen = {"width": 256, "height": 256, "preset": "12+1", "cfg": 1.0, "stages": stages, **inputs}
    plan = graph.add(
        "MrFlowPlan", model=parts.model, **{key: value for key, value in chosen.items() if key in of_plan}
    )[0]
    image: Link = []
    for stage in range(1, stages + 1):
        if stage == 1:
            latent = graph.add(
                "MrFlowEmptyLatent", plan=plan, model=parts.model, batch_size=inputs.get("batch_size", 1)
            )[0]
        else:
            handed = {"image": image, "vae": parts.vae, "upscale_model": parts.upscale_model}
            latent = graph.add("MrFlowHandoff", plan=plan, stage=stage, **handed)[0]
        noise = graph.add("MrFlowNoise", plan=plan, stage=stage)
        sigma = inputs.get("sigma") if stage > 1 else None
        steps = inputs.get("refine_steps") if stage > 1 else None
        sigmas = graph.add("MrFlowSigmas", plan=plan, model=parts.model, stage=stage, sigma=sigma, steps=steps)
        solver = graph.add("MrFlowSolver", plan=plan)
        texts = {"positive": parts.positive, "negative": parts.negative}
        guider = graph.add("MrFlowGuider", plan=plan, model=parts.model, stage=stage, **texts)
        sampled = graph.add(
            "SamplerCustomAdvanced",
            noise=noise[0],
            guider=guider[0],
            sampler=solver[0],
            sigmas=sigmas[0],
            latent_image=latent,
        )
        image = graph.add("MrFlowDecode", plan=plan, samples=sampled[0], vae=parts.vae, stage=stage)[0]
    graph.save(image, name)


def plan_in(text: str) -> StagedPlan:
    """The plan in the last line of what a node says."""
    return StagedPlan.from_string(text.strip().splitlines()[-1].removeprefix("plan: "))
