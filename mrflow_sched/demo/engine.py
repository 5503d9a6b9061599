"""The embedded model as an engine: it says where a prompt leaves its world, and has its few-step LoRA at hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from mrflow_sched.demo.paths import turbo_path
from mrflow_sched.demo.words import prompt_notes
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine, PipelineText
from mrflow_sched.engines.diffusers.precision import state_of
from mrflow_sched.sampling.engine import Capabilities

__all__ = ["EmbeddedEngine", "with_lora"]


class EmbeddedEngine(PipelineEngine):
    """The embedded model. It notes words and sentences that it does not know, and samples all the same."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Take what `PipelineEngine` takes.

        Args:
            *arguments: In its order.
            **options: By name.
        """
        super().__init__(*arguments, **options)
        self._few_step = False
        self._twins: dict[str, Any] = {}  # shared with its copies

    @property
    def capabilities(self) -> Capabilities:
        """Those of `PipelineEngine`, and the few-step LoRA."""
        return replace(super().capabilities, few_step=True)

    def in_few_steps(self) -> EmbeddedEngine:
        """The same engine with its few-step LoRA on, whatever other LoRAs its pipeline has.

        Returns:
            An engine that shares all with this one but the network, which is copied where it first runs.
        """
        engine = copy.copy(self)
        engine._few_step = True
        return engine

    def _as_run(self, network: torch.nn.Module, asked: Any) -> torch.nn.Module:
        return super()._as_run(self._twin_of(network) if self._few_step else network, asked)

    def _twin_of(self, network: torch.nn.Module) -> torch.nn.Module:
        state = state_of(network)
        if self._twins.get("state") != state:
            self._twins |= {"state": state, "network": with_lora(network, turbo_path())}
        return self._twins["network"]

    def encode_text(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None = None,
        *,
        lora_scale: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> PipelineText:
        """Embeddings for a batch of images, as `PipelineEngine.encode_text` makes them.

        Args:
            prompts: One text per image.
            negative_prompts: As many, or None.
            lora_scale: The scale of all LoRAs; None: as they are set.
            size: Of the final image; not read.

        Returns:
            The conditioning; its first notes say what of the prompts the model does not know.
        """
        notes = prompt_notes(prompts)
        text = super().encode_text(prompts, negative_prompts, lora_scale=lora_scale, size=size)
        return replace(text, notes=(*notes, *text.notes))


def with_lora(network: torch.nn.Module, file: Path) -> torch.nn.Module:
    """A copy of the embedded network with a LoRA added to its weights; no peft is needed for that.

    Args:
        network: The transformer, with LoRAs of its own or without.
        file: A LoRA as diffusers saves it, whose alpha is its rank.

    Returns:
        The copy.
    """
    import safetensors.torch

    factors: dict[str, torch.Tensor] = cast("Any", safetensors.torch).load_file(file)
    twin = copy.deepcopy(network)
    for name in [each for each in factors if each.endswith(".lora_A.weight")]:
        place = name.removesuffix(".lora_A.weight")
        layer: Any = twin.get_submodule(place.removeprefix("transformer."))
        weight = getattr(layer, "base_layer", layer).weight  # a layer with a LoRA of the owner's wraps its own
        with torch.no_grad():
            weight += (factors[f"{place}.lora_B.weight"].float() @ factors[name].float()).to(weight)
    return twin
