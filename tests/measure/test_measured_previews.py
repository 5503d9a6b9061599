"""Previews of native runs, and the check of them, on the exact Gaussian field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mrflow_sched import make_native_plan, make_plan, sample_staged
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.analytic import GaussianFieldEngine, power_law
from mrflow_sched.measure.metrics import paired_t, psnr, ssim
from mrflow_sched.measure.preview_check import Checked, check_previews
from mrflow_sched.measure.preview_kinds import KINDS, MEASURED, kind_note
from mrflow_sched.measure.previews import few_plan, preview, preview_plan, shrunk
from mrflow_sched.methods.previews import Chain, CommutatorGuidance
from mrflow_sched.plan.families import FAMILIES

ENGINE = GaussianFieldEngine()
EPSILON = replace(ENGINE, family=replace(ENGINE.family, prediction="epsilon", shift=FAMILIES["sd15"].shift))


def native(steps: int = 12, width: int = 64, height: int = 64, **more: Any) -> Any:
    return make_native_plan(ENGINE.family, width, height, steps=steps, seed=5, **more)


# ------------------------------------------------------------------------------------------------------------ previews


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_is_a_small_picture_of_the_native_run(kind: str) -> None:
    found = preview(ENGINE, native(), ["a", "b"], kind=kind)
    assert found.images.shape == (2, 3, 32, 32)
    assert bool(((found.images >= 0) & (found.images <= 1)).all())
    assert (found.kind, found.seeds, found.cancelled) == (kind, (5, 6), False)
    assert found.plan == native()
    assert 0 < found.cost < 12
    again = preview(ENGINE, native(), ["b"], kind=kind, seeds=[6])
    assert torch.allclose(again.images, found.images[1:], atol=1e-5)


def test_few_is_the_native_run_in_few_multistep_steps_shrunk() -> None:
    found = preview(ENGINE, native(), "a", steps=5)
    plan = make_native_plan(ENGINE.family, 64, 64, steps=5, solver="multistep", seed=5)
    assert torch.equal(found.images, shrunk(sample_staged(ENGINE, plan, "a").images, 32, 32))
    assert (found.title, found.cost) == ("few, 5 steps", 5.0)


def test_a_preview_is_nearer_to_its_own_native_picture_the_more_it_costs() -> None:
    full = shrunk(sample_staged(ENGINE, native(), ["a"] * 4).images, 32, 32)
    near = [float(psnr(preview(ENGINE, native(), ["a"] * 4, steps=steps).images, full).mean()) for steps in (2, 4, 8)]
    assert near[0] < near[1] < near[2]
    nested = float(psnr(preview(ENGINE, native(), ["a"] * 4, kind="nested").images, full).mean())
    other = float(psnr(preview(ENGINE, native(), ["a"] * 4, kind="nested", seeds=[50, 51, 52, 53]).images, full).mean())
    assert nested > other + 3


def test_schedules_are_thinned_as_they_were_made() -> None:
    plan = native(12, mu=0.7)
    assert few_plan(plan, 4).stages[0].sigmas == native(4, mu=0.7).stages[0].sigmas
    listed = native(4, sigmas=[1.0, 0.9, 0.6, 0.2, 0.0])
    assert few_plan(listed, 2).stages[0].sigmas == (1.0, 0.6, 0.0)
    assert few_plan(listed, 3).stages[0].sigmas == pytest.approx((1.0, 0.8, 1 / 3, 0.0))
    with pytest.raises(MrFlowError, match="steps is 12, and the run itself takes 12; preview it with fewer"):
        few_plan(plan, 12)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_has_plans_for_its_previews(name: str) -> None:
    family = FAMILIES[name]
    plan = make_native_plan(family, *family.native_size)
    few = few_plan(plan, min(6, plan.stages[0].steps - 1))
    assert few.stages[0].sigmas[0] == 1.0
    assert few.forwards < plan.forwards
    small = preview_plan(family, plan)
    assert small.stages[0].sigmas == plan.stages[0].sigmas
    assert small.width % family.grid == small.height % family.grid == 0
    assert abs(small.width - plan.width / 2) <= family.grid / 2


def test_edges_that_the_grid_adds_are_cropped_from_previews_too() -> None:
    plan = native(width=60, height=52)
    for kind in ("few", "nested", "chain-pixels"):
        assert preview(ENGINE, plan, "a", kind=kind).images.shape[-2:] == (
            preview_plan(ENGINE.family, plan).requested_height,
            preview_plan(ENGINE.family, plan).requested_width,
        )
    with pytest.raises(MrFlowError, match="halves exactly"):
        preview(ENGINE, native(width=72, height=72), "a", kind="chain-polyphase")


def test_models_that_are_no_flows_have_few_and_nested() -> None:
    plan = make_native_plan(EPSILON.family, 64, 64, steps=12)
    full = shrunk(sample_staged(EPSILON, plan, "a").images, 32, 32)
    few, nested = (preview(EPSILON, plan, "a", kind=kind).images for kind in ("few", "nested"))
    other = preview(EPSILON, plan, "a", kind="nested", seeds=[50]).images
    assert float(psnr(few, full)) > float(psnr(nested, full)) > float(psnr(other, full)) + 2
    with pytest.raises(MrFlowError, match="the chain is for flow models"):
        preview(EPSILON, plan, "a", kind="chain-pixels")


def test_a_staged_plan_has_no_preview_here() -> None:
    with pytest.raises(MrFlowError, match=r"2 stages, and a preview is of a native run.*first stage"):
        preview(ENGINE, make_plan(ENGINE.family, 64, 64), "a")
    with pytest.raises(MrFlowError, match=r"kind must be one of few, nested, .*, got 'best'"):
        preview(ENGINE, native(), "a", kind="best")
    with pytest.raises(MrFlowError, match="steps must be"):
        preview(ENGINE, native(), "a", steps=0)


def test_a_chain_of_ones_own_takes_the_place_of_the_usual_one() -> None:
    own = Chain(full=(64, 64), down="pixels", switch=2, guidance=CommutatorGuidance(steps=0))
    found = preview(ENGINE, native(), "a", kind="chain-pixels", chain=own)
    assert not torch.equal(found.images, preview(ENGINE, native(), "a", kind="chain-pixels").images)
    assert found.cost < preview(ENGINE, native(), "a", kind="chain-pixels").cost


def test_a_stopped_preview_says_so() -> None:
    seen: list[int] = []

    def cancel() -> bool:
        seen.append(1)
        return len(seen) > 6

    assert preview(ENGINE, native(), "a", kind="chain-pixels", cancel=cancel).cancelled


# ---------------------------------------------------------------------------------------------------------- the check


class Twisted(GaussianFieldEngine):
    """A field in whose latents every second one has the other sign, so that an average of them is no picture."""

    def encode(self, images: Tensor, **more: Any) -> Tensor:
        return self._turned(super().encode(images, **more))

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(self._turned(latents))

    def denoise(self, x: Tensor, sigma: Tensor, text: Any, *, guidance: float) -> Tensor:
        return self._turned(super().denoise(self._turned(x), sigma, text, guidance=guidance))

    @staticmethod
    def _turned(latents: Tensor) -> Tensor:
        signs = torch.ones(latents.shape[-2:], dtype=latents.dtype)
        signs[::2, 1::2] = signs[1::2, ::2] = -1
        return latents * signs


def test_the_check_measures_what_a_downsampler_itself_makes_of_the_picture() -> None:
    """Where neighbouring latents have opposite signs, their average is nothing; the way over pixels is untouched."""
    engine = Twisted(power=power_law(variance=0.02))
    found = check_previews(engine, native(9), ["a", "b"], steps=4)
    rows = {row.kind: row for row in found.rows}
    assert list(rows) == list(KINDS)
    assert (rows["few"].ideal, rows["nested"].ideal, rows["few"].keeps_its_word) == (None, None, None)
    pixels, average = rows["chain-pixels"], rows["chain-average"]
    assert pixels.ideal is not None
    assert average.ideal is not None
    assert pixels.ideal > average.ideal + 6
    assert rows["few"].psnr > found.floor[0] + 6
    assert rows["few"].own_seed == 1.0
    assert all(row.cost > 0 and row.seconds > 0 for row in found.rows)
    assert found.prompts == 2


@pytest.mark.parametrize(
    ("gain", "ideal_gain", "keeps"),
    [(2.1, 3.0, True), (2.0, 3.0, False), (9.0, -4.0, False), (-4.0, 9.0, False), (None, None, None)],
)
def test_a_chain_keeps_its_word_by_two_tests(gain: float | None, ideal_gain: float | None, keeps: bool | None) -> None:
    row = Checked("chain-pixels", ideal=None if gain is None else 30.0, gain=gain, ideal_gain=ideal_gain)
    assert row.keeps_its_word is keeps


def test_the_check_says_what_a_model_does_not_allow() -> None:
    plan = make_native_plan(EPSILON.family, 64, 64, steps=9)
    rows = {row.kind: row for row in check_previews(EPSILON, plan, ["a", "b"], steps=4).rows}
    assert rows["chain-pixels"].refusal is not None
    assert "flow models" in rows["chain-pixels"].refusal
    assert rows["chain-pixels"].keeps_its_word is None
    assert rows["few"].refusal is None
    with pytest.raises(MrFlowError, match="prompts must hold two or more, got 1"):
        check_previews(ENGINE, native(9), ["a"])
    with pytest.raises(MrFlowError, match="too small to compare"):
        check_previews(ENGINE, native(9, 16, 16), ["a", "b"])


def test_what_is_said_of_a_kind() -> None:
    assert kind_note("few", "sd35") is None
    assert kind_note("nested", "sd35") is None
    assert "never checked on sd35" in (kind_note("chain-pixels", "sd35") or "")
    for family, kinds in MEASURED.items():
        assert family in FAMILIES
        assert set(kinds) <= set(KINDS)
        for kind, keeps in kinds.items():
            assert (kind_note(kind, family) is None) is keeps


def test_paired_t_is_students() -> None:
    assert paired_t(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(2 / (1 / 3**0.5))
    assert paired_t(torch.tensor([0.0, 0.0])) == 0.0
    assert paired_t(torch.tensor([-1.0, -1.0])) == -float("inf")
    assert float(ssim(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))) == 1.0
