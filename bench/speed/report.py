"""Tables and plots of the speed benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.markdown import table
from mrflow_sched import FAMILIES, make_native_plan, make_plan
from mrflow_sched.plan.cost import part_costs, peak_memory, work_ratio

_COLUMNS = {
    "speedup": ".2f",
    "limit": ".2f",
    "share of limit": ".1%",
    "fastest share": ".1%",
    "network limit": ".2f",
    "overhead": ".1%",
}
KINDS = ("stage 1 sample", "stage 2 sample", "decode", "encode", "upscale", "other")


def to_markdown(record: Mapping[str, Any]) -> str:
    """One table per family."""
    head = f"{record['device']}, torch {record['torch']}, median of {record['repeats']}"
    head += ", networks of a few channels" if record["small"] else ""
    head += f", networks compiled ({record['compile']})" if record.get("compile") else ""
    tables = [head + "."]
    for name, found in record["families"].items():
        tables.append(f"**{name}**" + (f", {found['size']}x{found['size']}" if "size" in found else ""))
        tables.append(
            _scale_tables(found)
            if "sizes" in found
            else _outside_table(found)
            if "outside" in found
            else _ways_table(found)
        )
    return "\n\n".join(tables)


def _ways_table(found: Mapping[str, Any]) -> str:
    head = ["way", "s", "speedup", "limit", "share of the limit", "fastest runs", "network only", "outside it"]
    rows: list[list[str]] = []
    for name, row in found["ways"].items():
        told = f"{row['predicted']:.2f} s ({row['predicted off by']:+.1%})" if "predicted" in row else ""
        label = f"native {row['steps']}" if "steps" in row else name
        cells = [label, f"{row['seconds']:.3f}"]
        for key, form in _COLUMNS.items():
            cells.append(format(row[key], form) if key in row else "")
        rows.append([*cells, told, f"{row['peak'] / 2**20:.0f}"])
    text = table([*head, "predicted", "peak MiB"], rows)
    encoders = ", ".join(f"{title} {1000 * seconds:.1f} ms" for title, seconds in found.get("text", {}).items())
    return f"{text}\n\nText encoders, one prompt, not part of the runs: {encoders}." if encoders else text


def _scale_tables(found: Mapping[str, Any]) -> str:
    sizes: list[list[object]] = []
    for row in found["sizes"]:
        told = "" if row["memory predicted"] is None else f"{row['memory predicted'] / 2**20:.0f}"
        seconds, peak = f"{row['seconds']:.2f}", f"{row['peak'] / 2**20:.0f}"
        sizes.append([row["side"], row["stages"], row["tile"] or "", seconds, peak, told])
    batches: list[list[object]] = []
    for row in found["batches"]:
        seconds, each = f"{row['seconds']:.2f}", f"{row['seconds'] / row['batch']:.3f}"
        batches.append([row["batch"], seconds, each, f"{row['peak'] / 2**20:.0f}"])
    tables = [
        table(["side", "stages", "tile", "s", "peak MiB", "predicted MiB"], sizes, "r"),
        table(["batch", "s", "s per image", "peak MiB"], batches, "r"),
    ]
    return "\n\n".join(tables)


def _outside_table(found: Mapping[str, Any]) -> str:
    rows: list[list[str]] = []
    used = 0.0
    for row in found["outside"]:
        used = row["seconds"] if row["used"] else used
        part, share = (row["part"], "") if row["used"] else ("", f"{row['seconds'] / used:.2f}")
        rows.append([part, row["way"], f"{1000 * row['seconds']:.2f}", share])
    return table(["part", "way (first: the one in use)", "ms", "relative"], rows, "llr")


def limits(presets: Sequence[str]) -> str:
    """The limit by FLOP of every family: native over staged, network only, and with VAE and upscaler."""
    head = ["family", "size", "native TFLOP", *(f"{preset} network, whole" for preset in presets), "GiB at 12+1"]
    rows: list[list[str]] = []
    for name, family in FAMILIES.items():
        wide, high = family.default_size or family.native_size
        native = part_costs(make_native_plan(family, wide, high)) or ()
        scale, unit = (1e12, "") if name != "demo" else (1e9, " (GFLOP)")
        cells = [name, f"{wide}x{high}", f"{sum(part.flop for part in native) / scale:.4g}{unit}"]
        own = {len(sigmas) - 1 for sigmas in family.shift.lists}  # the only step counts of such a family
        for preset in presets:
            low, refine = (int(count) for count in preset.split("+"))
            if own and low not in own:
                cells.append("")
                continue
            plan = make_plan(family, wide, high, low_steps=low, refine_steps=refine)
            cells.append(f"{plan.cost_ratio:.2f}, {work_ratio(plan):.2f}")
        peak = peak_memory(make_plan(family, wide, high, low_steps=min(own, default=12), refine_steps=1))
        cells.append("" if peak is None else f"{peak.total / 2**30:.1f}")
        rows.append(cells)
    return table(head, rows)


def large(side: int = 4096, stages: int = 4, tile: int = 1024) -> str:
    """Peak memory of a large image from a small first stage, by family: whole, in tiles with only the working part on
    the device, and the latter with 8-bit weights."""
    title = f"GiB at {side}x{side} from {side >> (stages - 1)}"
    rows: list[list[str]] = []
    for name in FAMILIES:
        if name == "demo" or peak_memory(make_plan(name, 1024, 1024)) is None:
            continue
        whole, cut = (make_plan(name, side, side, stages=stages, tile=each) for each in (0, tile))
        peaks = [
            peak_memory(whole),
            *(peak_memory(cut, weight_bytes=w, offload=True, vae_tile=tile, upscaler_tile=tile // 2) for w in (2, 1)),
        ]
        rows.append([name, *(f"{peak.total / 2**30:.1f}" for peak in peaks if peak)])
    return table([title, "whole", f"tiles of {tile}, offloaded", "offloaded, 8-bit weights"], rows)


def kinds(parts: Mapping[str, float], whole: float) -> dict[str, float]:
    """Seconds of a run by kind of part; "other" is the time outside all parts."""
    found: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for name, seconds in parts.items():
        kind = name if name in KINDS else name.split()[-1]
        found["other" if kind not in KINDS else kind] += seconds
    found["other"] += whole - sum(parts.values())
    return found


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Parts of every staged run and its speedup beside the limit; or seconds and memory against size and batch."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    families = record["families"]
    scaled = any("sizes" in found for found in families.values())
    figure, axes = plt.subplots(
        len(families), 2, figsize=(10, 3.2 * len(families)), squeeze=False, layout="constrained"
    )
    for line, (name, found) in zip(axes, families.items(), strict=True):
        (_scale_plot if scaled else _ways_plot)(line, name, found)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _ways_plot(line: Any, name: str, found: Mapping[str, Any]) -> None:
    left, right = line
    staged = {way: row for way, row in found["ways"].items() if "speedup" in row}
    labels = [way.replace(" ", "\n") for way in staged]
    bottom = [0.0] * len(staged)
    for index, kind in enumerate(KINDS):
        heights = [kinds(row["parts"], row["seconds"])[kind] for row in staged.values()]
        left.bar(labels, heights, bottom=bottom, label=kind, color=f"C{index}")
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    left.set_ylabel(f"{name}: seconds")
    left.set_ylim(top=1.3 * max(bottom))
    left.legend(fontsize=7, ncol=3, loc="upper center")
    right.bar(labels, [row["speedup"] for row in staged.values()], label="measured", width=0.6)
    if all("limit" in row for row in staged.values()):
        limits = [row["limit"] for row in staged.values()]
        right.scatter(labels, limits, marker="_", s=900, color="black", label="limit by FLOP", zorder=3)
    right.set_ylabel("times as fast as native")
    right.grid(alpha=0.3, axis="y")
    right.margins(y=0.15)
    right.legend(fontsize=7, markerscale=0.3)


def _scale_plot(line: Any, name: str, found: Mapping[str, Any]) -> None:
    left, right = line
    for tiled in (False, True):
        rows = [row for row in found["sizes"] if bool(row["tile"]) == tiled]
        if rows:
            megapixels = [row["side"] ** 2 / 1e6 for row in rows]
            word = "tiled" if tiled else "whole"
            left.plot(megapixels, [row["seconds"] for row in rows], "o-", label=f"seconds, {word}")
            left.plot(megapixels, [row["peak"] / 2**30 for row in rows], "s--", label=f"peak GiB, {word}")
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("megapixels")
    left.set_title(name, fontsize=9)
    batches = found["batches"]
    right.plot(
        [row["batch"] for row in batches],
        [row["seconds"] / row["batch"] for row in batches],
        "o-",
        label="seconds per image",
    )
    right.plot([row["batch"] for row in batches], [row["peak"] / 2**30 for row in batches], "s--", label="peak GiB")
    right.set_xlabel("images per batch")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
