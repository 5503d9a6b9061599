"""A bench for ComfyUI's nodes: a host with a model, graphs for it, and what the same run gives without ComfyUI."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_doubles import ENGINE, Host, Model, UpscaleModel, Vae

from mrflow_sched.plan.families import get_family
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import StagedResult, sample_staged

PLAN: dict[str, Any] = {
    "width": 64,
    "height": 64,
    "seed": 3,
    "preset": "6+1",
    "cfg": 0.0,
    "family": "auto",
    "factor": 0.0,
    "stages": 2,
    "low_steps": 0,
    "solver": "family",
    "shift": "low",
    "noise": "own",
}
LATER: dict[str, Any] = {"sigma": 0.0, "refine_steps": 0, "refine_cfg": 0.0}


class Doubler:
    name, scale = "doubler", 2

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return UpscaleModel()(images)


class Bench:
    """A host with a model, and graphs for it."""

    def __init__(self, **parts: Any) -> None:
        self.model, self.vae = parts.get("model") or Model(), parts.get("vae") or Vae()
        self.upscale_model = parts.get("upscale_model") or UpscaleModel()
        self.texts = {"positive": [["red", {}]], "negative": [["blue", {}]]}
        self.host = Host()

    def loaders(self) -> dict[str, Any]:
        values = {
            "model": self.model,
            "vae": self.vae,
            "upscale_model": self.upscale_model,
            **self.texts,
        }
        return {name: {"class_type": "Value", "inputs": {"value": value}} for name, value in values.items()}

    def links(self, *names: str) -> dict[str, Any]:
        return {name: [name, 0] for name in names}

    def run(self, kind: str, *sockets: str, output: int = 0, **values: Any) -> Any:
        given = {**self.links(*sockets), **values}
        inputs = {name: value for name, value in given.items() if value is not None}
        self.model.calls.clear()
        return self.host.run({**self.loaders(), "it": {"class_type": kind, "inputs": inputs}}, "it", output)

    def sampler(self, *, output: int = 0, **values: Any) -> Any:
        sockets = ("model", "positive", "negative", "vae", "upscale_model")
        return self.run("MrFlowSampler", *sockets, output=output, **{**PLAN, **LATER, "batch_size": 1, **values})

    def nodes(self, graph: dict[str, Any], node: str, output: int = 0) -> Any:
        self.model.calls.clear()
        return self.host.run({**self.loaders(), **graph}, node, output)


def whole(plan: StagedPlan, **changes: Any) -> StagedResult:
    settings: dict[str, Any] = {"negative_prompt": "blue", "upscaler": Doubler(), "keep_stages": True, **changes}
    return sample_staged(replace(ENGINE, family=get_family(plan.family)), plan, "red", **settings)


def name_of(value: Any) -> str:
    """A parameter's name in the list of tests."""
    return f"{value.config}-{value.file}" if isinstance(value, Model) else str(value)


def pictures(result: StagedResult) -> torch.Tensor:
    return result.images.movedim(1, -1)


def refined(bench: Bench, image: torch.Tensor, output: int = 0, **values: Any) -> Any:
    """One output of MrFlow Refine on an image."""
    settings = {"width": 0, "height": 0, "seed": 3, "preset": "12+1", "sigma": 0.0, "cfg": 0.0, "family": "auto"}
    parts = bench.links("model", "positive", "negative", "vae", "upscale_model", "image")
    graph = {
        "image": {"class_type": "Value", "inputs": {"value": image}},
        "it": {
            "class_type": "MrFlowRefine",
            "inputs": {**parts, **settings, "factor": 2.0, "refine_steps": 0, **values},
        },
    }
    return bench.nodes(graph, "it", output)
