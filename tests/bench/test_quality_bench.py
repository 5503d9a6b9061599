"""bench/quality: its metrics answer as their definitions say, and its ways are what they are called."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bench.quality.__main__ as command
from bench.command import SIDES
from bench.quality import cached, guided, ideas, judge, kinds, metrics, report, scores, sweeps, ways
from mrflow_sched import make_plan
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.demo.scenes import CATEGORIES
from mrflow_sched.plan.families import get_family

UNUSED: Any = None


@pytest.fixture(scope="module")
def truth() -> scores.Truth:
    scenes = command.scenes_of(4)
    return scores.Truth(scenes, command.rendered(scenes, 256))


def blurred(pictures: Tensor) -> Tensor:
    half = torch.nn.functional.interpolate(pictures, scale_factor=0.5, mode="area")
    return torch.nn.functional.interpolate(half, scale_factor=2.0, mode="bicubic").clamp(0, 1)


def test_pictures_are_nearest_to_themselves(truth: Any) -> None:
    true = truth.true.pictures
    soft = blurred(true)
    assert torch.allclose(metrics.ssim(true, true), torch.ones(len(true)))
    assert bool((metrics.ssim(soft, true) < 0.999).all())
    maps = judge.maps(true)
    assert float(metrics.perceptual(maps, maps).max()) == 0
    assert float(metrics.perceptual(judge.maps(soft), maps).min()) > 0
    grey = torch.full((1, 3, 8, 8), 0.5)
    assert metrics.colour(grey).tolist() == [[0.5, 0.5, 0.5, 0.0]]


def test_ssim_is_that_of_its_authors_formula() -> None:
    """For two plain pictures only the brightness term is left: (2ab + c1) / (a² + b² + c1)."""
    a, b = torch.full((1, 3, 16, 16), 0.3), torch.full((1, 3, 16, 16), 0.6)
    expected = (2 * 0.3 * 0.6 + 1e-4) / (0.3**2 + 0.6**2 + 1e-4)
    assert float(metrics.ssim(a, b)) == pytest.approx(expected, abs=1e-4)


def test_the_pyramid_adds_up_and_bands_are_where_they_belong() -> None:
    x = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    bands = metrics.pyramid(x)
    assert [band.shape[-1] for band in bands] == [64, 32, 16, 8]
    image = bands[-1]
    for band in reversed(bands[:-1]):
        image = band + torch.nn.functional.interpolate(image, band.shape[-2:], mode="bilinear", align_corners=False)
    assert torch.allclose(image, x, atol=1e-6)


def test_what_a_blur_takes_is_the_finest_level(truth: Any) -> None:
    same = metrics.sliced_wasserstein(truth.true.projected, truth.true.projected)
    assert same.tolist() == [0.0] * metrics.LEVELS
    soft = truth.measure(blurred(truth.true.pictures))
    levels = metrics.sliced_wasserstein(soft.projected, truth.true.projected)
    assert levels[0] > 2 * levels[1] > 0
    assert metrics.spectrum_distance(truth.true.spectrum, truth.true.spectrum) == 0
    assert metrics.spectrum_distance(soft.spectrum, truth.true.spectrum) > 3


def test_frechet_is_the_distance_of_gaussians() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((4000, 3), generator=generator, dtype=torch.float64)
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-9)
    moved = 2 * x + torch.tensor([1.0, 0.0, -2.0])
    # |m|² + (2 - 1)² in each of three directions, up to the sample's own moments.
    assert metrics.frechet(moved, x) == pytest.approx(5 + 3, rel=0.1)


def test_a_flat_spectrum_is_flat_and_a_wave_is_one_ring() -> None:
    noise = torch.rand((64, 3, 64, 64), generator=torch.Generator().manual_seed(2))
    power = metrics.spectrum(noise).mean(0)
    assert float(power[2:].std() / power[2:].mean()) < 0.1
    axis = torch.arange(64) / 64
    wave = torch.sin(2 * torch.pi * 16 * axis).expand(1, 3, 64, 64)  # half of the Nyquist limit
    assert int(metrics.spectrum(wave).argmax()) == metrics.BANDS // 2


def test_resamples_stay_within_their_groups_and_repeat() -> None:
    groups = [[0, 1, 2], [3, 4, 5, 6]]
    drawn = metrics.resamples(5, 7, groups)
    for rows in drawn:
        assert (sum(row < 3 for row in rows.tolist()), len(rows)) == (3, 7)
    assert all(torch.equal(a, b) for a, b in zip(drawn, metrics.resamples(5, 7, groups), strict=True))
    assert metrics.interval(list(range(101))) == pytest.approx((2.5, 97.5))


def test_the_judge_reads_true_scenes_and_no_others(truth: Any) -> None:
    found = truth.groups(truth.true)
    assert truth.parts(truth.true)["attributes"] > 0.97
    assert min(found.values()) > 0.85  # of few scenes
    turned = truth.measure(truth.true.pictures.flip(0))
    assert truth.parts(turned)["attributes"] < 0.7
    heights = truth.letters_by_height(truth.true)
    assert set(heights) <= {32, 46}
    assert min(heights.values()) >= 0.9


def test_the_composite_is_one_for_the_truth_and_falls_with_every_fault(truth: Any) -> None:
    assert sum(scores.WEIGHTS.values()) == pytest.approx(1)
    best = truth.parts(truth.true)
    assert best["composite"] > 0.97
    assert (best["local structure"], best["spectrum"]) == (1.0, 1.0)
    assert best["look"] == pytest.approx(1, abs=1e-4)
    true = truth.true.pictures
    soft = truth.parts(truth.measure(blurred(true)))
    blank = truth.parts(truth.measure(true.mean((2, 3), keepdim=True).expand_as(true)))
    assert best["composite"] > soft["composite"] > blank["composite"]
    assert blank["local structure"] == pytest.approx(0, abs=0.02)
    assert blank["spectrum"] < 0  # nothing is clipped
    smooth = truth.rows_of("smooth")
    assert "letters" not in truth.parts(truth.true, smooth)
    assert truth.parts(truth.true, smooth)["composite"] > 0.97


def test_intervals_hold_the_value_and_a_gap_of_nothing_is_nothing(truth: Any) -> None:
    soft = truth.measure(blurred(truth.true.pictures))
    groups = [truth.rows_of(category).tolist() for category in CATEGORIES]
    samples = metrics.resamples(20, len(truth.scenes), groups)
    found = scores.compared(truth, {"true": truth.true, "soft": soft}, "true", samples)
    assert found["true"]["to base, interval"] == (0.0, 0.0)
    low, high = found["soft"]["to base, interval"]
    assert low <= found["soft"]["to base"] + 0.02
    assert high < 0


def test_hires_fix_starts_where_webuis_start() -> None:
    """0.12 on FLUX's full-size shift is 0.301 with twelve steps and 0.311 with one, as seen on real hosts."""
    assert ways.host_mu() == pytest.approx(1.15)
    names = [ways.hires_fix(256, 12, steps, 0.12, latent=False).name for steps in (12, 1)]
    assert ["sigma 0.30" in names[0], "sigma 0.31" in names[1]] == [True, True]


