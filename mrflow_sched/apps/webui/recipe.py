"""Decide all numbers of a job: the user's controls, the loaded model and the wanted size become one frozen `Recipe`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.webui.controls import AUTOMATIC, Controls
from mrflow_sched.apps.webui.host import ModelInfo
from mrflow_sched.apps.webui.upscaler import MARK, is_interpolation, pick_automatic
from mrflow_sched.plan.checks import MAX_SIDE, UpscalerKind
from mrflow_sched.plan.families import Family, Preset
from mrflow_sched.plan.families.base import steps_in
from mrflow_sched.plan.make import make_sized_plan
from mrflow_sched.plan.notes import size_notes, unaided_stages
from mrflow_sched.plan.recipes import sigmas_from_recipe
from mrflow_sched.plan.refining import for_upscaler
from mrflow_sched.plan.schedule import refine_sigmas
from mrflow_sched.plan.sizes import snap
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampling.noise import model_sigmas

__all__ = ["Recipe", "fit_sizes", "make_recipe"]

LEAST_SIDE = 64
"""The least side of the low-resolution image, in pixels; models draw nothing coherent below it."""

_SCALE_AT_END = re.compile(r"\s+[1-9]x\+?$")


@dataclass(frozen=True)
class Recipe:
    """What a job will do.

    Attributes:
        plan: The staged plan that the numbers come from.
        preset: Name of the preset that `low_steps`, `refine_steps` and `sigma` start from.
        low_width: Width of the low-resolution image in pixels.
        low_height: Height of the low-resolution image in pixels.
        width: Width of the final image in pixels.
        height: Height of the final image in pixels.
        low_steps: Steps of stage 1.
        refine_steps: Steps of the refine stage.
        sigma: Flow sigma at which the refine stage starts.
        first_sigmas: Schedule of stage 1, `low_steps` + 1 flow sigmas; None: the host's schedule.
        refine_sigmas: Schedule of the refine stage, `refine_steps` + 1 values in the model's own measure (flow sigma,
            or sigma_ve for models that are no flow models), as the host takes it.
        solver: A name of `sampling.solvers`; None: the host's sampler.
        upscaler: A name of the host's list.
        experimental: The model is no flow model.
        notes: Sentences for the user.
        line: The whole job in one short line.
    """

    plan: StagedPlan
    preset: str
    low_width: int
    low_height: int
    width: int
    height: int
    low_steps: int
    refine_steps: int
    sigma: float
    first_sigmas: tuple[float, ...] | None
    refine_sigmas: tuple[float, ...]
    solver: str | None
    upscaler: str
    experimental: bool
    notes: tuple[str, ...]
    line: str

    def first_list(self, steps: int) -> tuple[float, ...]:
        """Return the schedule for a host's first pass. For flow models only.

        Args:
            steps: How many steps the host asks for. One more than planned means that it drops the value before the
                last. For any other number (another extension changed it) the plan's schedule is made anew with it.

        Returns:
            `steps` + 1 flow sigmas, of which those of the plan reach the network.
        """
        first = self.plan.stages[0]
        if steps in (self.low_steps, self.low_steps + 1):
            return _answer(first.sigmas, steps)
        kind, _, *numbers = first.recipe.split(" ")
        if kind == "list":  # a model's own sigmas, which exist for this number of steps only
            return _answer(first.sigmas, steps)
        return sigmas_from_recipe(" ".join([kind, str(steps), *numbers]))

    def refine_list(self, steps: int) -> tuple[float, ...]:
        """Return the schedule for a host's hires pass.

        Args:
            steps: How many steps the host asks for. With more than planned the values that it drops are added; with
                fewer the schedule starts at the same sigma.

        Returns:
            `steps` + 1 values in the model's own measure, of which those of the plan reach the network.
        """
        if steps >= self.refine_steps:
            return _answer(self.refine_sigmas, steps)
        return model_sigmas(refine_sigmas(self.sigma, steps), "epsilon" if self.experimental else "flow")


def _answer(sigmas: tuple[float, ...], steps: int) -> tuple[float, ...]:
    """Return `steps` + 1 values of which exactly `sigmas` reach the network.

    A host that asks for one step more than it runs drops the value before the last, so that one is doubled. A host that
    asks for still more takes the last ones (a strength below 1), so the first one is repeated.
    """
    missing = steps + 1 - len(sigmas)
    if missing <= 0:
        return sigmas
    if missing == 1:
        return (*sigmas[:-1], sigmas[-2], sigmas[-1])
    return (*(sigmas[0],) * missing, *sigmas)


# ------------------------------------------------------------------------------------------------------------- making


def make_recipe(
    controls: Controls, model: ModelInfo, width: int, height: int, *, upscalers: Sequence[Any] = ()
) -> Recipe:
    """Decide all numbers of a job.

    Args:
        controls: What the user chose.
        model: The loaded model.
        width: Wanted width of the final image in pixels.
        height: Wanted height of the final image in pixels.
        upscalers: The host's upscalers, its entries or only their names. "automatic" takes none that the host would
            have to download first, as far as its entry tells.

    Returns:
        The recipe.

    Raises:
        MrFlowError: The model cannot run staged, a low-resolution side would be under 64 px, or the plan would cost
            more than sampling natively.
    """
    if model.refusal is not None:
        raise MrFlowError(model.refusal)
    family = model.family
    upscaler, upscaler_note = _upscaler(controls.upscaler, upscalers)
    kind: UpscalerKind = "interpolation" if is_interpolation(upscaler) else "network"
    preset, preset_note = _preset(controls, family, kind)
    final, low = fit_sizes(model, width, height, controls.factor)
    if min(low) < LEAST_SIDE:
        raise MrFlowError(
            f"MrFlow cannot make {width}x{height} with factor {controls.factor:g}: the low-resolution image would be "
            f"{low[0]}x{low[1]}, and its sides must be at least {LEAST_SIDE} px; choose a larger size or a smaller "
            "factor."
        )
    plan = _plan(controls, model, preset, (low, final), (width, height), kind)
    if plan.cost_ratio < 1.0:
        raise MrFlowError(
            f"MrFlow would cost {1 / plan.cost_ratio:.2f} times as much as {plan.native_steps} native steps at "
            f"{final[0]}x{final[1]}; use fewer low steps or a larger factor."
        )
    own_schedule = model.flow and model.known and controls.shift != "host"
    first, last = plan.stages
    recipe = Recipe(
        plan=plan,
        preset=preset.name,
        low_width=low[0],
        low_height=low[1],
        width=final[0],
        height=final[1],
        low_steps=first.steps,
        refine_steps=last.steps,
        sigma=last.start_sigma,
        first_sigmas=first.sigmas if own_schedule else None,
        refine_sigmas=model_sigmas(last.sigmas, family.prediction),
        solver=_solver(controls, family),
        upscaler=upscaler,
        experimental=model.experimental,
        notes=(),
        line="",
    )
    notes = (
        preset_note,
        *size_notes(plan, family, stretches=True, grid=model.grid_final),
        *_notes(controls, model),
        upscaler_note,
    )
    return replace(recipe, notes=tuple(note for note in notes if note), line=_line(recipe, draft=controls.draft))


def fit_sizes(model: ModelInfo, width: int, height: int, factor: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """Choose the final size and the low-resolution size.

    Of the low sizes next to final / factor the one with the aspect ratio nearest to the final one is taken, because
    hosts stretch one into the other.

    Args:
        model: The loaded model, whose grids the sizes lie on.
        width: Wanted width in pixels.
        height: Wanted height in pixels.
        factor: Final side over low side.

    Returns:
        (width, height) of the final image and of the low-resolution one, in pixels.

    Raises:
        MrFlowError: `width` or `height` is below 1 or above 32768.
    """
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise MrFlowError(f"width and height must be 1 to {MAX_SIDE} pixels, got {width!r} and {height!r}.")
    final = snap(width, model.grid_final), snap(height, model.grid_final)
    wanted = final[0] / factor, final[1] / factor

    def misfit(size: tuple[int, int]) -> tuple[float, float]:
        shape = abs(math.log(size[0] * final[1] / (size[1] * final[0])))
        return round(shape, 9), abs(math.log(size[0] * size[1] / (wanted[0] * wanted[1])))

    widths, heights = (_around(side, model.grid_low) for side in wanted)
    return final, min(product(widths, heights), key=misfit)


def _around(side: float, grid: int) -> tuple[int, ...]:
    """Return the multiples of `grid` next to `side`: below and above, or `side` itself."""
    below = max(math.floor(side / grid + 1e-9), 1)
    return (below * grid,) if below * grid >= side else (below * grid, (below + 1) * grid)


def _preset(controls: Controls, family: Family, kind: UpscalerKind) -> tuple[Preset, str | None]:
    """Return the preset to start from, as it is for the upscaler, and a note where the family lacks what was asked."""
    preset, note = _preset_of(controls, family)
    counted = bool(controls.sigma) or (note is None and bool(steps_in(controls.preset)))
    return replace(for_upscaler(family, preset, kind, counted=counted), name=preset.name), note


def _preset_of(controls: Controls, family: Family) -> tuple[Preset, str | None]:
    default = family.get_preset()
    if controls.preset == AUTOMATIC:
        return default, None
    few_step = [preset.name for preset in family.presets if preset.few_step]
    if controls.preset in family.preset_names and controls.preset not in few_step:
        return family.get_preset(controls.preset), None
    steps = steps_in(controls.preset)
    if not steps:
        return default, f"{family.title} has no preset {controls.preset!r}; {default.name} is used."
    return replace(default, name=controls.preset, low_steps=steps[0], refine_steps=steps[1]), None


def _plan(
    controls: Controls,
    model: ModelInfo,
    preset: Preset,
    sizes: Sequence[tuple[int, int]],
    wanted: tuple[int, int],
    kind: UpscalerKind,
) -> StagedPlan:
    family = model.family
    refine_guidance = {"same": None, "off": 1.0, "value": controls.refine_cfg_value}[controls.refine_cfg]
    return make_sized_plan(
        family,
        sizes,
        wanted,
        stretches=True,
        grid=model.grid_final,
        low_steps=controls.low_steps or preset.low_steps,
        refine_steps=controls.refine_steps or preset.refine_steps,
        sigma=controls.sigma or preset.sigma,
        solver=_solver(controls, family) or "euler",
        refine_guidance=refine_guidance if family.guidance_kind == "cfg" else None,
        noise="nested" if controls.keep_composition else "own",
        upscaler_kind=kind,
    )


def _solver(controls: Controls, family: Family) -> str | None:
    """Return a name of `sampling.solvers`; None: the host's sampler."""
    return {"host sampler": None, "multistep": "multistep", AUTOMATIC: family.solver}[controls.solver]


