"""The sigmas that a diffusers scheduler's configuration asks for: those of diffusers' own scheduler, in plans too."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from typing import Any

import pytest
import tiny_pipelines
import torch
from pipeline_tools import listening, theirs_with

from mrflow_sched import MrFlow, make_native_plan
from mrflow_sched._runtime.torchvision_ops import ensure_ops
from mrflow_sched.engines.diffusers.layouts import find_layout
from mrflow_sched.engines.diffusers.layouts.shift import shift_rule, ve_rule
from mrflow_sched.engines.diffusers.scheduler import MrFlowScheduler
from mrflow_sched.plan.families import FAMILIES, ShiftRule
from mrflow_sched.plan.schedule import (
    beta_sigmas,
    native_sigmas,
    scaled_linear_sigmas,
    scaled_linear_ve,
    spaced_by_beta,
    ve_of_betas,
)
from mrflow_sched.sampling.noise import model_sigmas

ensure_ops()
diffusers: Any = import_module("diffusers")
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO = {**SDXL, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


def planned(family: str, rule: ShiftRule, steps: int, **options: Any) -> tuple[float, ...]:
    known = replace(FAMILIES[family], shift=rule)
    return make_native_plan(known, *known.native_size, steps=steps, **options).stages[0].sigmas


@pytest.mark.parametrize("family", ["sana", "sd3", "auraflow"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_families_that_leave_the_list_to_the_scheduler_end_as_it_does(family: str, shift: float) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(num_inference_steps=12)
    info = FAMILIES[family].pipeline
    assert info is not None
    rule = shift_rule(theirs, FAMILIES[family].shift, even_list=info.even_list)
    assert planned(family, rule, 12) == pytest.approx(theirs.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("dynamic", [True, False])
def test_beta_spacing_keeps_shift_and_ends(dynamic: bool) -> None:
    """diffusers makes its own list first and spaces it anew between the two ends that come out."""
    config = {"use_dynamic_shifting": dynamic, "shift": 3.0, "shift_terminal": 0.05 if dynamic else None}
    plain = theirs_with("FlowMatchEulerDiscreteScheduler", **config)
    beta = type("Beta", (), {"config": {**plain.config, "use_beta_sigmas": True}})()  # its own needs scipy
    rule = shift_rule(beta, FAMILIES["flux1-dev"].shift)
    assert rule == replace(shift_rule(plain, FAMILIES["flux1-dev"].shift), beta=0.6)
    options = {"mu": 0.8} if dynamic else {}
    ends, spaced = (planned("flux1-dev", each, 6, **options) for each in (replace(rule, beta=None), rule))
    assert (spaced[0], spaced[-2], spaced[-1]) == (1.0, ends[-2], 0.0)
    assert ends[-2] == pytest.approx(0.05 if dynamic else 3 * (1 / 6) / (1 + 2 / 6))
    quantiles = [(sigma - spaced[-2]) / (1.0 - spaced[-2]) for sigma in spaced[:-1]]
    assert quantiles == pytest.approx(beta_sigmas(5), abs=1e-12)
    ours: Any = MrFlowScheduler.from_config({**plain.config, "use_beta_sigmas": True}, solver="euler")
    ours.set_timesteps(sigmas=[1 - index / 6 for index in range(6)], mu=0.8 if dynamic else None)
    assert ours.sigmas.tolist() == pytest.approx(spaced, abs=1e-6)


def test_beta_spacing_of_short_lists() -> None:
    assert spaced_by_beta([1.0]) == [1.0]
    assert spaced_by_beta([1.0, 0.3]) == [1.0, 0.3]
    assert native_sigmas(1, beta=0.6) == (1.0, 0.0)


@pytest.mark.parametrize("steps", [1, 4, 6, 30])
@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_zero_terminal_snr_is_eulers(kind: str, steps: int) -> None:
    config = {**ZERO, "beta_schedule": kind} | ({"beta_start": 1e-4, "beta_end": 0.02} if kind == "linear" else {})
    theirs = diffusers.EulerDiscreteScheduler(**config)
    ours: Any = MrFlowScheduler.from_config(theirs.config, solver="euler")
    for each in (theirs, ours):
        each.set_timesteps(steps)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-4, atol=1e-6)
    assert ours.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist())


def test_training_sigmas_rise_whatever_the_betas() -> None:
    table = ve_of_betas([1e-4 + index * 0.0199 / 999 for index in range(1000)], zero_snr=True)
    assert all(after > before for before, after in pairwise(table))
    assert table[-1] == pytest.approx(4096.0, rel=1e-6)
    assert scaled_linear_ve(zero_snr=True)[-1] == pytest.approx(4096.0, rel=1e-6)
    assert ShiftRule("zero-snr").largest_ve == scaled_linear_ve(zero_snr=True)[-1]
    assert ShiftRule("scaled-linear").largest_ve == pytest.approx(14.614647, abs=1e-5)


def test_a_plan_for_zero_terminal_snr_starts_at_the_last_training_step() -> None:
    theirs = diffusers.EulerDiscreteScheduler(**ZERO)
    theirs.set_timesteps(6)
    rule = ve_rule(theirs, FAMILIES["sdxl"].shift)
    sigmas = planned("sdxl", rule, 6)
    assert sigmas == scaled_linear_sigmas(6, zero_snr=True)
    ve = model_sigmas(sigmas, "v", rule.largest_ve)
    assert ve == pytest.approx(theirs.sigmas.tolist(), rel=1e-4)
    walked = MrFlowScheduler.for_stage(theirs.config, ve, "euler", prediction="v")
    assert walked.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist(), abs=1e-3)
    assert ve_rule(diffusers.EulerDiscreteScheduler(**SDXL), FAMILIES["sdxl"].shift) == FAMILIES["sdxl"].shift


def test_a_zero_terminal_snr_pipeline_runs_from_999() -> None:
    pipe = tiny_pipelines.make("sdxl")
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config({**pipe.scheduler.config, **ZERO})
    layout = find_layout(pipe)
    side = 8 * layout.family.grid
    with listening(pipe) as heard:
        MrFlow(pipe)("a red star", width=side, height=side, low_steps=6, solver="euler", output_type="np")
    told = [float(time[0]) for time in heard.timesteps]
    assert told[:6] == pytest.approx([999, 832, 666, 499, 332, 166], abs=1e-2)