def test_costs_are_in_forwards_at_the_final_size() -> None:
    assert ways.native(256, 20).cost == pytest.approx(20)
    share = (ways.staged(256).cost - 1) / 12
    assert 0.15 < share < 0.25
    assert ways.hires_fix(256, 12, 4, 0.5, latent=True).cost == pytest.approx(12 * share + 4)
    assert ways.midway(256, 12, 8, 2).cost == pytest.approx(8 * share + 2)
    every = ways.equal_cost(256)
    assert len({way.name for way in every}) == len(every) > 20
    swept = [way for sweep in sweeps.SWEEPS.values() for way in sweep.ways(256)]
    assert len(swept) > 40


@pytest.mark.parametrize("kind", ["hires pixel", "hires latent", "midway", "staged", "reference"])
def test_a_way_makes_pictures_of_the_size(kind: str) -> None:
    made = {
        "hires pixel": lambda: ways.hires_fix(128, 1, 1, 0.5, latent=False),
        "hires latent": lambda: ways.hires_fix(128, 1, 1, 0.5, latent=True),
        "midway": lambda: ways.midway(128, 2, 1, 1),
        "staged": lambda: ways.staged(128, low_steps=1),
        "reference": lambda: ways.staged(128, low_steps=1, upscaler="reference", posterior="sample"),
    }[kind]()
    result = made.make(ways.Model.load(128), ["a smooth pink sky over blue waves with a sun on the left"], [3])
    assert result.images.shape == (1, 3, 128, 128)
    assert float(result.images.std()) > 0.01
    if kind in ("staged", "reference"):
        assert result.low is not None
        assert result.upscaled is not None
        assert (result.low.shape[-1], result.upscaled.shape[-1]) == (64, 128)


