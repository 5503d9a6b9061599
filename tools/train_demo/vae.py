"""The VAE: an encoder in closed form, a decoder trained against it.

Encoder. The principal components of 4x4 patches are written into the layers of a stock ``AutoencoderKL``: two
strided convolutions gather the patch, residual branches are zero, and the last group norm and SiLU are made
transparent. SiLU is undone by pairs, as silu(z) - silu(-z) = z; the norm by constant channels of height ``MARGIN``,
which fix its scale for every image.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tools.train_demo import data

WIDTHS = (12, 24, 48)
MARGIN = 256.0
LOG_VARIANCE = -9.0


def make_vae() -> AutoencoderKL:
    kind: Any = AutoencoderKL  # its annotations name tuples of one
    return kind(
        in_channels=3,
        out_channels=3,
        latent_channels=data.CHANNELS,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=data.HIGH,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def write_encoder(vae: AutoencoderKL, components: Any) -> None:
    """Set the encoder so that its mean is ((patch - mean) @ analysis), exactly up to rounding."""
    encoder: Any = vae.encoder
    for parameter in encoder.parameters():
        parameter.zero_()
    for module in encoder.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.fill_(1.0)
    channels = data.CHANNELS
    encoder.conv_in.weight[:3, :, 1, 1] = torch.eye(3)
    for row in range(2):
        for column in range(2):
            for colour in range(3):
                encoder.down_blocks[0].downsamplers[0].conv.weight[
                    (row * 2 + column) * 3 + colour, colour, row, column
                ] = 1.0
    encoder.down_blocks[1].resnets[0].conv_shortcut.weight[:12, :12, 0, 0] = torch.eye(12)
    analysis = torch.from_numpy(np.asarray(components["analysis"])).view(
        2, 2, 2, 2, 3, channels
    )  # row pair, row, column pair, column
    gather = encoder.down_blocks[1].downsamplers[0].conv
    for row in range(2):
        for column in range(2):
            gather.weight[:channels, :12, row, column] = analysis[row, :, column].reshape(12, channels).T.float()
    offset = torch.from_numpy(np.asarray(components["mean"] @ components["analysis"])).float()
    gather.bias[:channels] = -offset
    spread = encoder.down_blocks[2].resnets[0].conv_shortcut
    spread.weight[:channels, :channels, 0, 0] = torch.eye(channels)
    spread.weight[channels : 2 * channels, :channels, 0, 0] = -torch.eye(channels)
    spare = WIDTHS[2] - 2 * channels
    spread.bias[2 * channels :] = MARGIN * torch.tensor([1.0, -1.0]).repeat(spare // 2)
    power = (spare * MARGIN**2 + 2 * channels) / WIDTHS[2]
    encoder.conv_norm_out.weight.fill_(power**0.5)
    encoder.conv_out.weight[:channels, :channels, 1, 1] = torch.eye(channels)
    encoder.conv_out.weight[:channels, channels : 2 * channels, 1, 1] = -torch.eye(channels)
    encoder.conv_out.bias[channels:] = LOG_VARIANCE


@dataclass(frozen=True)
class DecoderSettings:
    seconds: float = 600.0
    batch: int = 12
    crop: int = 24  # latents, so 96 pixels
    lr: float = 2.5e-3
    noise: float = 0.03
    seed: int = 3


def _edges(picture: Tensor) -> Tensor:
    return torch.cat(
        [(picture[..., 1:, :] - picture[..., :-1, :]).flatten(), (picture[..., 1:] - picture[..., :-1]).flatten()]
    )


def train(
    work: Path, settings: DecoderSettings | None = None, *, start: Any = None, save_every: float = 60.0
) -> dict[str, Any]:
    """Train the decoder on stored latents and images, from nothing or from the VAE `start` on; writes ``vae.pt``."""
    settings = settings or DecoderSettings()
    torch.manual_seed(settings.seed)
    vae = start or make_vae()
    if start is None:
        write_encoder(vae, np.load(work / "components.npz"))
    decoder: Any = vae.decoder
    opt = torch.optim.AdamW(decoder.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0)
    step, elapsed, curve = 0, 0.0, []
    path = work / "vae.pt"
    if path.exists():
        state = torch.load(path, weights_only=False)
        vae.load_state_dict(state["vae"])
        opt.load_state_dict(state["opt"])
        step, elapsed, curve = state["step"], state["elapsed"], state["curve"]
    sizes = (data.LOW, data.HIGH)
    latents = {size: np.load(work / f"latents{size}.npy", mmap_mode="r") for size in sizes}
    pictures = np.load(work / "pictures.npy", mmap_mode="r")
    rng = np.random.default_rng([settings.seed, step])
    running: list[float] = []
    begin, last_save = time.time() - elapsed, time.time()
    while elapsed < settings.seconds:
        for group in opt.param_groups:
            group["lr"] = settings.lr * min(1, (step + 1) / 100) * max(0.02, 1 - elapsed / settings.seconds)
        size = sizes[int(rng.random() < 0.5)]
        z, target = _crops(latents[size], pictures, size, settings, rng)
        z = z + settings.noise * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)
        with torch.autocast("cpu", torch.bfloat16):
            out = decoder(z.contiguous(memory_format=torch.channels_last))
        out = out.float()
        loss = (
            (out - target).abs().mean()
            + 0.5 * (_edges(out) - _edges(target)).abs().mean()
            + (out - target).square().mean()
        )
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        opt.step()
        running.append(float((out.detach().clamp(-1, 1) - target).square().mean()) / 4)
        step += 1
        elapsed = time.time() - begin
        if step % 50 == 0:
            curve.append([step, elapsed, float(-10 * np.log10(np.mean(running)))])
            running = []
            print("vae dB", curve[-1], flush=True)
        if time.time() - last_save > save_every or elapsed >= settings.seconds:
            torch.save(
                {"vae": vae.state_dict(), "opt": opt.state_dict(), "step": step, "elapsed": elapsed, "curve": curve},
                path,
            )
            last_save = time.time()
    record = {"settings": asdict(settings), "steps": step, "seconds": elapsed, "curve": curve}
    (work / "vae.json").write_text(json.dumps(record))
    return record


def _crops(
    latents: Any, pictures: Any, size: int, settings: DecoderSettings, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    side, crop = size // data.PATCH, settings.crop
    z, targets = [], []
    for row in rng.integers(0, len(latents), settings.batch):
        y, x = rng.integers(0, side - crop + 1, 2)
        z.append(latents[row][:, y : y + crop, x : x + crop].astype(np.float32))
        scale = data.HIGH // size
        top, left, extent = y * data.PATCH * scale, x * data.PATCH * scale, crop * data.PATCH * scale
        picture = pictures[row, top : top + extent, left : left + extent].astype(np.float32)[None] / 127.5 - 1
        targets.append((picture if scale == 1 else data.shrink(picture))[0].transpose(2, 0, 1))
    return torch.from_numpy(np.stack(z)), torch.from_numpy(np.stack(targets))
