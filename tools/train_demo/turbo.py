"""The few-step LoRA: four steps of stage 1 that end where many steps end.

    python -m tools.train_demo.turbo --out FILE [--weights FOLDER] [--seconds 2400]
    python -m tools.train_demo.turbo --out FILE --begin FILE --rate 0.001     goes on from a LoRA

Trajectory distillation, without data. The teacher, the network without LoRA, walks from noise to an image in several
steps for each of the student's; the student walks its own way with the solver that plans use, and is to be where the
teacher is after every step. Its errors are its own: each step is trained on the states that the steps before lead to.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.quality.variety import SHIPPED
from mrflow_sched import make_plan
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.scenes import left_open
from mrflow_sched.plan.recipes import recipe_of_steps, sigmas_from_recipe
from mrflow_sched.sampling.solvers import solver_steps
from tools.train_demo import data, flow, further, lora

STEPS, FINER = 4, 2
"""The student's steps, and the teacher's for each of them."""
USUAL, USUAL_SHARE = 3.5, 0.6
"""The guidance scale of that share of the images; the others draw theirs from the range of training."""
OPEN_SHARE, FINE_SHARE = 0.35, 0.3
_FIRST = 2_000_000  # of scenes


def sigmas(steps: int) -> tuple[float, ...]:
    """Stage 1's schedule in a plan of so many steps."""
    return sigmas_from_recipe(recipe_of_steps(make_plan("demo", 256, 256).stages[0].recipe, steps))


Denoise = Callable[[Tensor, float], Tensor]


def walk(solver: str, x: Tensor, schedule: tuple[float, ...], denoise: Denoise) -> list[Tensor]:
    """The states after every step of a solver of one evaluation per step."""
    steps, states = solver_steps(solver, x, schedule), list[Tensor]()
    state, sigma = next(steps)
    while True:
        try:
            state, sigma = steps.send(denoise(state, sigma))
        except StopIteration as end:
            return [*states, end.value]
        states.append(state)


@dataclass
class Turbo(lora.Lesson):
    """Walk in `STEPS` steps where the teacher walks in `FINER` times as many."""

    solver: str = "multistep"

    def begin(self, networks: lora.Networks, settings: lora.LoraSettings, rank: int) -> None:
        """Keep the networks, and begin to draw captions."""
        self.networks, self.settings = networks, settings
        self.rng = np.random.default_rng([settings.seed, rank])
        self.next = _FIRST + rank * 1_000_000
        self.schedules = sigmas(STEPS), sigmas(STEPS * FINER)

    def captions(self, count: int) -> list[str]:
        """Captions of new scenes, some of which leave things open."""
        texts: list[str] = []
        for _ in range(count):
            scene = further.scene_at(self.next, FINE_SHARE)
            self.next += 1
            opened = self.rng.random() < OPEN_SHARE
            texts.append(caption(left_open(scene, self.rng) if opened else scene))
        return texts

    def loss(self, step: int) -> Tensor:
        """Squared distance to the teacher's states, each in units of the step's velocity."""
        count, side = self.settings.batch, data.LOW // data.PATCH
        tokens, pooled = self.networks.encode(self.captions(count))
        noise = torch.randn(count, data.CHANNELS, side, side)
        guidance = torch.empty(count).uniform_(*flow.GUIDANCE_RANGE)
        guidance[: round(USUAL_SHARE * count)] = USUAL

        def denoising(network: Any) -> Denoise:
            def denoise(x: Tensor, sigma: float) -> Tensor:
                v = flow.velocity(network, x, torch.full((count,), sigma), tokens, pooled, guidance)
                return x - sigma * v

            return denoise

        schedule, finer = self.schedules
        with torch.no_grad():
            wanted = walk(self.solver, noise, finer, denoising(self.networks.plain))[FINER - 1 :: FINER]
        made = walk(self.solver, noise, schedule, denoising(self.networks.transformer))
        widths = [a - b for a, b in pairwise(schedule)]
        parts = [
            ((mine - theirs) / width).square().mean() for mine, theirs, width in zip(made, wanted, widths, strict=True)
        ]
        return torch.stack(parts).mean()


def main() -> None:
    """Train the LoRA and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the LoRA, a safetensors file")
    parser.add_argument("--weights", default=SHIPPED, metavar="FOLDER", help="the model that it is for")
    usual = lora.LoraSettings()
    parser.add_argument("--seconds", type=float, default=usual.seconds, help="of training (default %(default)s)")
    parser.add_argument("--rate", type=float, default=usual.rate, help="AdamW's, at first (default %(default)s)")
    parser.add_argument("--seed", type=int, default=usual.seed, help="of all that is drawn (default %(default)s)")
    parser.add_argument("--begin", type=Path, metavar="FILE", help="a LoRA of this command to go on from")
    asked = parser.parse_args()
    settings = replace(usual, seconds=asked.seconds, rate=asked.rate, seed=asked.seed)
    lora.train(asked.out, asked.weights, settings, Turbo(), asked.begin)


if __name__ == "__main__":
    main()
