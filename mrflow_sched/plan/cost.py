"""What a plan costs, part by part: FLOP, memory, and seconds on a machine that was measured once.

FLOP and bytes are counted on the real classes in their real sizes (`bench/speed/count.py`) and written down as a few
numbers per family, so that a plan's cost takes microseconds to compute, without torch. A multiply-add is two FLOP;
matrix products, convolutions and attention are counted, all else is negligible beside them.

Seconds follow from one measured staged run (`Speeds.measured`): its two sizes separate what a FLOP costs in each part
from what a forward costs before its first FLOP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.plan.checks import checked_number, checked_whole
from mrflow_sched.plan.families import FAMILIES, Family
from mrflow_sched.plan.families.base import PixelCost
from mrflow_sched.plan.stages import Stage, StagedPlan

__all__ = ["UPSCALER_FLOP", "PartCost", "Peak", "Speeds", "part_costs", "peak_memory", "uncounted_parts", "work_ratio"]

Offload = Literal["model", "layers"]
"""What waits beside a card: parts that are idle, or all layers but the one at work."""
UPSCALER_FLOP: Mapping[str, float] = {"x2": 8.966e6, "x4": 3.5854e7, "demo": 2.76e5, "lanczos": 0.0}
"""FLOP per pixel of the small image: RRDBNet of 23 blocks (RealESRGAN x2plus, x4plus), the embedded model's, none."""


MAX_SECONDS = 1e7
"""The longest part of a run, in seconds, that can be predicted from."""
_MAX_UPSCALER_FLOP = 1e12
_MAX_BATCH = 10**6
_UPSCALER_ALIVE = 260.0
"""Bytes alive at once per pixel of the upscaled image in an RRDBNet of 64 channels, 16 bits."""
_UPSCALER_WEIGHTS: Mapping[str, float] = {"x2": 1.67e7, "x4": 1.67e7, "demo": 3.7e5, "lanczos": 0.0}
# The largest layer that is moved at once is smaller in every family: FLUX.1's is 1/210 of its network.
_LAYER_SHARE = 1 / 20
_TWIN_BYTES: Mapping[str, float] = {"int8": 1.02, "fp8": 1.02, "int4": 0.55}
"""Bytes per weight of a network's copy in fewer bits, scales included."""
_LATENT_COPIES = 5
"""Latents alive in a step: the state, the noise, two velocities and the denoised image, in float32."""


@dataclass(frozen=True, slots=True)
class PartCost:
    """The cost of one part of a run for one image.

    Attributes:
        name: As in `StagedResult.timings`.
        calls: How often the part runs; for a network, its forwards.
        flop: FLOP of all calls together.
        pixels: Pixels that it makes or reads.
        alive: Bytes of tensors alive at once, in 16 bits; None where not counted.
    """

    name: str
    calls: int
    flop: float
    pixels: int
    alive: float | None


def part_costs(
    plan: StagedPlan, family: Family | None = None, *, upscaler: str | float | None = None
) -> tuple[PartCost, ...] | None:
    """The cost of each part of a plan for one image.

    A VAE that was never counted is left out.

    Args:
        plan: The plan.
        family: Its family; None: the known one of its name.
        upscaler: A name of `UPSCALER_FLOP`, or FLOP per pixel of the small image; None: the family's usual upscaler,
            or none where the plan is for interpolation.

    Returns:
        The parts in order; None for a family that is not in the table.

    Raises:
        MrFlowError: The upscaler's name is unknown.
    """
    known = FAMILIES.get(plan.family) if family is None else family
    if known is None:
        return None
    each = _upscaler_flop(_usual_upscaler(plan, known) if upscaler is None else upscaler)
    vae = known.vae_cost
    parts: list[PartCost] = []
    for number, stage in enumerate(plan.stages, 1):
        if number > 1:
            before = plan.stages[number - 2]
            parts.append(_upscale(before, stage, each))
            if stage.sigmas and vae is not None:
                parts.append(_pixel_part("encode", vae.encode, stage))
        if stage.sigmas:
            parts.append(_sampling(f"stage {number} sample", stage, plan.step_tokens(number - 1), known))
            if vae is not None:
                parts.append(_pixel_part(f"stage {number} decode", vae.decode, stage))
    return tuple(parts)


