"""The page of a tuning run: curves, images before and after, and what it cost."""

from __future__ import annotations

import html
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mrflow_sched._runtime.write import write_whole
from mrflow_sched.images.convert import to_pil
from mrflow_sched.tuning.state import Check

__all__ = ["Story", "check_line", "gain", "write_images", "write_report"]

REPORT = "report.html"
_MOST_SHOWN = 12
"""Held-out images on the page."""
_WIDE, _HIGH, _EDGE = 560, 200, 44


@dataclass(frozen=True)
class Story:
    """What the page tells.

    Attributes:
        reward: Name of the reward.
        guard: Name of the guard.
        prompts: How many were trained on.
        held_out: The prompts that were not.
        settings: One line for each.
        checks: All looks at the held-out prompts.
        good_update: The updates that are in the LoRA's file.
        stopped: Why tuning ended before its last update, or "".
        guard_drop: As in `TuneSettings`.
        full: The final images' checks before and after, or none.
    """

    reward: str
    guard: str
    prompts: int
    held_out: tuple[str, ...]
    settings: tuple[str, ...]
    checks: tuple[Check, ...]
    good_update: int
    stopped: str
    guard_drop: float
    full: tuple[Check, ...] = ()


def gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """What paired values gained.

    Args:
        before: Of each image.
        after: Likewise, of the same images.

    Returns:
        (the mean difference, half the width of its 95 % interval by the normal distribution).
    """
    apart = [b - a for a, b in zip(before, after, strict=True)]
    return statistics.fmean(apart), 1.96 * statistics.stdev(apart) / math.sqrt(len(apart))


def check_line(before: Check, now: Check, updates: int, reward: str, guard: str) -> str:
    """A look at the held-out prompts in a line.

    Args:
        before: Of the model as it was.
        now: Of the LoRA.
        updates: That are asked for.
        reward: Its name.
        guard: Its name.

    Returns:
        The line.
    """
    if now.update == 0:
        said = f"{reward} {statistics.fmean(now.rewards):.4f}, {guard} {statistics.fmean(now.guards):.4f}"
        return f"before: {said} on {len(now.rewards)} held-out prompts"
    pace = now.seconds / now.update
    left = pace * (updates - now.update)
    return (
        f"update {now.update} of {updates}: {reward} {_changed(before.rewards, now.rewards)}, guard {guard} "
        f"{_changed(before.guards, now.guards)}, PSNR to before {statistics.fmean(now.psnr):.1f} dB; "
        f"{pace:.1f} s an update, {left / 60:.0f} min left"
    )


def write_images(folder: Path, name: str, images: Tensor) -> None:
    """Write the held-out images that the page shows.

    Args:
        folder: The run's.
        name: Of the moment: "before", "after", "update-0010".
        images: (n, 3, H, W), floats in [0, 1].

    Raises:
        OSError: A file cannot be written.
    """
    where = folder / "samples"
    where.mkdir(exist_ok=True)
    for number, image in enumerate(images[:_MOST_SHOWN]):
        buffer = io.BytesIO()
        to_pil(image).save(buffer, "PNG")
        write_whole(where / f"{name}-{number + 1:02d}.png", buffer.getvalue())


def write_report(folder: Path, story: Story) -> Path:
    """Write the page over the older one.

    Args:
        folder: The run's; its images lie in samples/.
        story: What it tells.

    Returns:
        The page.

    Raises:
        OSError: It cannot be written.
    """
    path = folder / REPORT
    write_whole(path, _page(story).encode())
    return path