PROMPTS = ["the word MAGIC in white letters on a blue wall", "a smooth pink sky over blue waves with a sun on the left"]


@pytest.fixture(scope="module")
def small() -> Any:
    return ways.Model.load(128)


@pytest.fixture(scope="module")
def plain(small: Any) -> Any:
    return ideas.opened(128, "plain").make(small, PROMPTS, [3, 8])


def test_the_staged_way_laid_open_is_the_staged_way(small: Any, plain: Any) -> None:
    staged = ways.staged(128).make(small, PROMPTS, [3, 8])
    assert torch.equal(plain.images, staged.images)
    same = ideas.Parts(sigma=lambda model, low: torch.full((len(low),), 0.6))
    again = ideas.opened(128, "same", same).make(small, PROMPTS, [3, 8])
    assert torch.allclose(again.images, plain.images, atol=1e-5)


def test_guidance_by_two_forwards_is_what_it_says(small: Any) -> None:
    engine = small.engine
    if "true_cfg_scale" not in inspect.signature(type(engine.pipe).__call__).parameters:
        with pytest.raises(MrFlowError, match=r"FluxPipeline of the installed diffusers has no true_cfg_scale"):
            guided.guided_by_two(engine)
        return
    both = guided.guided_by_two(engine)
    assert (engine.family.guidance_kind, both.family.guidance_kind) == ("embedded", "cfg")
    x, sigma = torch.randn((1, *engine.latent_shape(64, 64)), generator=torch.Generator().manual_seed(0)), torch.ones(1)
    pair, alone, empty = both.encode_text(PROMPTS[:1], [""]), engine.encode_text(PROMPTS[:1]), engine.encode_text([""])
    first, second = (engine.denoise(x, sigma, text, guidance=1.0) for text in (alone, empty))
    wanted = second + 3 * (first - second)
    near = 0.02 * float(wanted.abs().max())  # where the network runs in bfloat16
    assert float((first - second).abs().max()) > 5 * near
    assert torch.allclose(both.denoise(x, sigma, pair, guidance=3.0), wanted, rtol=0, atol=near)
    assert torch.equal(both.denoise(x, sigma, pair, guidance=1.0), first)
    off, half, on = (
        guided.guided(128, name, **numbers)
        for name, numbers in (
            ("off", {"guidance": 1.0}),
            ("half", {"guidance_interval": (0.5, 1.0)}),
            ("on", {}),
        )
    )
    assert off.cost < half.cost < on.cost == pytest.approx(2 * off.cost)
    made = half.make(small, PROMPTS, [3, 8])
    assert made.images.shape == (2, 3, 128, 128)


def test_step_caching_leaves_out_blocks_of_stage_1(small: Any, plain: Any) -> None:
    import diffusers

    if not hasattr(diffusers, "FirstBlockCacheConfig"):
        pytest.skip("the installed diffusers has no first-block cache")
    whole, none = (cached.cached(128, threshold) for threshold in (0.0, 1e9))
    assert whole.cost == none.cost == ways.staged(128).cost
    same, coarse = (way.make(small, PROMPTS, [3, 8]).images for way in (whole, none))
    assert float((same - plain.images).abs().mean()) < 0.004  # they round at other places
    assert float((coarse - same).abs().mean()) > 0.01


def test_nested_noise_is_white_and_the_final_noise_made_coarse() -> None:
    noise = ideas.nested_noise(UNUSED, range(4), (16, 32, 32))
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    from mrflow_sched.sampling.noise import draw_noise

    large = draw_noise((16, 64, 64), range(4))
    coarse = torch.nn.functional.interpolate(large, scale_factor=0.5, mode="area")
    assert torch.allclose(noise, 2 * coarse, atol=1e-6)
    # The refine stage's seeds are one above stage 1's.
    assert torch.equal(ideas.native_noise(UNUSED, [6], (16, 64, 64)), draw_noise((16, 64, 64), [5]))


def test_every_picture_gets_its_own_sigma_and_a_flat_one_the_least(small: Any) -> None:
    flat = torch.full((1, 3, 64, 64), 0.5)
    busy = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    levels = ideas.sigma_of_error(small, torch.cat([flat, busy]))
    assert 0.0499 < float(levels[0]) < float(levels[1]) < 0.6001


