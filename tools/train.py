"""Train the demo model from scratch: ``python -m tools.train --work DIR`` runs every unfinished part in order.

Parts: data, text, flow, vae, sr, guide, classifier, export, evaluate. Each keeps checkpoints under DIR and
resumes where it stopped; its settings and curves are written to DIR/<part>.json. ``--scale 0.01`` shrinks every time
budget, to run the whole chain in minutes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from tools.train_demo import classifier, data, evaluate, export, flow, sr, text, vae

PARTS = ("data", "text", "flow", "vae", "sr", "guide", "classifier", "export", "evaluate")
WEIGHTS = Path(__file__).resolve().parent.parent / "mrflow_sched" / "demo" / "weights"


def run(part: str, work: Path, scenes: int, scale: float, out: Path) -> None:
    if part == "data":
        data.build(work, scenes)
    elif part == "text":
        text.train(work, seconds=900 * scale)
    elif part == "flow":
        default = flow.FlowSettings()
        flow.train(work, replace(default, seconds=default.seconds * scale))
    elif part == "vae":
        vae.train(work, replace(vae.DecoderSettings(), seconds=vae.DecoderSettings().seconds * scale))
    elif part == "sr":
        sr.train(work, replace(sr.UpscalerSettings(), seconds=sr.UpscalerSettings().seconds * scale))
    elif part == "guide":
        flow.train_guidance(work, replace(flow.GuideSettings(), seconds=flow.GuideSettings().seconds * scale))
    elif part == "classifier":
        judged = classifier.ClassifierSettings()
        seconds, letters = judged.seconds * scale, judged.letter_seconds * scale
        classifier.train(work, replace(judged, seconds=seconds, letter_seconds=letters))
    elif part == "export":
        export.export(work, out)
    else:
        evaluate.evaluate(work, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="folder for images, latents and checkpoints (about 10 GB for 28000 scenes)",
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the finished pipeline folder goes")
    parser.add_argument("--scenes", type=int, default=28000)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on every time budget")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    done_path = options.work / "parts_done.json"
    done = json.loads(done_path.read_text()) if done_path.exists() else []
    for part in options.parts:
        if part in done and list(options.parts) == list(PARTS):
            continue
        run(part, options.work, options.scenes, options.scale, options.out)
        done = sorted({*done, part})
        done_path.write_text(json.dumps(done))


if __name__ == "__main__":
    main()
