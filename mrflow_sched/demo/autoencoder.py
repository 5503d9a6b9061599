"""The embedded model's autoencoder in plain torch, for a host that has no diffusers.

The weights' names and the arithmetic are those of diffusers' `AutoencoderKL` without attention in its middle: residual
blocks of two 3x3 convolutions behind group norms, halved with a stride, doubled by the nearest pixel.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mrflow_sched.demo.paths import weights_path

__all__ = ["Autoencoder", "load_autoencoder"]

_EPSILON = 1e-6
"""Of every group norm, as diffusers has it."""


# Two convolutions beside a straight way through, which a 1x1 convolution widens where it must.
class _Residual(nn.Module):
    def __init__(self, layers: Any, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = layers.GroupNorm(groups, channels, eps=_EPSILON)
        self.conv1 = layers.Conv2d(channels, out, 3, padding=1)
        self.norm2 = layers.GroupNorm(groups, out, eps=_EPSILON)
        self.conv2 = layers.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Identity() if channels == out else layers.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        changed = self.conv1(nn.functional.silu(self.norm1(x)))
        changed = self.conv2(nn.functional.silu(self.norm2(changed)))
        return self.conv_shortcut(x) + changed


# A stride of two; a row and a column of zeros follow the last ones.
class _Halve(nn.Module):
    def __init__(self, layers: Any, channels: int) -> None:
        super().__init__()
        self.conv = layers.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pad(x, (0, 1, 0, 1)))


# Every pixel four times, then a convolution.
class _Double(nn.Module):
    def __init__(self, layers: Any, channels: int) -> None:
        super().__init__()
        self.conv = layers.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


# The residual blocks of one resolution.
class _Level(nn.Module):
    def __init__(self, layers: Any, channels: int, out: int, blocks: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(layers, channels if k == 0 else out, out, groups) for k in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x


# A level of the encoder; all but the last end at half the size.
class _Down(_Level):
    def __init__(self, layers: Any, channels: int, out: int, blocks: int, groups: int, *, last: bool) -> None:
        super().__init__(layers, channels, out, blocks, groups)
        self.downsamplers = nn.Sequential(*(() if last else (_Halve(layers, out),)))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsamplers(super().forward(x))


# A level of the decoder; all but the last end at twice the size.
class _Up(_Level):
    def __init__(self, layers: Any, channels: int, out: int, blocks: int, groups: int, *, last: bool) -> None:
        super().__init__(layers, channels, out, blocks, groups)
        self.upsamplers = nn.Sequential(*(() if last else (_Double(layers, out),)))

    def forward(self, x: Tensor) -> Tensor:
        return self.upsamplers(super().forward(x))


class _Encoder(nn.Module):
    def __init__(self, layers: Any, widths: Sequence[int], latent: int, blocks: int, groups: int) -> None:
        super().__init__()
        last = widths[-1]
        self.conv_in = layers.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.Sequential(
            *(
                _Down(layers, widths[max(k - 1, 0)], width, blocks, groups, last=k == len(widths) - 1)
                for k, width in enumerate(widths)
            )
        )
        self.mid_block = _Level(layers, last, last, 2, groups)
        self.conv_norm_out = layers.GroupNorm(groups, last, eps=_EPSILON)
        self.conv_out = layers.Conv2d(last, 2 * latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.down_blocks(self.conv_in(x)))
        return self.conv_out(nn.functional.silu(self.conv_norm_out(x)))


class _Decoder(nn.Module):
    def __init__(self, layers: Any, widths: Sequence[int], latent: int, blocks: int, groups: int) -> None:
        super().__init__()
        down = widths[::-1]
        self.conv_in = layers.Conv2d(latent, down[0], 3, padding=1)
        self.mid_block = _Level(layers, down[0], down[0], 2, groups)
        self.up_blocks = nn.Sequential(
            *(
                _Up(layers, down[max(k - 1, 0)], width, blocks + 1, groups, last=k == len(down) - 1)
                for k, width in enumerate(down)
            )
        )
        self.conv_norm_out = layers.GroupNorm(groups, down[-1], eps=_EPSILON)
        self.conv_out = layers.Conv2d(down[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.up_blocks(self.mid_block(self.conv_in(z)))
        return self.conv_out(nn.functional.silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """Between images and latents a quarter of their size on each side."""

    def __init__(self, layers: Any, widths: Sequence[int], latent: int, blocks: int, groups: int) -> None:
        """The autoencoder with weights of no meaning.

        Args:
            layers: What has `Conv2d` and `GroupNorm`: `torch.nn`, or a host's own.
            widths: Channels of each resolution, the finest first; each but the first halves the size.
            latent: Channels of a latent.
            blocks: Residual blocks of each resolution in the encoder; the decoder has one more.
            groups: Groups of every norm.
        """
        super().__init__()
        self.encoder = _Encoder(layers, widths, latent, blocks, groups)
        self.decoder = _Decoder(layers, widths, latent, blocks, groups)

    def encode(self, images: Tensor) -> Tensor:
        """Latents of images.

        Args:
            images: (B, 3, H, W) in [-1, 1], both sides multiples of 4.

        Returns:
            (B, 16, H/4, W/4): the mode of the distribution.
        """
        return self.encoder(images).chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents.

        Args:
            latents: (B, 16, h, w).

        Returns:
            (B, 3, 4h, 4w), about in [-1, 1].
        """
        return self.decoder(latents)


def load_autoencoder(layers: Any = nn) -> Autoencoder:
    """The embedded model's autoencoder.

    Its latents are what the network works on: the model's scaling factor is 1 and its shift 0.

    Args:
        layers: As in `Autoencoder`.

    Returns:
        With its weights, in float32 on the CPU, ready to run.
    """
    from safetensors import torch as safetensors

    folder = weights_path() / "vae"
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    shape = (config[name] for name in ("block_out_channels", "latent_channels", "layers_per_block", "norm_num_groups"))
    with cast("Any", torch.random).fork_rng(devices=()):  # torch draws first weights, which the file's replace
        found = Autoencoder(layers, *shape)
    weights: dict[str, Tensor] = cast("Any", safetensors).load_file(folder / "diffusion_pytorch_model.safetensors")
    found.load_state_dict(weights)
    return found.to(torch.float32).eval().requires_grad_(False)
