"""Doubles of what the nodes use of ComfyUI: small, and with the behaviour that its real process was seen to have.

`Host` runs graphs: it expands nodes, passes links where an input asks for links, and caches every node by the inputs
of all that lead to it, as ComfyUI does. MODEL and VAE are the analytic field, whose answers are exact.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mrflow_sched.apps import comfy
from mrflow_sched.engines.analytic import GaussianFieldEngine
from mrflow_sched.plan.families import get_family

ENGINE = GaussianFieldEngine(means={"red": (2.0, -1.0, -1.0), "blue": (-1.0, -1.0, 2.0)}, family=get_family("z-image"))


class Interrupted(Exception):
    """The user's interrupt."""


# --------------------------------------------------------------------------------------------------- comfy_api.latest


@dataclass
class Socket:
    """An input or an output."""

    kind: str
    id: str = ""
    words: dict[str, Any] = field(default_factory=dict)
    extra_dict: dict[str, Any] = field(default_factory=dict)


def _kind(name: str) -> Any:
    def given(id: str = "", **words: Any) -> Socket:
        return Socket(name, id, words)

    return SimpleNamespace(Input=given, Output=given, io_type=name)


class Schema(SimpleNamespace):
    """What a node says of itself."""

    __dataclass_fields__ = ("search_aliases",)


class NodeOutput:
    """What a node gives."""

    def __init__(self, *args: Any, expand: Any = None) -> None:
        self.args, self.expand = args, expand

    def __getitem__(self, index: int) -> Any:
        return self.args[index]


class ComfyNode:
    """A node."""

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        return cls.define_schema()  # type: ignore[attr-defined]


_KINDS = (
    *("Model", "Conditioning", "Vae", "UpscaleModel", "Image", "Latent", "Sigmas", "Noise", "Sampler", "Guider"),
    *("Clip", "String", "Int", "Float", "Combo"),
)
_HIDDEN = SimpleNamespace(unique_id="UNIQUE_ID", dynprompt="DYNPROMPT")
_CLASSES = {"ComfyNode": ComfyNode, "Schema": Schema, "NodeOutput": NodeOutput, "Hidden": _HIDDEN, "Custom": _kind}
IO = SimpleNamespace(**{name: _kind(name) for name in _KINDS}, **_CLASSES)


# ------------------------------------------------------------------------------------------------- models and samplers


class FlowSampling:
    """As ComfyUI's ModelSamplingDiscreteFlow."""

    sigma_max = torch.tensor(1.0)

    def __init__(self, shift: float = 3.0) -> None:
        self.shift = shift

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
        return sigma * noise + (1.0 - sigma) * latent


class ModelSamplingFlux(FlowSampling):
    """Whose shift is a logarithm."""


class DiscreteSampling:
    """Of SD1.5 and SDXL."""

    sigma_max = torch.tensor(14.6146)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
        return latent + noise * sigma


@dataclass
class Model:
    """A MODEL around the analytic field; `calls` holds (sigma, rows) of every evaluation."""

    config: str = "ZImage"
    kind: str = "FLOW"
    sampling: Any = field(default_factory=FlowSampling)
    file: str | None = "z_image_bf16"
    unet: Mapping[str, Any] = field(default_factory=dict)
    engine: Any = ENGINE
    channels: int | None = None
    dimensions: int = 2
    calls: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = type(self.config, (), {"unet_config": dict(self.unet)})()
        self.model = SimpleNamespace(model_config=config, model_type=SimpleNamespace(name=self.kind))
        factor = self.engine.family.vae_factor
        self.format = SimpleNamespace(
            latent_channels=self.channels or 3 * factor**2,
            latent_dimensions=self.dimensions,
            spacial_downscale_ratio=factor,
        )
        if self.file is not None:
            self.cached_patcher_init = (print, (f"/models/{self.file}.safetensors", {}))

    def get_model_object(self, name: str) -> Any:
        return {"latent_format": self.format, "model_sampling": self.sampling}[name]


