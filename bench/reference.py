"""Compares the official scripts' procedure with ours, on the embedded model, in one run.

    python -m bench.reference --out DIR          reference.md, reference.json (some minutes); --size, --seeds
    python -m bench.reference --quick            one prompt, prints only

The reference is written from the description in docs/official.md, with diffusers' own pipeline and scheduler: few Euler
steps at half size with the shift of that size, an 8-bit image, super-resolution in 192-pixel tiles, an 8-bit image, a
sample of the VAE's posterior, noise from the same generator, one Euler step. Four ways are compared with it:

* native, 50 steps at full size: the base of speedups and distances.
* MrFlow with the reference's choices, rounded to 8 bits at the same two places: shows that the procedure is the same.
* MrFlow with the reference's choices in float: shows the effect of the rounding.
* MrFlow with its defaults.

All ways share networks, dtype (float32), prompts, seeds, sizes, numbers of steps and the start sigma.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from bench.command import results_folder, run_command, side, to_json
from bench.markdown import table
from mrflow_sched import MrFlow, demo, load_upscaler
from mrflow_sched._runtime.peak import PeakMemory
from mrflow_sched.engines.diffusers.folder import load_pipeline
from mrflow_sched.measure.metrics import psnr
from mrflow_sched.upscaling.model import ModelUpscaler

LOW_STEPS, SIGMA, NATIVE_STEPS = 12, 0.12, 50
FRAME, TILE, MARGIN, TOGETHER = 15, 192, 24, 4
"""The reference's super-resolution: reflected frame, tile side and its margin in pixels, tiles per batch."""

Picture = Callable[[str, int], Image.Image]


# ------------------------------------------------------------------------------------------------------- the reference


