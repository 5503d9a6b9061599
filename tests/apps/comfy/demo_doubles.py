"""Small doubles of the parts of ComfyUI that the demo model's loader uses; each does what ComfyUI's does, no more."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import comfy_doubles
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

CPU = torch.device("cpu")


class LatentFormat:
    """`comfy.latent_formats.LatentFormat`: as it stands, latents are the network's."""

    scale_factor = 1.0
    latent_channels = 4
    spacial_downscale_ratio = 8

    def process_in(self, latent: Tensor) -> Tensor:
        return latent * self.scale_factor


class Flux:
    """`comfy.supported_models.Flux`."""

    latent_format: Any = LatentFormat
    supported_inference_dtypes: Any = (torch.bfloat16, torch.float16, torch.float32)

    def __init__(self, unet_config: Mapping[str, Any]) -> None:
        self.unet_config = dict(unet_config)
        self.latent_format = self.latent_format()
        self.manual_cast_dtype: torch.dtype | None = None

    def set_inference_dtype(self, dtype: torch.dtype, manual_cast_dtype: torch.dtype | None) -> None:
        self.unet_config["dtype"], self.manual_cast_dtype = dtype, manual_cast_dtype

    def get_model(self, state_dict: Mapping[str, Tensor], prefix: str) -> Model:
        return Model(self)


class Model(nn.Module):
    """`comfy.model_base.Flux`, without a network."""

    def __init__(self, config: Flux) -> None:
        super().__init__()
        self.model_config = config
        self.weights: dict[str, Tensor] = {}

    def load_model_weights(self, weights: dict[str, Tensor], prefix: str) -> None:
        self.weights = weights


class ModelPatcher:
    """`comfy.model_patcher.ModelPatcher`."""

    def __init__(self, model: nn.Module, *, load_device: torch.device, offload_device: torch.device) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device


class Layers:
    """`comfy.ops.disable_weight_init`: layers that ComfyUI can stream."""

    class Conv2d(nn.Conv2d):
        comfy_cast_weights = False

    class GroupNorm(nn.GroupNorm):
        comfy_cast_weights = False


class TAESD(nn.Module):
    """`comfy.taesd.taesd.TAESD`: what its weights are called."""

    def __init__(self, latent_channels: int = 4) -> None:
        super().__init__()
        self.taesd_decoder = nn.Sequential(nn.Identity(), nn.Conv2d(latent_channels, 3, 3))


class VAE:
    """`comfy.sd.VAE`: finds out by the weights' names what it has, and asks its first stage for everything."""

    def __init__(self, sd: Mapping[str, Tensor]) -> None:
        found = TAESD(sd["taesd_decoder.1.weight"].shape[1])
        found.load_state_dict(sd)
        self.first_stage_model: Any = found
        self.latent_channels = sd["taesd_decoder.1.weight"].shape[1]
        self.device, self.vae_dtype = CPU, torch.float32
        self.downscale_ratio = self.upscale_ratio = 8
        self.memory_used_encode: Any = None
        self.memory_used_decode: Any = None
        self.patcher = ModelPatcher(found, load_device=CPU, offload_device=CPU)
        self.size: int | None = None
        self.model_size()

    def model_size(self) -> int:
        if self.size is None:
            self.size = sum(each.numel() * each.element_size() for each in self.first_stage_model.parameters())
        return self.size

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        return self.first_stage_model.encode(pixels.movedim(-1, 1) * 2 - 1)

    @torch.inference_mode()
    def decode(self, samples: Tensor) -> Tensor:
        return self.first_stage_model.decode(samples).add(1).div(2).clamp(0, 1).movedim(1, -1)


class ClipTarget:
    """`comfy.supported_models_base.ClipTarget`."""

    def __init__(self, tokenizer: Any, clip: Any) -> None:
        self.tokenizer, self.clip = tokenizer, clip


class CLIP:
    """`comfy.sd.CLIP`."""

    def __init__(self, target: ClipTarget, model_options: Mapping[str, Any]) -> None:
        options: Any = model_options
        device, dtype = options["initial_device"], options["dtype"]
        self.cond_stage_model = target.clip(device=device, dtype=dtype, model_options=options)
        assert self.cond_stage_model.dtypes == {dtype}
        self.tokenizer = target.tokenizer(embedding_directory=None, tokenizer_data={})
        devices = {"load_device": options["load_device"], "offload_device": options["offload_device"]}
        self.patcher = ModelPatcher(self.cond_stage_model, **devices)

    def tokenize(self, text: str, return_word_ids: bool = False, **options: Any) -> Any:
        return self.tokenizer.tokenize_with_weights(text, return_word_ids, **options)

    @torch.inference_mode()
    def encode_from_tokens_scheduled(self, tokens: Any) -> list[list[Any]]:
        self.cond_stage_model.reset_clip_options()
        self.cond_stage_model.set_clip_options({"execution_device": self.patcher.load_device})
        cond, pooled = self.cond_stage_model.encode_token_weights(tokens)
        return [[cond, {"pooled_output": pooled}]]


def _weight_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    return next(iter(weights.values())).dtype


def _converted(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """`convert_diffusers_mmdit`: other names, and the old ones are gone."""
    return {f"converted.{name}": weights.pop(name) for name in list(weights)}


def _unet_dtype(*, model_params: int, supported_dtypes: list[torch.dtype], weight_dtype: torch.dtype) -> torch.dtype:
    """On a CPU: the widest."""
    assert model_params > 9e6
    assert weight_dtype in supported_dtypes
    return supported_dtypes[-1]


def comfy() -> dict[str, Any]:
    """ComfyUI's modules by name."""

    def device() -> torch.device:
        return CPU

    management = dict.fromkeys(
        ("get_torch_device", "unet_offload_device", "vae_offload_device", "intermediate_device"), device
    )
    return {
        "comfy.latent_formats": {"LatentFormat": LatentFormat},
        "comfy.supported_models": {"Flux": Flux},
        "comfy.supported_models_base": {"ClipTarget": ClipTarget},
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.model_management": {**management, "unet_dtype": _unet_dtype, "unet_manual_cast": lambda *_: None},
        "comfy.model_detection": {
            "convert_diffusers_mmdit": _converted,
            "detect_unet_config": lambda *_: {"axes_dim": [16, 56, 56], "num_heads": 2, "hidden_size": 256},
        },
        "comfy.utils": {
            "load_torch_file": lambda path, safe_load: load_file(path),
            "calculate_parameters": lambda weights: sum(each.numel() for each in weights.values()),
            "weight_dtype": _weight_dtype,
        },
        "comfy.ops": {"disable_weight_init": Layers},
        "comfy.sd": {"VAE": VAE, "CLIP": CLIP},
        "comfy.taesd.taesd": {"TAESD": TAESD},
    }


def demo_in_comfy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`mrflow_sched.apps.comfy.demo`, imported where ComfyUI's modules are the doubles."""
    modules = comfy_doubles.modules()
    for name, members in comfy().items():
        vars(modules.setdefault(name, ModuleType(name))).update(members)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    comfy_doubles.forget()
    return import_module("mrflow_sched.apps.comfy.demo")
