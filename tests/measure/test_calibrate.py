"""Calibration: the spectra, the bounds and the choice; the command; the entry that plans read."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mrflow_sched import demo, get_family, make_plan
from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched.apps.cli import main as cli
from mrflow_sched.apps.cli.calibrate import lower_note
from mrflow_sched.engines.analytic import GaussianFieldEngine
from mrflow_sched.measure.calibrate import (
    NEAR_DB,
    Calibration,
    SweepRow,
    band_power,
    bound,
    calibrate,
    choose,
    fewest_steps,
    local_power,
    unfold_patches,
)

FIELD = GaussianFieldEngine(
    family=replace(GaussianFieldEngine().family, vae_factor=1, patch=8, grid=8, latent_channels=3), contrast=0.05
)
SAMPLE = Calibration(
    family="demo",
    upscaler="x2",
    width=256,
    height=256,
    factor=2.0,
    pictures=2,
    clean_power=0.3,
    error_power=0.03,
    error_power_low=0.06,
    bound=0.354,
    error_bound=0.148,
    sweep=(SweepRow(0.12, 1, -0.5, 30.0), SweepRow(0.15, 1, 0.1, 29.5)),
    low_steps_distance=(("euler", 20, 0.06), ("multistep", 12, 0.05)),
    sigma=0.15,
    low_steps=11,
    refine_steps=1,
)


# -------------------------------------------------------------------------------------------------------------- numbers


def test_white_noise_has_power_one_in_both_bands() -> None:
    noise = torch.randn((8, 4, 64, 48), generator=torch.Generator().manual_seed(0))
    for factor in (1.5, 2.0, 4.0):
        assert band_power(noise, factor) == pytest.approx((1, 1), rel=0.05)
    assert band_power(3 * noise, 2.0) == pytest.approx((9, 9), rel=0.05)


@pytest.mark.parametrize(("waves", "band"), [(7, 0), (15, 0), (16, 1), (20, 1), (32, 1)])
def test_a_wave_counts_in_the_band_that_it_lies_in(waves: int, band: int) -> None:
    """Of 64 samples, a grid twice as coarse holds up to 15 waves; the 16th is its Nyquist frequency."""
    axis = torch.arange(64) / 64
    wave = torch.cos(2 * torch.pi * waves * axis).expand(1, 1, 64, 64)
    powers = band_power(5 + wave, 2.0)  # the mean is nobody's detail
    assert powers[1 - band] == pytest.approx(0, abs=1e-6)
    assert powers[band] > 0.1


def test_power_is_counted_where_it_is() -> None:
    """A sixteenth of an image holds all the detail: its mean power is a sixteenth, where it is it is what it is."""
    noise = torch.randn((8, 4, 64, 64), generator=torch.Generator().manual_seed(0))
    assert local_power(noise, 2.0) == pytest.approx(1, rel=0.1)
    small = torch.zeros_like(noise)
    small[..., 16:32, 32:48] = 2 * noise[..., 16:32, 32:48]
    assert band_power(small, 2.0)[1] == pytest.approx(4 / 16, rel=0.1)
    assert 2.4 < local_power(small, 2.0) < 4.1  # windows at its border see a part
    assert local_power(torch.ones(1, 4, 8, 8), 2.0) == pytest.approx(0, abs=1e-6)
    assert local_power(noise[..., :3, :2], 1.5) > 0  # smaller than a window


def test_the_bound_is_the_level_at_which_noise_is_as_strong_as_the_detail() -> None:
    assert bound(0.0) == 0
    assert bound(1.0) == 0.5
    for power in (0.012, 0.031, 0.5):
        level = bound(power)
        assert level**2 == pytest.approx((1 - level) ** 2 * power)
    with pytest.raises(ValueError, match="power must not be negative, got -1"):
        bound(-1.0)


def test_the_least_noise_with_the_models_own_detail_is_chosen() -> None:
    rows = [SweepRow(level, 1, detail, 30.0) for level, detail in ((0.05, -0.2), (0.1, -1.5), (0.2, -0.8), (0.3, 0.1))]
    assert choose(rows, 0.0).sigma == 0.05
    assert choose(rows, 0.08).sigma == 0.2
    assert choose(rows, 0.1).sigma == 0.2
    assert choose([SweepRow(0.1, 1, -4.0, 30.0), SweepRow(0.2, 1, -2.0, 30.0)], 0.0).sigma == 0.2
    assert choose(rows, 0.9).sigma == 0.05  # a bound above all that was swept: the sweep decides


def test_low_steps_are_the_fewest_that_are_as_accurate_as_the_papers() -> None:
    assert (
        fewest_steps((("euler", 20, 0.06), ("multistep", 8, 0.09), ("multistep", 12, 0.05), ("multistep", 16, 0.04)))
        == 12
    )
    assert fewest_steps((("euler", 20, 0.01), ("multistep", 20, 0.02))) == 20


def test_patches_in_channels_are_unfolded_before_frequencies_are_counted() -> None:
    family = get_family("flux2-dev")
    pixels = torch.randn((2, 32, 8, 12), generator=torch.Generator().manual_seed(1))
    folded = pixels.reshape(2, 32, 4, 2, 6, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 128, 4, 6)
    assert torch.equal(unfold_patches(folded, family), pixels)
    assert unfold_patches(pixels, family) is pixels


# --------------------------------------------------------------------------------------------------- a model in numbers


def test_on_a_field_of_known_power_the_power_is_found() -> None:
    """Sampled natively to the end and encoded, the detail has the power that the field's formula has there."""
    said: list[str] = []
    found = calibrate(FIELD, None, prompts=["a"] * 6, width=64, height=64, native_steps=200, seed=3, tell=said.append)
    rows, columns = (torch.fft.fftfreq(64).abs() for _ in range(2))
    above = torch.maximum(rows[:, None], columns[None]) >= 0.25
    expected = float(FIELD.spectrum(64, 64)[above].mean())
    assert found.clean_power == pytest.approx(expected, rel=0.1)
    assert found.bound == pytest.approx(bound(found.clean_power))
    # Lanczos makes no detail: its error there is the detail that is missing.
    assert found.error_power == pytest.approx(found.clean_power, rel=0.1)
    assert found.error_power_low < found.error_power
    # One step to the mean of what is possible gives most detail from about the bound: the paper's claim, in numbers.
    once = [row for row in found.sweep if row.refine_steps == 1]
    best = max(once, key=lambda row: row.detail_db)
    assert abs(best.sigma - found.bound) < 0.04
    assert best.detail_db < -NEAR_DB
    assert found.sigma == best.sigma
    # The second step brings back what one step averages away.
    assert found.sweep[-1].detail_db > best.detail_db + NEAR_DB
    assert found.refine_steps == 2
    assert (found.pictures, found.upscaler, found.factor) == (6, "Lanczos", FIELD.family.factor)
    assert len(said) == len(found.sweep) + 3


