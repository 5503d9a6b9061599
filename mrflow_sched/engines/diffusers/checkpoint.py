"""What a single file is, told by the header of its safetensors: which model, which of its parts, or something else.

The names of tensors are those of the authors' own code and of the hosts that followed it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

from safetensors import safe_open

from mrflow_sched._runtime.errors import MrFlowError, first_line, shown
from mrflow_sched.engines.diffusers.files import Weights, tensor_shapes

__all__ = ["Checkpoint", "Kind", "named", "read_checkpoint"]

_NETWORK = "model.diffusion_model."
_VAE = ("first_stage_model.", "vae.")
_TEXT_ENCODERS = ("cond_stage_model.", "conditioner.", "text_encoder")
_AVERAGES = "model_ema."
"""How the tensors of the parts begin; those of a network alone may begin with nothing."""


class _Encoder(NamedTuple):
    """How the names of a text encoder begin, and the tensors by which diffusers finds it."""

    prefix: str
    marks: tuple[str, ...]


_POSITIONS = "transformer.text_model.embeddings.position_embedding.weight"
_OF_SDXL = "conditioner.embedders.1.model.positional_embedding"
_CLIP: Mapping[str, tuple[_Encoder, ...]] = {
    "text_encoder": (
        _Encoder("cond_stage_model.", (f"cond_stage_model.{_POSITIONS}",)),
        _Encoder("cond_stage_model.", ("cond_stage_model.model.token_embedding.weight",)),
        _Encoder("conditioner.embedders.0.", (f"conditioner.embedders.0.{_POSITIONS}", _OF_SDXL)),
        _Encoder("text_encoders.clip_l.", (f"text_encoders.clip_l.{_POSITIONS}",)),
    ),
    "text_encoder_2": (
        _Encoder("conditioner.embedders.1.", (_OF_SDXL,)),
        _Encoder("text_encoders.clip_g.", (f"text_encoders.clip_g.{_POSITIONS}",)),
    ),
}
_T5 = (_Encoder("text_encoders.t5xxl.", ("text_encoders.t5xxl.transformer.shared.weight",)),)


class Kind(NamedTuple):
    """A model that single files are made of.

    Attributes:
        title: Its name in a sentence.
        marks: Tensors that all its files have, without the prefix of the network.
        pipelines: Beginning of the names of its pipelines in diffusers, a regular expression.
        repository: Where its settings can be had; "" where no place is sure.
    """

    title: str
    marks: tuple[str, ...]
    pipelines: str
    repository: str


_SD = "StableDiffusion(?!XL|3)"
_FLUX = "double_blocks.0.img_attn.norm.key_norm.scale"
_FLUX2 = "single_stream_modulation.lin.weight"
_SD3 = "joint_blocks.0.x_block.attn.qkv.weight"
_KINDS = (
    Kind(
        "Stable Diffusion XL",
        ("label_emb.0.0.weight",),
        "StableDiffusionXL|Kolors",
        "stabilityai/stable-diffusion-xl-base-1.0",
    ),
    Kind("Stable Diffusion 2", ("input_blocks.0.0.weight", "cond_stage_model.model.token_embedding.weight"), _SD, ""),
    Kind("Stable Diffusion 1.5", ("input_blocks.0.0.weight",), _SD, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    Kind("FLUX.2-dev", (_FLUX2, "guidance_in.in_layer.weight"), "Flux2", "black-forest-labs/FLUX.2-dev"),
    Kind("FLUX.2-klein", (_FLUX2,), "Flux2", ""),
    Kind("Chroma", ("distilled_guidance_layer.in_proj.bias",), "Chroma", "lodestones/Chroma1-HD"),
    Kind("FLUX.1-dev", (_FLUX, "guidance_in.in_layer.weight"), "Flux(?!2)", "black-forest-labs/FLUX.1-dev"),
    Kind("FLUX.1-schnell", (_FLUX,), "Flux(?!2)", "black-forest-labs/FLUX.1-schnell"),
    Kind(
        "Stable Diffusion 3.5 Medium",
        (_SD3, "joint_blocks.0.x_block.attn2.qkv.weight"),
        "StableDiffusion3",
        "stabilityai/stable-diffusion-3.5-medium",
    ),
    Kind(
        "Stable Diffusion 3.5",
        (_SD3, "joint_blocks.0.x_block.attn.ln_q.weight"),
        "StableDiffusion3",
        "stabilityai/stable-diffusion-3.5-large",
    ),
    Kind("Stable Diffusion 3", (_SD3,), "StableDiffusion3", "stabilityai/stable-diffusion-3-medium-diffusers"),
    Kind(
        "Z-Image", ("layers.0.adaLN_modulation.0.weight", "cap_embedder.0.weight"), "ZImage", "Tongyi-MAI/Z-Image-Turbo"
    ),
    Kind(
        "Lumina 2",
        ("layers.0.adaLN_modulation.1.weight", "cap_embedder.0.weight"),
        "Lumina2",
        "Alpha-VLLM/Lumina-Image-2.0",
    ),
    Kind("Qwen-Image", ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"), "QwenImage", "Qwen/Qwen-Image"),
)


class _Other(NamedTuple):
    """What a file may be instead of a model: how one of its tensors is called, what it is, what to do."""

    name: str
    what: str
    advice: str


_ITS_MODEL = "give the model that it belongs to"
_OTHERS = (
    _Other(
        r"(^|[._])(lora_(up|down|mid|A|B)|hada_w\d|lokr_w\d)",
        "a LoRA",
        "give the model with --model and this file with --lora",
    ),
    _Other(
        r"^(control_|controlnet|input_hint_block)",
        "a ControlNet",
        "give the model itself; in Python, MrFlow takes a pipeline with its ControlNet",
    ),
    _Other(r"^(ip_adapter|image_proj)\.", "an IP-Adapter", "give the model itself"),
    _Other(
        r"^conditioner\.embedders\.0\.model\.",
        "the refiner of Stable Diffusion XL, which starts from an image",
        "give the base model",
    ),
)
_OTHERS_WITHOUT_NETWORK = (
    _Other(
        r"^(params(_ema)?\.)?(conv_first|model\.[01]|body\.0|conv_before_upsample|upsample|layers\.0\.residual_group)\.",
        "an upscaler",
        "give a model with --model and this file with --upscaler",
    ),
    _Other(r"^((first_stage_model|vae)\.)?(encoder|decoder)\.conv_in\.", "a VAE alone", _ITS_MODEL),
    _Other(r"(^|\.)(text_model|encoder\.block\.0|embed_tokens|resblocks\.0)\.", "a text encoder alone", _ITS_MODEL),
    _Other(r"^(emb_params|clip_[lg]|string_to_param)", "an embedding for prompts", "give the model itself"),
)

_SCALES = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale|comfy_quant|absmax|wscales)(_\d)?$"
)
_PLAIN = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Checkpoint:
    """A single file, by its header.

    Attributes:
        file: Where it lies.
        shapes: Of its tensors, by name.
        kind: The model that it is of; None: one that is not known by its names.
    """

    file: Path
    shapes: Mapping[str, tuple[int, ...]]
    kind: Kind | None

    @property
    def v_prediction(self) -> bool:
        """Whether its author marked it as trained to predict v."""
        return "v_pred" in self.shapes

    @property
    def zero_snr(self) -> bool:
        """Whether its author marked it as trained with zero terminal signal-to-noise ratio."""
        return "ztsnr" in self.shapes

    @property
    def edm_ends(self) -> tuple[float, float] | None:
        """Least and largest noise of an EDM model that says them (CosXL); None: it says none.

        Raises:
            MrFlowError: They are no numbers.
        """
        names = ("edm_vpred.sigma_min", "edm_vpred.sigma_max")
        if not self.shapes.keys() >= set(names):
            return None
        if any(math.prod(self.shapes[name]) != 1 for name in names):
            raise MrFlowError(f"model is {named(self.file)}, whose {' and '.join(names)} must be one number each.")
        with cast("Any", safe_open)(self.file, "pt") as stored:  # its types are partial
            return float(stored.get_tensor(names[0])), float(stored.get_tensor(names[1]))

    @property
    def edm(self) -> bool:
        """Whether its author marked it as an EDM model (Playground 2.5, CosXL)."""
        return any(key.startswith("edm_") for key in self.shapes)

    @property
    def whole(self) -> bool:
        """Whether it holds a VAE and text encoders beside its network."""
        return all(any(key.startswith(each) for key in self.shapes) for each in (_VAE, _TEXT_ENCODERS))

    def part(self, name: str, kind: type) -> Weights | None:
        """What the file holds of a part of the pipeline.

        Args:
            name: Of the part.
            kind: Its class, a network of diffusers or transformers.

        Returns:
            The weights; None where the file holds none that diffusers reads.

        Raises:
            MrFlowError: It holds a text encoder in a way that diffusers does not read.
        """
        if name in ("transformer", "unet"):
            return self._held(self._network)
        if hasattr(kind, "from_single_file"):
            return self._held(tuple(key for key in self.shapes if key.startswith(_VAE)))
        places = _T5 if kind.__name__.startswith("T5Encoder") else _CLIP.get(name, ())
        read = tuple(each.prefix for each in places if self.shapes.keys() >= set(each.marks))
        names = tuple(key for key in self.shapes if key.startswith(read or tuple(each.prefix for each in places)))
        if names and not read:
            raise MrFlowError(
                f"model is {named(self.file)}, whose {name} is kept in a way that diffusers does not read, first "
                f"{shown(repr(names[0]))}; save the model again with the host that made it."
            )
        return self._held(names)

    @cached_property
    def _network(self) -> tuple[str, ...]:
        """Names of the network's tensors."""
        under = tuple(key for key in self.shapes if key.startswith(_NETWORK))
        beside = (*_VAE, *_TEXT_ENCODERS, _AVERAGES)
        return under or tuple(key for key in self.shapes if not key.startswith(beside))

    def _held(self, names: tuple[str, ...]) -> Weights | None:
        return Weights(sum(math.prod(self.shapes[key]) for key in names), len(names)) if names else None


