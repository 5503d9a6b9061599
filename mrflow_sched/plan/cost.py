"""What a plan costs, part by part: FLOP, memory, and seconds on a machine that was measured once.

FLOP and bytes are counted on the real classes in their real sizes (`bench/speed/count.py`) and written down as a few
numbers per family, so that a plan can be priced in microseconds, without torch. Two per multiply-add; matrix products,
convolutions and attention are counted, all else is negligible beside them.

Seconds follow from one measured staged run (`Speeds.measured`): its two sizes tell what a FLOP costs in each part, and
what a forward costs before its first FLOP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.families import FAMILIES, Family
from mrflow_sched.plan.families.base import PixelCost
from mrflow_sched.plan.stages import Stage, StagedPlan

__all__ = ["UPSCALER_FLOP", "PartCost", "Peak", "Speeds", "part_costs", "peak_memory", "work_ratio"]

UPSCALER_FLOP: Mapping[str, float] = {"x2": 8.966e6, "x4": 3.5854e7, "demo": 2.76e5, "lanczos": 0.0}
"""FLOP per pixel of the small image: RRDBNet of 23 blocks (RealESRGAN x2plus, x4plus), the embedded model's, none."""


_UPSCALER_ALIVE = 260.0
"""Bytes alive at once per pixel of the upscaled image in an RRDBNet of 64 channels, 16 bits."""
_UPSCALER_WEIGHTS = 1.67e7


@dataclass(frozen=True, slots=True)
class PartCost:
    """One part of a run for one image: its name as in `StagedResult.timings`, how often it is called, FLOP of all
    calls together, pixels that it makes or reads, and bytes of tensors alive at once (None where not counted)."""

    name: str
    calls: int
    flop: float
    pixels: int
    alive: float | None


def part_costs(
    plan: StagedPlan, family: Family | None = None, *, upscaler: str | float | None = None
) -> tuple[PartCost, ...] | None:
    """The parts of `plan` for one image, in order; None for a family that is not in the table.

    `upscaler`: a name of `UPSCALER_FLOP` (left out, a x2 model), or FLOP per pixel of the small image. A VAE that was
    never counted is left out. Raises MrFlowError for an unknown name.
    """
    known = FAMILIES.get(plan.family) if family is None else family
    if known is None:
        return None
    each = _upscaler_flop(known.usual_upscaler if upscaler is None else upscaler)
    vae = known.vae_cost
    parts: list[PartCost] = []
    for number, stage in enumerate(plan.stages, 1):
        if number > 1:
            before = plan.stages[number - 2]
            parts.append(_upscale(before, stage, each))
            if stage.sigmas and vae is not None:
                parts.append(_pixel_part("encode", vae.encode, stage))
        if stage.sigmas:
            parts.append(_sampling(f"stage {number} sample", stage, plan.tile_tokens(number - 1), known))
            if vae is not None:
                parts.append(_pixel_part(f"stage {number} decode", vae.decode, stage))
    return tuple(parts)


def work_ratio(plan: StagedPlan, family: Family | None = None, *, upscaler: str | float | None = None) -> float:
    """FLOP of native sampling, decoding included, over FLOP of all parts of `plan`.

    Where nothing but the network is known, `plan.cost_ratio`.
    """
    known = FAMILIES.get(plan.family) if family is None else family
    parts = part_costs(plan, known, upscaler=upscaler)
    if known is None or parts is None:
        return plan.cost_ratio
    last = plan.stages[-1]
    vae = known.vae_cost
    native = plan.native_forwards * known.forward_cost(last.tokens)
    if vae is not None:
        native += vae.decode.flop(last.width * last.height)
    return native / sum(part.flop for part in parts)


# -------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True, slots=True)
class Peak:
    """The most memory of a run: `total` bytes, in the part `name`, of which `weights` wait or work."""

    total: float
    name: str
    weights: float


def peak_memory(
    plan: StagedPlan,
    family: Family | None = None,
    *,
    batch: int = 1,
    weight_bytes: float = 2.0,
    offload: bool = False,
    vae_tile: int | None = None,
    upscaler_tile: int | None = None,
) -> Peak | None:
    """The most memory on the device of a run in 16 bits; None for a family whose network was not counted.

    Weights of the network take `weight_bytes` each (2 in 16 bits, 1 in 8, 0.55 in 4 with their scales) and stay on the
    device beside VAE and upscaler, unless `offload` keeps only the part at work there. Text encoders are taken as gone.
    Tiles are sides in pixels, of the image at work; what does not fit into one is done in several, one after the
    other. Workspaces and fragmentation, which no count sees, come on top: expect some 10 % more.
    """
    known = FAMILIES.get(plan.family) if family is None else family
    parts = None if known is None else part_costs(plan, known)
    network = None if known is None else known.network_cost
    if known is None or parts is None or network is None:
        return None
    vae = known.vae_cost
    held = {"sample": network.weights * weight_bytes, "vae": 2 * vae.weights if vae else 0.0}
    held["upscale"] = 2 * _UPSCALER_WEIGHTS
    found: list[Peak] = []
    for part in parts:
        kind = "sample" if part.name.endswith("sample") else "upscale" if part.name == "upscale" else "vae"
        tile = {"sample": None, "upscale": upscaler_tile, "vae": vae_tile}[kind]
        pixels = part.pixels if tile is None else min(part.pixels, tile**2)
        alive = (part.alive or 0.0) * pixels / part.pixels * (1 if kind == "vae" else batch)
        kept = batch * part.pixels * 3 * 4 * 2  # images in float32: the one before and the one after
        weights = held[kind] if offload else sum(held.values())
        found.append(Peak(weights + alive + kept, part.name, weights))
    return max(found, key=lambda peak: peak.total)


