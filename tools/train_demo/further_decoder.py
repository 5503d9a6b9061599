"""The VAE's decoder, trained further on fine detail: its encoder passes hairlines that it never learnt to draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL

from mrflow_sched import demo
from mrflow_sched.demo.paths import weights_path
from tools.train_demo import data, further, vae

SETTINGS = vae.DecoderSettings(seconds=900.0, lr=1.2e-3)
SCENES, FINE_SHARE = 1600, 0.8
_FIRST = 1_000_000  # of scenes that the network does not see


def prepare(folder: Path, count: int) -> None:
    """Draw scenes and encode them, as ``vae.train`` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = further.Encoder.read_off(demo.load_engine(device="cpu", dtype="float32"))
    pictures = np.empty((count, data.HIGH, data.HIGH, 3), np.uint8)
    for k in range(count):
        scene = further.scene_at(_FIRST + k, FINE_SHARE)
        pictures[k] = np.rint(further.picture_of(scene, _FIRST + k) * 255)
    for size in (data.HIGH, data.LOW):
        side = size // data.PATCH
        latents = np.empty((count, data.CHANNELS, side, side), np.float16)
        for first in range(0, count, 64):
            block = pictures[first : first + 64].astype(np.float32) / 255
            latents[first : first + 64] = encoder.latents(block if size == data.HIGH else data.shrink(block))
        np.save(folder / f"latents{size}.npy", latents)
    np.save(folder / "pictures.npy", pictures)


def train(work: Path, settings: vae.DecoderSettings = SETTINGS, count: int = SCENES) -> dict[str, Any]:
    """Train from the shipped VAE on; writes ``decoder/vae.pt`` and ``decoder/vae.json``."""
    folder = work / "decoder"
    if not (folder / "pictures.npy").exists():
        prepare(folder, count)
    kind: Any = AutoencoderKL
    return vae.train(folder, settings, start=kind.from_pretrained(weights_path() / "vae").float())
