"""Make the figures and tables of docs/ from the embedded model: ``python -m tools.figures --work DIR``.

Needs the work folder of ``tools.train`` (curves, judge) and the finished weights; parts that were not trained there
keep the record that docs/demo-model.json has. Writes training, stage and sample figures to docs/images/, the numbers to
docs/demo-model.json, and the tables of docs/demo-model.md and docs/solvers.md.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import torch
from PIL import Image
from safetensors import safe_open

from bench import solvers
from bench.markdown import table
from mrflow_sched import demo, load_upscaler, make_plan, sample_staged
from mrflow_sched.images.files import save_png
from tools.train_demo import evaluate

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
RECORD = ROOT / "docs" / "demo-model.json"
RECORDS = ("text", "flow", "vae", "sr", "guided", "classifier", "further")


def training_record(work: Path) -> dict[str, Any]:
    """What is on record of every part: that of the work folder, else what the page had."""
    paths = {name: work / f"{name}.json" for name in RECORDS} | {"text": work / "text" / "done.json"}
    before = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    found = {name: json.loads(path.read_text()) if path.exists() else before.get(name) for name, path in paths.items()}
    return {name: part for name, part in found.items() if part is not None}


def whole_curve(rows: list[list[Any]]) -> list[list[Any]]:
    """The rows of a training that was begun anew with its clock at 0, with the seconds of all that went before."""
    whole: list[list[Any]] = []
    before = last = 0.0
    for row in rows:
        before += last if row[1] < last else 0.0
        last = row[1]
        whole.append([row[0], row[1] + before, *row[2:]])
    return whole


def training_curves(record: dict[str, Any], path: Path) -> None:
    """Loss of the flow model and of its further training, quality of the VAE's decoder and of the upscaler, against
    seconds of training."""
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.2), layout="constrained")
    rows = record["flow"]["curve"]
    for column, label in ((2, "64 pixels"), (3, "128 pixels"), (4, "256 pixels")):
        points = [(row[1], row[column]) for row in rows if row[column] is not None and row[0] > 100]
        axes[0].plot(*zip(*points, strict=True), label=label)
    axes[0].set(title="flow model", xlabel="seconds", ylabel="velocity error (mean square)")
    axes[0].legend()
    rows = whole_curve(record["further"]["curve"]) if "further" in record else []
    for column, label in ((2, "128 pixels"), (3, "256 pixels, a quarter"), (5, "256 pixels")):
        points = [(row[1], row[column]) for row in rows if row[column] is not None and row[0] > 100]
        axes[1].plot([point[0] for point in points], [point[1] for point in points], label=label)
    axes[1].set(title="flow model, further", xlabel="seconds", ylabel="velocity error (mean square)")
    axes[1].legend()
    for axis, key, title in ((axes[2], "vae", "VAE decoder"), (axes[3], "sr", "upscaler x2")):
        points = [(row[1], row[2]) for row in record[key]["curve"] if row[0] > 100]
        axis.plot(*zip(*points, strict=True))
        axis.set(title=title, xlabel="seconds", ylabel="PSNR on training crops, dB")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def stages_strip(path: Path) -> None:
    """One image in its stages: stage 1, upscaled, refined."""
    engine, upscaler = demo.load_engine(), load_upscaler(demo.upscaler_path())
    prompt = demo.example_prompts()[0]
    plan = make_plan("demo", 256, 256, "12+1", seed=3)
    result = sample_staged(engine, plan, prompt, upscaler=upscaler, keep_stages=True)
    low, upscaled = (stage.image[0] for stage in result.stages)
    small = torch.ones(3, 256, 128)
    small[:, 64:192] = low
    gap = torch.ones(3, 256, 16)
    save_png(path, torch.cat([small, gap, upscaled, gap, result.images[0]], 2), {})


def merge_sheets(names: tuple[str, str], work: Path, path: Path) -> None:
    left, right = (Image.open(work / f"sheet-{name}.png") for name in names)
    joined = Image.new("RGB", (left.width + right.width + 24, left.height), "white")
    joined.paste(left, (0, 0))
    joined.paste(right, (left.width + 24, 0))
    joined.resize((joined.width // 2, joined.height // 2), Image.Resampling.LANCZOS).save(path, optimize=True)


def write_between(page: Path, mark: str, text: str) -> None:
    """Put text between ``<!-- mark -->`` and the next ``<!-- end -->`` of a page."""
    head, rest = page.read_text().split(f"<!-- {mark} -->\n", 1)
    _, tail = rest.split("<!-- end -->", 1)
    page.write_text(head + f"<!-- {mark} -->\n" + text + "\n<!-- end -->" + tail)


def part_table(weights: Path) -> str:
    """Class and size of every part of the shipped weights."""
    rows: list[list[str]] = []
    files = {
        "network": "transformer",
        "VAE": "vae",
        "T5": "text_encoder_2",
        "CLIP": "text_encoder",
        "upscaler": "upscaler",
    }
    for title, folder in files.items():
        path = next((weights / folder).glob("*.safetensors"))
        with safe_open(path, "pt") as stored:
            shapes = [stored.get_slice(key).get_shape() for key in stored.keys()]  # noqa: SIM118
        config = weights / folder / "config.json"
        kind = json.loads(config.read_text()) if config.exists() else {"_class_name": "ESRGAN (RRDBNet)"}
        name = kind.get("_class_name") or kind["architectures"][0]
        count = sum(math.prod(shape) for shape in shapes)
        rows.append([title, f"`{name}`", f"{count / 1e6:.2f} M weights, {path.stat().st_size / 1e6:.1f} MB"])
    return table(["part", "class", "size"], rows, "l")


def accuracy_table(scores: dict[str, Any]) -> str:
    """Share of each attribute that the judge reads in the images, by sampling way."""
    names = [name for name, value in scores.items() if isinstance(value, dict)]
    groups = list(scores["native 50"])
    groups.remove("seconds")
    rows: list[list[str]] = []
    for group in groups:
        cells = [f"{scores[name][group] * 100:.1f} %" if group in scores[name] else "" for name in names]
        rows.append([group, *cells])
    note = (
        f"{scores['scenes']} captions, a quarter of each category, and {scores['fine scenes']} with fine detail (the "
        f"rows below them); guidance {scores['guidance']:g}."
    )
    return f"{table(['attribute', *names], rows, 'l')}\n\n{note}"


def record_table(record: dict[str, Any]) -> str:
    """Training seconds and steps of every part, and its quality at the end."""
    rows: list[list[str]] = []
    flow, guided = record["flow"], record["guided"]
    low, high = (next(row[k] for row in reversed(flow["curve"]) if row[k] is not None) for k in (3, 4))
    judge, seen = record["classifier"], flow["samples"]
    judged = {
        "seconds": sum(curve[-1][1] for curve in judge["curves"].values()),
        "steps": sum(curve[-1][0] for curve in judge["curves"].values()),
    }
    ends = {
        "text": f"{record['text']['curve'][-1][3]:.1%} of token roles correct on held-out captions",
        "flow": f"velocity error {low:.3f} at 128, {high:.3f} at 256, after {seen['tiny']} samples at 64 pixels, "
        f"{seen['low']} at 128 and {seen['high']} at 256",
        "vae": f"{record['vae']['curve'][-1][2]:.1f} dB on training crops",
        "sr": f"{record['sr']['curve'][-1][2]:.1f} dB on training crops",
        "guided": "error {:.3f} to the guided teacher, {:.3f} for a network that ignores the scale".format(
            *guided["curve"][-1][2:]
        ),
        "classifier": f"{record['classifier']['accuracy_on_true_scenes']['all'] * 100:.1f} % on unseen rendered scenes",
    }
    further = dict(record.get("further", {}))
    if further:
        curve, more = whole_curve(further["curve"]), further["samples"]
        further["seconds"] = curve[-1][1]
        low, high = (fmean([row[k] for row in curve if row[k] is not None][-20:]) for k in (2, 5))
        ends["further"] = (
            f"velocity error {low:.3f} at 128, {high:.3f} at 256, after {more['low']} samples at 128, {more['high']} "
            f"at 256 and {more['quarter'] + more['half']} bands of images at 256"
        )
    for name, end in ends.items():
        part = {"classifier": judged, "further": further}.get(name, record[name])
        rows.append([name, f"{part['seconds']:.0f}", str(part["steps"]), end])
    return table(["part", "seconds", "steps", "at the end"], rows, "l")


def solver_tables(path: Path, *, ratios: bool) -> str:
    """Solver tables of docs/solvers.md from results of bench.solvers: ratios to the best, or plain distances."""
    found = [solvers.Row(**row) for row in json.loads(path.read_text())]
    tables: list[str] = []
    for scale in sorted({row.guidance for row in found}):
        here = [row for row in found if row.guidance == scale]
        if ratios:
            values = solvers.mean_ratios(here, solvers.STEPS)
        else:
            values = {name: {row.steps: row.rms for row in here if row.solver == name} for name in solvers.COMPARED}
        tables.append(solvers.table(f"guidance {scale:g}", values, solvers.STEPS))
    return "\n\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--skip-evaluation", action="store_true", help="use the existing evaluation")
    options = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    if not options.skip_evaluation:
        evaluate.evaluate(options.work, demo.weights_path())
    record = training_record(options.work)
    record["evaluation"] = json.loads((options.work / "evaluation.json").read_text())
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    page = ROOT / "docs" / "demo-model.md"
    write_between(page, "parts", part_table(demo.weights_path()))
    write_between(page, "accuracy", accuracy_table(record["evaluation"]))
    write_between(page, "record", record_table(record))
    results = ROOT / "bench" / "results"
    solver_page = ROOT / "docs" / "solvers.md"
    write_between(solver_page, "mixtures", solver_tables(results / "solvers.json", ratios=True))
    if (results / "solvers-demo.json").exists():
        write_between(solver_page, "demo", solver_tables(results / "solvers-demo.json", ratios=False))
    training_curves(record, IMAGES / "training.png")
    stages_strip(IMAGES / "stages.png")
    merge_sheets(("native-50", "staged-12+1"), options.work, IMAGES / "samples.png")


if __name__ == "__main__":
    main()
