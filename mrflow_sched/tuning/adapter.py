"""A fresh LoRA on a pipeline's network: its weights, and its file as other programs read it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mrflow_sched._runtime.errors import MrFlowError

if TYPE_CHECKING:
    from mrflow_sched.engines.diffusers.pipeline import PipelineEngine

__all__ = ["Adapter", "check_peft"]

_NAME = "tuned"
_LEFT_OUT = ("norm", "mod", "embed", "gate", "router")
"""Parts of layers' names: what sets scales and shifts, or chooses, is left as it is."""


def check_peft() -> None:
    """Refuse to go on where peft is missing.

    Raises:
        MrFlowError: It is not installed.
    """
    if find_spec("peft") is None:
        raise MrFlowError("tuning needs peft, which is not installed; run pip install 'mrflow-sched[tune]'.")


def layers_of(network: nn.Module) -> list[str]:
    """The layers that a LoRA is put on: the attention and the feed-forward layers of every block.

    Args:
        network: The network.

    Returns:
        Their names.
    """
    parts: dict[str, nn.Module] = dict(cast("Any", network).named_modules())
    inside = tuple(f"{name}." for name, part in parts.items() if isinstance(part, nn.ModuleList))
    return [
        name
        for name, part in parts.items()
        if isinstance(part, nn.Linear) and name.startswith(inside) and not any(word in name for word in _LEFT_OUT)
    ]


class Adapter:
    """A LoRA that changes nothing yet, on an engine's network; all other weights are frozen.

    Attributes:
        network: The network.
        parameters: The LoRA's weights, float32, in the order of their names.
    """

    def __init__(self, engine: PipelineEngine, rank: int, seed: int) -> None:
        """Put one on.

        Args:
            engine: Of a diffusers pipeline that takes LoRAs and has none on.
            rank: Its rank.
            seed: Of its first factors; the second ones are 0.

        Raises:
            MrFlowError: The pipeline takes no LoRA, or has one on already.
        """
        check_peft()
        pipe, self.network = engine.pipe, cast("Any", engine.network)
        kind = type(pipe).__name__
        found = [name for name, part in pipe.components.items() if part is self.network]
        if not hasattr(pipe, "load_lora_weights") or not hasattr(self.network, "add_adapter") or not found:
            raise MrFlowError(f"{kind} takes no LoRA, so there is nothing to tune; use another model.")
        if getattr(self.network, "peft_config", None):
            raise MrFlowError(
                f"the {kind} has a LoRA on; call its fuse_lora() and unload_lora_weights() first, so that the new one "
                "is tuned on top of it."
            )
        layers = layers_of(self.network)
        if not layers:
            raise MrFlowError(f"the network of {kind} has no blocks of linear layers to put a LoRA on.")
        self._prefix = found[0]
        self._before = {name: each.requires_grad for name, each in self.network.named_parameters()}
        self.network.requires_grad_(False)
        self._add(rank, layers, seed)
        named = [(name, each) for name, each in self.network.named_parameters() if each.requires_grad]
        self._names = [name for name, _ in sorted(named)]
        self.parameters: list[nn.Parameter] = [each for _, each in sorted(named)]
        for each in self.parameters:
            each.data = each.data.float()

    def _add(self, rank: int, layers: list[str], seed: int) -> None:
        from peft import LoraConfig

        devices = [each.device for each in self.network.parameters() if each.device.type == "cuda"][:1]
        library: Any = torch
        with library.random.fork_rng(devices):  # peft draws from the global state
            library.manual_seed(seed)
            self.network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), adapter_name=_NAME)

    @contextlib.contextmanager
    def off(self) -> Generator[None, None, None]:
        """Let the network run without the LoRA in this block.

        Yields:
            Nothing.
        """
        self.network.disable_adapters()
        try:
            yield
        finally:
            self.network.enable_adapters()

    @contextlib.contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Generator[None, None, None]:
        """Let the LoRA have other weights in this block.

        Args:
            weights: As `weights` gives them.

        Yields:
            Nothing.
        """
        own = self.weights()
        self.load(weights)
        try:
            yield
        finally:
            self.load(own)

    def weights(self) -> dict[str, Tensor]:
        """Copy the LoRA's weights.

        Returns:
            Them, by name, on the CPU.
        """
        return {
            name: each.detach().to("cpu", copy=True) for name, each in zip(self._names, self.parameters, strict=True)
        }

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights.

        Args:
            weights: As `weights` gives them.

        Raises:
            MrFlowError: They are of another LoRA.
        """
        if set(weights) != set(self._names):
            raise MrFlowError("the saved weights are of another LoRA; choose another folder.")
        for name, each in zip(self._names, self.parameters, strict=True):
            each.copy_(weights[name])

    def file(self, weights: Mapping[str, Tensor]) -> bytes:
        """A LoRA file as diffusers, ComfyUI and WebUIs read it.

        Args:
            weights: As `weights` gives them.

        Returns:
            A safetensors file. Its scale is 1: rank and alpha are the same.
        """
        from safetensors.torch import save

        peft: Any = import_module("peft")
        with self.holding(weights):
            layers: dict[str, Tensor] = peft.get_peft_model_state_dict(self.network, adapter_name=_NAME)
        dtype = torch.float16 if all(each.abs().max() < 6e4 for each in layers.values()) else torch.float32
        named = {f"{self._prefix}.{name}": each.to("cpu", dtype).contiguous() for name, each in layers.items()}
        return save(named, metadata={"format": "pt"})

    def remove(self) -> None:
        """Take the LoRA off, and leave the network as it was."""
        self.network.delete_adapters(_NAME)  # older versions of diffusers forget it only here
        self.network.unload_lora()
        for name, each in self.network.named_parameters():
            each.requires_grad_(self._before[name])
