"""Train the demo model: ``python -m tools.train --work DIR`` runs every unfinished part in order.

From scratch: data, text, flow, vae, sr, guide, classifier, fine classifier, export, evaluate. With ``--from-shipped``,
from the weights of the package on: further (text encoders and network), decoder, export, fine classifier, evaluate.
Each part keeps checkpoints under DIR and resumes where it stopped; its settings and curves are written to
DIR/<part>.json. ``--scale 0.01`` shrinks every time budget, to run the whole chain in minutes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from tools.train_demo import (
    classifier,
    data,
    evaluate,
    export,
    fine_classifier,
    flow,
    further,
    further_decoder,
    sr,
    text,
    vae,
)

FROM_SHIPPED = ("further", "decoder", "export", "fine classifier", "evaluate")
PARTS = ("data", "text", "flow", "vae", "sr", "guide", "classifier", "fine classifier", "export", "evaluate")
WEIGHTS = Path(__file__).resolve().parent.parent / "mrflow_sched" / "demo" / "weights"


def run_further(part: str, work: Path, scale: float, out: Path) -> None:
    """A part of the training from the shipped weights on."""
    if part == "further":
        default = further.FurtherSettings()
        further.train(work, replace(default, seconds=default.seconds * scale))
    elif part == "decoder":
        decoder = further_decoder.SETTINGS
        further_decoder.train(work, replace(decoder, seconds=decoder.seconds * scale))
    elif part == "export":
        export.export_further(work, out)
    elif part == "fine classifier":
        fine_classifier.train(work, fine_classifier.FineSettings().scaled(scale))
    else:
        evaluate.evaluate(work, out)


def run(part: str, work: Path, scenes: int, scale: float, out: Path) -> None:
    """A part of the training from scratch."""
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
    elif part == "fine classifier":
        fine_classifier.train(work, fine_classifier.FineSettings().scaled(scale))
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
    parser.add_argument("--from-shipped", action="store_true", help="train the weights of the package further")
    parser.add_argument("--parts", nargs="+", choices=list(dict.fromkeys([*PARTS, *FROM_SHIPPED])))
    options = parser.parse_args()
    every = FROM_SHIPPED if options.from_shipped else PARTS
    unknown = [part for part in options.parts or () if part not in every]
    if unknown:
        parser.error(f"--parts {unknown[0]!r} is no part of this training; choose from {', '.join(every)}")
    options.work.mkdir(parents=True, exist_ok=True)
    done_path = options.work / "parts_done.json"
    done = json.loads(done_path.read_text()) if done_path.exists() else []
    for part in options.parts or every:
        if part in done and not options.parts:
            continue
        if options.from_shipped:
            run_further(part, options.work, options.scale, options.out)
        else:
            run(part, options.work, options.scenes, options.scale, options.out)
        done = sorted({*done, part})
        done_path.write_text(json.dumps(done))


if __name__ == "__main__":
    main()
