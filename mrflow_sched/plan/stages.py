"""The numbers of a run as frozen values: `Stage`, one resolution with its schedule, and `StagedPlan`, the whole run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args

from mrflow_sched._runtime.errors import MrFlowError, quoted, shown
from mrflow_sched.plan.checks import (
    MAX_FIRST_PIXELS,
    MAX_FORWARDS,
    MAX_GUIDANCE,
    MAX_SCALE,
    MAX_SEED,
    MAX_STAGES,
    MAX_TOKENS,
    Noise,
    Posterior,
    Precision,
    SeedRule,
    TilePositions,
    UpscalerKind,
    check_choice,
    checked_flag,
    checked_interval,
    checked_number,
    checked_side,
    checked_tile,
    checked_whole,
    listed,
)
from mrflow_sched.plan.notes import plan_notes
from mrflow_sched.plan.recipes import explicit_recipe, sigmas_from_recipe
from mrflow_sched.plan.schedule import MAX_MU, validate_sigmas
from mrflow_sched.plan.solver_table import check_solver
from mrflow_sched.plan.text import (
    NAME,
    PLAN_NUMBERS,
    checksum,
    plan_to_string,
    read_plan,
    stage_from_dict,
    stage_to_dict,
)
from mrflow_sched.plan.tiles import tile_sides
from mrflow_sched.plan.token_shares import checked_shares, token_count

_LONGEST_NOTE, _MOST_NOTES = 500, 50

# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True)
class Stage:
    """One resolution with its own schedule.

    Attributes:
        width: Width in pixels.
        height: Height in pixels.
        tokens: Image tokens of the network at this size.
        mu: Logarithm of the shift in `sigmas`; None where the schedule has no shift.
        sigmas: The schedule, falling to exactly 0; () means that no step is taken and the upscaler's image is kept.
        solver: A name of `solver_table.SOLVERS`.
        guidance: Guidance scale; 1 is off.
        forwards: Network evaluations per image.
        recipe: `sigmas` in short (see `recipes.sigmas_from_recipe`); left out, or not matching, it is made to spell the
            values out.
        guidance_interval: (low, high) range of sigma in which guidance is applied.
        shares: Share of the tokens that the network sees at each step, which never falls; (): all at every step.
        precision: Of the network's weights; "own": as the model was loaded.
        renoise: Share of the noise that is drawn anew after each step but the last; above 0 the solver must be "euler".
        few_step: The network has its few-step LoRA on.

    Raises:
        MrFlowError: The values cannot be a stage.
    """

    width: int
    height: int
    tokens: int
    mu: float | None
    sigmas: tuple[float, ...]
    solver: str
    guidance: float
    forwards: int
    recipe: str = ""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    shares: tuple[float, ...] = ()
    precision: Precision = "own"
    renoise: float = 0.0
    few_step: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", checked_side(self.width, "width"))
        object.__setattr__(self, "height", checked_side(self.height, "height"))
        object.__setattr__(self, "tokens", checked_whole(self.tokens, "tokens", 1, self.width * self.height))
        check_solver(self.solver)
        object.__setattr__(self, "guidance", checked_number(self.guidance, "guidance", 0, MAX_GUIDANCE))
        if self.mu is not None:
            object.__setattr__(self, "mu", checked_number(self.mu, "mu", -MAX_MU, MAX_MU))
        object.__setattr__(self, "guidance_interval", checked_interval(self.guidance_interval))
        sigmas = () if _is_empty(self.sigmas) else validate_sigmas(self.sigmas, "sigmas")
        object.__setattr__(self, "forwards", checked_whole(self.forwards, "forwards", 1 if sigmas else 0, MAX_FORWARDS))
        object.__setattr__(self, "sigmas", sigmas)
        object.__setattr__(self, "shares", checked_shares(self.shares, self.steps))
        check_choice(self.precision, "precision", get_args(Precision))
        object.__setattr__(self, "renoise", checked_number(self.renoise, "renoise", 0, 1))
        if self.renoise and (self.solver != "euler" or self.shares):
            raise MrFlowError(
                f"renoise={self.renoise:g} is for the solver euler on all tokens, got {self.solver}; leave one out."
            )
        checked_flag(self.few_step, "few_step")
        if not isinstance(cast("object", self.recipe), str):
            raise MrFlowError(f"recipe must be text such as 'native 12 mu=0.63', got {quoted(self.recipe)}.")
        if not self.recipe or sigmas_from_recipe(self.recipe) != sigmas:
            object.__setattr__(self, "recipe", explicit_recipe(sigmas))

    @property
    def steps(self) -> int:
        """Solver steps: one less than there are sigmas."""
        return max(len(self.sigmas) - 1, 0)

    @property
    def guided(self) -> tuple[float, float]:
        """Former name of `guidance_interval`."""
        return self.guidance_interval

    @property
    def always_guided(self) -> bool:
        """Whether guidance is applied at every sigma of the stage."""
        low, high = self.guidance_interval
        return all(low <= sigma <= high for sigma in self.sigmas[:-1])

    def guidance_at(self, sigma: float) -> float:
        """The guidance applied at one sigma.

        Args:
            sigma: Flow sigma in [0, 1].

        Returns:
            The stage's guidance within `guidance_interval` (to 1e-6), else 1, which is off.
        """
        low, high = self.guidance_interval
        # Sigmas go through float32 on their way to the network.
        return self.guidance if low - 1e-6 <= sigma <= high + 1e-6 else 1.0

    @property
    def start_sigma(self) -> float:
        """The sigma at which the stage starts; 0.0 for a stage without steps."""
        return self.sigmas[0] if self.sigmas else 0.0


@dataclass(frozen=True, slots=True)
class StagedPlan:
    """All numbers of a run.

    `stages[0]` goes from pure noise to a clean image; each later stage refines the upscaled result.

    Attributes:
        family: Name of the model's family.
        preset: Name of the preset, such as "12+1".
        requested_width: Width in pixels that was asked for; `width` is what is made.
        requested_height: Height in pixels that was asked for.
        stages: 1 to 8 stages, first to last.
        seed: Seed of the first image's noise, 0 to 2^63 - 1.
        seed_rule: How the seeds of stages and of the images of a batch differ, see `noise.stage_seed`.
        posterior: Whether to take the mode of the VAE encoder's distribution or a sample of it.
        native_steps: Steps of native sampling at the final size, with which costs are compared.
        native_forwards: Network evaluations of native sampling.
        text_tokens: Text tokens that share the network's sequence.
        attention: Cost of attention: one forward on n tokens, text included, costs n (1 + `attention` n) in units that
            cancel.
        tile: Side in pixels of the tiles in which the network sees later stages that are larger; 0: whole images.
        tile_positions: Where a tile's tokens are to the network: where they lie in the "whole" image, or as if the tile
            were an image of its "own", as in every plan of before there was a choice.
        noise: What stage 1 starts from: noise of its "own" size, or that of the final size, shrunk ("nested").
        upscaler_kind: What upscales the image that this was planned for: a "network", as in every plan of before there
            was a choice, or "interpolation".
        context: Share of the tokens that a later stage with `Stage.shares` shows its network beside those that it
            refines, so that these see the whole image; what it makes of them is not kept.
        notes: Sentences for the user; not part of equality.

    Raises:
        MrFlowError: The values cannot be a plan.
    """

    family: str
    preset: str
    requested_width: int
    requested_height: int
    stages: tuple[Stage, ...]
    seed: int = 0
    seed_rule: SeedRule = "offset"
    posterior: Posterior = "mode"
    native_steps: int = 50
    native_forwards: int = 50
    text_tokens: int = 0
    attention: float = 0.0
    tile: int = 0
    tile_positions: TilePositions = "own"
    noise: Noise = "own"
    upscaler_kind: UpscalerKind = "network"
    context: float = 0.0
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name in ("family", "preset"):
            text: object = getattr(self, name)
            if not (isinstance(text, str) and NAME.fullmatch(text)):
                raise MrFlowError(f"{name} must be a plain name such as 'flux1-dev', got {quoted(text)}.")
        object.__setattr__(self, "requested_width", checked_side(self.requested_width, "requested_width"))
        object.__setattr__(self, "requested_height", checked_side(self.requested_height, "requested_height"))
        object.__setattr__(self, "stages", _checked_stages(self.stages))
        object.__setattr__(self, "seed", checked_whole(self.seed, "seed", 0, MAX_SEED))
        check_choice(self.seed_rule, "seed_rule", ("offset", "hash"))
        check_choice(self.posterior, "posterior", ("mode", "sample"))
        check_choice(self.noise, "noise", ("own", "nested"))
        check_choice(self.upscaler_kind, "upscaler_kind", ("network", "interpolation"))
        check_choice(self.tile_positions, "tile_positions", ("whole", "own"))
        object.__setattr__(self, "native_steps", checked_whole(self.native_steps, "native_steps", 1, MAX_FORWARDS))
        object.__setattr__(
            self, "native_forwards", checked_whole(self.native_forwards, "native_forwards", 1, MAX_FORWARDS)
        )
        object.__setattr__(self, "text_tokens", checked_whole(self.text_tokens, "text_tokens", 0, MAX_TOKENS))
        object.__setattr__(self, "attention", checked_number(self.attention, "attention", 0, MAX_SCALE))
        object.__setattr__(self, "tile", checked_tile(self.tile))
        object.__setattr__(self, "context", checked_number(self.context, "context", 0, 1))
        if self.stages[0].shares and self.stages[0].shares[-1] != 1.0:
            raise MrFlowError("shares of stage 1 must end at 1, or part of the image would stay noise.")
        if any(stage.renoise for stage in self.stages[1:]):
            raise MrFlowError("renoise is for stage 1; later stages must have 0.")
        if self.tile and any(stage.shares for stage in self.stages):
            raise MrFlowError("tile must be 0 where a stage's shares leave tokens out; use one of the two.")
        right = isinstance(cast("object", self.notes), tuple)
        if not right or not all(isinstance(note, str) for note in listed(self.notes)):
            raise MrFlowError(f"notes must be a tuple of sentences, got {quoted(self.notes)}.")

    @property
    def asked_area(self) -> tuple[slice, slice]:
        """Rows and columns of the final image that were asked for; the grid may have added edges around them."""
        height, width = min(self.requested_height, self.height), min(self.requested_width, self.width)
        top, left = (self.height - height) // 2, (self.width - width) // 2
        return slice(top, top + height), slice(left, left + width)

    @property
    def width(self) -> int:
        """Width in pixels of the image as it is made."""
        return self.stages[-1].width

    @property
    def height(self) -> int:
        """Height in pixels of the image as it is made."""
        return self.stages[-1].height

    @property
    def forwards(self) -> int:
        """Network evaluations per image over all stages."""
        return sum(stage.forwards for stage in self.stages)

    @property
    def cost_ratio(self) -> float:
        """Network cost of native sampling over that of this plan; text, VAE and upscaler are not counted."""
        return self.native_forwards / sum(self.stage_costs())

    def stage_costs(self) -> tuple[float, ...]:
        """Network cost of each stage.

        Returns:
            One number per stage in native forwards, that is, in evaluations at the final size.
        """
        final = self._forward_weight(self.stages[-1].tokens)

        def weight(index: int) -> float:
            seen = self.step_tokens(index)
            return sum(sum(map(self._forward_weight, each)) for each in seen) / len(seen)

        return tuple(stage.forwards * (weight(index) / final) for index, stage in enumerate(self.stages))

    def step_tokens(self, index: int) -> tuple[tuple[int, ...], ...]:
        """Image tokens of each forward, for each step of a stage.

        Args:
            index: Number of the stage from 0.

        Returns:
            `tile_tokens` for each step, or once where all steps are alike.
        """
        stage, beside = self.stages[index], self.context if index else 0.0
        if not stage.shares:
            return (self.tile_tokens(index),)
        return tuple((token_count(stage.tokens, min(share + beside, 1.0)),) for share in stage.shares)

    def tiled(self, index: int) -> bool:
        """Whether the network sees a stage in tiles.

        Args:
            index: Number of the stage from 0; the first is never tiled.

        Returns:
            True for a later stage with a side above `tile`, where `tile` is set.
        """
        return index > 0 and 0 < self.tile < max(self.stages[index].width, self.stages[index].height)

    def tile_tokens(self, index: int) -> tuple[int, ...]:
        """Image tokens of each forward that one evaluation of a stage takes.

        Args:
            index: Number of the stage from 0.

        Returns:
            One number, or one for every tile.
        """
        stage = self.stages[index]
        if not self.tiled(index):
            return (stage.tokens,)
        grid = round(math.sqrt(stage.width * stage.height / stage.tokens))
        return tuple(wide * high // grid**2 for wide, high in tile_sides(stage.width, stage.height, self.tile, grid))

    def _forward_weight(self, tokens: int) -> float:
        total = tokens + self.text_tokens
        return total * (1.0 + self.attention * total)

    def to_string(self) -> str:
        """The plan on one line, for image metadata.

        Returns:
            Text without commas, colons or quotes; `notes` are left out.
        """
        return plan_to_string(self)

    @classmethod
    def from_string(cls, text: str) -> StagedPlan:
        """Read what `to_string` wrote, of this version or an older one.

        Args:
            text: The line; its checksum may be missing.

        Returns:
            An equal plan, with notes made anew.

        Raises:
            MrFlowError: The text is not a plan, is of a newer version, or does not match its checksum.
        """
        if not isinstance(cast("object", text), str):
            raise MrFlowError(f"plan string must be text, got {quoted(text)}.")
        body, mark, written = text.strip().partition(";#")
        try:
            fields, stages = read_plan(body)
            plan = cls(stages=tuple(Stage(**stage) for stage in stages), **fields)
        except ValueError as error:
            raise MrFlowError(f"plan string {quoted(text)} cannot be read: {shown(error, 300)}") from error
        if mark and written != checksum(body, plan.stages):
            raise MrFlowError(
                f"plan string {quoted(text)} was edited, or written by a version whose schedules differ; "
                "delete the checksum, from ';#' on, to use it anyway."
            )
        return replace(plan, notes=plan_notes(plan))

    def to_dict(self) -> dict[str, Any]:
        """The plan as lists, numbers and strings.

        Returns:
            The keys of `mrflow plan --json`, and all that is needed to read the plan back.
        """
        return {
            "family": self.family,
            "preset": self.preset,
            "cost_ratio": self.cost_ratio,
            "plan": self.to_string(),
            "stages": [stage_to_dict(stage) for stage in self.stages],
            "requested": {"width": self.requested_width, "height": self.requested_height},
            "forwards": self.forwards,
            **{name: getattr(self, name) for name in PLAN_NUMBERS},
            "tile": self.tile,
            "tile_positions": self.tile_positions,
            "noise": self.noise,
            "upscaler_kind": self.upscaler_kind,
            "context": self.context,
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """The plan as JSON.

        Returns:
            `to_dict` on one line.
        """
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> StagedPlan:
        """Read what `to_json` wrote.

        Args:
            text: JSON, of which the numbers are read and the `plan` line is not.

        Returns:
            An equal plan, with the notes of the text.

        Raises:
            MrFlowError: The text is not such a plan.
        """
        try:
            data = cast("Mapping[str, Any]", json.loads(text))
            return cls(
                family=data["family"],
                preset=data["preset"],
                requested_width=data["requested"]["width"],
                requested_height=data["requested"]["height"],
                stages=tuple(Stage(**stage_from_dict(stage)) for stage in data["stages"]),
                **{name: data[name] for name in PLAN_NUMBERS},
                tile=data.get("tile", 0),
                tile_positions=data.get("tile_positions", "own"),
                noise=data.get("noise", "own"),
                upscaler_kind=data.get("upscaler_kind", "network"),
                context=data.get("context", 0.0),
                notes=tuple(shown(note, _LONGEST_NOTE) for note in data["notes"][:_MOST_NOTES]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise MrFlowError(f"plan JSON {quoted(text)} cannot be read: {quoted(error, 300)}.") from error


def _is_empty(sigmas: object) -> bool:
    return isinstance(sigmas, (tuple, list)) and not sigmas


def _checked_stages(stages: object) -> tuple[Stage, ...]:
    given = listed(stages)
    found = tuple(stage for stage in given if isinstance(stage, Stage))
    if not given or len(found) < len(given):
        raise MrFlowError(f"stages must hold at least one stage, and nothing but stages, got {quoted(stages)}.")
    if len(found) > MAX_STAGES:
        raise MrFlowError(f"stages must hold at most {MAX_STAGES} stages, got {len(found)}.")
    first, *later = found
    if first.start_sigma != 1.0:
        raise MrFlowError(f"stage 1 must start at sigma 1.0, got {first.start_sigma!r}; later stages start lower.")
    if first.width * first.height > MAX_FIRST_PIXELS:
        raise MrFlowError(
            f"stage 1 must have at most {MAX_FIRST_PIXELS} pixels (8192x8192), got {first.width}x{first.height}; "
            "choose a smaller size, a larger factor or more stages."
        )
    for number, stage in enumerate(later, start=2):
        if stage.start_sigma >= 1.0:
            raise MrFlowError(f"stage {number} must start below sigma 1.0, got {stage.start_sigma!r}.")
    return found