def read_checkpoint(file: Path) -> Checkpoint:
    """Read the header of a single file.

    Args:
        file: A safetensors file.

    Returns:
        What it is.

    Raises:
        MrFlowError: It cannot be read, is no model that makes images from text, or is quantised.
    """
    try:
        shapes = tensor_shapes(file)
        with file.open("rb") as stream:  # safetensors has found it to be sound
            header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    except Exception as error:  # safetensors has an exception of its own, and passes on those of the system
        raise MrFlowError(
            f"model is {named(file)}, which cannot be read as safetensors ({first_line(error)}); download it again."
        ) from error
    bare = {key.removeprefix(_NETWORK) for key in shapes}
    kind = next((each for each in _KINDS if bare.issuperset(each.marks)), None)
    alone = kind is None and not any(key.startswith(_NETWORK) for key in shapes)
    for pattern, what, advice in (*_OTHERS, *(_OTHERS_WITHOUT_NETWORK if alone else ())):
        if any(re.search(pattern, key) for key in shapes):
            raise MrFlowError(f"model is {named(file)}, which is {what}; {advice}.")
    found = Checkpoint(file, shapes, kind)
    _check_plain(found, {key: str(header[key]["dtype"]) for key in shapes})
    return found


def _check_plain(checkpoint: Checkpoint, dtypes: Mapping[str, str]) -> None:
    """Refuse weights that are numbers only together with scales, which diffusers would leave aside."""
    for key, dtype in dtypes.items():
        matrix = len(checkpoint.shapes[key]) > 1 and not key.endswith("position_ids")
        if _SCALES.search(key) or (matrix and dtype not in _PLAIN):
            raise MrFlowError(
                f"model is {named(checkpoint.file)}, whose weights are quantised (tensor {shown(repr(key))}, {dtype}); "
                "take the file with weights of 16 bits, or plain fp8."
            )


def named(path: Path) -> str:
    """A path for a sentence.

    Args:
        path: Any.

    Returns:
        It, quoted and cut to a sane length.
    """
    return shown(repr(str(path)), 200)