def test_colour_guards_bring_back_the_low_pictures_colours(plain: Any) -> None:
    shifted = (plain.images * 0.9 + 0.05).clamp(0, 1)
    means = plain.low.mean((2, 3))
    for guard in (ideas.whole_colours, ideas.local_colours):
        before = (shifted.mean((2, 3)) - means).abs().mean()
        after = (guard(plain.low, plain.upscaled, shifted).mean((2, 3)) - means).abs().mean()
        assert after < 0.2 * before


def test_what_does_not_vary_is_not_refined() -> None:
    upscaled = torch.full((1, 3, 64, 64), 0.5)
    upscaled[..., 32:, :] = torch.rand((1, 3, 32, 64), generator=torch.Generator().manual_seed(1))
    refined = upscaled + 0.1
    kept = ideas.where_it_varies(upscaled, upscaled, refined)
    assert torch.equal(kept[..., :24, :], upscaled[..., :24, :])
    assert torch.allclose(kept[..., 44:, :], refined[..., 44:, :])


def test_corrections_bring_upscaled_latents_nearer_to_the_scenes(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ideas, "FITTED_ON", 8)
    made, true = ideas._pairs(small)
    plain = (made - true).square().mean()
    one, three = ((ideas.least_squares(side)(small, made) - true).square().mean() for side in (1, 3))
    assert plain > one > three
    power = [each.square().mean((0, 2, 3)) for each in (made, true, ideas.same_power(small, made))]
    assert float((power[2] / power[1]).log().abs().mean()) < float((power[0] / power[1]).log().abs().mean())
    detail = [ideas.band_power(each, 2) for each in (made, true, ideas.same_detail(small, made))]
    assert detail[2][0] == pytest.approx(detail[0][0], rel=1e-3)
    assert detail[2][1] == pytest.approx(detail[1][1], rel=0.02)


def test_ideas_are_compared_with_the_upscaler_that_is_asked_for(small: Any, plain: Any) -> None:
    asked = ideas.upscaled_by("Lanczos", ways.staged(128)).make(small, PROMPTS, [3, 8])
    assert torch.equal(asked.images, ways.staged(128, upscaler="Lanczos").make(small, PROMPTS, [3, 8]).images)
    assert not torch.equal(asked.images, plain.images)
    every = ideas.compared(256, "Lanczos")
    assert [way.name for way in every[:2]] == ["staged 12+1", "native 20 multistep"]
    assert [way.name for way in every[2:]] == [way.name for way in ideas.ideas(256)]


def test_all_ideas_have_names_and_costs_near_12_and_1() -> None:
    tried = ideas.ideas(256)
    assert len({way.name for way in tried}) == len(tried) > 12
    plain = ways.staged(256).cost
    assert all(way.cost <= 2.5 * plain for way in tried)


def a_row(kind: str, cost: float, composite: float, letters: float, low: float, high: float) -> dict[str, Any]:
    return {
        "kind": kind,
        "cost": cost,
        "composite": composite,
        "accuracy": composite,
        "to base": composite - 0.97,
        "to base, interval": (low, high),
        "letters by height": {18: 0.1, 32: letters},
        "colour drift": {"low to final": {"mean": -0.5}},
    }


def test_goals_are_met_or_missed_as_the_numbers_say() -> None:
    record = {
        "base": "native 50",
        "size": 256,
        "ways": {
            "native 50": a_row("native", 50, 0.97, 0.9, 0, 0),
            "staged 12+1": a_row("staged", 3.3, 0.965, 0.88, -0.02, 0.01),
            "staged 20+1": a_row("staged", 4.8, 0.971, 0.9, -0.01, 0.01),
            "hires": a_row("hires fix", 3.3, 0.96, 0.9, 0, 0),
            "midway": a_row("midway", 3.2, 0.95, 0.9, 0, 0),
        },
    }
    rows = report.goals(record)
    assert [met for _, _, met in rows] == [True, True, True, False, True, True]
    assert rows[3][1] == "not better than midway"  # nothing of ours costs as little
    assert "18 px" not in rows[4][1]
    record["ways"]["staged 12+1"] = a_row("staged", 3.3, 0.95, 0.8, -0.03, -0.01)
    record["ways"]["staged 12+1"]["colour drift"]["low to final"]["mean"] = 1.2
    record["ways"]["staged 20+1"] = a_row("staged", 4.8, 0.95, 0.9, -0.03, -0.01)
    record["ways"]["native 50"]["accuracy"] = 0.9
    assert not any(met for _, _, met in report.goals(record))


