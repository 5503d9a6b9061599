"""What to keep off a card and what to cut into tiles so that a run fits, by counting, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.checks import checked_number
from mrflow_sched.plan.cost import Offload, Peak, peak_memory, uncounted_parts
from mrflow_sched.plan.families import FAMILIES, Family
from mrflow_sched.plan.notes import tile_notes
from mrflow_sched.plan.stages import StagedPlan

__all__ = ["CUT", "SPARE", "Fitted", "fit_card"]

CUT = 512
"""Side in pixels of the tiles of VAE and upscaler, of the image that they make."""
SPARE = 1.1
"""What a run is given beside its counted peak, for workspaces and fragmentation, which no count sees."""
_LEAST_GIGABYTES, _MOST_GIGABYTES = 0.05, 1e6
_LARGE = 4.0
"""A network that was not counted sees later stages of more than this many times the native area in tiles."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """How a run is made to fit.

    Attributes:
        plan: The plan, with tiles of the network where they were needed.
        offload: "model": only the part at work is on the card; "layers": only the layer at work; None: everything is.
        vae_tile: Side in pixels of the VAE's tiles; None: whole images.
        upscaler_tile: Side in pixels of the upscaler's tiles, of the image that it makes; None: whole images.
        peak: What was counted of it.
        gigabytes: Of the card, in GiB.
        uncounted: Parts that the count leaves out: "network" (its weights are in it), "VAE".
        title: Of the family.
    """

    plan: StagedPlan
    offload: Offload | None
    vae_tile: int | None
    upscaler_tile: int | None
    peak: Peak
    gigabytes: float
    uncounted: tuple[str, ...]
    title: str

    @property
    def fits(self) -> bool:
        """Whether the counted peak and its spare fit."""
        return self.peak.total * SPARE <= self.gigabytes * 2**30

    def to_dict(self) -> dict[str, Any]:
        """What was chosen, as numbers and words.

        Returns:
            The keys of "memory" in `mrflow plan --json`.
        """
        return {
            "gigabytes": self.gigabytes,
            "fits": self.fits,
            "peak_bytes": round(self.peak.total),
            "part": self.peak.name,
            "counted": self.peak.counted,
            "uncounted": list(self.uncounted),
            "offload": self.offload,
            "vae_tile": self.vae_tile,
            "upscaler_tile": self.upscaler_tile,
            "tile": self.plan.tile,
        }

    @property
    def sentence(self) -> str:
        """What was chosen and what it needs, for the user."""
        offload = {
            None: "all parts stay on it",
            "model": "parts wait beside it while they are idle",
            "layers": "layers wait beside it until they are needed, which is slow",
        }[self.offload]
        cuts = (("VAE", self.vae_tile), ("upscaler", self.upscaler_tile), ("network", self.plan.tile or None))
        tiles = [f"{name} in tiles of {side}" for name, side in cuts if side is not None]
        need = f"{'about' if self.peak.counted else 'at least'} {self.peak.total / 2**30:.1f} GiB in {self.peak.name}"
        left = {"network": "what the network needs beside its weights", "VAE": "the VAE"}
        without = " and ".join(left[part] for part in self.uncounted)
        verb = "was" if len(self.uncounted) == 1 else "were"
        need += f", without {without}, which {verb} not counted for {self.title}" if without else ""
        chosen = f"{'; '.join([offload, *tiles])}: {need}"
        card = f"a card of {self.gigabytes:.4g} GB"
        return f"On {card} {chosen}." if self.fits else f"The run does not fit on {card}; the least is this: {chosen}."


def fit_card(
    plan: StagedPlan,
    gigabytes: float,
    family: Family | None = None,
    *,
    batch: int = 1,
    value_bytes: float = 2.0,
    weight_bytes: float | None = None,
    offloads: bool = True,
    tiles: bool = True,
    name: str = "gigabytes",
) -> Fitted:
    """The least that has to be done for a run to fit on a card.

    In this order: upscaler in tiles; parts offloaded, which costs seconds; VAE in tiles, which may leave faint seams;
    the network in tiles in later stages, which no longer sees the image as a whole; layers offloaded, which is many
    times slower. What an earlier measure no longer helps, once a later one is taken, is not done. A VAE
    that was not counted works in tiles in any case, and so does a network that was not counted, in later stages of more
    than four times the native area.

    Args:
        plan: The plan. A tile that it has is kept.
        gigabytes: Memory of the card in GiB, from 0.05.
        family: The plan's family; None: the known one of its name.
        batch: As in `peak_memory`.
        value_bytes: Likewise.
        weight_bytes: Likewise.
        offloads: Parts can wait elsewhere; False: on a CPU, say.
        tiles: The network may be cut into tiles.
        name: How refusals call `gigabytes`.

    Returns:
        The first of these that fits, else the one that needs least.

    Raises:
        MrFlowError: A number is out of range, or the family's cost is unknown.
    """
    advice = "it is the memory of the card in GB, such as 8, 12 or 16"
    room = checked_number(gigabytes, name, _LEAST_GIGABYTES, _MOST_GIGABYTES, advice)
    known = FAMILIES.get(plan.family) if family is None else family
    if known is None:
        raise MrFlowError(f"{name} cannot be planned for family {plan.family}, whose cost is unknown; leave it out.")
    numbers = {"batch": batch, "value_bytes": value_bytes, "weight_bytes": weight_bytes}
    made: list[Fitted] = []
    for offload, tile, vae_tile, upscaler_tile in _ways(plan, known, offloads, tiles):
        cut = plan
        if tile != plan.tile:
            cut = replace(plan, tile=tile, tile_positions="whole")
            cut = replace(cut, notes=(*plan.notes, *tile_notes(cut, known)))
        cuts = {"offload": offload or False, "vae_tile": vae_tile, "upscaler_tile": upscaler_tile}
        peak = cast("Peak", peak_memory(cut, known, **numbers, **cuts))  # type: ignore[arg-type]
        left_out = uncounted_parts(known)
        made.append(Fitted(cut, offload, vae_tile, upscaler_tile, peak, room, left_out, known.title))
        if made[-1].fits:
            return made[-1]
    return min(made, key=lambda each: each.peak.total)


def _ways(
    plan: StagedPlan, family: Family, offloads: bool, tiles: bool
) -> Iterator[tuple[Offload | None, int, int | None, int | None]]:
    """Offload and tiles of network, VAE and upscaler, from the least harm to the most."""
    sides = sorted({max(family.native_size), family.min_low_side}, reverse=True) if tiles and not plan.tile else []
    cut = [side for side in sides if len(plan.stages) > 1 and side < max(plan.width, plan.height)]
    left_out = uncounted_parts(family)
    large = plan.width * plan.height > _LARGE * math.prod(family.native_size)
    networks = cut if cut and large and "network" in left_out else [plan.tile, *cut]
    cuts = (None, CUT)
    vae_cuts = (CUT,) if "VAE" in left_out else cuts
    kept: tuple[Offload | None, ...] = (None, "model") if offloads else (None,)
    for tile, vae_tile, offload, upscaler_tile in product(networks, vae_cuts, kept, cuts):
        yield offload, tile, vae_tile, upscaler_tile
    for tile, vae_tile, upscaler_tile in product(networks, vae_cuts, cuts) if offloads else ():
        yield "layers", tile, vae_tile, upscaler_tile
