"""Pixel super-resolution: a one-block RRDBNet x2 in ESRGAN layout, first regressed, then trained against a patch
discriminator.

It is trained on the images it will get: low-size images that went through the VAE.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from spandrel.architectures.ESRGAN import ESRGAN
from torch import Tensor, nn

from tools.train_demo import data, vae

FILTERS, BLOCKS = 24, 1


def make_upscaler() -> ESRGAN:
    return ESRGAN(in_nc=12, out_nc=3, num_filters=FILTERS, num_blocks=BLOCKS, scale=4, shuffle_factor=2, plus=False)


def make_critic() -> nn.Module:
    norm = nn.utils.parametrizations.spectral_norm
    widths = (3, 24, 48, 64)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [norm(nn.Conv2d(a, b, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, norm(nn.Conv2d(widths[-1], 1, 3, 1, 1)))


@dataclass(frozen=True)
class UpscalerSettings:
    seconds: float = 600.0
    gan_from: float = 0.5  # share of the budget after which the discriminator joins
    gan_weight: float = 0.01
    batch: int = 12
    crop: int = 40  # low pixels
    lr: float = 2e-3
    pool: int = 3000  # scenes whose low size is decoded in advance
    seed: int = 4


@torch.inference_mode()
def decoded_low(work: Path, count: int) -> np.ndarray:
    """The first ``count`` low-size scenes, or all there are, after encoding and decoding, uint8 (count, 128, 128, 3);
    kept in a file."""
    path = work / "decoded128.npy"
    if path.exists():
        return np.load(path, mmap_mode="r")
    model = vae.make_vae()
    model.load_state_dict(torch.load(work / "vae.pt", weights_only=False)["vae"])
    decoder: Any = model.decoder
    latents = np.load(work / "latents128.npy", mmap_mode="r")
    count = min(count, len(latents))
    out = np.empty((count, data.LOW, data.LOW, 3), np.uint8)
    for first in range(0, count, 20):
        z = torch.from_numpy(latents[first : first + 20].astype(np.float32))
        with torch.autocast("cpu", torch.bfloat16):
            pictures = decoder(z.contiguous(memory_format=torch.channels_last)).float().clamp(-1, 1)
        out[first : first + len(z)] = ((pictures + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    np.save(path, out)
    return out


def _crops(low: np.ndarray, high: Any, settings: UpscalerSettings, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    xs, ys, crop = [], [], settings.crop
    for row in rng.integers(0, len(low), settings.batch):
        top, left = rng.integers(0, data.LOW - crop + 1, 2)
        xs.append(low[row, top : top + crop, left : left + crop])
        ys.append(high[row, 2 * top : 2 * (top + crop), 2 * left : 2 * (left + crop)])
    x, y = (torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2).float() / 255 for part in (xs, ys))
    x = x + torch.empty(len(x), 1, 1, 1).uniform_(0, 0.012) * torch.randn_like(x)
    if rng.random() < 0.5:
        x, y = x.flip(-1), y.flip(-1)
    if rng.random() < 0.5:
        x, y = x.transpose(-1, -2), y.transpose(-1, -2)
    return x.contiguous(memory_format=torch.channels_last), y.contiguous(memory_format=torch.channels_last)


def train(work: Path, settings: UpscalerSettings | None = None, *, save_every: float = 60.0) -> dict[str, Any]:
    """Train the upscaler; writes ``sr.pt``, whose ``ema`` is shipped."""
    settings = settings or UpscalerSettings()
    torch.manual_seed(settings.seed)
    model, critic = make_upscaler(), make_critic()
    average = make_upscaler()
    average.load_state_dict(model.state_dict())
    average.requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0)
    critic_opt = torch.optim.AdamW(critic.parameters(), lr=4e-4, betas=(0.5, 0.98), weight_decay=0.0)
    step, elapsed, curve = 0, 0.0, []
    path = work / "sr.pt"
    if path.exists():
        state = torch.load(path, weights_only=False)
        for module, key in ((model, "model"), (critic, "critic"), (average, "ema")):
            module.load_state_dict(state[key])
        opt.load_state_dict(state["opt"])
        critic_opt.load_state_dict(state["critic_opt"])
        step, elapsed, curve = state["step"], state["elapsed"], state["curve"]
    low, high = decoded_low(work, settings.pool), np.load(work / "pictures.npy", mmap_mode="r")
    rng = np.random.default_rng([settings.seed, step])
    running: list[tuple[float, float]] = []
    begin, last_save = time.time() - elapsed, time.time()
    while elapsed < settings.seconds:
        done = elapsed / settings.seconds
        gan = done >= settings.gan_from
        rate = settings.lr * min(1, (step + 1) / 100) * max(0.05, 1 - done) * (0.5 if gan else 1.0)
        for group in opt.param_groups:
            group["lr"] = rate
        x, y = _crops(low, high, settings, rng)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out = out.float()
        loss = (out - y).abs().mean() + 0.5 * (vae._edges(out) - vae._edges(y)).abs().mean()
        if gan:
            critic.requires_grad_(False)
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss + settings.gan_weight * nn.functional.softplus(-critic(out).float()).mean()
            critic.requires_grad_(True)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if gan:
            with torch.autocast("cpu", torch.bfloat16):
                real, fake = critic(y).float(), critic(out.detach()).float()
            critic_loss = nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean()
            critic_opt.zero_grad(set_to_none=True)
            critic_loss.backward()
            critic_opt.step()
        with torch.no_grad():
            for old, new in zip(average.parameters(), model.parameters(), strict=True):
                old.lerp_(new, 0.005 if step > 200 else 0.1)
        running.append((float((out.detach().clamp(0, 1) - y).square().mean()), float(loss)))
        step += 1
        elapsed = time.time() - begin
        if step % 50 == 0:
            power, mean_loss = np.mean(running, axis=0)
            curve.append([step, elapsed, float(-10 * np.log10(power)), float(mean_loss)])
            running = []
            print("sr dB", curve[-1], flush=True)
        if time.time() - last_save > save_every or elapsed >= settings.seconds:
            torch.save(
                {
                    "model": model.state_dict(),
                    "critic": critic.state_dict(),
                    "ema": average.state_dict(),
                    "opt": opt.state_dict(),
                    "critic_opt": critic_opt.state_dict(),
                    "step": step,
                    "elapsed": elapsed,
                    "curve": curve,
                },
                path,
            )
            last_save = time.time()
    record = {"settings": asdict(settings), "steps": step, "seconds": elapsed, "curve": curve}
    (work / "sr.json").write_text(json.dumps(record))
    return record