def test_without_a_network_the_bound_is_that_of_the_detail_left_out() -> None:
    """An upscaler whose error is small all over, told as a network and as interpolation."""

    class Exact:
        scale, name = 2, "exact"

        def __init__(self, large: torch.Tensor, kind: str) -> None:
            self._large, self.kind = large, kind

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return self._large[: len(images)] + 0.002

    images = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(4)) * 0.2 + 0.4
    found = [
        calibrate(FIELD, Exact(images, kind), prompts=["a"], width=64, height=64, images=images)
        for kind in ("network", "interpolation")
    ]
    assert found[0].error_bound < 0.05 < found[0].bound
    assert found[0].sigma < min(found[1].sigma, found[0].bound)
    assert found[1].sigma >= round(min(found[1].bound, 0.6), 2)


def test_given_pictures_are_measured_in_place_of_native_ones() -> None:
    images = torch.rand((2, 3, 48, 64), generator=torch.Generator().manual_seed(4)) * 0.2 + 0.4
    found = calibrate(FIELD, None, prompts=["a", "b"], width=64, height=64, images=images)
    assert found.pictures == 2
    with pytest.raises(ValueError, match="images must be one per prompt, got 2 for 1 prompts"):
        calibrate(FIELD, None, prompts=["a"], width=64, height=64, images=images)
    with pytest.raises(ValueError, match="prompts is empty"):
        calibrate(FIELD, None, prompts=[], width=64, height=64)


def test_a_calibration_that_is_stopped_gives_nothing() -> None:
    with pytest.raises(Cancelled):
        calibrate(FIELD, None, prompts=["a"], width=64, height=64, cancel=lambda: True)


# ------------------------------------------------------------------------------------------------------------ the entry


def test_an_entry_reads_back_exactly_and_becomes_the_default_preset() -> None:
    again = Calibration.from_json(SAMPLE.to_json())
    assert again == SAMPLE
    family = again.apply(get_family("demo"))
    plan = make_plan(family, 256, 256)
    assert (plan.preset, plan.stages[0].steps, plan.stages[1].start_sigma) == ("calibrated", 11, 0.15)
    assert make_plan(family, 256, 256, "12+1").stages[0].steps == 12
    assert len(again.apply(family).presets) == len(family.presets)
    with pytest.raises(ValueError, match="the calibration is of family demo, not sd3; calibrate this model"):
        again.apply(get_family("sd3"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "mrflow-calibration-1"}',
        SAMPLE.to_json().replace('"sigma": 0.15,\n  "low', '"sigma": 1.5,\n  "low'),
        SAMPLE.to_json().replace('"family"', '"model"'),
        SAMPLE.to_json().replace('"low_steps": 11', '"low_steps": 1001'),
        SAMPLE.to_json().replace('"refine_steps": 1\n}', '"refine_steps": 1.5\n}'),
        SAMPLE.to_json().replace('"demo"', "3"),
        "[" * 100_000,
    ],
)
def test_what_is_no_entry_is_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"this is not a calibration .*make one with mrflow calibrate") as caught:
        Calibration.from_json(text)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- the command