def work_ratio(plan: StagedPlan, family: Family | None = None, *, upscaler: str | float | None = None) -> float:
    """Work of native sampling, decoding included, over that of all parts of a plan.

    Args:
        plan: The plan.
        family: Its family; None: the known one of its name.
        upscaler: As in `part_costs`.

    Returns:
        A ratio of FLOP; `plan.cost_ratio` for a family that is not in the table.

    Raises:
        MrFlowError: The upscaler's name is unknown.
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
    """The highest memory use of a run.

    Attributes:
        total: Bytes.
        name: The part that needs them.
        weights: Bytes of weights among them, of parts at work and of parts that wait.
        counted: Every part was counted; False: those of `uncounted_parts` are left out.
    """

    total: float
    name: str
    weights: float
    counted: bool


def peak_memory(
    plan: StagedPlan,
    family: Family | None = None,
    *,
    batch: int = 1,
    value_bytes: float = 2.0,
    weight_bytes: float | None = None,
    offload: bool | Offload = False,
    vae_tile: int | None = None,
    upscaler_tile: int | None = None,
) -> Peak | None:
    """The highest memory use on the device of a run.

    The network sees the whole batch at once, VAE and upscaler one image after the other. Text encoders are taken as
    gone; a network that some stage has in another precision is there twice. Workspaces and fragmentation, which no
    count sees, come on top: expect some 10 % more.

    Args:
        plan: The plan.
        family: Its family; None: the known one of its name.
        batch: Images that are made at once.
        value_bytes: Bytes per number of all parts: 2 in 16 bits, 4 in float32.
        weight_bytes: Bytes per weight of the network, where they differ: 1 in 8 bits, 0.55 in 4 with their scales.
        offload: "model" or True: only the part at work is kept on the device; "layers": only the layer at work, taken
            as a twentieth of its part; False: network, VAE and upscaler all are.
        vae_tile: Side in pixels of the VAE's tiles, of the image at work; None: whole images.
        upscaler_tile: Side in pixels of the upscaler's tiles, of the upscaled image; None: whole images.

    Returns:
        The part that needs most; None for a family that is not in the table.

    Raises:
        MrFlowError: A number is out of its range.
    """
    batch = checked_whole(batch, "batch", 1, _MAX_BATCH)
    value_bytes = checked_number(value_bytes, "value_bytes", 0, 8)
    known = FAMILIES.get(plan.family) if family is None else family
    parts = None if known is None else part_costs(plan, known)
    if known is None or parts is None:
        return None
    network, vae = known.network_cost, known.vae_cost
    weights = known.linear_cost / 2 if network is None else network.weights  # a multiply-add for each weight
    each = value_bytes if weight_bytes is None else weight_bytes
    twins = {stage.precision for stage in plan.stages} - {"own"}
    held = {
        "sample": weights * (each + sum(_TWIN_BYTES[name.partition("-")[0]] for name in twins)),
        "vae": value_bytes * vae.weights if vae else 0.0,
        "upscale": value_bytes * _UPSCALER_WEIGHTS[_usual_upscaler(plan, known)] if len(plan.stages) > 1 else 0.0,
    }
    latents = _LATENT_COPIES * 4 * known.latent_channels / known.vae_factor**2
    found: list[Peak] = []
    for part in parts:
        kind = "sample" if part.name.endswith("sample") else "upscale" if part.name == "upscale" else "vae"
        tile = {"sample": None, "upscale": upscaler_tile, "vae": vae_tile}[kind]
        pixels = part.pixels if tile is None else min(part.pixels, tile**2)
        alive = (part.alive or 0.0) * pixels / part.pixels * value_bytes / 2 * (batch if kind == "sample" else 1)
        # The images before and after a part in float32, and the latents beside them.
        kept = batch * part.pixels * (3 * 4 * 2 + (latents if kind == "sample" else 0.0))
        at_work = held[kind] * (_LAYER_SHARE if offload == "layers" else 1.0) if offload else sum(held.values())
        found.append(Peak(at_work + alive + kept, part.name, at_work, not uncounted_parts(known)))
    return max(found, key=lambda peak: peak.total)


def uncounted_parts(family: Family) -> tuple[str, ...]:
    """What `peak_memory` leaves out.

    Args:
        family: The family.

    Returns:
        Of "network", of which only the fewest weights that its FLOP allow are taken, and "VAE", those that were never
        counted; usually none.
    """
    network = () if family.network_cost is not None else ("network",)
    without = family.vae_cost is None and family.vae_factor > 1  # a family that works on pixels has no VAE
    return (*network, "VAE") if without else network


# ------------------------------------------------------------------------------------------------------------- seconds


@dataclass(frozen=True, slots=True)
class Speeds:
    """How fast a machine is.

    Attributes:
        network: Seconds per FLOP of the network.
        forward: Seconds that a forward of one image takes beside its FLOP.
        decode: Seconds per FLOP of the VAE's decoder.
        encode: Seconds per FLOP of the VAE's encoder.
        upscale: Seconds per FLOP of the upscaler.
        other: Seconds that a run takes beside its parts (text, noise, saving).
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
        """The speeds that one measured run of a staged plan shows.

        Two stages of different size separate what a FLOP costs from what a forward costs.

        Args:
            plan: The plan that was run, with two sampled stages of different size.
            seconds: Seconds by part, as `StagedResult.timings` or `mrflow compare` name them.
            family: The plan's family; None: the known one of its name.
            upscaler: As in `part_costs`.

        Returns:
            The machine's speeds, for `predict`.

        Raises:
            MrFlowError: A part is missing, a number is not from 0 to `MAX_SECONDS`, there is one size
                only, or the family or the upscaler is unknown.
        """
        parts = part_costs(plan, family, upscaler=upscaler)
        if parts is None:
            raise MrFlowError(
                f"the cost of family {plan.family} is unknown; give its Family, or measure with one of FAMILIES."
            )
        taken = {
            name: checked_number(value, f"seconds[{quoted(name)}]", 0, MAX_SECONDS) for name, value in seconds.items()
        }
        missing = [part.name for part in parts if part.name not in seconds]
        if missing:
            raise MrFlowError(f"seconds has no {missing[0]!r}; give every part of the plan that was run.")
        sampled = [part for part in parts if part.name.endswith("sample")]
        if len(sampled) != 2 or sampled[0].pixels == sampled[1].pixels:
            raise MrFlowError(
                f"seconds holds {len(sampled)} sampled stages; measure a plan of two stages of different size."
            )
        low, high = ((part.flop / part.calls, taken[part.name] / part.calls) for part in sampled)
        slope = max((high[1] - low[1]) / (high[0] - low[0]), 1e-30)
        named = {part.name for part in parts}

        def rate(kind: str) -> float:
            alike = [part for part in parts if part.name.endswith(kind) and part.flop > 0]
            work = sum(part.flop for part in alike)
            return sum(taken[part.name] for part in alike) / work if work else 0.0

        return cls(
            network=slope,
            forward=max(low[1] - slope * low[0], 0.0),
            decode=rate("decode"),
            encode=rate("encode"),
            upscale=rate("upscale"),
            other=sum(value for name, value in taken.items() if name not in named),
        )

    def predict(
        self, plan: StagedPlan, family: Family | None = None, *, upscaler: str | float | None = None
    ) -> tuple[tuple[str, float], ...]:
        """The run time of a plan on this machine.

        Args:
            plan: Any plan.
            family: Its family; None: the known one of its name.
            upscaler: As in `part_costs`.

        Returns:
            (part, seconds) in order, "other" at the end.

        Raises:
            MrFlowError: The family or the upscaler is unknown.
        """
        parts = part_costs(plan, family, upscaler=upscaler)
        if parts is None:
            raise MrFlowError(
                f"the cost of family {plan.family} is unknown; give its Family, or plan with one of FAMILIES."
            )
        rates = {"sample": self.network, "decode": self.decode, "encode": self.encode, "upscale": self.upscale}
        rows: list[tuple[str, float]] = []
        for part in parts:
            kind = part.name.split()[-1]
            fixed = self.forward * part.calls if kind == "sample" else 0.0
            rows.append((part.name, rates[kind] * part.flop + fixed))
        return (*rows, ("other", self.other))


