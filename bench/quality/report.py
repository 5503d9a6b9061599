"""Tables, the trade-off plot and image sheets of the measured ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from bench.markdown import table
from bench.quality import full_size, known
from bench.quality.kinds import kind_of
from mrflow_sched.demo.scenes import Scene
from mrflow_sched.images.convert import to_pil

OURS = "staged 12+1"
"""The way that the goals are about."""
TRUTH = known.TRUE
"""The rendered scenes, among the images by way."""
BEYOND = ("hires fix", "midway", "native")
"""Kinds of ways that are not ours; the goals compare them with the staged ones."""
PARTS = ("attributes", "letters", "local structure", "look", "spectrum")


def to_markdown(record: Mapping[str, Any]) -> str:
    """What the bench knows of itself, then the ways in the order asked: composite and cost, its parts, full size, same
    noise, kinds of picture and, if it could tell its known pairs apart, differences to the base and the goals."""
    told = record["known"]["could tell"]
    tables = [known.to_markdown(record["known"])]
    if record.get("not measured"):
        tables.append(f"Stopped by Ctrl-C, not measured: {'; '.join(record['not measured'])}.")
    tables += [_costs(record, told), _parts(record), _at_full_size(record, told)]
    natives = {name: row["same noise"] for name, row in record["ways"].items() if "same noise" in row}
    if len(natives) > 1:
        tables.append(_same_noise(natives))
    if "by kind" in record:
        tables.append(_by_kind(record))
    tables.append(_kinds_of_all(record))
    if told and OURS in record["ways"] and "staged 20+1" in record["ways"]:
        met = [[goal, value, "yes" if reached else "no"] for goal, value, reached in goals(record)]
        tables.append(table(["goal", "measured", "met"], met, "l"))
    return "\n\n".join(tables)


def _costs(record: Mapping[str, Any], told: bool) -> str:
    head = ["way", "cost", "s", "composite (95 %)", "over ceiling"]
    lines: list[list[str]] = []
    for name, row in record["ways"].items():
        own = f"{row['composite']:.3f} {_within(row['interval'], '.3f')}"
        lines.append([name, f"{row['cost']:.2f}", f"{row['seconds']:.2f}", own, f"{row['over ceiling']:.3f}"])
        if told:
            lines[-1].append(f"{row['to base']:+.3f} {_within(row['to base, interval'])}")
    for name, command in record.get("not installed", {}).items():
        lines.append([name, "", "", "not installed", f"`{command}`", *([""] if told else [])])
    return table([*head, f"to {record['base']} (95 %)"] if told else head, lines, "lrrl")


def _within(edges: Sequence[float] | None, form: str = "+.3f") -> str:
    return "" if edges is None else f"({edges[0]:{form}} to {edges[1]:{form}})"


def _parts(record: Mapping[str, Any]) -> str:
    base = record["base"]
    lines: list[list[str]] = []
    for name, row in record["ways"].items():
        near = row[f"to {base}"]
        parts = [f"{row[part]:.3f}" if part in row else "" for part in PARTS]
        lines.append([name, *parts, f"{near['psnr']:.1f}, {near['ssim']:.3f}", f"{near['colour drift']:.2f}"])
    return table(["way", *PARTS, f"PSNR, SSIM to {base}", "colour drift"], lines)


def _at_full_size(record: Mapping[str, Any], told: bool) -> str:
    """Distances at full size and the patch judge's readings; what these and local structure say together, where the
    bench could tell."""
    head = ["way", "distance at full size", "logit", "patch distance"]
    lines: list[list[str]] = []
    for name, row in record["ways"].items():
        patches = row["patches"]
        lines.append([name, f"{row['full size']['distance']:.2f}", f"{patches['logit']:+.2f}"])
        lines[-1].append(f"{patches['distance']:.2f}")
        if told:
            lines[-1] += [_within(patches[f"{value} to base, interval"], "+.2f") for value in ("logit", "distance")]
            lines[-1].append(patches["verdict"])
    base = record["base"]
    more = [f"logit to {base} (95 %)", f"patch distance to {base} (95 %)", "all together"]
    against_truth = {name: row["full size"]["to ground truth"] for name, row in record["ways"].items()}
    return "\n\n".join(
        [table([*head, *more] if told else head, lines), full_size.to_markdown(against_truth, "ground truth")]
    )


def _same_noise(natives: Mapping[str, Mapping[str, Any]]) -> str:
    converged = next(iter(natives.values()))["converged"]
    lines = [
        [name, f"{found['median psnr']:.1f}", f"{found['flips']:.0%}"]
        for name, found in natives.items()
        if name != converged
    ]
    return table([f"way, to {converged} from the same noise", "median PSNR", "another colour, ground or sky"], lines)


def _by_kind(record: Mapping[str, Any]) -> str:
    """Where our way loses to the base, and by how much."""
    lines: list[list[str]] = []
    for kind, row in record["by kind"].items():
        both = [row["base"], row["ours"]]
        cells = [f"{row['ceiling']['composite']:.3f}", " / ".join(f"{each['composite']:.3f}" for each in both)]
        cells.append(f"{row['to base']:+.3f} {_within(row['to base, interval'])}".strip())
        cells += [
            " / ".join(f"{each[part]:.2f}" if part in each else "-" for each in both)
            for part in ("attributes", "letters", "distance at full size")
        ]
        lines.append([kind, str(row["scenes"]), *cells])
    head = ["by kind of picture", "scenes", "ceiling", f"{record['base']} / {OURS}", "difference (95 %)"]
    return table([*head, "attributes", "letters", "distance at full size"], lines)


def _kinds_of_all(record: Mapping[str, Any]) -> str:
    kinds = list(next(iter(record["ways"].values()))["kinds"])
    lines: list[list[str]] = []
    for name, row in record["ways"].items():
        heights = ", ".join(f"{height} px {share:.2f}" for height, share in row["letters by height"].items())
        lines.append([name, *(f"{row['kinds'][kind]['composite']:.3f}" for kind in kinds), heights])
    return table(["way", *kinds, "letters by height"], lines)


def goals(record: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Each goal of the method on this model, the measured value, and whether this run meets it."""
    rows, base = record["ways"], record["base"]
    ours, longer, native = rows[OURS], rows["staged 20+1"], rows[base]
    staged = [row for row in rows.values() if row["kind"] == "staged"]

    def beaten(row: Mapping[str, Any]) -> bool:
        """By a staged way that costs no more."""
        return any(each["cost"] <= row["cost"] + 1e-6 and each["composite"] >= row["composite"] for each in staged)

    unbeaten = [name for name, row in rows.items() if row["kind"] in BEYOND and not beaten(row)]
    least = record["size"] / 12
    large = [height for height in ours["letters by height"] if int(height) >= least]
    letters = [ours["letters by height"][height] / max(native["letters by height"][height], 1e-9) for height in large]
    drift = abs(ours["colour drift"]["low to final"]["mean"])
    low, high = longer["to base, interval"]
    return [
        (f"attributes and letters of {base} at 95 % or more", f"{native['accuracy']:.1%}", native["accuracy"] >= 0.95),
        (f"{OURS} within 1 % of {base}'s composite", f"{ours['to base']:+.3f}", ours["to base"] >= -0.01),
        (f"staged 20+1 indistinguishable from {base}", f"{low:+.3f} to {high:+.3f}", low <= 0 <= high or low > 0),
        (
            "better than every other way at equal or lower cost",
            "not better than " + ", ".join(unbeaten) if unbeaten else "all",
            not unbeaten,
        ),
        (
            f"letters of 1/12 of the height or more: 97 % of {base}'s",
            ", ".join(f"{height} px {share:.0%}" for height, share in zip(large, letters, strict=True)),
            min(letters, default=1.0) >= 0.97,
        ),
        ("mean colour drift from the low-resolution image at most 1/255", f"{drift:.2f}/255", drift <= 1.0),
    ]


