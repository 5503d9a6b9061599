"""How a job's time compares with a native run: seconds of a clock that the stand-ins turn, and what is expected."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest
from doubles import Anima, Flux, LdmModel, Sampler, WebUI
from test_infotext import model

from mrflow_sched.apps.webui import expected
from mrflow_sched.apps.webui.controls import Controls
from mrflow_sched.apps.webui.expected import TYPICAL, Expected, expect, phrase
from mrflow_sched.apps.webui.recipe import make_recipe
from mrflow_sched.plan.families import FAMILIES

X2 = "RealESRGAN_x2plus (MrFlow)"


@pytest.fixture(autouse=True)
def one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expected, "_learned", {})


# ------------------------------------------------------------------------------------------------------------- measured


class Clock:
    """Seconds that pass only where a stand-in works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ui: WebUI, low: float, high: float) -> None:
        self.now, self.steps = 100.0, {"first": low, "hires": high}
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        network = Sampler.network

        def timed(sampler: Sampler, p: Any) -> Any:
            ask = network(sampler, p)

            def asked(*args: Any, **kwargs: Any) -> Any:
                self.now += self.steps["hires" if p.is_hr_pass else "first"]
                return ask(*args, **kwargs)

            return asked

        monkeypatch.setattr(Sampler, "network", timed)
        for owner, name, seconds in (
            (ui, "encode_text", lambda *_: 3.0),
            (ui, "images_to_samples", lambda *_: 1.0),
            (ui.model, "decode_first_stage", lambda z: 2.0 if z.shape[-1] > 30 else 0.5),
        ):
            self.slow(monkeypatch, owner, name, seconds)

    def slow(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: Any) -> None:
        call = getattr(owner, name)

        def slowly(*args: Any) -> Any:
            self.now += seconds(*args)
            return call(*args)

        monkeypatch.setattr(owner, name, slowly)


def comment(
    monkeypatch: pytest.MonkeyPatch, *, low: float = 3.0, high: float = 4.0, choice: Any = None, **fields: Any
) -> str:
    """What is said under an image of 384x256 on a FLUX model: text 3 s, a step `low` and `high`, decoding 0.5 and 2 s,
    encoding 1 s."""
    ui = WebUI("forge", Flux())
    Clock(monkeypatch, ui, low, high)
    p = ui.job(**{"width": 384, "height": 256, "cfg_scale": 1.0, **fields})
    ui.generate(p, {"enabled": True, **(choice or {})})
    assert not ui.errors
    return next(said for said in p.comments if said.startswith("MrFlow: 192x128"))


