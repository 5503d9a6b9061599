"""Models of every class that ComfyUI knows, without weights: their sampling, latents and VAE are real, the network is a
double that records and answers at once.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management  # pyright: ignore
import comfy.model_patcher  # pyright: ignore
import comfy.sd  # pyright: ignore
import comfy.supported_models  # pyright: ignore
import torch
from comfy_api.latest import io  # pyright: ignore

from .lines import write, write_network
from .watch import CATEGORY

management: Any = comfy.model_management  # pyright: ignore
CHANNELS = {"in_channels": 4, "out_channels": 4, "patch_size": 2, "adm_in_channels": None}
PARTS = {
    "SD3": {"depth": 24},
    "Flux": {"guidance_embed": True},
    "FluxSchnell": {"guidance_embed": False},
    "Flux2": {"hidden_size": 3072},
}
"""What a class' settings say beyond the channels, where something depends on it."""


class Network(torch.nn.Module):
    """Answers "turn", half of its input moved by one pixel, or "still", nothing: then no step changes the image."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.answer, self.dtype, self.patch_size = answer, torch.float32, 2
        self.weight = torch.nn.Parameter(torch.zeros(8, 8))

    def forward(self, x: Any, timestep: Any, *_: Any, **__: Any) -> Any:
        write_network(x, timestep)
        return torch.zeros_like(x) if self.answer == "still" else 0.5 * x.roll(1, -1)


class FirstStage(torch.nn.Module):
    """Averages over cells into the first three channels, and writes the shapes it sees."""

    def __init__(self, channels: int, factor: int, dimensions: int) -> None:
        super().__init__()
        self.channels, self.factor, self.dimensions = channels, factor, dimensions
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, x: Any) -> Any:
        write("encode", shape=list(x.shape))
        cells = (1, self.factor, self.factor) if self.dimensions == 3 else (self.factor, self.factor)
        pool = torch.nn.functional.avg_pool3d if self.dimensions == 3 else torch.nn.functional.avg_pool2d
        small = pool(x[:, :, ::4] if self.dimensions == 3 else x, cells)
        empty = torch.zeros(small.shape[0], self.channels - 3, *small.shape[2:], dtype=x.dtype)
        return torch.cat((small, empty), dim=1)

    def decode(self, z: Any, **_: Any) -> Any:
        write("decode", shape=list(z.shape))
        return z[:, :3].repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)


class Vae(comfy.sd.VAE):
    """ComfyUI's own, with its first stage exchanged."""

    def __init__(self, channels: int, factor: int, dimensions: int) -> None:
        # Its own __init__ only detects and loads weights.
        self.first_stage_model = FirstStage(channels, factor, dimensions).eval()
        self.memory_used_encode = self.memory_used_decode = lambda shape, dtype: 1000 * shape[-1] * shape[-2]
        self.downscale_ratio = self.upscale_ratio = factor
        if dimensions == 3:
            self.downscale_ratio = (lambda frames: max(0, (frames + 3) // 4), factor, factor)
            self.upscale_ratio = (lambda frames: max(0, frames * 4 - 3), factor, factor)
        self.downscale_index_formula = self.upscale_index_formula = None
        if dimensions == 3:
            self.downscale_index_formula = self.upscale_index_formula = (4, factor, factor)
        self.latent_channels, self.latent_dim, self.output_channels = channels, dimensions, 3
        self.pad_channel_value = self.extra_1d_channel = self.format_encoded = self.size = None
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        self.working_dtypes, self.vae_dtype = [torch.float32], torch.float32
        self.disable_offload, self.not_video, self.crop_input, self.handles_tiling = False, False, True, False
        self.device, self.output_device = management.vae_device(), management.intermediate_device()
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=management.vae_offload_device()
        )


def _model(kind: str, answer: str) -> Any:
    """A MODEL of the class, as a loader would make it of a file."""
    known: Any = comfy.supported_models
    settings = getattr(known, kind)({**CHANNELS, **PARTS.get(kind, {}), "disable_unet_model_creation": True})
    settings.set_inference_dtype(torch.float32, None)
    made = settings.get_model({}, "", device=None)
    made.diffusion_model = Network(answer)
    return comfy.model_patcher.ModelPatcher(
        made, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


class RecorderModel(io.ComfyNode):
    """A model of any class, with a text for it and a VAE that fits it."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="RecorderModel",
            category=CATEGORY,
            inputs=[io.String.Input("kind"), io.Combo.Input("answer", options=["turn", "still"], default="turn")],
            outputs=[io.Model.Output(), io.Conditioning.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, kind: str, answer: str) -> Any:
        made = _model(kind, answer)
        latent = made.get_model_object("latent_format")
        usual = {3: 1, 64: 32, 128: 16}.get(latent.latent_channels, 8)  # older releases do not tell
        factor = getattr(latent, "spacial_downscale_ratio", usual)
        text = [[torch.zeros(1, 8, 16), {"pooled_output": torch.zeros(1, 16)}]]
        return io.NodeOutput(made, text, Vae(latent.latent_channels, factor, min(latent.latent_dimensions, 3)))


class _Upscaler:
    """An UPSCALE_MODEL that resizes bilinearly: an even ramp stays one."""

    def __init__(self, scale: int) -> None:
        self.scale, self.model = scale, torch.nn.Identity()
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
        )

    def to(self, *_: Any) -> Any:
        return self

    def __call__(self, image: Any) -> Any:
        write("upscale", shape=list(image.shape))
        return torch.nn.functional.interpolate(image, scale_factor=self.scale, mode="bilinear")


class RecorderUpscaler(io.ComfyNode):
    """An upscaler of any whole scale."""

    @classmethod
    def define_schema(cls) -> Any:
        inputs = [io.Int.Input("scale", default=2, min=1, max=8)]
        return io.Schema(
            node_id="RecorderUpscaler", category=CATEGORY, inputs=inputs, outputs=[io.UpscaleModel.Output()]
        )

    @classmethod
    def execute(cls, scale: int) -> Any:
        return io.NodeOutput(_Upscaler(scale))


class RecorderPicture(io.ComfyNode):
    """A picture that rises evenly: red to the right, green downwards, both by `slope` a pixel from the centre's 0.5."""

    @classmethod
    def define_schema(cls) -> Any:
        numbers = [io.Int.Input("width"), io.Int.Input("height"), io.Int.Input("batch_size", default=1)]
        return io.Schema(
            node_id="RecorderPicture",
            category=CATEGORY,
            inputs=[*numbers, io.Float.Input("slope", default=0.0005)],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int, slope: float) -> Any:
        across = 0.5 + slope * (torch.arange(width) + 0.5 - width / 2)
        down = 0.5 + slope * (torch.arange(height) + 0.5 - height / 2)
        red, green = across.expand(height, width), down.unsqueeze(1).expand(height, width)
        picture = torch.stack((red, green, torch.full_like(red, 0.5)), dim=-1)
        return io.NodeOutput(picture.unsqueeze(0).repeat(batch_size, 1, 1, 1))


class RecorderLevels(io.ComfyNode):
    """SIGMAS as they are written, "1, 0.5, 0"."""

    @classmethod
    def define_schema(cls) -> Any:
        inputs = [io.String.Input("levels")]
        return io.Schema(node_id="RecorderLevels", category=CATEGORY, inputs=inputs, outputs=[io.Sigmas.Output()])

    @classmethod
    def execute(cls, levels: str) -> Any:
        return io.NodeOutput(torch.tensor([float(each) for each in levels.split(",")]))


class RecorderList(io.ComfyNode):
    """Two values as a list, as batch and text nodes give them."""

    @classmethod
    def define_schema(cls) -> Any:
        inputs = [io.AnyType.Input("first"), io.AnyType.Input("second")]
        outputs = [io.AnyType.Output(is_output_list=True)]
        return io.Schema(node_id="RecorderList", category=CATEGORY, inputs=inputs, outputs=outputs)

    @classmethod
    def execute(cls, first: Any, second: Any) -> Any:
        return io.NodeOutput([first, second])