def plot(record: Mapping[str, Any], path: Path, *, sweep: bool = False) -> None:
    """Composite against seconds per image (or, for a sweep, by value), with intervals."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = record["ways"]
    if sweep:
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for index, (name, row) in enumerate(rows.items()):
            _bar(axes, index, row, f"C{int(name == record['base'])}")
        axes.set_xticks(range(len(rows)), list(rows), rotation=35, ha="right", fontsize=8)
        axes.set_ylabel("composite")
        axes.grid(alpha=0.3)
    else:
        figure, both = plt.subplots(1, 2, figsize=(13, 6.2), layout="constrained")
        numbered = list(enumerate(sorted(rows.items(), key=lambda item: item[1]["seconds"]), 1))
        kinds = list(dict.fromkeys(row["kind"] for row in rows.values()))
        best = max(row["composite"] for row in rows.values())
        _trade_off(both[0], [(number, row) for number, (_, row) in numbered], kinds, bars=True)
        top = [(number, row) for number, (_, row) in numbered if row["composite"] > best - 0.03]
        _trade_off(both[1], top, kinds, bars=False)
        both[1].set_title("the best ways, by number (see right)", fontsize=9)
        names = "\n".join(f"{number}  {name}" for number, (name, _) in numbered)
        figure.text(1.01, 0.5, names, fontsize=7.5, va="center")
    if not record["known"]["could tell"]:
        figure.suptitle("could not tell its known pairs apart: differences mean nothing", fontsize=9)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _trade_off(axes: Any, rows: Sequence[tuple[int, Mapping[str, Any]]], kinds: Sequence[str], *, bars: bool) -> None:
    """Composite against seconds, with intervals or with each way's number."""
    for number, row in rows:
        colour = f"C{kinds.index(row['kind'])}"
        if bars:
            _bar(axes, row["seconds"], row, colour)
        else:
            axes.plot([row["seconds"]], [row["composite"]], "o", color=colour, markersize=4)
            spot = (0, 5 if number % 2 else -11)
            at = (row["seconds"], row["composite"])
            axes.annotate(str(number), at, xytext=spot, textcoords="offset points", fontsize=7, ha="center")
    axes.set_xscale("log")
    axes.set_xlabel("seconds per image")
    axes.set_ylabel("composite")
    for index, kind in enumerate(kinds):
        axes.plot([], [], "o", color=f"C{index}", label=kind)
    axes.legend()
    axes.grid(alpha=0.3)


