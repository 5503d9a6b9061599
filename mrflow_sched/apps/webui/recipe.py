"""All numbers of a job: the user's controls, the loaded model and the wanted size become one frozen `Recipe`."""

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
from mrflow_sched.apps.webui.upscaler import MARK, pick_automatic, scale_in_name
from mrflow_sched.plan.cost import work_ratio
from mrflow_sched.plan.families import TIERS, Family, Preset
from mrflow_sched.plan.make import make_sized_plan
from mrflow_sched.plan.notes import size_notes
from mrflow_sched.plan.recipes import sigmas_from_recipe
from mrflow_sched.plan.schedule import refine_sigmas
from mrflow_sched.plan.sizes import snap
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampling.noise import model_sigmas

__all__ = ["Recipe", "fit_sizes", "make_recipe"]

LEAST_SIDE = 64
"""A low-resolution side below this holds no image."""

_SCALE_AT_END = re.compile(r"\s+[1-9]x\+?$")
_STEPS_NAME = re.compile(r"([0-9]+)\+([0-9]+)")


@dataclass(frozen=True)
class Recipe:
    """What a job will do.

    `preset` is the one that `low_steps`, `refine_steps` and `sigma` (flow sigma) start from. Sizes in pixels.
    `first_sigmas` (None: the host's schedule) and `refine_sigmas` are in the model's own measure, as the host's
    override takes them. `solver`: a name of `mrflow_sched.solvers`, or None for the host's sampler. `upscaler`: a name
    of the host's list. `notes`: sentences for the user. `line`: the whole job in one short line.
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
        """The list to answer a host's first pass with that asks for `steps` steps.

        One step more than planned means that the host drops the value before the last (`_answer`). For another count
        (something changed it after us) the plan's schedule is made with that count. For flow models only.
        """
        first = self.plan.stages[0]
        if steps in (self.low_steps, self.low_steps + 1):
            return _answer(first.sigmas, steps)
        kind, _, *numbers = first.recipe.split(" ")
        if kind == "list":  # a model's own sigmas, which there are for no other count
            return _answer(first.sigmas, steps)
        return sigmas_from_recipe(" ".join([kind, str(steps), *numbers]))

    def refine_list(self, steps: int) -> tuple[float, ...]:
        """The list to answer a host's hires pass with that asks for `steps` steps; see `_answer`.

        For fewer than planned it runs from the same sigma in that many.
        """
        if steps >= self.refine_steps:
            return _answer(self.refine_sigmas, steps)
        return model_sigmas(refine_sigmas(self.sigma, steps), "epsilon" if self.experimental else "flow")


def _answer(sigmas: tuple[float, ...], steps: int) -> tuple[float, ...]:
    """`steps` + 1 values of which exactly `sigmas` reach the network.

    A host that asks for one step more than are run drops the value before the last: that one is doubled. A host that
    asks for still more takes the tail (a strength below 1): the head is filled up.
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
    """Decide everything for `controls` on `model` at a wanted final size in pixels.

    `upscalers`: the host's list, its entries or only their names. "automatic" takes none that the host would have to
    download first, as far as its entry tells. Raises MrFlowError, one sentence, where it cannot or should not be done:
    the model's own refusal, a low side under 64 px, or a plan that costs more than sampling natively.
    """
    if model.refusal is not None:
        raise MrFlowError(model.refusal)
    family = model.family
    preset, preset_note = _preset(controls, family)
    final, low = fit_sizes(model, width, height, controls.factor)
    if min(low) < LEAST_SIDE:
        raise MrFlowError(
            f"MrFlow cannot make {width}x{height} with factor {controls.factor:g}: the low-resolution image would be "
            f"{low[0]}x{low[1]}, and {LEAST_SIDE} px is the least side; choose a larger size or a smaller factor."
        )
    plan = _plan(controls, model, preset, (low, final), (width, height))
    if plan.cost_ratio < 1.0:
        raise MrFlowError(
            f"MrFlow would cost {1 / plan.cost_ratio:.2f} times as much as {plan.native_steps} native steps at "
            f"{final[0]}x{final[1]}; take fewer low steps or a larger factor."
        )
    upscaler, upscaler_note = _upscaler(controls.upscaler, upscalers)
    own_list = model.flow and model.known and controls.shift != "host"
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
        first_sigmas=first.sigmas if own_list else None,
        refine_sigmas=model_sigmas(last.sigmas, family.prediction),
        solver=family.solver if controls.solver == "multistep" else None,
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
    return replace(recipe, notes=tuple(note for note in notes if note), line=_line(recipe))


