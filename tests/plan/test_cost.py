"""The cost model: parts, ratios, memory, and seconds foretold from one measured run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mrflow_sched import FAMILIES, get_family, make_native_plan, make_plan
from mrflow_sched.plan.cost import UPSCALER_FLOP, Speeds, part_costs, peak_memory, work_ratio

NAMES = ["stage 1 sample", "stage 1 decode", "upscale", "encode", "stage 2 sample", "stage 2 decode"]


def costs(plan, **more):
    parts = part_costs(plan, **more)
    assert parts is not None
    return parts


def test_parts_are_those_of_a_run_in_its_order() -> None:
    assert [part.name for part in costs(make_plan("flux1-dev", 1024, 1024))] == NAMES
    unrefined = costs(make_plan("flux1-dev", 1024, 1024, refine_steps=0))
    assert [part.name for part in unrefined] == NAMES[:3]
    three = costs(make_plan("flux1-dev", 2048, 2048, stages=3))
    assert [part.name for part in three] == [*NAMES, "upscale", "encode", "stage 3 sample", "stage 3 decode"]
    assert [part.name for part in costs(make_native_plan("flux1-dev", 1024, 1024))] == [
        "stage 1 sample",
        "stage 1 decode",
    ]


def test_flux_at_12_and_1_costs_what_its_arithmetic_says() -> None:
    """On the real classes: 21.50 and 74.38 TFLOP a forward, decoding 2.51 and 10.47, upscale 2.35, encode 4.88."""
    plan = make_plan("flux1-dev", 1024, 1024)
    found = {part.name: part.flop / 1e12 for part in costs(plan)}
    expected = (12 * 21.5026, 2.51497, 2.35039, 4.88257, 74.3847, 10.4722)
    assert [found[name] for name in NAMES] == [pytest.approx(value, rel=2e-3) for value in expected]
    assert work_ratio(plan) == pytest.approx((50 * 74.3847 + 10.4722) / sum(expected), rel=2e-3)
    assert work_ratio(plan) == pytest.approx(10.58, abs=0.02)
    assert work_ratio(plan, upscaler="lanczos") > work_ratio(plan) > work_ratio(plan, upscaler="x4")
    assert work_ratio(plan, upscaler=UPSCALER_FLOP["x2"]) == work_ratio(plan)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_has_its_parts_and_a_ratio_below_that_of_the_network(name: str) -> None:
    family = get_family(name)
    plan = make_plan(family, *(family.default_size or family.native_size))
    assert costs(plan)
    assert 0.3 * plan.cost_ratio < work_ratio(plan) < plan.cost_ratio


def test_a_family_of_ones_own_is_priced_by_what_it_says() -> None:
    mine = replace(get_family("flux1-dev"), name="mine", linear_cost=1e9, attention_cost=0.0)
    plan = make_plan(mine, 1024, 1024)
    assert part_costs(plan) is None
    assert work_ratio(plan) == plan.cost_ratio
    assert peak_memory(plan) is None
    parts = costs(plan, family=mine)
    assert parts[0].flop == pytest.approx(12 * 1e9 * (1024 + 512))


def test_an_unknown_upscaler_gets_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"one of x2, x4, demo, lanczos, or FLOP per pixel, got 'x9'"):
        part_costs(make_plan("flux1-dev", 1024, 1024), upscaler="x9")


# -------------------------------------------------------------------------------------------------------------- memory


def test_memory_is_weights_and_the_largest_part() -> None:
    plan = make_plan("flux1-dev", 1024, 1024)
    peak = peak_memory(plan)
    assert peak is not None
    assert peak.name == "stage 2 decode"
    assert peak.weights == pytest.approx(2 * (1.19e10 + 8.38e7 + 1.67e7))
    assert peak.total / 2**30 == pytest.approx(23.9, abs=0.2)
    eight = peak_memory(plan, weight_bytes=1.0)
    assert eight is not None
    assert peak.total - eight.total == pytest.approx(1.19e10)


def test_the_images_before_and_after_a_part_are_kept_in_float32() -> None:
    """FLUX.1 at 1024x1024: 16-bit weights, 1537 bytes a pixel in the decoder, two images of 3 x 4 bytes a pixel."""
    plan, pixels = make_plan("flux1-dev", 1024, 1024), 1024**2
    weights = 2 * (1.19e10 + 8.38e7 + 1.67e7)
    for batch in (1, 3):
        peak = peak_memory(plan, batch=batch)
        assert peak is not None
        assert (peak.name, peak.total) == ("stage 2 decode", pytest.approx(weights + (1537 + 24 * batch) * pixels))


def test_memory_of_a_tiled_stage_is_that_of_one_tile() -> None:
    """All tiles of a stage have one size, also where they overlap more than they must."""
    plan = make_plan("flux1-dev", 2048, 1152, tile=1024)
    assert plan.tile_tokens(1) == (4096,) * 6
    sampled = next(part for part in costs(plan) if part.name == "stage 2 sample")
    assert sampled.alive == pytest.approx(1.059e5 * (4096 + 512))


def test_offload_tiles_and_batch_change_what_they_should() -> None:
    plan = make_plan("flux1-dev", 4096, 4096, stages=4)

    def gib(**options) -> float:
        peak = peak_memory(plan, **options)
        assert peak is not None
        return peak.total / 2**30

    assert gib() > gib(vae_tile=1024) > gib(offload=True, vae_tile=1024) > gib(weight_bytes=1, vae_tile=1024)
    assert gib() > gib(offload=True)
    few = {"offload": True, "vae_tile": 1024, "weight_bytes": 1.0, "upscaler_tile": 512}
    assert gib(**few, batch=2) > gib(**few)
    whole, tiled = (peak_memory(make_plan("flux1-dev", 4096, 4096, stages=4, tile=tile), **few) for tile in (0, 1024))
    assert whole is not None
    assert tiled is not None
    assert whole.total > tiled.total


# ------------------------------------------------------------------------------------------------------------- seconds


def machine(plan, upscaler=None) -> dict[str, float]:
    """Seconds on a machine whose rates we know."""
    rates = {"sample": 2e-13, "decode": 4e-13, "encode": 5e-13, "upscale": 3e-13}
    made = {}
    for part in costs(plan, upscaler=upscaler):
        kind = part.name.split()[-1]
        made[part.name] = rates[kind] * part.flop + (0.004 * part.calls if kind == "sample" else 0.0)
    return made


def test_one_run_foretells_others_of_other_steps_and_sizes() -> None:
    measured = make_plan("flux1-dev", 1024, 1024)
    speeds = Speeds.measured(measured, {**machine(measured), "text": 0.2, "noise": 0.05})
    assert (speeds.forward, speeds.other) == (pytest.approx(0.004), pytest.approx(0.25))
    for plan in (
        make_plan("flux1-dev", 1024, 1024, low_steps=6, refine_steps=2),
        make_plan("flux1-dev", 1536, 1024),
        make_native_plan("flux1-dev", 1024, 1024),
    ):
        told = dict(speeds.predict(plan))
        assert told.pop("other") == pytest.approx(0.25)
        assert told == pytest.approx(machine(plan))
    three = speeds.predict(make_plan("flux1-dev", 2048, 2048, stages=3))
    assert [name for name, _ in three].count("upscale") == 2


def test_what_cannot_be_learnt_from_gets_one_sentence() -> None:
    plan = make_plan("flux1-dev", 1024, 1024)
    seconds = machine(plan)
    del seconds["encode"]
    with pytest.raises(ValueError, match="seconds has no 'encode'"):
        Speeds.measured(plan, seconds)
    native = make_native_plan("flux1-dev", 1024, 1024)
    with pytest.raises(ValueError, match="holds 1 sampled stages; measure a plan of two stages"):
        Speeds.measured(native, machine(native))
    mine = make_plan(replace(get_family("flux1-dev"), name="mine"), 1024, 1024)
    with pytest.raises(ValueError, match="the cost of family mine is unknown"):
        Speeds.measured(mine, {})