# ------------------------------------------------------------------------------------------------------------- seconds


@dataclass(frozen=True, slots=True)
class Speeds:
    """What a machine takes: seconds per FLOP in each kind of part, and per forward and image before the first FLOP.

    `forward` is what a forward costs beside its FLOP, `other` what a run costs beside its parts (text, noise, saving).
    """

    network: float
    forward: float
    decode: float
    encode: float
    upscale: float
    other: float = 0.0

    @classmethod
    def measured(
        cls,
        plan: StagedPlan,
        seconds: Mapping[str, float],
        family: Family | None = None,
        *,
        upscaler: str | float | None = None,
    ) -> Speeds:
        """From one run of a staged `plan`: `seconds` by part, as `StagedResult.timings` or `mrflow compare` name them.

        Two stages of different size tell apart what a FLOP costs and what a forward costs. Raises MrFlowError, one
        sentence, where a part is missing or there is one size only.
        """
        parts = part_costs(plan, family, upscaler=upscaler)
        if parts is None:
            raise MrFlowError(
                f"nothing is known of what family {plan.family} costs; measure with a family of the table."
            )
        missing = [part.name for part in parts if part.name not in seconds]
        if missing:
            raise MrFlowError(f"seconds has no {missing[0]!r}; give every part of the plan that was run.")
        sampled = [part for part in parts if part.name.endswith("sample")]
        if len(sampled) != 2 or sampled[0].pixels == sampled[1].pixels:
            raise MrFlowError(f"seconds are of {len(sampled)} sampled stages; measure a plan of two sizes.")
        low, high = ((part.flop / part.calls, seconds[part.name] / part.calls) for part in sampled)
        slope = max((high[1] - low[1]) / (high[0] - low[0]), 1e-30)
        named = {part.name for part in parts}

        def rate(kind: str) -> float:
            alike = [part for part in parts if part.name.endswith(kind) and part.flop > 0]
            work = sum(part.flop for part in alike)
            return sum(seconds[part.name] for part in alike) / work if work else 0.0

        return cls(
            network=slope,
            forward=max(low[1] - slope * low[0], 0.0),
            decode=rate("decode"),
            encode=rate("encode"),
            upscale=rate("upscale"),
            other=sum(value for name, value in seconds.items() if name not in named),
        )

    def predict(
        self, plan: StagedPlan, family: Family | None = None, *, upscaler: str | float | None = None
    ) -> tuple[tuple[str, float], ...]:
        """(part, seconds) of `plan` on this machine, "other" at last. Raises MrFlowError for an unknown family."""
        parts = part_costs(plan, family, upscaler=upscaler)
        if parts is None:
            raise MrFlowError(f"nothing is known of what family {plan.family} costs; measure it with mrflow compare.")
        rates = {"sample": self.network, "decode": self.decode, "encode": self.encode, "upscale": self.upscale}
        rows: list[tuple[str, float]] = []
        for part in parts:
            kind = part.name.split()[-1]
            fixed = self.forward * part.calls if kind == "sample" else 0.0
            rows.append((part.name, rates[kind] * part.flop + fixed))
        return (*rows, ("other", self.other))


# ------------------------------------------------------------------------------------------------------------- helpers


def _upscaler_flop(upscaler: str | float) -> float:
    if isinstance(upscaler, str):
        if upscaler not in UPSCALER_FLOP:
            known = ", ".join(UPSCALER_FLOP)
            raise MrFlowError(f"upscaler must be one of {known}, or FLOP per pixel, got {upscaler!r}.")
        return UPSCALER_FLOP[upscaler]
    return upscaler


def _sampling(name: str, stage: Stage, tiles: Sequence[int], family: Family) -> PartCost:
    network = family.network_cost
    alive = None if network is None else network.alive * (max(tiles) + family.text_tokens)
    flop = stage.forwards * sum(map(family.forward_cost, tiles))
    return PartCost(name, stage.forwards * len(tiles), flop, stage.width * stage.height, alive)


def _pixel_part(name: str, part: PixelCost, stage: Stage) -> PartCost:
    pixels = stage.width * stage.height
    return PartCost(name, 1, part.flop(pixels), pixels, part.alive * pixels)


def _upscale(before: Stage, after: Stage, each: float) -> PartCost:
    made = after.width * after.height
    return PartCost("upscale", 1, each * before.width * before.height, made, _UPSCALER_ALIVE * made if each else 0.0)
