"""Native and staged sampling of one prompt, measured alike in one process.

What is measured: the wall clock from the prompt to the saved PNG (text encoding, sampling, decoding, super-resolution,
encoding, noise, saving), for both. Loading is not in it. Both run once before, at the same sizes with as few steps as
they can, and save, so that neither pays for first calls. Both use one solver and one seed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING

from mrflow_sched._runtime.errors import FileError, MissingFileError, MrFlowError, first_line
from mrflow_sched.measure.runs import Comparison, Part, Run
from mrflow_sched.measure.sheet import draw_sheet
from mrflow_sched.plan.make import make_native_plan
from mrflow_sched.plan.stages import StagedPlan

if TYPE_CHECKING:
    from mrflow_sched.engines import Engine
    from mrflow_sched.plan.families import Family
    from mrflow_sched.sampler import StagedResult
    from mrflow_sched.sampling.progress import Progress
    from mrflow_sched.upscaling.role import PixelUpscaler

SaveImage = Callable[["StagedResult", Path], None]


def compare(
    engine: Engine,
    prompt: str,
    staged_plan: StagedPlan,
    out: Path,
    *,
    negative_prompt: str | None = None,
    native_plan: StagedPlan | None = None,
    upscaler: PixelUpscaler | None = None,
    save: SaveImage | None = None,
    repeats: int = 1,
    callback: Callable[[str, Progress], None] | None = None,
) -> Comparison:
    """Sample a prompt natively and by a staged plan, and write native.png, staged.png and compare.png.

    The three images appear together at the end: a comparison that breaks off leaves `out` as it was.

    Args:
        engine: The model.
        prompt: What to sample.
        staged_plan: The staged run.
        out: An existing folder.
        negative_prompt: What the image should not show; None: nothing is said.
        native_plan: The native run; None: `native_plan_of` the staged plan and the engine's family.
        upscaler: What upscales; None: Lanczos.
        save: `save(result, path)` writes an image, in the warm-up too; None writes the first one without a record.
        repeats: 1 or more; native and staged runs alternate, and the run of median time stands for each.
        callback: `callback(name, progress)` receives the progress of every run, "native", "staged" and their warm-ups.

    Returns:
        The two runs that count, and where the images are.

    Raises:
        MrFlowError: `repeats` is below 1.
        FileError: `out` is missing, or a file cannot be written.
    """
    if repeats < 1:
        raise MrFlowError(f"repeats is {repeats!r}; give 1 or more.")
    native_plan = native_plan or native_plan_of(staged_plan, family=engine.family)
    plans = {"native": native_plan, "staged": staged_plan}
    keep = save or _save_first
    prompts = (prompt, negative_prompt)
    report = callback or _ignore_progress
    with _arriving_together(out, ("native.png", "staged.png", "compare.png")) as draft:
        for name, plan in plans.items():
            words = f"warm-up, {name}"
            path = draft / f"{name}.png"
            _measure(
                engine, prompts, shortest(plan), upscaler, lambda p, words=words: report(words, p), name, path, keep
            )
        runs: dict[str, list[Run]] = {name: [] for name in plans}
        for _ in range(repeats):
            for name, plan in plans.items():
                path = draft / f"{name}.png"
                runs[name].append(
                    _measure(engine, prompts, plan, upscaler, lambda p, name=name: report(name, p), name, path, keep)
                )
        native, staged = (_median_run(runs[name]) for name in ("native", "staged"))
        sheet = _write_sheet(prompt, native, staged, draft / "compare.png")
    native, staged = (replace(run, path=out / run.path.name) for run in (native, staged))
    return Comparison(native, staged, out / sheet.name, repeats, staged_plan)


def native_plan_of(plan: StagedPlan, steps: int | None = None, *, family: Family | None = None) -> StagedPlan:
    """The native run that a staged plan is compared with: same size, solver, guidance and seeds, all the steps.

    The shift is native's own at the full size, whatever the staged plan's mu: a plan does not say whether its mu was
    given or follows from its size.

    Args:
        plan: The staged plan.
        steps: Native steps; None: the plan's `native_steps`.
        family: The engine's family, needed where the plan's is not in `FAMILIES`.

    Returns:
        A plan of one stage.

    Raises:
        MrFlowError: The family is unknown and `family` is None.
    """
    first = plan.stages[0]
    return make_native_plan(
        family or plan.family,
        plan.width,
        plan.height,
        steps=steps or plan.native_steps,
        solver=first.solver,
        guidance=first.guidance,
        seed=plan.seed,
        seed_rule=plan.seed_rule,
        posterior=plan.posterior,
    )


def shortest(plan: StagedPlan) -> StagedPlan:
    """A plan with one step per stage: every code path and every size once, for little time.

    Args:
        plan: The plan.

    Returns:
        The same plan, each schedule cut to its first sigma and 0.
    """
    stages = tuple(
        replace(stage, sigmas=(stage.sigmas[0], 0.0), forwards=max(1, stage.forwards // stage.steps), shares=())
        if stage.sigmas
        else stage
        for stage in plan.stages
    )
    return replace(plan, stages=stages)


def _measure(
    engine: Engine,
    prompts: tuple[str, str | None],
    plan: StagedPlan,
    upscaler: PixelUpscaler | None,
    callback: Callable[[Progress], None],
    name: str,
    path: Path,
    save: SaveImage,
) -> Run:
    """Run a plan once and save its first image at `path`."""
    from mrflow_sched._runtime.peak import PeakMemory
    from mrflow_sched.sampler import sample_staged

    with PeakMemory(engine.device) as peak:
        begin = time.perf_counter()
        text, negative = prompts
        result = sample_staged(engine, plan, text, negative_prompt=negative, upscaler=upscaler, callback=callback)
        sampled = time.perf_counter()
        save(result, path)
        end = time.perf_counter()
    parts = [Part(timing.name, timing.seconds) for timing in result.timings]
    title, detail = _describe(name, plan)
    return Run(
        name,
        title,
        detail,
        end - begin,
        (*parts, Part("save", end - sampled)),
        peak.bytes,
        path,
        result.warnings,
    )


@contextlib.contextmanager
def _arriving_together(out: Path, names: Sequence[str]) -> Generator[Path, None, None]:
    """A folder to write the files `names` in; they move into `out` at the end, all of them or, on any error, none."""
    if not out.is_dir():
        raise MissingFileError(f"the folder {str(out)!r} does not exist; make it first.")
    for name in names:
        if (out / name).is_dir():
            raise FileError(f"the image {str(out / name)!r} cannot be written: a folder has that name; move it away.")
    try:
        place = tempfile.TemporaryDirectory(dir=out, prefix=".mrflow-")
    except OSError as error:
        raise _unwritten(out, error) from error
    with place:
        draft = Path(place.name)
        try:
            yield draft
        except FileError as error:  # it names a file of the draft, which nobody knows
            raise _unwritten(out, error.__cause__ or error) from error
        try:
            _move_in(draft, out, names)
        except OSError as error:
            raise _unwritten(out, error) from error


def _move_in(draft: Path, out: Path, names: Sequence[str]) -> None:
    """Move the files `names` from `draft` into `out`, over older ones: all of them or, on any error, none."""
    old = draft / "old"
    old.mkdir()
    try:
        for name in names:
            if (out / name).exists():
                os.replace(out / name, old / name)
            os.replace(draft / name, out / name)
    except BaseException:
        for name in names:
            if (old / name).exists():
                os.replace(old / name, out / name)
            elif not (draft / name).exists():
                (out / name).unlink(missing_ok=True)
        raise


def _unwritten(out: Path, error: BaseException) -> FileError:
    reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
    return FileError(
        f"the images of the comparison cannot be written into {str(out)!r}: {reason}; what was there is unchanged."
    )


def _describe(name: str, plan: StagedPlan) -> tuple[str, str]:
    size = f"{plan.width}x{plan.height}"
    steps = [stage.steps for stage in plan.stages]
    forwards = f"{plan.forwards} forwards"
    if len(steps) == 1:
        name = plan.preset if plan.stages[0].shares else name
        return f"{name}, {steps[0]} steps", f"{size}, {plan.stages[0].solver}, {forwards}"
    sizes = " then ".join(f"{stage.width}x{stage.height}" for stage in plan.stages)
    start = ", ".join(f"sigma {stage.start_sigma:g}" for stage in plan.stages[1:] if stage.sigmas)
    return (
        f"{name}, {'+'.join(map(str, steps))} steps",
        f"{sizes}, {plan.stages[0].solver}, {start or 'no refine'}, {forwards}",
    )


def _ignore_progress(_name: str, _progress: Progress) -> None:
    """The callback where none is given."""


def _median_run(runs: Sequence[Run]) -> Run:
    """The run of median time, the faster of the two in the middle."""
    middle = median_low(run.seconds for run in runs)
    return next(run for run in runs if run.seconds == middle)


def _save_first(result: StagedResult, path: Path) -> None:
    from mrflow_sched.images.files import save_png

    save_png(path, result.images[0], {})


def _write_sheet(prompt: str, native: Run, staged: Run, path: Path) -> Path:
    """Draw the sheet from the saved images and write it whole or not at all."""
    import numpy as np
    import torch

    from mrflow_sched.images.files import open_image, save_png

    images = [open_image(run.path, own=True).convert("RGB") for run in (native, staged)]
    sheet = torch.tensor(np.array(draw_sheet(prompt, native, staged, images)))
    save_png(path, sheet.permute(2, 0, 1).float() / 255, {"prompt": prompt})
    return path
