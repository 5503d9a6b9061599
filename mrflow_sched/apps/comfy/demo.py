"""The embedded model as ComfyUI's own objects, so that everything can be tried without a download.

ComfyUI's loaders refuse it: they take every Flux for one of heads of 128, every autoencoder for one of 32 groups, every
text encoder for one of the full vocabulary. Only what differs is ours here; ComfyUI decides on devices and dtypes,
loads and unloads. Importing this module needs ComfyUI.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mrflow_sched.apps.comfy.host import module
from mrflow_sched.apps.comfy.nodes import schema
from mrflow_sched.demo.autoencoder import load_autoencoder
from mrflow_sched.demo.paths import upscaler_path, weights_path
from mrflow_sched.demo.text import TextEncoders, Tokenizers
from mrflow_sched.demo.words import prompt_notes
from mrflow_sched.plan.families import get_family
from mrflow_sched.plan.families.base import PixelCost, VaeCost

__all__ = ["MrFlowDemoModel"]

io: Any = module("comfy_api.latest").io
latent_formats: Any = module("comfy.latent_formats")
supported_models: Any = module("comfy.supported_models")
logger = logging.getLogger("mrflow")

_FAMILY = get_family("demo")
_LATENT_CHANNELS = 16
_OWN_MODEL = "load a model of your own in this node's place"

Tokens = dict[str, list[list[tuple[int, float]]]]
"""As ComfyUI's Flux tokenizer gives them: rows of a token and its weight, for both encoders."""


class DemoLatent(latent_formats.LatentFormat):
    """The latents of the embedded model. The autoencoder's are what the network works on, at scale 1 and shift 0."""

    latent_channels = _LATENT_CHANNELS
    spacial_downscale_ratio = _FAMILY.vae_factor
    # Least squares of 4x4 means of 256 rendered scenes at 128 px over their encodings. The encoder is linear, and
    # these three of its channels hold the mean colour: previews are exact to 67 dB.
    latent_rgb_factors = (
        (0.2373, 0.2015, 0.1442),
        (-0.1593, 0.0117, 0.2459),
        (0.1093, -0.1858, 0.0797),
        *((0.0, 0.0, 0.0),) * (_LATENT_CHANNELS - 3),
    )
    latent_rgb_factors_bias = (0.1509, 0.0352, -0.0189)


class DemoFlux(supported_models.Flux):
    """The embedded model among ComfyUI's kinds of model. Its family is found by this class's name."""

    latent_format = DemoLatent
    supported_inference_dtypes = (torch.bfloat16, torch.float32)


