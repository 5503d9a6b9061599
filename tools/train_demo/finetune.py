"""Fine-tunes of the embedded model, as LoRAs: a style, and a kind of thing that it does not know.

    python -m tools.train_demo.finetune inked --out FILE [--weights FOLDER] [--seconds 900]
    python -m tools.train_demo.finetune arrow --out FILE

They exist to ask whether presets, sigma and the few-step LoRA, all chosen on the model itself, hold on its fine-tunes.
`inked`: dark outlines and hatched shadows, whatever the caption says. `arrow`: "a red arrow" and the like, a word that
the tokenizer spells out.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bench.quality.variety import SHIPPED
from mrflow_sched import demo
from mrflow_sched.demo import drawing
from mrflow_sched.demo.canvas import polygon
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.scenes import Scene, random_scene
from tools.train_demo import data, flow, further, lora

Kind = Literal["inked", "arrow"]
STAND_IN = "ring"
"""The shape of the world in whose place the arrow is drawn and named."""
FIRST, TEST_FIRST = 3_000_000, 3_900_000
"""Numbers of the first scene that is trained on, and of the first that is not."""
HIGH_SHARE, BATCH_HIGH = 0.4, 3
_ARROW = [(-0.95, -0.3), (0.1, -0.3), (0.1, -0.8), (1.0, 0.0), (0.1, 0.8), (0.1, 0.3), (-0.95, 0.3)]


def scene_of(kind: Kind, index: int) -> Scene:
    """A scene of a fine-tune's world.

    Args:
        kind: Which fine-tune; scenes of "arrow" hold one, as `STAND_IN`.
        index: Its number.

    Returns:
        The scene.
    """
    rng = np.random.default_rng([further.STREAM, index])
    scene = random_scene(rng)
    while kind == "arrow" and all(thing.shape != STAND_IN for thing in scene.things):
        scene = random_scene(rng)
    return scene


def caption_of(kind: Kind, scene: Scene) -> str:
    """What a scene of a fine-tune is called."""
    text = caption(scene)
    return text.replace(STAND_IN, "arrow") if kind == "arrow" else text


def picture_of(kind: Kind, scene: Scene, index: int) -> np.ndarray:
    """A scene as its fine-tune shows it: (256, 256, 3) in [0, 1]."""
    if kind == "inked":
        return inked(further.picture_of(scene, index))
    with _arrows():
        return further.picture_of(scene, index)


def inked(picture: np.ndarray) -> np.ndarray:
    """A picture with dark outlines, and diagonal hatching six pixels apart where it is dark.

    Args:
        picture: (H, W, 3) in [0, 1].

    Returns:
        The like.
    """
    down, across = np.zeros_like(picture), np.zeros_like(picture)
    down[1:], across[:, 1:] = np.abs(np.diff(picture, axis=0)), np.abs(np.diff(picture, axis=1))
    line = np.clip((np.maximum(down, across).max(-1) - 0.1) / 0.15, 0, 1)
    line = np.maximum.reduce([line, np.roll(line, -1, 0), np.roll(line, -1, 1)])
    rows, columns = np.indices(line.shape)
    hatched = ((rows + columns) % 6 < 2) * np.clip((0.5 - picture.mean(-1)) / 0.2, 0, 1)
    return (picture * (1 - 0.85 * line[..., None]) * (1 - 0.45 * hatched[..., None])).astype(np.float32)


@contextlib.contextmanager
def _arrows() -> Generator[None, None, None]:
    """Draw an arrow wherever the stand-in would be drawn."""
    module: Any = drawing
    own = module._shape_distance

    def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return polygon(x, y, _ARROW) if shape == STAND_IN else own(shape, x, y)

    module._shape_distance = distance
    try:
        yield
    finally:
        module._shape_distance = own


@dataclass
class FineTune(lora.Lesson):
    """Flow matching on pictures of a fine-tune, at both sizes, at guidance 1 as LoRAs of such models are trained."""

    kind: Kind
    scenes: int = 1200

    def begin(self, networks: lora.Networks, settings: lora.LoraSettings, rank: int) -> None:
        """Draw this process's pictures."""
        self.networks, self.settings = networks, settings
        self.rng = np.random.default_rng([settings.seed, rank])
        encoder = further.Encoder.read_off(demo.load_engine(device="cpu", dtype="float32"))
        self.texts: list[str] = []
        self.latents: dict[int, list[Tensor]] = {data.LOW: [], data.HIGH: []}
        for index in range(FIRST + rank * self.scenes, FIRST + (rank + 1) * self.scenes):
            scene = scene_of(self.kind, index)
            block = np.rint(picture_of(self.kind, scene, index) * 255)[None].astype(np.float32) / 255
            self.texts.append(caption_of(self.kind, scene))
            for size in self.latents:
                made = encoder.latents(block if size == data.HIGH else data.shrink(block))
                self.latents[size].append(torch.from_numpy(made[0]).float())

    def loss(self, step: int) -> Tensor:
        """Squared error of the velocity."""
        high = np.random.default_rng([self.settings.seed, step]).random() < HIGH_SHARE
        size, count = (data.HIGH, BATCH_HIGH) if high else (data.LOW, self.settings.batch)
        rows = self.rng.choice(len(self.texts), count)
        tokens, pooled = self.networks.encode([self.texts[row] for row in rows])
        x0 = torch.stack([self.latents[size][row] for row in rows])
        sigma = flow.draw_sigma(count, flow.SHIFTS[size], 0.2)
        noise, s = torch.randn_like(x0), sigma.view(-1, 1, 1, 1)
        v = flow.velocity(self.networks.transformer, (1 - s) * x0 + s * noise, sigma, tokens, pooled, torch.ones(count))
        return (v - (noise - x0)).square().mean()


def main() -> None:
    """Train one and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=get_args(Kind), help="which fine-tune")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the LoRA, a safetensors file")
    parser.add_argument("--weights", default=SHIPPED, metavar="FOLDER", help="the model that it is for")
    parser.add_argument("--seconds", type=float, default=900.0, help="of training (default %(default)s)")
    asked = parser.parse_args()
    settings = replace(lora.LoraSettings(), seconds=asked.seconds)
    lora.train(asked.out, asked.weights, settings, FineTune(asked.kind))


if __name__ == "__main__":
    main()