def test_the_worst_pictures_come_first(truth: Any) -> None:
    spoilt = truth.true.pictures.clone()
    spoilt[[3, 9]] = 0.5
    assert set(scores.worst(truth.measure(spoilt), truth.true)[:2]) == {3, 9}


def test_what_a_run_needs_is_looked_for_before_the_first_picture(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "measure", lambda *_, **__: pytest.fail("a picture was made"))
    with pytest.raises(SystemExit):
        command.main(["--quick", "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert "matplotlib, which is not installed" in said
    assert "mrflow-sched[dev]" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--size 0", "--size: must be a multiple of 8 from 64 to 512, a size of the embedded model, got '0'."),
        ("--size 100", "multiple of 8 from 64 to 512"),
        ("--size ten", "multiple of 8 from 64 to 512"),
        ("--kinds --ideas", "--ideas: not allowed with argument --kinds"),
        ("--kinds --sweep sigma", "--sweep: not allowed with argument --kinds"),
        ("--ideas --only staged*", "leave it out here."),
        ("--quick --only staged*", "leave it out here."),
        ("--only nothing", "is no way; choose from native 50; native 20; "),
        ("--resamples 1", "--resamples must be 2 or more, got 1."),
        ("--scenes 0", "--scenes must be 1 or more, got 0."),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_sentence(words: str, said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(words.split())
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_every_size_of_the_bench_has_two_stages_on_the_grid() -> None:
    assert SIDES.step == get_family("demo").grid
    for size in SIDES:
        stages = make_plan("demo", size, size, "12+1").stages
        assert [stage.width for stage in stages][1:] == [size]


def test_ctrl_c_leaves_the_record_of_what_was_measured() -> None:
    asked = [ways.native(64, 1), ways.native(64, 2), ways.staged(64, low_steps=1)]
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        if line.startswith("native 2"):
            raise KeyboardInterrupt

    record, pictures = command.measure(asked, "native 1", size=64, each=1, count=3, tell=tell)
    assert list(record["ways"]) == list(pictures)[1:] == ["native 1", "native 2"]
    assert record["not measured"] == ["staged 1+1"]
    json.dumps(record, allow_nan=False)
    assert "Stopped by Ctrl-C, not measured: staged 1+1." in report.to_markdown(record)
    assert said[-1].startswith("Stopped by Ctrl-C: the record is made of what was measured before")
    with pytest.raises(KeyboardInterrupt):
        command.measure(asked, "staged 1+1", size=64, each=1, count=3, tell=tell)


def test_the_command_writes_tables_a_plot_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    pair = [ways.native(64, 1), ways.native(64, 2), ways.staged(64, low_steps=1)]
    monkeypatch.setattr(report, "OURS", "staged 1+1")
    record, pictures = command.measure(pair, "native 1", size=64, each=1, count=3, tell=lambda line: None)
    text = report.to_markdown(record)
    assert text.startswith("**Could tell its known pairs apart: no: 10 scenes are too few: give at least 12.")
    assert "to native 1 (95 %)" not in text
    trusted = {**record, "known": {**record["known"], "could tell": True}}
    assert "to native 1 (95 %)" in report.to_markdown(trusted)
    assert "| all together |" in report.to_markdown(trusted)
    assert list(record["by kind"]) == list(kinds.KINDS)
    # A kind of one scene has a difference and no interval.
    assert {row["to base, interval"] for row in record["by kind"].values()} == {None}
    assert "nan" not in text
    json.dumps(record, allow_nan=False)
    assert "same noise" not in record["ways"]["staged 1+1"]
    same, far = (record["ways"][name]["same noise"] for name in ("native 2", "native 1"))
    assert (same["flips"], same["median psnr"]) == (0.0, 100.0)
    assert far["median psnr"] < 60
    report.plot(record, tmp_path / "plot.png")
    report.plot(record, tmp_path / "sweep.png", sweep=True)
    report.sheet(record, pictures, kinds.all_scenes(1), tmp_path / "sheet.png")
    report.sweeps_plot({"one": ("Which?", record), "two": ("And?", record)}, tmp_path / "sweeps.png")
    for name in ("plot", "sweep", "sheet", "sweeps"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    drift = record["ways"]["staged 1+1"]["colour drift"]
    assert set(drift) == {"low to upscaled", "upscaled to round trip", "round trip to final", "low to final"}
    assert np.isfinite(record["ways"]["staged 1+1"]["psnr of the layout"])