@pytest.mark.parametrize("batches", [1, 3])
def test_both_sides_are_counted_alike(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Native: 3 s of text, 20 steps of 4 s, 2 s of decoding. The job: 3 + 12 x 3 + 0.5 + 1 + 4 + 2 = 46.5 s."""
    said = comment(monkeypatch, n_iter=batches)
    assert said.endswith(f"; 20 steps at this size would take about {85 / 46.5:.1f} times as long")
    assert f"x12 ({batches * 39.5:.1f} s)" in said


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 12},  # 53 s natively: 1.14 times
        {"low": 4.5},  # a low step is slower than a large one: something was loaded, or others used the device
        {"high": 12.0},  # a large step is far slower than its FLOP say
        {"choice": {"refine_cfg": "off"}, "cfg_scale": 4.0},
    ],
    ids=["hardly faster", "slow first pass", "slow refine step", "other guidance"],
)
def test_nothing_is_said_where_the_seconds_allow_no_comparison(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    assert "times as long" not in comment(monkeypatch, **changes)


def test_the_same_guidance_by_another_name_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = {"refine_cfg": "value", "refine_cfg_value": 4.0}
    assert "times as long" in comment(monkeypatch, choice=choice, cfg_scale=4.0)


def test_a_solver_of_ours_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "about 1.8 times as long" in comment(monkeypatch, choice={"solver": "multistep"})


@pytest.mark.parametrize("call", [13, 14, 26])
def test_an_interrupted_pass_is_no_measure(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    ui = WebUI("forge", Flux())
    Clock(monkeypatch, ui, 3.0, 4.0)
    ui.interrupt_at = call
    p = ui.job(width=384, height=256, cfg_scale=1.0, n_iter=2)
    ui.generate(p, True, "12+2")
    assert not any("times as long" in said for said in p.comments)
    assert not expected._learned  # pyright: ignore[reportPrivateUsage]


def test_a_model_without_a_known_cost_is_compared_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ui = WebUI("forge", Anima())
    Clock(monkeypatch, ui, 3.0, 6.0)
    p = ui.job(width=384, height=256, cfg_scale=1.0)
    ui.generate(p, True)
    assert any("20 steps at this size would take about" in said for said in p.comments)


def test_a_turbo_model_is_compared_with_its_own_few_steps() -> None:
    assert expected.steps_beside(model("z-image-turbo"), 20) == 9
    assert expected.steps_beside(model("z-image-turbo"), 4) == 4
    assert expected.steps_beside(model("flux1-dev"), 20) == 20
    assert expected.steps_beside(model("flux1-dev"), None) == 20


# ------------------------------------------------------------------------------------------------------------- expected


def expectation(family: str, side: int = 1024, steps: int | None = 20, cfg: float | None = None, **choice: Any) -> Any:
    controls, info = Controls(True, **choice), model(family)
    return expect(make_recipe(controls, info, side, side, upscalers=[X2]), info, controls, steps, cfg)


def test_the_seconds_that_were_measured_are_found_again() -> None:
    """FLUX.1-dev's parts on one H100, seconds: forwards of 512x512 and 1024x1024, decoders, upscaler, encoder."""
    low, high, small, large, upscale, encode = 0.0703, 0.1884, 0.0227, 0.0893, 0.0410, 0.0493
    staged = 12 * low + small + upscale + encode + high + large
    found = expectation("flux1-dev", steps=20)
    assert found.faster == pytest.approx((20 * high + large) / staged, rel=0.04)
    assert found.than_steps == 20


def test_a_model_of_few_steps_gains_little_at_one_megapixel_and_more_above() -> None:
    gains = [expectation("flux1-schnell", side).faster for side in (1024, 1536, 2048)]
    assert gains == pytest.approx([1.24, 1.42, 1.58], abs=0.01)


def test_the_estimate_by_hand() -> None:
    family, vae = FAMILIES["flux1-dev"], FAMILIES["flux1-dev"].vae_cost
    assert vae is not None
    low, high = (TYPICAL.network * family.forward_cost(tokens) + TYPICAL.forward for tokens in (1024, 4096))
    decodes = [TYPICAL.decode * vae.decode.flop(side * side) for side in (512, 1024)]
    between = TYPICAL.upscale * 8.966e6 * 512 * 512 + TYPICAL.encode * vae.encode.flop(1024 * 1024)
    ours = 12 * low + decodes[0] + between + high + decodes[1]
    assert expectation("flux1-dev", cfg=1.0).faster == pytest.approx((20 * high + decodes[1]) / ours)
    guided = 24 * low + decodes[0] + between + high + decodes[1]
    found = expectation("flux1-dev", cfg=4.0, refine_cfg="off")
    assert found.faster == pytest.approx((40 * high + decodes[1]) / guided)


def test_larger_images_and_more_steps_gain_more() -> None:
    gains = [expectation("z-image-turbo", side).faster for side in (512, 1024, 1536, 2048)]
    assert gains == sorted(gains)
    assert expectation("flux1-dev", steps=10).faster < expectation("flux1-dev", steps=20).faster
    assert expectation("flux1-dev", steps=50).faster > 2 * expectation("flux1-dev", steps=20).faster
    assert expectation("qwen-image", cfg=None) == expectation("qwen-image", cfg=4.0)


def test_where_nothing_is_gained_the_line_says_from_where_on() -> None:
    found = expectation("flux2-klein", 768)
    assert found.faster < 1.2
    width, height = found.pays_from
    assert width == height > 768
    assert expectation("flux2-klein", width).faster >= 1.2 > expectation("flux2-klein", width - 64).faster
    assert phrase(found) == f"no faster than 4 steps at this size; pays from about {width}×{width} up"
    never = expectation("flux1-dev", steps=3)
    assert never.pays_from is None
    assert phrase(never) == "no faster than 3 steps at this size"
    assert phrase(Expected(4.44, 20)) == "about 4.4× faster than 20 steps"
    assert phrase(Expected(11.3, 50)) == "about 11× faster than 50 steps"


def test_an_unknown_model_gets_no_number() -> None:
    info = replace(model("z-image"), known=False)
    controls = Controls(True)
    recipe = make_recipe(controls, info, 1024, 1024, upscalers=[X2])
    assert expect(recipe, info, controls, 20, 1.0) is None
    assert "steps" not in recipe.line


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_a_finite_estimate(family: str) -> None:
    found = expectation(family, min(FAMILIES[family].native_size) * 2, steps=20)
    assert math.isfinite(found.faster)
    assert found.faster > 0.4  # of SANA-Sprint, whose native run is two steps


def test_the_last_clean_run_of_this_machine_counts_more_than_a_typical_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a run whose text (3 s on both sides) is left out: 20 x 4 + 2 s beside 12 x 3 + 0.5 + 1 + 4 + 2."""
    comment(monkeypatch, n_iter=2)
    info, controls = model("flux1-dev"), Controls(True)
    at = make_recipe(controls, info, 384, 256, upscalers=["R-ESRGAN 2x+"])
    found = expect(at, info, controls, 20, 1.0)
    assert found is not None
    assert found.faster == pytest.approx(82 / 43.5, rel=0.01)
    other = make_recipe(controls, info, 384, 256, upscalers=[X2])
    assert expect(other, info, controls, 20, 1.0) != found


def test_a_disturbed_run_teaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    comment(monkeypatch, low=9.0)
    assert not expected._learned  # pyright: ignore[reportPrivateUsage]


def test_models_of_other_kinds_are_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ui = WebUI("a1111", LdmModel())
    Clock(monkeypatch, ui, 1.0, 4.0)
    p = ui.job(width=384, height=256, sampler_name="DDIM")
    ui.generate(p, True)
    assert any("20 steps at this size would take about" in said for said in p.comments)