# ------------------------------------------------------------------------------------------------------------- helpers


def _usual_upscaler(plan: StagedPlan, family: Family) -> str:
    return family.usual_upscaler if plan.upscaler_kind == "network" else "lanczos"


def _upscaler_flop(upscaler: str | float) -> float:
    if isinstance(upscaler, str):
        if upscaler not in UPSCALER_FLOP:
            known = ", ".join(UPSCALER_FLOP)
            raise MrFlowError(f"upscaler must be one of {known}, or FLOP per pixel, got {quoted(upscaler)}.")
        return UPSCALER_FLOP[upscaler]
    return checked_number(upscaler, "upscaler", 0, _MAX_UPSCALER_FLOP)


def _sampling(name: str, stage: Stage, seen: Sequence[Sequence[int]], family: Family) -> PartCost:
    """`seen` holds the tokens of each forward, for each step or for all of them."""
    network = family.network_cost
    alive = None if network is None else network.alive * (max(map(max, seen)) + family.text_tokens)
    flop = stage.forwards * sum(sum(map(family.forward_cost, each)) for each in seen) / len(seen)
    return PartCost(name, stage.forwards * len(seen[0]), flop, stage.width * stage.height, alive)


def _pixel_part(name: str, part: PixelCost, stage: Stage) -> PartCost:
    pixels = stage.width * stage.height
    return PartCost(name, 1, part.flop(pixels), pixels, part.alive * pixels)


def _upscale(before: Stage, after: Stage, each: float) -> PartCost:
    made = after.width * after.height
    return PartCost("upscale", 1, each * before.width * before.height, made, _UPSCALER_ALIVE * made if each else 0.0)