def sweeps_plot(records: Mapping[str, tuple[str, Mapping[str, Any]]], path: Path) -> None:
    """All sweeps side by side, {name: (question, record)}: each value's difference to staged 12+1, with intervals."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    across = 3
    down = -(-len(records) // across)
    figure, axes = plt.subplots(down, across, figsize=(15, 3.3 * down), squeeze=False, layout="constrained")
    for panel in axes.flat[len(records) :]:
        panel.axis("off")
    for panel, (name, (question, record)) in zip(axes.flat, records.items(), strict=False):
        rows = {way.removeprefix(f"{name} "): row for way, row in record["ways"].items() if way != record["base"]}
        for index, row in enumerate(rows.values()):
            _bar(panel, index, row, "C0", "to base", "to base, interval")
        panel.axhline(0, color="grey", linewidth=0.8)
        bottom, top = panel.get_ylim()
        panel.set_ylim(min(bottom, -0.03), max(top, 0.03))
        panel.set_xticks(range(len(rows)), list(rows), rotation=30, ha="right", fontsize=7)
        panel.set_title(question if record["known"]["could tell"] else f"{question} (could not tell)", fontsize=9)
        panel.set_ylabel("composite, to 12+1", fontsize=7)
        panel.tick_params(axis="y", labelsize=7)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _bar(
    axes: Any, x: float, row: Mapping[str, Any], colour: str, value: str = "composite", interval: str = "interval"
) -> None:
    low, high = row[interval]
    middle = row[value]
    edges = [[max(middle - low, 0)], [max(high - middle, 0)]]
    axes.errorbar([x], [middle], yerr=edges, fmt="o", color=colour, capsize=2, markersize=5)


def sheet(
    record: Mapping[str, Any], pictures: Mapping[str, Tensor], scenes: Sequence[Scene], path: Path, each: int = 2
) -> None:
    """The ground truth and the 8-bit images of every way: `each` scenes of every kind side by side, a line per way."""
    shown: list[int] = []
    for kind in dict.fromkeys(map(kind_of, scenes)):
        shown += [row for row, scene in enumerate(scenes) if kind_of(scene) == kind][:each]
    side, left = 160, 190
    out = Image.new("RGB", (left + side * len(shown), side * len(pictures)), (250, 249, 246))
    pen = ImageDraw.Draw(out)
    for line, (name, images) in enumerate(pictures.items()):
        pen.multiline_text((8, line * side + 8), _wrapped(name), fill=(28, 30, 34))
        for column, row in enumerate(shown):
            small = to_pil(images[row] / 255).resize((side, side), Image.Resampling.LANCZOS)
            out.paste(small, (left + column * side, line * side))
    out.save(path)


def worst_sheet(record: Mapping[str, Any], pictures: Mapping[str, Tensor], path: Path) -> None:
    """The scenes at which our way loses most against the base: the ground truth, the base's image, ours."""
    names = [TRUTH, record["base"], OURS]
    side, left = 192, 120
    rows = record["worst"]
    out = Image.new("RGB", (left + side * len(rows), side * len(names)), (250, 249, 246))
    pen = ImageDraw.Draw(out)
    for line, name in enumerate(names):
        pen.multiline_text((8, line * side + 8), _wrapped(name, 16), fill=(28, 30, 34))
        for column, row in enumerate(rows):
            small = to_pil(pictures[name][row] / 255).resize((side, side), Image.Resampling.LANCZOS)
            out.paste(small, (left + column * side, line * side))
    out.save(path)


def _wrapped(text: str, width: int = 28) -> str:
    lines, line = [], ""
    for word in text.split():
        if len(line) + len(word) >= width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "\n".join([*lines, line])