@dataclass
class Vae:
    """A VAE around the analytic field; with `frames` it has an axis of time, and takes a batch for a video."""

    engine: Any = ENGINE
    frames: bool = False
    latent_channels: int | None = None
    seen: list[tuple[int, ...]] = field(default_factory=list)

    def encode(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        latents = self.engine.encode(images[..., :3].movedim(-1, 1))
        return latents.movedim(0, 1)[None] if self.frames else latents

    def decode(self, samples: Tensor) -> Tensor:
        if samples.ndim == 5:
            return self.engine.decode(samples[:, :, 0]).movedim(1, -1)[:, None]
        return self.engine.decode(samples).movedim(1, -1)


@dataclass
class UpscaleModel:
    """An UPSCALE_MODEL of scale 2 by repetition, or one that fails."""

    scale: int = 2
    error: Exception | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return images.repeat_interleave(self.scale, -1).repeat_interleave(self.scale, -2)


@dataclass
class Sampler:
    """A SAMPLER."""

    function: Callable[..., Tensor]


class CFGGuider:
    """A GUIDER."""

    def __init__(self, model: Model) -> None:
        self.model_patcher, self.cfg = model, 1.0
        self.positive: Any = None
        self.negative: Any = None

    def set_conds(self, positive: Any, negative: Any) -> None:
        self.positive, self.negative = positive, negative

    def set_cfg(self, cfg: float) -> None:
        self.cfg = cfg

    def sample(self, noise: Tensor, latent: Tensor, sampler: Sampler, sigmas: Tensor) -> Tensor:
        model, rows = self.model_patcher, 1 if self.cfg == 1.0 else 2
        texts = [[cond[0][0]] * len(noise) for cond in (self.positive, self.negative)]
        text = model.engine.encode_text(*texts)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            model.calls.append((round(float(sigma[0]), 6), rows * len(x)))
            flat = x[:, :, 0] if x.ndim == 5 else x
            found = model.engine.denoise(flat, sigma, text, guidance=self.cfg)
            return found.reshape(x.shape)

        return sampler.function(denoise, model.sampling.noise_scaling(sigmas[0], noise, latent), sigmas)


def fix_empty_latent_channels(model: Model, latent: Tensor) -> Tensor:
    return latent[:, :, None] if model.format.latent_dimensions == 3 else latent


# -------------------------------------------------------------------------------------------------------------- graphs


class GraphBuilder:
    """As ComfyUI's: node ids are unique over all expansions."""

    made = 0

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}

    def node(self, class_type: str, **values: Any) -> Any:
        GraphBuilder.made += 1
        name = f"inner.{GraphBuilder.made}"
        self.nodes[name] = {"class_type": class_type, "inputs": values}
        return SimpleNamespace(out=lambda index: [name, index])

    def finalize(self) -> dict[str, dict[str, Any]]:
        return self.nodes


class SamplerCustomAdvanced:
    """ComfyUI's own node."""

    hidden: Any = None

    @classmethod
    def execute(cls, noise: Any, guider: CFGGuider, sampler: Sampler, sigmas: Tensor, latent_image: Any) -> NodeOutput:
        drawn = noise.generate_noise(latent_image)
        done = guider.sample(drawn, latent_image["samples"], sampler, sigmas)
        return NodeOutput({**latent_image, "samples": done}, None)


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