def _upscaler(asked: str, entries: Sequence[Any]) -> tuple[str, str | None]:
    """Return the upscaler to use, and a note where it is not the one asked for or a better one is missing."""
    names = [str(getattr(entry, "name", entry)) for entry in entries]
    if asked != AUTOMATIC and (asked in names or not names):
        return asked, None
    chosen, hint = pick_automatic(name for name, entry in zip(names, entries, strict=True) if not _remote(entry))
    if asked != AUTOMATIC:
        return chosen, f"The upscaler {asked!r} is not installed here; {_spoken(chosen)} is used."
    return chosen, hint


def _remote(entry: Any) -> bool:
    """Return whether a host's upscaler is still only an address to download from."""
    place = getattr(entry, "local_data_path", None) or getattr(entry, "data_path", None)
    return str(place or "").startswith("http")


# ------------------------------------------------------------------------------------------------------------- words


def _notes(controls: Controls, model: ModelInfo) -> list[str]:
    """Return notes on choices that act on this model otherwise than their names say."""
    notes: list[str] = []
    solver = model.family.solver
    if controls.solver == "multistep" and solver == "euler":
        notes.append(f"{model.title} is distilled: Euler suits it better than multistep.")
    if controls.solver == AUTOMATIC:
        notes.append(f"Stage 1 uses the solver {solver}, which suits {model.title}.")
    if model.flow and not model.known and controls.shift != "host":
        notes.append(f"MrFlow does not know the schedule of {model.title}: stage 1 uses the WebUI's.")
    return notes


def _line(recipe: Recipe, *, draft: bool) -> str:
    scale = recipe.width / recipe.low_width
    first = f"{recipe.low_width}×{recipe.low_height} ×{recipe.low_steps}"
    later = (
        f"→ {_spoken(recipe.upscaler)} ×{scale:.3g} → {recipe.width}×{recipe.height} ×{recipe.refine_steps} @ σ "
        f"{recipe.sigma:.4g}"
    )
    line = f"draft {first} · finished later: {later}" if draft else f"{first} {later}"
    if unaided_stages(recipe.plan):
        line = f"{line} · refined more, as no network upscales"
    if recipe.plan.noise == "nested":
        line = f"{line} · keeps composition"
    return f"{line} · experimental" if recipe.experimental else line


def _spoken(upscaler: str) -> str:
    """Return an upscaler's name without a scale at its end and without our mark; Neo's "None" is Lanczos."""
    return "Lanczos" if upscaler == "None" else _SCALE_AT_END.sub("", upscaler.removesuffix(MARK)) or upscaler