class Reference:
    """The official order of operations, on a `FluxPipeline`."""

    def __init__(self, pipe: Any, tiles: Tiles, size: int, guidance: float) -> None:
        import diffusers

        library: Any = diffusers  # its annotations name tuples of one
        self._pipe, self._tiles, self._size = pipe, tiles, size
        unshifted = library.FlowMatchEulerDiscreteScheduler(shift=1.0)  # the start sigma reaches the network as it is
        self._refiner = library.FluxPipeline(**{**pipe.components, "scheduler": unshifted})
        for one in (pipe, self._refiner):
            one.set_progress_bar_config(disable=True)
        self._more = {"guidance_scale": guidance}
        self._longest = pipe.tokenizer_2.model_max_length

    @torch.no_grad()
    def __call__(self, prompt: str, seed: int) -> Image.Image:
        pipe, size = self._pipe, self._size
        embedded, pooled, _ = pipe.encode_prompt(prompt, None, max_sequence_length=self._longest)
        told = {"prompt_embeds": embedded, "pooled_prompt_embeds": pooled, **self._more}
        half: dict[str, Any] = {"width": size // 2, "height": size // 2, "num_inference_steps": LOW_STEPS}
        low = pipe(**told, **half, generator=torch.Generator().manual_seed(seed)).images[0]
        large = to_picture(self._tiles(from_picture(low)), truncate=True)
        generator = torch.Generator().manual_seed(seed + 1)
        pixels = pipe.image_processor.preprocess(large, height=size, width=size)
        vae = pipe.vae.config
        clean = (pipe.vae.encode(pixels).latent_dist.sample(generator) - vae.shift_factor) * vae.scaling_factor
        noise = torch.randn(clean.shape, generator=generator)
        start = SIGMA * noise + (1.0 - SIGMA) * clean
        packed = pipe._pack_latents(start, *start.shape)
        full: dict[str, Any] = {"width": size, "height": size, "num_inference_steps": 1, "sigmas": [SIGMA]}
        return self._refiner(**told, **full, latents=packed).images[0]


@dataclass(frozen=True)
class Tiles:
    """Super-resolution in tiles, as the reference does it: a reflected frame, whole tiles with a margin of repeated
    border pixels, four at a time. With `rounded` the image is 8-bit before and after, the latter by truncation."""

    upscaler: ModelUpscaler
    rounded: bool = False
    name: str = "tiles"

    @property
    def scale(self) -> int:
        return self.upscaler.scale

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if self.rounded:
            return torch.cat([from_picture(to_picture(self._large(from_picture(to_picture(i))), True)) for i in images])
        return torch.cat([self._large(image[None]) for image in images])

    def _large(self, image: Tensor) -> Tensor:
        framed = functional.pad(image, [FRAME] * 4, mode="reflect")
        height, width = framed.shape[-2:]
        room = functional.pad(
            framed, [MARGIN, MARGIN + -width % TILE, MARGIN, MARGIN + -height % TILE], mode="replicate"
        )
        rows, columns = (range(0, side - 2 * MARGIN, TILE) for side in room.shape[-2:])
        side, scale = TILE + 2 * MARGIN, self.scale
        tiles = torch.cat([room[..., y : y + side, x : x + side] for y in rows for x in columns])
        inner = slice(MARGIN * scale, (MARGIN + TILE) * scale)
        made = torch.cat(
            [
                self.upscaler.model(part.to(self.upscaler.device, self.upscaler.dtype)).float()[..., inner, inner]
                for part in tiles.split(TOGETHER)
            ]
        )
        lines = [torch.cat(tuple(line.unsqueeze(1)), -1) for line in made.split(len(columns))]
        whole = torch.cat(lines, -2).to(image.device)
        edge = FRAME * scale
        return whole[..., edge : edge + image.shape[-2] * scale, edge : edge + image.shape[-1] * scale].clamp(0, 1)


def to_picture(image: Tensor, truncate: bool = False) -> Image.Image:
    """(3, H, W) or (1, 3, H, W) in [0, 1] as an 8-bit PIL image."""
    values = image.reshape(image.shape[-3:]).permute(1, 2, 0) * 255
    return Image.fromarray((values if truncate else values.round()).to(torch.uint8).cpu().numpy())


def from_picture(picture: Image.Image) -> Tensor:
    """An 8-bit PIL image as (1, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


# ----------------------------------------------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class Row:
    """One way. "Levels" are 8-bit steps over all pixels and channels; PSNR in dB, of all images as one."""

    name: str
    seconds: float
    peak_mib: float
    worst_levels_to_reference: int
    mean_levels_to_reference: float
    psnr_to_reference: float
    psnr_to_native: float


def ways(size: int) -> dict[str, Picture]:
    """All ways by name, each a function (prompt, seed) -> image."""
    pipe = load_pipeline(demo.weights_path(), device="cpu", dtype="float32")
    upscaler = cast(ModelUpscaler, load_upscaler(demo.upscaler_path(), device="cpu", dtype="float32"))
    guidance = MrFlow(pipe, family="demo").family.guidance

    def ours(upscaler: Any, **choices: Any) -> Picture:
        mrflow = MrFlow(pipe, upscaler=upscaler, family="demo")
        numbers: dict[str, Any] = {"low_steps": LOW_STEPS, "refine_steps": 1, "sigma": SIGMA, "factor": 2, **choices}
        return lambda prompt, seed: mrflow(prompt, width=size, height=size, seed=seed, **numbers).images[0]

    def native(prompt: str, seed: int) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        longest = pipe.tokenizer_2.model_max_length
        more: dict[str, Any] = {"guidance_scale": guidance, "max_sequence_length": longest, "generator": generator}
        return pipe(prompt, width=size, height=size, num_inference_steps=NATIVE_STEPS, **more).images[0]

    same = {"solver": "euler", "posterior": "sample"}
    return {
        "native": native,
        "reference": Reference(pipe, Tiles(upscaler), size, guidance),
        "MrFlow, its choices, rounded": ours(Tiles(upscaler, rounded=True), **same),
        "MrFlow, its choices, float": ours(Tiles(upscaler), **same),
        "MrFlow": ours(upscaler),
    }


def measure(size: int, prompts: Sequence[str], seeds: Sequence[int], tell: Callable[[str], object]) -> list[Row]:
    """Every way on every prompt and seed, one after the other, so that a slow moment of the machine affects all."""
    every = ways(size)
    pictures: dict[str, list[np.ndarray]] = {name: [] for name in every}
    seconds: dict[str, list[float]] = {name: [] for name in every}
    peaks = dict.fromkeys(every, 0)
    for name, make in every.items():
        tell(f"warm-up: {name}")
        make(prompts[0], seeds[0])
    for seed in seeds:
        for prompt in prompts:
            tell(f"seed {seed}: {prompt}")
            for name, make in every.items():
                with PeakMemory(torch.device("cpu")) as peak:
                    begin = time.perf_counter()
                    picture = make(prompt, seed)
                    seconds[name].append(time.perf_counter() - begin)
                peaks[name] = max(peaks[name], peak.bytes)
                pictures[name].append(np.array(picture).astype(np.int16))
    return [
        Row(
            name,
            statistics.median(seconds[name]),
            peaks[name] / 2**20,
            max(int(np.abs(a - b).max()) for a, b in zip(pictures[name], pictures["reference"], strict=True)),
            statistics.fmean(
                float(np.abs(a - b).mean()) for a, b in zip(pictures[name], pictures["reference"], strict=True)
            ),
            *(_psnr(pictures[name], pictures[to]) for to in ("reference", "native")),
        )
        for name in every
    ]


def _psnr(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """PSNR of the mean square error over all images."""
    first, second = (torch.from_numpy(np.stack(list(each)))[None].double() / 255 for each in (some, others))
    return float(psnr(first, second))


def to_markdown(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    native = next(row for row in rows if row.name == "native")
    head = ["way", "seconds", "native / this", "peak MiB", "to the reference: largest, mean 8-bit step"]
    cells = [
        [
            row.name,
            f"{row.seconds:.2f}",
            f"{native.seconds / row.seconds:.2f}",
            f"{row.peak_mib:.0f}",
            f"{row.worst_levels_to_reference}, {row.mean_levels_to_reference:.3f}",
            _db(row.psnr_to_reference),
            _db(row.psnr_to_native),
        ]
        for row in rows
    ]
    return table([*head, "PSNR to reference", "PSNR to native"], cells)


def _db(value: float) -> str:
    return "same" if value == float("inf") else f"{value:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=side, default=256, help="side of the image in pixels (default 256)")
    parser.add_argument("--seeds", type=int, default=2, help="seeds per prompt (default 2)")
    parser.add_argument("--quick", action="store_true", help="one prompt and seed")
    parser.add_argument("--out", type=results_folder, help="folder for reference.json and reference.md")
    options = parser.parse_args(arguments)
    prompts = demo.example_prompts()[: 1 if options.quick else None]
    seeds = range(3, 3 + (1 if options.quick else options.seeds))
    rows = measure(options.size, prompts, seeds, lambda line: print(line, file=sys.stderr))
    text = to_markdown(rows)
    print(text)
    if options.out is not None:
        said = {"size": options.size, "prompts": list(prompts), "seeds": list(seeds), "torch": torch.__version__}
        record = {**said, "threads": torch.get_num_threads(), "rows": [asdict(row) for row in rows]}
        (options.out / "reference.json").write_text(to_json(record))
        (options.out / "reference.md").write_text(text + "\n")


if __name__ == "__main__":
    run_command(main)
