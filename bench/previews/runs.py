"""The pictures that the tables of previews.py compare, made once in parts and kept on disk.

A part is four prompts at one seed. All chains of a part share one full run: its states are kept at the switches.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.quality.__main__ import scenes_of
from mrflow_sched import demo, load_upscaler, make_native_plan, make_plan, sample_staged
from mrflow_sched.demo.captions import caption
from mrflow_sched.measure.previews import preview, shrunk
from mrflow_sched.methods.previews import (
    CommutatorGuidance,
    DownSelector,
    Head,
    Switched,
    averaged,
    commutator_norms,
    euler_tail,
    in_pixels,
    selected,
)
from mrflow_sched.sampling.noise import draw_noise
from mrflow_sched.sampling.shrink import shrink_noise
from mrflow_sched.sampling.solvers import sample_euler

SIZE, STEPS, BATCH = 256, 30, 4
SWITCH = 10  # a third of the steps, as in the paper
PARTIAL = 8  # prompts of the rows that settle a side question
GUIDED, OFF = CommutatorGuidance(), CommutatorGuidance(steps=0)
FULL = make_native_plan("demo", SIZE, SIZE, steps=STEPS)
SMALL = make_native_plan("demo", SIZE // 2, SIZE // 2, steps=STEPS)
SIGMAS = FULL.stages[0].sigmas
GUIDANCE = FULL.stages[0].guidance
VERSION = "1"


def prompts_of(count: int) -> list[str]:
    """Captions of scenes that nothing was trained on; of any four in a row, one of every category."""
    each = -(-count // 4)
    captions = [caption(scene) for scene in scenes_of(each)]
    return [captions[row * each + column] for column in range(each) for row in range(4)][:count]


def seeds_of(first: int, count: int, draw: int) -> list[int]:
    """The noise seeds of `count` prompts from the `first` on, of the draw with that number."""
    return [1000 * draw + 77 + row for row in range(first, first + count)]


class Part:
    """Four prompts at one seed: the pictures by row of the table, and numbers of each image."""

    def __init__(self, engine: Any, prompts: list[str], seeds: list[int], *, partial: bool) -> None:
        """Prepare to make a part; `partial` adds the rows that settle a side question."""
        self.engine, self.prompts, self.seeds, self.partial = engine, prompts, seeds, partial
        self.text = engine.encode_text(prompts)
        self.found: dict[str, Tensor] = {}

    def estimate(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.engine.denoise(x, sigma, self.text, guidance=GUIDANCE)

    def picture(self, name: str, images: Tensor) -> None:
        self.found[name] = (images.clamp(0, 1) * 255).round().to(torch.uint8).contiguous()

    def shrink(self, clean: Tensor) -> Tensor:
        """Small latents of clean latents, by way of the picture."""
        return self.engine.encode(shrunk(self.engine.decode(clean), SIZE // 2, SIZE // 2))

    def tail(
        self,
        name: str,
        switched: Switched,
        guidance: CommutatorGuidance = OFF,
        towards: Tensor | None = None,
        *,
        wrong: bool = False,
    ) -> None:
        """Walk to the end and keep the picture; `towards` is D x1, to which the distance is kept too."""
        if wrong:
            end = self.wrong_way(switched, guidance)
        else:
            end = euler_tail(self.estimate, switched, guidance)
        self.picture(name, self.engine.decode(end))
        if towards is not None:
            self.found[f"distance: {name}"] = (end - towards).flatten(1).norm(dim=1)

    def wrong_way(self, switched: Switched, guidance: CommutatorGuidance) -> Tensor:
        """The walk with the sign of the guidance turned: the t-form's plus sign kept in sigma form."""
        x = switched.state
        for step, (sigma, following) in enumerate(pairwise(switched.sigmas)):
            slope = (x - self.estimate(x, x.new_full((len(x),), sigma))) / sigma
            if guidance.acts(step):
                x = x + guidance.alpha * (switched.target - slope)
            x = x + (following - sigma) * slope
        return x

    def make(self, upscaler: Any) -> dict[str, Tensor]:
        """All rows."""
        shape = self.engine.latent_shape(SIZE, SIZE)
        noise = draw_noise(shape, self.seeds)
        heads, end = self.full_run(noise)
        white = shrink_noise(noise, shape[1] // 2, shape[2] // 2)
        native = self.engine.decode(end)
        self.picture("native", shrunk(native, SIZE // 2, SIZE // 2))
        self.ceilings(end)
        self.alone(noise, white)
        self.polyphase(heads, end)
        self.others(heads, end, white)
        for step in (4, SWITCH, 20):
            self.picture(
                f"clean estimate at {step}", shrunk(self.engine.decode(heads[step].clean), SIZE // 2, SIZE // 2)
            )
        for steps in (4, 6, 8):
            self.picture(f"few {steps}", preview(self.engine, FULL, self.prompts, steps=steps, seeds=self.seeds).images)
        plan = make_plan("demo", SIZE, SIZE, "12+1")
        staged = sample_staged(self.engine, plan, self.prompts, upscaler=upscaler, seeds=self.seeds, keep_stages=True)
        self.picture("staged", shrunk(staged.images, SIZE // 2, SIZE // 2))
        self.picture("stage 1", staged.stages[0].image)
        return self.found

    def full_run(self, noise: Tensor) -> tuple[dict[int, Head], Tensor]:
        """The native run with its states at the switches."""
        heads: dict[int, Head] = {}

        def keep(step: dict[str, Any]) -> None:
            number = int(step["i"])
            if number in (0, 4, SWITCH, 20):
                velocity = (step["x"] - step["denoised"]) / SIGMAS[number]
                heads[number] = Head(step["x"], velocity, noise, SIGMAS[number:])

        return heads, sample_euler(self.estimate, noise, SIGMAS, callback=keep)

    def ceilings(self, end: Tensor) -> None:
        """What D of the finished latents itself decodes to: the best that a chain with this D can reach."""
        self.picture("D x1: pixels", self.engine.decode(self.shrink(end)))
        self.picture("D x1: polyphase", self.engine.decode(DownSelector(2, 0).down(end).contiguous()))
        self.picture("D x1: average", self.engine.decode(torch.nn.functional.avg_pool2d(end, 2)))

    def alone(self, noise: Tensor, white: Tensor) -> None:
        """Small runs from the first step on."""
        shape = white.shape[1:]
        own = draw_noise(shape, [seed + 500_000 for seed in self.seeds])
        empty = torch.empty(0)
        self.tail("independent", Switched(own, empty, SMALL.stages[0].sigmas))
        self.tail("nested D_0", Switched(DownSelector(2, 0).down(noise).contiguous(), empty, SIGMAS))
        self.tail("nested Haar", Switched(white, empty, SIGMAS))

    def polyphase(self, heads: dict[int, Head], end: Tensor) -> None:
        """The published chain, and what it is made of."""
        early, head = heads[4], heads[SWITCH]
        self.tail("naive, switch 4", selected(early, [0] * len(self.seeds)))
        norms, estimates = commutator_norms(head, self.estimate)
        self.found["norms"] = norms.T.contiguous()
        for phase in range(4):
            each = selected(head, [phase] * len(self.seeds))
            self.tail(f"phase {phase}", each._replace(estimate=estimates[phase]))
        phases = [int(phase) for phase in norms.argmin(0)]
        best = torch.stack([estimates[phase, row] for row, phase in enumerate(phases)])
        chosen = selected(head, phases)._replace(estimate=best)
        goal = selected(Head(end, end, end, (0.0,)), phases).state
        self.tail("argmin", chosen, towards=goal)
        self.tail("argmin + guidance", chosen, GUIDED, goal)
        self.tail("argmin + guidance, wrong sign", chosen, GUIDED, goal, wrong=True)
        if self.partial:
            self.tail("argmin + guidance R", chosen, CommutatorGuidance(again=True), goal)
            self.tail("argmin + guidance R after", chosen, CommutatorGuidance(again=True, after=True), goal)
            self.tail("argmin + guidance from step 1", chosen, CommutatorGuidance(first=1), goal)
            self.tail("argmin + guidance .01", chosen, CommutatorGuidance(alpha=0.01), goal)
            for step in (0, 4):
                self.found[f"norms at {step}"] = commutator_norms(heads[step], self.estimate)[0].T.contiguous()

    def others(self, heads: dict[int, Head], end: Tensor, white: Tensor) -> None:
        """The downsamplers in pixels, and block means."""
        goal = self.shrink(end)
        for step in (4, SWITCH):
            switched = in_pixels(heads[step], self.shrink, white)
            self.tail(f"pixels, switch {step}", switched, towards=goal)
            if step == SWITCH or self.partial:
                self.tail(f"pixels + guidance, switch {step}", switched, GUIDED, goal)
        if self.partial:
            switched = in_pixels(heads[SWITCH], self.shrink, white)
            self.tail("pixels + guidance, wrong sign", switched, GUIDED, goal, wrong=True)
        mean = averaged(heads[SWITCH], *white.shape[-2:])
        self.tail("average", mean)
        self.tail("average + guidance", mean, GUIDED)


@torch.no_grad()
def made(prompts: int, seeds: int, folder: Path) -> tuple[list[str], dict[str, Tensor]]:
    """All parts, from disk where they were made before.

    Args:
        prompts: How many.
        seeds: Of each prompt.
        folder: Where the parts are kept.

    Returns:
        The prompts, and each row's values of all images in the order seed by seed, prompt by prompt; rows of the
        first `PARTIAL` prompts hold those only.
    """
    texts = prompts_of(prompts)
    return texts, _joined(folder, texts, seeds, _maker())


def _maker() -> Callable[[list[str], list[int], bool], dict[str, Tensor]]:
    """Makes parts; the model is loaded for the first."""
    loaded: list[Any] = []

    def make(prompts: list[str], seeds: list[int], partial: bool) -> dict[str, Tensor]:
        if not loaded:
            loaded.extend((demo.load_engine(device="cpu"), load_upscaler(demo.upscaler_path())))
        return Part(loaded[0], prompts, seeds, partial=partial).make(loaded[1])

    return make


def _joined(folder: Path, texts: list[str], draws: int, make: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    """The parts of previews.py, each made where it is not on disk."""

    def part(prompts: list[str], seeds: list[int], first: int) -> dict[str, Tensor]:
        partial = first < PARTIAL
        asked = [VERSION, prompts, seeds, partial, FULL.to_string()]
        return kept(folder, "previews", asked, lambda: make(prompts, seeds, partial))

    return in_parts(texts, draws, part)


def in_parts(
    texts: list[str], draws: int, part: Callable[[list[str], list[int], int], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Call `part(prompts, seeds, number of the first prompt)` for every four prompts of every draw, and join."""
    rows: dict[str, list[Tensor]] = {}
    for draw in range(draws):
        for first in range(0, len(texts), BATCH):
            prompts = texts[first : first + BATCH]
            for name, values in part(prompts, seeds_of(first, len(prompts), draw), first).items():
                rows.setdefault(name, []).append(values)
    return {name: torch.cat(values) for name, values in rows.items()}


def kept(folder: Path, name: str, asked: list[Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """A part from disk; made, and kept there, where nothing was kept of exactly what is `asked`."""
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    file = folder / f"{name}-{digest}.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(make(), file.with_suffix(".new"))
        file.with_suffix(".new").rename(file)
        print(f"{name}: {file.name} is made", file=sys.stderr, flush=True)
    return load_file(file)
