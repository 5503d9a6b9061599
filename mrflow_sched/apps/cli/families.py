"""`mrflow families`: the models that are known, their presets, and what each preset is for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mrflow_sched.apps.cli.console import Outcome
from mrflow_sched.apps.cli.options import Commands, common_options
from mrflow_sched.apps.plan_lines import counted
from mrflow_sched.plan.families import FAMILIES, PURPOSES, TIERS, Family, Preset, get_family

_PURPOSES = {"text": "images with lettering", "detail": "small things in large images"}
_GUIDANCE = {"embedded": "an input of the network", "cfg": "CFG, two forwards a step", "none": "distilled away"}


@dataclass(frozen=True)
class FamiliesRequest:
    """Families to show.

    Attributes:
        names: Names of families; empty shows all.
    """

    names: tuple[str, ...]

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> FamiliesRequest:
        """Make the request from parsed arguments.

        Args:
            args: What the parser of `add_parser` returned.

        Returns:
            The request.
        """
        return cls(tuple(args.names))


def add_parser(commands: Commands) -> None:
    """Add `mrflow families`.

    Args:
        commands: Where the parser is added.
    """
    parser = commands.add_parser(
        "families", parents=[common_options()], allow_abbrev=False, help="list the known models and their presets"
    )
    parser.add_argument("names", nargs="*", metavar="FAMILY", help="families to show (default: all)")
    parser.set_defaults(from_args=FamiliesRequest.from_args, run=run)


def run(request: FamiliesRequest) -> Outcome:
    """Look the families up.

    Args:
        request: What to show.

    Returns:
        The families, as values and as a table.

    Raises:
        MrFlowError: A family is unknown.
    """
    found = [get_family(name) for name in request.names or FAMILIES]
    return Outcome([_values(family) for family in found], tuple(_lines(found)))


def purpose(family: Family, preset: Preset) -> str:
    """Say what a preset is for.

    Args:
        family: The family.
        preset: One of its presets.

    Returns:
        A few words: the names that choose it too, or the kind of image.
    """
    tiers = [tier for tier in TIERS if family.get_preset(tier) == preset]
    words = ["the default" if tier == "balanced" else tier for tier in tiers]
    if preset.name in _PURPOSES:
        words.append(_PURPOSES[preset.name])
    if preset.few_step:
        words.append("fewest steps, with the LoRA for them that comes with the model")
    return ", ".join(words) or "between fast and best"


def _values(family: Family) -> dict[str, Any]:
    return {
        "name": family.name,
        "title": family.title,
        "size": list(family.default_size or family.native_size),
        "grid": family.grid,
        "native_steps": family.native_steps,
        "guidance": family.guidance,
        "guidance_kind": family.guidance_kind,
        "solver": family.solver,
        "presets": [
            {
                "name": preset.name,
                "low_steps": preset.low_steps,
                "refine_steps": preset.refine_steps,
                "sigma": preset.sigma,
                "for": purpose(family, preset),
                "source": preset.source,
            }
            for preset in _presets(family)
        ],
    }


def _presets(family: Family) -> list[Preset]:
    """Its own presets, and those for a kind of image."""
    own = [preset for preset in family.presets if preset.name not in PURPOSES]
    return [*own, *(family.get_preset(name) for name in PURPOSES)]


def _lines(families: list[Family]) -> Iterator[str]:
    for family in families:
        width, height = family.default_size or family.native_size
        guided = f"guidance {family.guidance:g} ({_GUIDANCE[family.guidance_kind]})"
        yield (
            f"{family.name}: {family.title}, {width}x{height} in multiples of {family.grid}, natively "
            f"{counted(family.native_steps, 'step')} at {guided}"
        )
        for preset in sorted(_presets(family), key=lambda preset: (preset.low_steps, preset.sigma)):
            steps = f"{preset.low_steps}+{preset.refine_steps}"
            words = "" if preset.name == steps else f"{steps}, "
            yield f"  {preset.name:<6} sigma {preset.sigma:<5g} {words}{purpose(family, preset)}"
    yield (
        "fast, balanced, best, text and detail are presets of every family, and so is any other N+M: N steps at the "
        "low size, M at the full size, with the default's sigma. Fewer steps are faster, more follow the prompt more "
        "closely; a higher sigma redraws more of the fine detail."
    )