def mrflow(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_writes_an_entry_that_plans_use(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = (
        "--size",
        "96x96",
        "--factor",
        "1.5",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--out",
        str(tmp_path),
    )
    code, out, err = mrflow(capsys, "calibrate", "a blue star over green hills", *small)
    assert code == 0
    assert "recommended: low steps" in out
    assert "measuring: 1 native" in err
    assert "The preset 12+1 starts from 0.6, measured on images of every kind" in err
    path = tmp_path / "calibration-demo.json"
    assert out.splitlines()[-1] == str(path)
    entry = Calibration.from_json(path.read_text())
    code, out, _ = mrflow(capsys, "plan", "--family", "demo", "--calibration", str(path), "--json")
    plan = json.loads(out)
    assert (code, plan["preset"]) == (0, "calibrated")
    assert math.isclose(plan["stages"][1]["sigmas"][0], entry.sigma)
    # A picture of one's own, and nothing is written over.
    Image.effect_noise((80, 70), 60).convert("RGB").save(tmp_path / "own.png")
    words = ("calibrate", "--images", str(tmp_path / "own.png"), "--json", "--no-progress")
    code, out, err = mrflow(capsys, *words, "--size", "128x128", "--device", "cpu", "--out", str(tmp_path))
    assert code == 0
    assert "own.png is not shaped like 128x128: it is upscaled to 146x128 and cropped at the centre" in err
    assert json.loads(out)["file"] == str(tmp_path / "calibration-demo-2.json")
    assert Calibration.from_json(path.read_text()) == entry
    assert not list(tmp_path.glob(".mrflow-*"))


def test_a_sigma_below_that_of_a_measured_preset_is_noted() -> None:
    family = get_family("demo")
    assert family.get_preset().measured
    low = lower_note(replace(SAMPLE, sigma=0.28), family)
    assert low is not None
    assert low.startswith(
        "The preset 12+1 starts from 0.6, measured on images of every kind, small lettering and small"
    )
    assert "; 0.28 is what these images need on the whole" in low
    assert lower_note(replace(SAMPLE, sigma=0.6), family) is None
    # What was taken from elsewhere says nothing of this model.
    assert lower_note(replace(SAMPLE, sigma=0.05), get_family("flux1-dev")) is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--images", "none.png"), "there is no image file 'none.png'"),
        (("--images", "none.png", "--steps", "3"), "--steps has no meaning"),
        (("a", "b", "--images", "none.png"), "there are 2 prompts for 1 --images"),
        (("a", "--prompts", "none.txt"), "so a prompt beside it has no meaning"),
        (("--prompts", "none.txt"), "--prompts is 'none.txt', which does not exist"),
        (("--factor", "9"), "factor"),
        (("--size", "0x8"), "is not a size"),
        (("--upscaler", "none.pth"), "which is not a file"),
    ],
)
def test_what_cannot_be_calibrated_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = mrflow(capsys, "calibrate", *words)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert sentence in err
    assert list(tmp_path.iterdir()) == []


def test_prompts_come_from_a_file_or_from_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mrflow_sched.measure import calibrate as module

    taken: list[tuple[str, ...]] = []

    def measured(*given: Any, **named: Any) -> Calibration:
        taken.append(named["prompts"])
        return SAMPLE

    monkeypatch.setattr(module, "calibrate", measured)
    file = tmp_path / "prompts.txt"
    file.write_text("# stars\na blue star\n\na red star\n")
    output = ("--device", "cpu", "--out", str(tmp_path))
    assert mrflow(capsys, "calibrate", "--prompts", str(file), *output)[0] == 0
    assert mrflow(capsys, "calibrate", "a ring", "a heart", *output)[0] == 0
    assert taken == [("a blue star", "a red star"), ("a ring", "a heart")]
    code, _, err = mrflow(capsys, "calibrate", "--prompts", str(file), "--images", str(file), *output)
    assert code == 2
    assert "there are 2 prompts for 1 --images" in err


def test_a_calibration_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(SAMPLE.to_json())
    for words, sentence in (
        (("plan", "--family", "sd3", "--calibration", str(path)), "of family demo, not sd3"),
        (
            ("plan", "--family", "demo", "--calibration", str(tmp_path)),
            "which cannot be read (is a directory); give a file that",
        ),
        (
            ("plan", "--family", "demo", "--calibration", str(demo.weights_path() / "model_index.json")),
            "not a calibration",
        ),
    ):
        code, _, err = mrflow(capsys, *words)
        assert code == 2
        assert sentence in err


def test_a_full_disk_leaves_no_half_entry(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mrflow_sched.measure import calibrate as module

    monkeypatch.setattr(module, "calibrate", lambda *given, **named: SAMPLE)

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "calibration-demo.json").write_text("older")
    monkeypatch.setattr(os, "fsync", full)
    code, _, err = mrflow(capsys, "calibrate", "--device", "cpu", "--out", str(tmp_path))
    assert code == 2
    assert "calibration-demo-2.json' cannot be written (the disk is full)" in err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"]


def test_a_size_without_a_picture_in_it_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for size, tokens in (("1x1", "8x8, 1 token"), ("112x112", "56x56, 49 tokens")):
        code, out, err = mrflow(capsys, "calibrate", "--size", size, "--out", str(tmp_path / "new"))
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"--size {size} makes stage 1 {tokens}" in err
    assert not (tmp_path / "new").exists()