# ------------------------------------------------------------------------------------------------------------ the page

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .3rem .8rem; border-bottom: 1px solid #ddd; }
td { text-align: right; } td:first-child, th:first-child { text-align: left; }
figure { display: inline-block; margin: .5rem; vertical-align: top; width: 17rem; }
figure img { width: 8.2rem; image-rendering: auto; } figcaption { font-size: .85rem; }
svg { background: #fafafa; margin-right: 1rem; } .stopped { background: #fff1e0; padding: .6rem 1rem; }
"""


def _page(story: Story) -> str:
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Tuning report</title>",
        f"<style>{_STYLE}</style><h1>Tuned by {_safe(story.reward)}</h1>",
        f"<p>{_safe(_summary(story))}</p>",
        *([f"<p class='stopped'>{_safe(_stopped(story))}</p>"] if story.stopped else []),
        "<h2>On prompts that were not trained on</h2>",
        _curve(f"reward: {story.reward}", story, lambda check: check.rewards),
        _curve(f"guard: {story.guard}", story, lambda check: check.guards),
        _curve("PSNR to before, dB", story, lambda check: check.psnr),
        _table(story),
        *([_full(story)] if story.full else []),
        "<h2>Before and after</h2>",
        *_pairs(story),
        "<h2>Settings</h2><pre>" + "\n".join(map(_safe, story.settings)) + "</pre></html>",
    ]
    return "\n".join(parts)


def _summary(story: Story) -> str:
    return (
        f"Trained on {story.prompts} prompts, looked at on {len(story.held_out)} others. The LoRA's file holds the "
        f"averaged weights after {story.good_update} updates. A reward that rises while the guard falls is a reward "
        "that is deceived: look at the images."
    )


def _stopped(story: Story) -> str:
    if story.stopped == "guard":
        return (
            f"Stopped: the guard {story.guard} fell by more than {story.guard_drop:g} of how much it varied between "
            f"the held-out images. What is saved is the last state before that, of update {story.good_update}."
        )
    return "Stopped on request; the same command goes on from there."


def _table(story: Story) -> str:
    rows = [f"<tr><th>updates</th><th>{_safe(story.reward)}</th><th>{_safe(story.guard)}</th><th>PSNR, dB</th></tr>"]
    before = story.checks[0]
    for check in story.checks:
        rewards, guards = _changed(before.rewards, check.rewards), _changed(before.guards, check.guards)
        rows.append(_row(str(check.update), rewards, guards, _decibel(check)))
    return "<table>" + "".join(rows) + "</table>"


def _full(story: Story) -> str:
    before, after = story.full
    rewards, guards = _changed(before.rewards, after.rewards), _changed(before.guards, after.guards)
    return (
        "<h2>The final images of the whole plan</h2><table>"
        f"<tr><th>updates</th><th>{_safe(story.reward)}</th><th>{_safe(story.guard)}</th><th>PSNR, dB</th></tr>"
        + _row("0", f"{statistics.fmean(before.rewards):.4f}", f"{statistics.fmean(before.guards):.4f}", "")
        + _row(str(after.update), rewards, guards, _decibel(after))
        + "</table>"
    )


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in cells) + "</tr>"


def _pairs(story: Story) -> list[str]:
    before, after = story.checks[0], next(each for each in story.checks if each.update == story.good_update)
    found: list[str] = []
    for number, prompt in enumerate(story.held_out[:_MOST_SHOWN]):
        names = [f"samples/{name}-{number + 1:02d}.png" for name in ("before", f"update-{after.update:04d}")]
        images = "".join(f"<img src='{name}' alt=''>" for name in (names if after.update else names[:1]))
        said = f"{before.rewards[number]:.4f} → {after.rewards[number]:.4f}" if after.update else ""
        found.append(f"<figure>{images}<figcaption>{_safe(prompt)}<br>{said}</figcaption></figure>")
    return found


def _curve(title: str, story: Story, read: Callable[[Check], Sequence[float]]) -> str:
    points = [
        (check.update, statistics.fmean(values))
        for check in story.checks
        if (values := [value for value in read(check) if math.isfinite(value)])
    ]
    if len(points) < 2:
        return ""
    last, low, high = points[-1][0], min(y for _, y in points), max(y for _, y in points)
    first, span = points[0][0], (high - low) or 1.0

    def place(x: int, y: float) -> str:
        across = _EDGE + (x - first) / max(last - first, 1) * (_WIDE - 2 * _EDGE)
        return f"{across:.1f},{_HIGH - _EDGE - (y - low) / span * (_HIGH - 2 * _EDGE):.1f}"

    line = " ".join(place(x, y) for x, y in points)
    dots = "".join("<circle cx='{}' cy='{}' r='3'/>".format(*place(x, y).split(",")) for x, y in points)
    return (
        f"<svg width='{_WIDE}' height='{_HIGH}' role='img' aria-label='{_safe(title)}'>"
        f"<text x='{_EDGE}' y='22' font-size='14'>{_safe(title)}</text>"
        f"<text x='2' y='{_EDGE + 4}' font-size='11'>{high:.4g}</text>"
        f"<text x='2' y='{_HIGH - _EDGE + 4}' font-size='11'>{low:.4g}</text>"
        f"<text x='{_EDGE}' y='{_HIGH - 14}' font-size='11'>update {first}</text>"
        f"<text x='{_WIDE - _EDGE - 20}' y='{_HIGH - 14}' font-size='11'>{last}</text>"
        f"<polyline points='{line}' fill='none' stroke='#2060c0' stroke-width='2'/>{dots}</svg>"
    )


def _changed(before: Sequence[float], after: Sequence[float]) -> str:
    mean, half = gain(before, after)
    return f"{statistics.fmean(after):.4f} ({mean:+.4f} ± {half:.4f})"


def _decibel(check: Check) -> str:
    finite = [value for value in check.psnr if math.isfinite(value)]
    return f"{statistics.fmean(finite):.1f}" if finite else "the same"


def _safe(text: str) -> str:
    return html.escape(text, quote=True)