class Host:
    """Runs graphs of nodes. Values that are no links are given to nodes as they are; "List" is a node of several."""

    def __init__(self) -> None:
        from mrflow_sched.apps.comfy import expanding, nodes

        rooms = (expanding, nodes)
        self.kinds: dict[str, Any] = {name: getattr(room, name) for room in rooms for name in room.__all__}
        self.graph: dict[str, dict[str, Any]] = {}
        self.cache: dict[Any, tuple[list[Any], ...]] = {}

    def run(self, graph: Mapping[str, Mapping[str, Any]], node: str, index: int = 0) -> Any:
        """One output of one node, which is one value."""
        (found,) = self.run_list(graph, node, index)
        return found

    def run_list(self, graph: Mapping[str, Mapping[str, Any]], node: str, index: int = 0) -> list[Any]:
        """One output of one node."""
        self.graph = {name: dict(each) for name, each in graph.items()}
        return self._outputs(node)[index]

    def _outputs(self, name: str) -> tuple[list[Any], ...]:
        key = self._key(name)
        if key not in self.cache:
            self.cache[key] = self._executed(name)
        return self.cache[key]

    def _key(self, name: str) -> Any:
        node = self.graph[name]
        inputs = [
            (each, (self._key(value[0]), value[1]) if is_link(value) else value if _plain(value) else id(value))
            for each, value in sorted(node["inputs"].items())
        ]
        return node["class_type"], tuple(inputs)

    def _executed(self, name: str) -> tuple[list[Any], ...]:
        node = self.graph[name]
        kind, inputs = node["class_type"], node["inputs"]
        if kind in ("Value", "List"):
            return ([inputs["value"]] if kind == "Value" else list(inputs["value"]),)
        made: Any = self.kinds.get(kind, SamplerCustomAdvanced)
        raw, lists = set[str](), False
        if kind in self.kinds:
            made = self.kinds[kind]
            schema = made.define_schema()
            raw = {each.id for each in schema.inputs if each.extra_dict.get("rawLink")}
            lists = vars(schema).get("is_input_list", False)
            _check(schema, inputs)
        values = {
            each: self._outputs(value[0])[value[1]] if is_link(value) and each not in raw else [value]
            for each, value in inputs.items()
        }
        hidden = {"unique_id": name, "dynprompt": SimpleNamespace(get_node=self.graph.__getitem__)}
        made.hidden = SimpleNamespace(**hidden)
        count = 1 if lists else max(map(len, values.values()), default=1)
        calls = [{each: found[min(at, len(found) - 1)] for each, found in values.items()} for at in range(count)]
        results = [self._resolved(made.execute(**call)) for call in ([values] if lists else calls)]
        return tuple([result[at] for result in results] for at in range(len(results[0])))

    def _resolved(self, found: NodeOutput) -> list[Any]:
        """What a call gave; as ComfyUI does, an expanded node's outputs one after the other, whatever each holds."""
        if found.expand is None:
            return list(found.args)
        self.graph |= found.expand
        return [
            each for value in found.args for each in (self._outputs(value[0])[value[1]] if is_link(value) else [value])
        ]


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _check(schema: Any, values: Mapping[str, Any]) -> None:
    known = {each.id: each for each in schema.inputs}
    assert set(values) <= set(known), (schema.node_id, set(values) - set(known))
    missing = {name for name, each in known.items() if not each.words.get("optional")} - set(values)
    assert not missing, (schema.node_id, missing)
    for name, value in values.items():
        words = known[name].words
        if _plain(value) and "min" in words:
            assert words["min"] <= value <= words["max"], (schema.node_id, name, value)
        if _plain(value) and "options" in words:
            assert value in words["options"], (schema.node_id, name, value)


# -------------------------------------------------------------------------------------------------------------- modules


def modules() -> dict[str, ModuleType]:
    """ComfyUI's modules by name."""

    def made(name: str, **members: Any) -> ModuleType:
        module = ModuleType(name)
        vars(module).update(members)
        return module

    def upscaled(model: UpscaleModel, images: Tensor) -> NodeOutput:
        return NodeOutput(model(images.movedim(-1, 1)).movedim(1, -1))

    management = {"InterruptProcessingException": Interrupted, "intermediate_device": lambda: torch.device("cpu")}
    return {
        "comfy_api": made("comfy_api"),
        "comfy_api.latest": made("comfy_api.latest", io=IO, ComfyExtension=object),
        "comfy": made("comfy"),
        "comfy.model_management": made("comfy.model_management", **management),
        "comfy.sample": made("comfy.sample", fix_empty_latent_channels=fix_empty_latent_channels),
        "comfy.samplers": made("comfy.samplers", KSAMPLER=Sampler, CFGGuider=CFGGuider),
        "comfy_extras": made("comfy_extras"),
        "comfy_extras.nodes_upscale_model": made(
            "comfy_extras.nodes_upscale_model", ImageUpscaleWithModel=SimpleNamespace(execute=upscaled)
        ),
        "comfy_execution": made("comfy_execution"),
        "comfy_execution.graph_utils": made("comfy_execution.graph_utils", GraphBuilder=GraphBuilder),
    }


def forget(names: Sequence[str] = ("inputs", "nodes", "expanding", "extension", "demo")) -> None:
    """Drop the modules of the pack that hold ComfyUI's classes."""
    for name in names:
        sys.modules.pop(f"mrflow_sched.apps.comfy.{name}", None)
        if hasattr(comfy, name):  # where `from mrflow_sched.apps.comfy import nodes` looks first
            delattr(comfy, name)