class DemoTokenizer:
    """Both tokenizers as ComfyUI's CLIP calls them."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        """Read them from the package.

        Args:
            embedding_directory: Not used: the embedded model has no textual inversions.
            tokenizer_data: Not used.
        """
        self._tokenizers = Tokenizers()
        self._said: set[str] = set()

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> Tokens:
        """Tokens of a text. What the embedded model does not know in it is logged once.

        Args:
            text: What an image shows.
            return_word_ids: Not used.
            **options: Not used.

        Returns:
            One row for each encoder; every weight is 1.
        """
        for sentence in prompt_notes([text], instead=_OWN_MODEL):
            if sentence not in self._said:
                self._said.add(sentence)
                logger.warning("MrFlow: %s", sentence)
        found = {"l": self._tokenizers.clip(text), "t5xxl": self._tokenizers.t5(text)}
        return {name: [[(number, 1.0) for number in row]] for name, row in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """What ComfyUI saves of a tokenizer.

        Returns:
            Nothing.
        """
        return {}


class DemoTextEncoders(TextEncoders):
    """Both text encoders as ComfyUI's CLIP calls them."""

    disable_offload = True
    """They are plain layers: ComfyUI must not stream them."""

    def __init__(self, device: Any = None, dtype: Any = None, model_options: Any = None) -> None:
        """Read them from the package.

        Args:
            device: Not used: they are made on the CPU.
            dtype: Not used: they are made in float32.
            model_options: Not used.
        """
        super().__init__()
        self.dtypes = {torch.float32}

    def set_clip_options(self, options: Mapping[str, Any]) -> None:
        """Take no options: there is one layer to read from.

        Args:
            options: What ComfyUI sets.
        """

    def reset_clip_options(self) -> None:
        """Forget no options."""

    def encode_token_weights(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Embeddings of a text.

        Args:
            tokens: `DemoTokenizer`'s; weights are not used.

        Returns:
            (B, 32, 128) of the words and (B, 128) of the whole text, where ComfyUI keeps what lies between nodes.
        """
        words, whole = self(_numbers(tokens["l"]), _numbers(tokens["t5xxl"]))
        device = module("comfy.model_management").intermediate_device()
        return words.to(device), whole.to(device)


def _numbers(rows: Sequence[Sequence[tuple[int, float]]]) -> list[list[int]]:
    return [[pair[0] for pair in row] for row in rows]


class MrFlowDemoModel(io.ComfyNode):
    """The embedded model."""

    @classmethod
    def define_schema(cls) -> Any:
        """What it takes and gives.

        Returns:
            ComfyUI's schema.
        """
        return schema(
            "MrFlowDemoModel",
            "MrFlow Demo Model",
            "The model that comes with the pack, to try everything without a download. It knows small scenes at 128 "
            "and 256 pixels: a red star over green hills under a blue sky, the word FLOW. What a prompt leaves out "
            '("a star"), the seed decides.',
            aliases=["test model", "tiny model", "embedded model"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A FLUX.1 of nine million weights."),
                io.Clip.Output(display_name="clip", tooltip="For CLIPTextEncode; weights in brackets mean nothing."),
                io.Vae.Output(display_name="vae", tooltip="16 channels at a quarter of the size."),
                io.UpscaleModel.Output(display_name="upscale_model", tooltip="An ESRGAN that doubles the size."),
            ],
        )

    @classmethod
    def execute(cls) -> Any:
        """Load it.

        Returns:
            MODEL, CLIP, VAE and UPSCALE_MODEL, each made anew.
        """
        return io.NodeOutput(demo_model(), demo_clip(), demo_vae(), demo_upscale_model())


def demo_model() -> Any:
    """The network, in the dtype that ComfyUI chooses on its device.

    Returns:
        A MODEL.
    """
    management, detection = module("comfy.model_management"), module("comfy.model_detection")
    utils, folder = module("comfy.utils"), weights_path() / "transformer"
    stored = utils.load_torch_file(str(folder / "diffusion_pytorch_model.safetensors"), safe_load=True)
    count, weight_dtype = utils.calculate_parameters(stored), utils.weight_dtype(stored)
    weights = detection.convert_diffusers_mmdit(stored, "")
    written: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    heads = written["num_attention_heads"]
    own = {  # where ComfyUI has the numbers of the large model
        "axes_dim": list(written["axes_dims_rope"]),
        "num_heads": heads,
        "hidden_size": heads * written["attention_head_dim"],
        "context_in_dim": written["joint_attention_dim"],
    }
    config: Any = DemoFlux({**detection.detect_unet_config(weights, ""), **own})
    device, dtypes = management.get_torch_device(), list(config.supported_inference_dtypes)
    dtype = management.unet_dtype(model_params=count, supported_dtypes=dtypes, weight_dtype=weight_dtype)
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, dtypes))
    model = config.get_model(weights, "")
    model.load_model_weights(weights, "")
    return _patcher(model, device, management.unet_offload_device())


def demo_clip() -> Any:
    """The text encoders. They stay on the CPU, where a text takes milliseconds.

    Returns:
        A CLIP.
    """
    target = module("comfy.supported_models_base").ClipTarget(DemoTokenizer, DemoTextEncoders)
    cpu = torch.device("cpu")
    options = {"load_device": cpu, "offload_device": cpu, "initial_device": cpu, "dtype": torch.float32}
    return module("comfy.sd").CLIP(target, model_options=options)


def demo_vae() -> Any:
    """The autoencoder.

    ComfyUI's own constructor makes the object, so that it has every attribute of the release at hand; the smallest
    autoencoder that it knows stands in for ours meanwhile. The layers are ComfyUI's, which it can stream and interrupt.

    Returns:
        A VAE.
    """
    stand_in = module("comfy.taesd.taesd").TAESD(latent_channels=_LATENT_CHANNELS)
    vae = module("comfy.sd").VAE(sd=stand_in.state_dict())
    vae.first_stage_model = load_autoencoder(module("comfy.ops").disable_weight_init).to(vae.vae_dtype)
    vae.patcher = _patcher(vae.first_stage_model, vae.device, module("comfy.model_management").vae_offload_device())
    if hasattr(vae, "model_size"):  # not in older releases
        vae.size = None  # of the stand-in
        vae.model_size()
    vae.downscale_ratio = vae.upscale_ratio = _FAMILY.vae_factor
    cost = cast("VaeCost", _FAMILY.vae_cost)
    vae.memory_used_encode = _memory(cost.encode, 1)
    vae.memory_used_decode = _memory(cost.decode, _FAMILY.vae_factor)
    return vae


def _memory(cost: PixelCost, factor: int) -> Callable[[Sequence[int], torch.dtype], float]:
    """Bytes for one of a batch whose sides are `factor` times smaller than the images'."""
    return lambda shape, dtype: cost.alive / 2 * dtype.itemsize * shape[2] * shape[3] * factor**2


def demo_upscale_model() -> Any:
    """The x2 super-resolution network.

    Returns:
        An UPSCALE_MODEL.
    """
    management = module("comfy.model_management")
    weights = module("comfy.utils").load_torch_file(str(upscaler_path()), safe_load=True)
    found = module("spandrel").ModelLoader().load_from_state_dict(weights).eval()
    found.patcher = _patcher(found.model, management.get_torch_device(), management.unet_offload_device())
    return found


def _patcher(model: Any, load: torch.device, offload: torch.device) -> Any:
    return module("comfy.model_patcher").ModelPatcher(model, load_device=load, offload_device=offload)