def fit_sizes(model: ModelInfo, width: int, height: int, factor: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """The final size on the latent's grid, nearest to `width` x `height`, and the low size on the network's.

    Of the low sizes next to final / factor the one shaped most like the final size is taken: hosts stretch one into
    the other. Raises MrFlowError for sides below 1.
    """
    if width < 1 or height < 1:
        raise MrFlowError(f"width and height must be at least 1, got {width!r} and {height!r}.")
    final = snap(width, model.grid_final), snap(height, model.grid_final)
    wanted = final[0] / factor, final[1] / factor

    def misfit(size: tuple[int, int]) -> tuple[float, float]:
        shape = abs(math.log(size[0] * final[1] / (size[1] * final[0])))
        return round(shape, 9), abs(math.log(size[0] * size[1] / (wanted[0] * wanted[1])))

    widths, heights = (_around(side, model.grid_low) for side in wanted)
    return final, min(product(widths, heights), key=misfit)


def _around(side: float, grid: int) -> tuple[int, ...]:
    """The multiples of `grid` at and on both sides of `side`."""
    below = max(math.floor(side / grid + 1e-9), 1)
    return (below * grid,) if below * grid >= side else (below * grid, (below + 1) * grid)


def _preset(controls: Controls, family: Family) -> tuple[Preset, str | None]:
    """The preset to start from, and a note where the family lacks the one asked for."""
    default = family.get_preset()
    if controls.preset == AUTOMATIC:
        return default, None
    if controls.preset in (*TIERS, *(preset.name for preset in family.presets)):
        return family.get_preset(controls.preset), None
    match = _STEPS_NAME.fullmatch(controls.preset)
    if match is None:
        return default, f"{family.title} has no preset {controls.preset!r}; its {default.name} is used."
    steps = int(match[1]), int(match[2])
    return replace(default, name=controls.preset, low_steps=steps[0], refine_steps=steps[1]), None


def _plan(
    controls: Controls,
    model: ModelInfo,
    preset: Preset,
    sizes: Sequence[tuple[int, int]],
    wanted: tuple[int, int],
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
        solver=family.solver if controls.solver == "multistep" else "euler",
        refine_guidance=refine_guidance if family.guidance_kind == "cfg" else None,
    )


def _upscaler(asked: str, entries: Sequence[Any]) -> tuple[str, str | None]:
    """The upscaler to use, and a note where it is not the one asked for or a better one is missing."""
    names = [str(getattr(entry, "name", entry)) for entry in entries]
    if asked != AUTOMATIC and (asked in names or not names):
        return asked, None
    chosen, hint = pick_automatic(name for name, entry in zip(names, entries, strict=True) if not _remote(entry))
    if asked != AUTOMATIC:
        return chosen, f"The upscaler {asked!r} is not installed here; {_spoken(chosen)} is used."
    return chosen, hint


def _remote(entry: Any) -> bool:
    """Whether a host's upscaler is still only an address to download from."""
    place = getattr(entry, "local_data_path", None) or getattr(entry, "data_path", None)
    return str(place or "").startswith("http")


# ------------------------------------------------------------------------------------------------------------- words


def _notes(controls: Controls, model: ModelInfo) -> list[str]:
    """What the choices do on this model that their words do not tell."""
    notes: list[str] = []
    solver = model.family.solver
    if controls.solver == "multistep" and solver != "multistep":
        notes.append(f"Stage 1 runs the solver {solver}, which suits {model.title} better than multistep.")
    if model.flow and not model.known and controls.shift != "host":
        notes.append(f"MrFlow has no numbers for {model.title}: stage 1 follows the WebUI's schedule.")
    return notes


def _line(recipe: Recipe) -> str:
    scale = recipe.width / recipe.low_width
    parts = [
        f"{recipe.low_width}×{recipe.low_height} ×{recipe.low_steps} → {_spoken(recipe.upscaler)} ×{scale:.3g} → "
        f"{recipe.width}×{recipe.height} ×{recipe.refine_steps} @ σ {recipe.sigma:.4g}",
        f"≈ {work_ratio(recipe.plan, upscaler=_work_of(recipe.upscaler)):.2g}× fewer FLOPs",
    ]
    return " · ".join([*parts, "experimental"] if recipe.experimental else parts)


def _work_of(upscaler: str) -> str:
    """Which of the cost model's upscalers comes nearest to the one of this name."""
    if upscaler in ("None", "Lanczos", "Nearest"):
        return "lanczos"
    return "x4" if scale_in_name(upscaler) == 4 else "x2"


def _spoken(upscaler: str) -> str:
    """An upscaler's name for a line that tells the scale: no scale at its end, no mark of ours; Neo's "None" is
    Lanczos."""
    return "Lanczos" if upscaler == "None" else _SCALE_AT_END.sub("", upscaler.removesuffix(MARK)) or upscaler
