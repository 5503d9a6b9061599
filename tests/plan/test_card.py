"""Offload and tiles for a card of a given size: the least harm that fits, and the count that it is chosen by."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mrflow_sched import FAMILIES, get_family, make_plan
from mrflow_sched.plan.card import CUT, SPARE, fit_card
from mrflow_sched.plan.cost import peak_memory

GIB = 2**30


@pytest.mark.parametrize("side", [1024, 2048, 4096])
@pytest.mark.parametrize("gigabytes", [8, 12, 16, 24])
@pytest.mark.parametrize("name", ["flux1-dev", "qwen-image", "z-image", "sd35", "sdxl"])
def test_what_is_chosen_fits_by_the_count(name: str, gigabytes: int, side: int) -> None:
    fitted = fit_card(make_plan(name, side, side), gigabytes)
    assert fitted.fits
    vae, upscaler = fitted.vae_tile, fitted.upscaler_tile
    peak = peak_memory(fitted.plan, offload=fitted.offload or False, vae_tile=vae, upscaler_tile=upscaler)
    assert peak is not None
    assert peak == fitted.peak
    assert peak.total * SPARE <= gigabytes * GIB
    assert f"card of {gigabytes} GB" in fitted.sentence


def test_nothing_is_done_that_is_not_needed() -> None:
    plan = make_plan("z-image", 4096, 4096)
    roomy = fit_card(plan, 1000)
    assert (roomy.plan, roomy.offload, roomy.vae_tile, roomy.upscaler_tile) == (plan, None, None, None)
    assert "all parts stay on it: about" in roomy.sentence
    peak = peak_memory(plan, vae_tile=CUT)
    assert peak is not None
    just = fit_card(plan, peak.total * SPARE / GIB)
    assert (just.plan.tile, just.offload, just.vae_tile) == (0, None, CUT)
    small = fit_card(plan, 16)  # its network in 16 bits fits only where attention sees tiles
    assert (small.plan.tile, small.plan.tile_positions) == (1024, "whole")
    assert "network in tiles of 1024" in small.sentence
    layers = fit_card(plan, 8)
    assert layers.offload == "layers"
    assert "which is slow" in layers.sentence


def test_a_tile_of_the_plan_and_a_plan_that_must_stay_are_kept() -> None:
    assert fit_card(make_plan("flux1-dev", 4096, 4096, tile=1536), 8).plan.tile == 1536
    assert fit_card(make_plan("flux1-dev", 4096, 4096), 8, tiles=False).plan.tile == 0


def test_what_cannot_fit_says_the_least() -> None:
    plan = make_plan("flux1-dev", 4096, 4096)
    for offloads in (True, False):
        least = fit_card(plan, 0.5, offloads=offloads)
        assert not least.fits
        assert least.sentence.startswith("The run does not fit on a card of 0.5 GB; the least is this: ")
        assert (least.offload == "layers") is offloads


def test_layers_need_less_than_parts_and_parts_less_than_all() -> None:
    plan = make_plan("flux1-dev", 1024, 1024)
    totals = [peak.total for kind in (False, True, "layers") if (peak := peak_memory(plan, offload=kind))]  # type: ignore[arg-type]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 3
    assert peak_memory(plan, offload=True) == peak_memory(plan, offload="model")


@pytest.mark.parametrize(
    ("name", "tile", "vae_tile", "without"),
    [
        ("lumina2", 1024, None, "what the network needs beside its weights"),
        ("qwen-image-2.1", 0, CUT, "what the network needs beside its weights and the VAE"),
        ("wan", 832, CUT, "what the network needs beside its weights and the VAE"),
        ("prx-pixel", 1024, None, "what the network needs beside its weights"),  # it has no VAE
        ("flux1-dev", 0, None, ""),
    ],
)
def test_what_was_not_counted_is_cut_into_tiles_and_named(
    name: str, tile: int, vae_tile: int | None, without: str
) -> None:
    fitted = fit_card(make_plan(name, 4096, 4096), 1000)
    assert fitted.fits
    assert (fitted.plan.tile, fitted.vae_tile) == (tile, vae_tile)
    assert bool(fitted.uncounted) is bool(without) is not fitted.peak.counted
    assert ("at least" in fitted.sentence) is bool(without)
    verb = "were" if " and " in without else "was"
    end = f", without {without}, which {verb} not counted for {FAMILIES[name].title}."
    assert fitted.sentence.endswith(end) is bool(without)
    native = fit_card(make_plan(name, *FAMILIES[name].native_size), 1000)
    assert (native.plan.tile, native.vae_tile) == (0, vae_tile)
    assert fit_card(make_plan(name, 4096, 4096), 1000, tiles=False).plan.tile == 0


def test_bad_numbers_get_one_sentence() -> None:
    plan = make_plan("flux1-dev", 1024, 1024)
    for bad in (-1, 0, 0.04, float("nan"), "12", None):
        with pytest.raises(ValueError, match=r"^gigabytes must be a number from 0\.05"):
            fit_card(plan, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whose cost is unknown"):
        fit_card(replace(plan, family="mine"), 12)
    assert fit_card(replace(plan, family="mine"), 48, get_family("flux1-dev")).fits
