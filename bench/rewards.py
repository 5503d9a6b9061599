"""Measures reward tuning on the embedded model.

    python -m bench.rewards --out bench/results               every part (under an hour on two CPU cores)
    python -m bench.rewards --parts gradients --images 1      prints only

Writes rewards.json and rewards.md. Parts: gradients, how near each way of leading a reward back comes to
backpropagation through every step, with its seconds and what its graph keeps in memory; tuning, what the default of
`mrflow tune` does to held-out captions for three seeds: the reward, the guard, what full-size readers find there, and
the same with a reward that is known to be deceived (saturation, without a guard).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from bench.command import results_folder, run_command, to_json
from bench.markdown import table
from mrflow_sched import demo, load_upscaler, make_plan, sample_staged
from mrflow_sched.demo.captions import random_captions
from mrflow_sched.demo.judge import hits, load_judge
from mrflow_sched.demo.parse import scene_of
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.measure.scores import get_score
from mrflow_sched.methods.reward import Surrogate
from mrflow_sched.tuning import Tuned, TuneSettings, tune
from mrflow_sched.tuning.adapter import Adapter
from mrflow_sched.tuning.report import gain
from mrflow_sched.tuning.sampled import Batch, Teacher

PARTS = ("gradients", "tuning")
WAYS: dict[str, Surrogate] = {
    "full": Surrogate("full"),
    "bridge, 6 active, coupling 1": Surrogate("bridge", count=6, coupling=1.0),
    "bridge, 3 active, coupling .5": Surrogate("bridge"),
    "sparse, 3 active, unbiased": Surrogate("sparse", unbiased=True),
    "lagrange, order 3": Surrogate("lagrange"),
    "leap, coupling .3": Surrogate("leap", coupling=0.3),
    "clean (ReFL)": Surrogate("clean"),
    "renoised (DRaFT-LV)": Surrogate("renoised"),
    "detached (DRTune)": Surrogate("detached"),
}
STEPS = 6


def gradients(images: int, draws: int) -> list[dict[str, Any]]:
    """Each way's cosine to the exact gradient, and the length of it beside that one's, for two rewards."""
    engine = demo.load_engine(device="cpu", dtype="float32")
    plan, captions = make_plan(engine.family, 256, 256, low_steps=STEPS), random_captions(images, seed=11)
    adapter = Adapter(engine, 4, seed=1)
    try:  # a fresh LoRA's first factors get no gradient: as after some updates
        noise = torch.Generator().manual_seed(2)
        adapter.load(
            {name: 0.02 * torch.randn(each.shape, generator=noise) for name, each in adapter.weights().items()}
        )
        rows = [{"way": name} | _of_way(engine, adapter, plan, captions, way, draws) for name, way in WAYS.items()]
    finally:
        adapter.remove()
    return rows


def _of_way(
    engine: PipelineEngine, adapter: Adapter, plan: Any, captions: Sequence[str], way: Surrogate, draws: int
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for reward in ("saturation", "judge"):
        teacher = Teacher(engine, plan, get_score(reward), None, None, None)

        def gradient(chosen: Surrogate, draw: int, teacher: Teacher = teacher) -> Tensor:
            seeds = tuple(range(draw * 100, draw * 100 + len(captions)))
            loss, _ = teacher.loss(Batch(tuple(captions), seeds, draw), chosen)
            parts: Any = torch.autograd.grad(loss, adapter.parameters, allow_unused=True)
            return torch.cat([part.flatten() for part in parts if part is not None])

        near: list[float] = []
        length: list[float] = []
        for draw in range(draws):
            exact, found = gradient(WAYS["full"], draw), gradient(way, draw)
            near.append(float(torch.cosine_similarity(found, exact, dim=0)))
            length.append(float(found.norm() / exact.norm()))
        row |= {f"{reward} cosine": [min(near), max(near)], f"{reward} length": fmean(length)}
        if reward == "saturation":
            row |= _cost(gradient, way, adapter)
    return row


def _cost(gradient: Callable[[Surrogate, int], object], way: Surrogate, adapter: Adapter) -> dict[str, float]:
    """Seconds, and megabytes that the graph keeps besides weights."""
    weights = {each.untyped_storage().data_ptr() for each in adapter.network.parameters()}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    begin = time.perf_counter()
    gradient(way, 0)
    seconds = time.perf_counter() - begin
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        gradient(way, 0)
    return {"seconds": seconds, "megabytes": sum(kept.values()) / 1e6}


def tuning(updates: int, seeds: Sequence[int], train: int, held_out: int) -> list[dict[str, Any]]:
    """What tuning does to held-out captions."""
    rows: list[dict[str, Any]] = []
    # The second sets its guard aside: it shows what one is for.
    for reward, guard, drop in (("judge", "sharpness", 0.1), ("saturation", "judge", 100.0)):
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(_tuned(reward, guard, drop, seed, updates, train, held_out, Path(folder)))
    return rows


def _tuned(
    reward: str, guard: str, drop: float, seed: int, updates: int, train: int, held_out: int, folder: Path
) -> dict[str, Any]:
    engine = demo.load_engine(device="cpu")
    captions = random_captions(train + held_out, seed=100)
    plan = make_plan(engine.family, 256, 256, low_steps=STEPS, seed=1000)
    settings = TuneSettings(updates=updates, guard_drop=drop, seed=seed)
    begin = time.perf_counter()
    found = tune(
        *(engine, captions[:train], captions[train:]),
        plan=plan,
        reward=reward,
        guard=guard,
        folder=folder,
        settings=settings,
    )
    seconds = time.perf_counter() - begin
    before, after = found.checks[0], found.at(found.update)
    read = _read(found, captions[train:], plan)
    return {
        "reward": reward,
        "guard": guard,
        "seed": seed,
        "updates": found.update,
        "stopped": found.stopped,
        "seconds": seconds,
        "before": fmean(before.rewards),
        "gain": gain(before.rewards, after.rewards),
        "guard gain": gain(before.guards, after.guards),
        "psnr": fmean(after.psnr) if found.update else None,
        **read,
    }


def _read(found: Tuned, captions: Sequence[str], plan: Any) -> dict[str, Any]:
    """Shares of attributes and letters that are read right in final images of new seeds, before and after."""
    judge, scenes = load_judge(), [scene_of(caption) for caption in captions]
    engine, upscaler = demo.load_engine(device="cpu"), load_upscaler(demo.upscaler_path())
    shares: dict[str, list[list[float]]] = {"attributes": [], "letters": []}
    for tuned in (False, True):
        if tuned and found.file is not None:
            engine.pipe.load_lora_weights(str(found.file.parent), weight_name=found.file.name)
        seeds = [5000 + row for row in range(len(captions))]
        images = sample_staged(engine, plan, list(captions), upscaler=upscaler, seeds=seeds).images
        read = hits(judge, images, cast("Any", scenes))
        values: dict[str, list[float]] = {"attributes": [], "letters": []}
        for each in read:
            marks = [mark for name, found_marks in each.items() if name != "letters" for mark in found_marks]
            values["attributes"].append(float(np.mean(marks)))
            if each.get("letters"):
                values["letters"].append(float(np.mean(each["letters"])))
        for name, each_image in values.items():
            shares[name].append(each_image)
    return {
        name: {"before": fmean(before), "gain": gain(before, after) if len(before) > 1 else (0.0, 0.0)}
        for name, (before, after) in shares.items()
        if before
    }


def report(rows: dict[str, Any]) -> str:
    """The tables."""
    parts: list[str] = []
    if "gradients" in rows:
        head = ("way", "saturation: cosine", "length", "judge: cosine", "length", "MB", "s")
        lines = [
            (
                row["way"],
                *(
                    part
                    for reward in ("saturation", "judge")
                    for part in (_span(row[f"{reward} cosine"]), f"{row[f'{reward} length']:.2f}")
                ),
                f"{row['megabytes']:.0f}",
                f"{row['seconds']:.2f}",
            )
            for row in rows["gradients"]
        ]
        parts.append("## gradients\n\n" + table(head, lines))
    if "tuning" in rows:
        head = ("reward", "guard", "seed", "updates", "reward", "guard", "attributes", "letters", "PSNR", "s")
        lines = [
            (
                row["reward"],
                row["guard"],
                str(row["seed"]),
                str(row["updates"]),
                _gained(row["gain"]),
                _gained(row["guard gain"]),
                _gained(row["attributes"]["gain"]),
                _gained(row["letters"]["gain"]) if "letters" in row else "",
                "" if row["psnr"] is None else f"{row['psnr']:.1f}",
                f"{row['seconds']:.0f}",
            )
            for row in rows["tuning"]
        ]
        parts.append("## tuning\n\n" + table(head, lines))
    return "\n\n".join(parts) + "\n"


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:.2f} to {values[1]:.2f}"


def _gained(values: Sequence[float]) -> str:
    return f"{values[0]:+.4f} ± {values[1]:.4f}"


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        words: Its arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.rewards", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--images", type=int, default=2, help="of a gradient")
    parser.add_argument("--draws", type=int, default=4, help="of noise and of picks, for each gradient")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--prompts", type=int, nargs=2, default=(96, 32), help="trained on, and held out")
    parser.add_argument("--out", type=results_folder, help="folder for rewards.json and rewards.md")
    asked = parser.parse_args(words)
    rows: dict[str, Any] = {}
    if "gradients" in asked.parts:
        rows["gradients"] = gradients(asked.images, asked.draws)
    if "tuning" in asked.parts:
        rows["tuning"] = tuning(asked.updates, asked.seeds, *asked.prompts)
    text = report(rows)
    if asked.out is not None:
        (asked.out / "rewards.json").write_text(to_json({"rows": rows}))
        (asked.out / "rewards.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_command(main)
