"""MrFlowScheduler: what diffusers asks of a scheduler, the lists and steps of diffusers' own, and our solvers."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipeline_tools import theirs_with
from torch import Tensor

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched._runtime.torchvision_ops import ensure_ops
from mrflow_sched.plan.schedule import native_sigmas, refine_sigmas, scaled_linear_sigmas, stretch_to_terminal
from mrflow_sched.sampling.noise import add_noise, model_sigmas, to_denoised
from mrflow_sched.sampling.solvers import SOLVERS, evaluation_sigmas, solver_forwards, solver_steps

ensure_ops()
diffusers: Any = import_module("diffusers")  # its lazy names are hidden from type checkers

from mrflow_sched.engines.diffusers import scheduler as module  # noqa: E402

MrFlowScheduler: Any = module.MrFlowScheduler  # what from_config and from_pretrained return is not typed by diffusers

FLOW = {"num_train_timesteps": 1000}
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPES = ((2, 6), (2, 5, 6), (2, 4, 5, 6), (2, 4, 1, 5, 6))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(x: Tensor, sigma: float) -> Tensor:
    """A curved field on the last dimension: what a solver does wrong shows."""
    weight = noise(x.shape[-1], x.shape[-1], seed=9).to(x)
    return torch.tanh(x @ weight) + (1.0 + sigma) * torch.sin(x)


def walk(scheduler: Any, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A pipeline's loop; the network sees the pipeline's own copy of the state."""
    x = x.to(dtype)
    for index, time in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[index])
        seen = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(seen, sigma), time, x, return_dict=False)[0]
    return x


def said(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def flow(**options: Any) -> Any:
    scheduler = MrFlowScheduler(**options)
    scheduler.set_timesteps(6)
    return scheduler


# ------------------------------------------------------------------------------------ what diffusers asks of schedulers


CONFIGS = [
    {},
    {"shift": 3.0, "solver": "careful"},
    {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    {"stage": "refine", "sigma": 0.18, "refine_curve": "shifted", "solver": "heun"},
    {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction", **SDXL},
    SDXL,
    {**SDXL, "prediction_type": "v_prediction", "timestep_spacing": "leading", "steps_offset": 1},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_saved_scheduler_walks_as_the_one_it_was_saved_from(config: dict[str, Any], tmp_path: Any) -> None:
    first = MrFlowScheduler(**config)
    first.save_pretrained(tmp_path)
    loaded = MrFlowScheduler.from_pretrained(tmp_path)
    again = MrFlowScheduler.from_config(first.config)
    results = []
    for scheduler in (first, loaded, again):
        scheduler.set_timesteps(5, mu=0.7)
        results.append(walk(scheduler, noise(2, 3, 4) * scheduler.init_noise_sigma))
        assert said(scheduler.config) == said(first.config)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("kind", "config", "warned"),
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, True),
        ("LCMScheduler", {}, True),
        ("TCDScheduler", {}, True),
        ("DPMSolverMultistepScheduler", {}, False),
        ("EulerDiscreteScheduler", {}, False),
        ("FlowMatchEulerDiscreteScheduler", {}, False),
    ],
)
def test_a_sampler_that_adds_noise_is_replaced_with_a_warning(kind: str, config: dict[str, Any], warned: bool) -> None:
    theirs = getattr(diffusers, kind)(**config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = MrFlowScheduler.from_config(theirs.config)
        MrFlowScheduler.for_stage(theirs.config, (1.0, 0.0), "euler", prediction=made.prediction)
    said = [each for each in caught if "adds noise at every step; MrFlowScheduler adds none" in str(each.message)]
    assert [each.filename for each in said] == [__file__] * warned


def test_a_loaded_ancestral_sampler_is_known_by_its_class(tmp_path: Path) -> None:
    diffusers.EulerAncestralDiscreteScheduler().save_pretrained(tmp_path)
    loaded = diffusers.EulerAncestralDiscreteScheduler.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="adds noise at every step"):
        MrFlowScheduler.from_config(loaded.config)


def test_arguments_override_a_configuration() -> None:
    made = MrFlowScheduler.from_config(MrFlowScheduler(shift=3.0).config, solver="euler", shift=5.0)
    assert (made.config.solver, made.config.shift, made.config.num_train_timesteps) == ("euler", 5.0, 1000)
    back = diffusers.FlowMatchEulerDiscreteScheduler.from_config(made.config)
    assert back.config.shift == 5.0


@pytest.mark.parametrize("steps", [1, 2, 5, 100])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_list_falls_to_zero_and_times_fit_it(config: dict[str, Any], steps: int) -> None:
    scheduler = MrFlowScheduler(**config)
    scheduler.set_timesteps(steps, mu=0.7)
    assert len(scheduler.timesteps) == len(scheduler.sigmas) - 1 == solver_forwards(scheduler.config.solver, steps)
    assert scheduler.num_inference_steps == steps
    assert scheduler.timesteps.dtype == scheduler.sigmas.dtype == torch.float32
    assert all(after <= before for before, after in pairwise(scheduler.sigmas.tolist()))
    assert scheduler.sigmas[-1] == 0.0
    assert 0.0 <= scheduler.timesteps.min() <= scheduler.timesteps.max() <= 1000.0
    if scheduler.prediction == "flow":
        torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_steps_keep_shape_and_the_dtype_of_the_networks_output(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scheduler = flow()
    x = noise(*shape).to(dtype)
    first = scheduler.step(network(x, 1.0), scheduler.timesteps[0], x)
    assert isinstance(first, module.MrFlowSchedulerOutput)
    assert first.prev_sample.shape == x.shape
    assert first.prev_sample.dtype == dtype
    assert first.pred_original_sample.dtype == torch.float32
    second = scheduler.step(network(x, 1.0).float(), scheduler.timesteps[1], first.prev_sample, return_dict=False)
    assert second[0].dtype == torch.float32


def test_dict_and_tuple_say_the_same() -> None:
    x = noise(2, 4)
    named, plain = flow(), flow()
    for time in named.timesteps:
        output = named.step(network(x, 0.5), time, x)
        told = plain.step(network(x, 0.5), time, x, return_dict=False, generator=None, eta=0.3)
        assert torch.equal(output.prev_sample, told[0])
        assert torch.equal(output.pred_original_sample, told[1])
        x = told[0]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_equals_its_samples_alone(solver: str, shape: tuple[int, ...]) -> None:
    x = noise(*shape)
    together = walk(flow(solver=solver), x)
    for index in range(len(x)):
        alone = walk(flow(solver=solver), x[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-5, atol=1e-5)


def test_index_for_timestep_finds_what_is_there_and_says_what_is_not() -> None:
    scheduler = flow(solver="heun")
    for index in (0, 2, 4, 10):  # where steps begin: the second of two evaluations at one level
        assert scheduler.index_for_timestep(scheduler.timesteps[index]) == index
        assert scheduler.index_for_timestep(float(scheduler.timesteps[index])) == index
    with pytest.raises(ValueError, match=r"timestep 3\.5 is not in the schedule"):
        scheduler.index_for_timestep(3.5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_in_the_middle_walks_the_rest_of_the_list(solver: str) -> None:
    """By `set_begin_index` and by the first timestep alike, and for Heun from either evaluation of a step."""
    x = noise(2, 4)
    levels = tuple(native_sigmas(6, mu=0.7))

    def model(state: Tensor, sigma: Tensor) -> Tensor:
        return to_denoised(network(state, float(sigma[0])), state, float(sigma[0]))

    for begin in (2, 3):
        scheduler = MrFlowScheduler(use_dynamic_shifting=True, solver=solver)
        scheduler.set_timesteps(6, mu=0.7, sigmas=np.linspace(1, 1 / 6, 6))
        begun = (begin + 1) // 2 if solver == "heun" else begin
        expected = SOLVERS[solver](model, x, levels[begun:])
        by_index, by_time = copy.deepcopy(scheduler), copy.deepcopy(scheduler)
        by_index.set_begin_index(begin)
        for each, first in ((by_index, begin), (by_time, 2 * begun if solver == "heun" else begin)):
            state = x
            for index in range(first, len(each.timesteps)):
                level = evaluation_sigmas(solver, levels)[index]
                state = each.step(network(state, level), each.timesteps[index], state, return_dict=False)[0]
            torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)


def test_add_noise_and_scale_noise_mix_as_the_model_was_trained() -> None:
    clean, drawn = noise(3, 2, 4), noise(3, 2, 4, seed=1)
    scheduler = flow(shift=3.0)
    times = scheduler.timesteps[[0, 2, 5]]
    levels = scheduler.sigmas[[0, 2, 5]]
    expected = add_noise(clean, drawn, levels)
    torch.testing.assert_close(scheduler.scale_noise(clean, times, drawn), expected)
    torch.testing.assert_close(scheduler.add_noise(clean, drawn, times), expected)
    assert scheduler.scale_noise(clean.half(), times, drawn.half()).dtype == torch.float16
    with pytest.raises(ValueError, match="noise is None"):
        scheduler.scale_noise(clean, times)

    scheduler.set_begin_index(2)  # image-to-image: the level at which the pipeline begins, whatever the timestep is
    torch.testing.assert_close(scheduler.scale_noise(clean, 0.0, drawn), add_noise(clean, drawn, float(levels[1])))

    ours, theirs = MrFlowScheduler(**SDXL), theirs_with("EulerDiscreteScheduler", **SDXL)
    for each in (ours, theirs):
        each.set_timesteps(7)
    times = theirs.timesteps[[1, 4, 6]]
    torch.testing.assert_close(ours.add_noise(clean, drawn, times), theirs.add_noise(clean, drawn, times))


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_a_mask_keeps_is_noised_to_the_sigma_that_is_due(solver: str) -> None:
    """diffusers' inpainting pipelines noise the kept region anew after every step, for the next one."""
    scheduler = flow(shift=3.0, solver=solver)
    clean, drawn = noise(1, 2, 4), noise(1, 2, 4, seed=1)
    scheduler.set_begin_index(0)
    state, heard = drawn, []
    for index, (time, level) in enumerate(zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True)):
        state = scheduler.step(network(state, float(level)), time, state, return_dict=False)[0]
        due = float(scheduler.sigmas[index + 1])
        # Such a pipeline names the next timestep; where a level is evaluated twice, that does not tell which.
        told = scheduler.timesteps[min(index + 1, len(scheduler.timesteps) - 1)]
        kept = scheduler.scale_noise(clean, told[None], drawn)
        torch.testing.assert_close(kept, (1 - due) * clean + due * drawn)
        heard.append(due)
    assert len(set(heard)) > 2
    assert heard[-1] == 0.0


def test_a_copy_starts_anew_and_leaves_the_other_alone() -> None:
    scheduler, x = flow(), noise(2, 4)
    expected = walk(flow(), x)
    half_way = x
    for time in scheduler.timesteps[:3]:
        half_way = scheduler.step(network(half_way, float(time) / 1000), time, half_way, return_dict=False)[0]
    for made in (copy.copy(scheduler), copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert made.step_index is None
        assert torch.equal(walk(made, x), expected)
    for time in scheduler.timesteps[3:]:
        half_way = scheduler.step(network(half_way, float(time) / 1000), time, half_way, return_dict=False)[0]
    torch.testing.assert_close(half_way, expected, rtol=1e-5, atol=1e-5)


def test_a_step_too_many_and_shapes_that_do_not_fit_are_refused() -> None:
    scheduler, x = flow(), noise(2, 4)
    walk(scheduler, x)
    with pytest.raises(ValueError, match=r"after the last of 6 evaluations; call set_timesteps"):
        scheduler.step(x, 0.0, x)
    scheduler = flow()
    with pytest.raises(ValueError, match=r"model_output has shape \(2, 8\) and sample \(2, 4\)"):
        scheduler.step(noise(2, 8), scheduler.timesteps[0], x)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match=r"sample must keep the shape of the state before it, \(2, 4\), got \(3, 4\)"):
        scheduler.step(noise(3, 4), scheduler.timesteps[1], noise(3, 4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stochastic_sampling": True}, "stochastic_sampling is True"),
        ({**SDXL, "final_sigmas_type": "sigma_min"}, "final_sigmas_type is 'sigma_min'.*'zero'"),
        ({**SDXL, "interpolation_type": "log_linear"}, "interpolation_type is 'log_linear'"),
        ({**SDXL, "prediction_type": "sample"}, "prediction_type is 'sample'.*'epsilon'"),
        ({"prediction_type": "epsilon"}, "needs beta_start and beta_end"),
        ({"time_shift_type": "cubic"}, "time_shift_type is 'cubic'.*'exponential', 'linear'"),
        ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, "only one of use_karras_sigmas"),
        ({"solver": "rk4"}, "solver 'rk4' is unknown"),
        ({"stage": "upscale"}, "stage is 'upscale'.*'sample', 'refine'"),
        ({"stage": "refine", "sigma": 1.2}, "start_sigma must lie between 0 and 1"),
        ({"stage": "refine", "refine_curve": "round"}, "refine_curve must be"),
    ],
)
def test_options_that_are_not_served_are_refused_in_a_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MrFlowScheduler(**options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs one count"),
        ({"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, "'num_inference_steps': 3, 'sigmas': 2"),
        ({"num_inference_steps": 0}, "1 or more"),
        ({"sigmas": [0.5, 0.7]}, "sigmas must fall"),
        ({"sigmas": [14.6, 0.7]}, "sigma must lie between 0 and 1"),
    ],
)
def test_counts_and_lists_that_do_not_fit_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MrFlowScheduler().set_timesteps(**arguments)
    with pytest.raises(ValueError, match="mu is None with use_dynamic_shifting"):
        MrFlowScheduler(use_dynamic_shifting=True).set_timesteps(4)


# ------------------------------------------------------------------------------------------ the lists of diffusers' own


FLOW_EULER = [
    {},
    {"shift": 3.0},
    {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    {"shift": 3.0, "use_karras_sigmas": True},
    {"shift": 3.0, "use_exponential_sigmas": True},
    {"num_train_timesteps": 500, "shift": 1.5, "shift_terminal": 0.1},
]
SHARP: dict[str, Any] = {"rtol": 0.0, "atol": 1e-6}


@pytest.mark.parametrize("config", FLOW_EULER)
@pytest.mark.parametrize("how", ["count", "sigmas", "both"])
def test_euler_on_flow_lists_is_flow_match_euler(config: dict[str, Any], how: str) -> None:
    """Lists, times and the whole loop, however the pipeline asks: FLUX and Qwen give sigmas, CogView4 both."""
    theirs = theirs_with("FlowMatchEulerDiscreteScheduler", **config)
    ours = MrFlowScheduler.from_config(theirs.config, solver="euler")
    training = theirs.config.num_train_timesteps
    asked: dict[str, Any] = {"mu": 0.8} if theirs.config.use_dynamic_shifting else {}
    times = np.linspace(training, 1.0, 7).astype(np.int64).astype(np.float32)
    asked |= {
        "count": {"num_inference_steps": 7},
        "sigmas": {"sigmas": np.linspace(1.0, 1 / 7, 7)},
        "both": {"sigmas": times / training, "timesteps": times},
    }[how]
    if "timesteps" in asked and "timesteps" not in inspect.signature(theirs.set_timesteps).parameters:
        pytest.skip("the installed diffusers has a FlowMatchEulerDiscreteScheduler that takes no timesteps")
    for each in (ours, theirs):
        each.set_timesteps(device="cpu", **asked)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, **SHARP)
    torch.testing.assert_close(ours.timesteps / training, theirs.timesteps / training, **SHARP)
    torch.testing.assert_close(walk(ours, noise(2, 4)), walk(theirs, noise(2, 4)), rtol=1e-5, atol=1e-5)


def test_lists_are_those_of_our_own_plans_too() -> None:
    scheduler = MrFlowScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 12, 12), mu=0.63)
    expected = stretch_to_terminal(native_sigmas(12, mu=0.63), 0.02)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(expected), **SHARP)


def test_one_step_to_the_terminal_has_nothing_to_stretch() -> None:
    scheduler = MrFlowScheduler(shift_terminal=0.02)
    scheduler.set_timesteps(sigmas=[1.0])
    assert scheduler.sigmas.tolist() == [1.0, 0.0]


def test_a_list_that_ends_in_0_twice_ends_in_it_once() -> None:
    """Z-Image of diffusers 0.36 sets sigma_min to 0: nine steps are eight, and no network is run at 0."""
    theirs = theirs_with("FlowMatchEulerDiscreteScheduler", shift=3.0)
    ours = MrFlowScheduler.from_config(theirs.config)
    for each in (ours, theirs):
        each.sigma_min = 0.0
    theirs_times = np.linspace(1000.0, 0.0, 9)  # what that scheduler makes of it
    theirs.set_timesteps(sigmas=theirs_times / 1000)
    ours.set_timesteps(9)
    assert len(ours.timesteps) == 8
    assert theirs.sigmas.tolist() == pytest.approx([*ours.sigmas.tolist(), 0.0])


@pytest.mark.parametrize("config", [{"shift": 3.0}, SDXL])
def test_beta_spacing_is_diffusers(config: dict[str, Any]) -> None:
    pytest.importorskip("scipy")
    kind = "EulerDiscreteScheduler" if "beta_start" in config else "FlowMatchEulerDiscreteScheduler"
    theirs = theirs_with(kind, use_beta_sigmas=True, **config)
    ours = MrFlowScheduler.from_config(theirs.config)
    for each in (ours, theirs):
        each.set_timesteps(7)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-5)


def test_beta_spacing_keeps_the_ends_and_is_symmetric() -> None:
    plain, beta = MrFlowScheduler(shift=3.0), MrFlowScheduler(shift=3.0, use_beta_sigmas=True)
    for each in (plain, beta):
        each.set_timesteps(7)
    top, bottom = float(plain.sigmas[0]), float(plain.sigmas[-2])
    assert (float(beta.sigmas[0]), float(beta.sigmas[-2])) == pytest.approx((top, bottom))
    assert float(beta.sigmas[3]) == pytest.approx((top + bottom) / 2)
    gaps = (beta.sigmas[:-2] - beta.sigmas[1:-1]).tolist()
    assert gaps[0] < gaps[1] < gaps[2]  # Beta(0.6, 0.6) crowds at the ends
    torch.testing.assert_close(torch.tensor(gaps), torch.tensor(gaps[::-1]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_multistep_schedulers_with_flow_sigmas_keep_their_list(kind: str, shift: float) -> None:
    """Sana and HiDream. Theirs start up to shift/1000 below pure noise or end as much off; ours starts at 1."""
    theirs = theirs_with(kind, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
    ours = MrFlowScheduler.from_config(theirs.config)
    for each in (ours, theirs):
        each.set_timesteps(8)
    assert ours.prediction == "flow"
    assert float(ours.sigmas[0]) == 1.0
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=0, atol=1.01e-3 * shift)


EULER = [
    *({**SDXL, "timestep_spacing": spacing} for spacing in ("linspace", "leading", "trailing")),
    {**SDXL, "timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "v_prediction"},
    {**SDXL, "use_karras_sigmas": True},
    {**SDXL, "use_exponential_sigmas": True},
    {**SDXL, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
    {"trained_betas": torch.linspace(1e-4, 0.02, 1000).tolist()},
    {},  # nothing but defaults, which the class has and we have not
]


@pytest.mark.parametrize("config", EULER)
@pytest.mark.parametrize("how", ["count", "timesteps", "sigmas"])
def test_euler_on_variance_exploding_lists_is_euler_discrete(config: dict[str, Any], how: str) -> None:
    theirs = theirs_with("EulerDiscreteScheduler", **config)
    ours = MrFlowScheduler.from_config(theirs.config, solver="euler")
    if how == "timesteps" and (config.get("use_karras_sigmas") or config.get("use_exponential_sigmas")):
        pytest.skip("EulerDiscreteScheduler takes no timesteps with these")
    given = {
        "count": {"num_inference_steps": 7},
        "timesteps": {"timesteps": [999, 700, 401, 33, 0]},
        "sigmas": {"sigmas": [14.6, 7.0, 2.5, 0.8, 0.2, 0.0]},
    }[how]
    for each in (ours, theirs):
        each.set_timesteps(device="cpu", **given)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-4, atol=1e-5)  # theirs: float32 products
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-2)
    assert ours.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-4)
    x = noise(2, 4) * ours.init_noise_sigma
    torch.testing.assert_close(walk(ours, x), walk(theirs, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["DDIMScheduler", "PNDMScheduler", "DDPMScheduler"])
def test_other_configurations_of_sd15_and_sdxl_are_read(kind: str) -> None:
    """What the configuration does not say, the class that it came from does: DDIM's spacing is "leading"."""
    theirs = theirs_with(kind, **SDXL, steps_offset=1)
    ours = MrFlowScheduler.from_config(theirs.config, solver="multistep")
    ours.set_timesteps(10)
    assert ours.prediction == "epsilon"
    assert ours.timesteps.tolist() == [901.0 - 100 * index for index in range(10)]


def test_a_configuration_file_of_sd15_is_read() -> None:
    raw = {"_class_name": "PNDMScheduler", **SDXL, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
    assert MrFlowScheduler.from_config(raw).prediction == "epsilon"


# ---------------------------------------------------------------------------------------------------- refine and stages


@pytest.mark.parametrize("curve", ["linear", "shifted"])
@pytest.mark.parametrize("steps", [1, 3])
def test_nothing_shifts_a_refine_list(curve: str, steps: int) -> None:
    """FLUX.1 would run 0.12 at 0.301 and Qwen-Image at 0.020 if its scheduler made the list.

    Source: docs/method.md, section 1.5.
    """
    theirs = theirs_with("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, shift=3.0, shift_terminal=0.02)
    scheduler = MrFlowScheduler.from_config(theirs.config, stage="refine", sigma=0.12, refine_curve=curve)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=1.15)
    expected = torch.tensor(refine_sigmas(0.12, steps, curve))
    assert torch.equal(scheduler.sigmas, expected)
    assert torch.equal(scheduler.timesteps, torch.tensor([1000 * s for s in refine_sigmas(0.12, steps, curve)[:-1]]))


def test_a_refine_list_of_sdxl_has_the_same_signal_to_noise() -> None:
    scheduler = MrFlowScheduler(**SDXL, stage="refine", sigma=0.12)
    scheduler.set_timesteps(2)
    assert scheduler.sigmas.tolist() == pytest.approx([0.12 / 0.88, 0.06 / 0.94, 0.0])
    assert scheduler.init_noise_sigma == 1.0


ASKED = [{"num_inference_steps": 9, "mu": 1.15}, {"sigmas": [1.0, 0.5], "mu": 3.0}, {"sigmas": [1.0, 0.5]}, {}]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_stage_walks_its_list_whatever_is_asked_for(asked: dict[str, Any], solver: str) -> None:
    config = theirs_with("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, shift=3.0).config
    levels = (0.31, 0.2, 0.07, 0.0)
    scheduler = MrFlowScheduler.for_stage(config, levels, solver)
    scheduler.sigma_min = 0.0  # ZImagePipeline of diffusers 0.36 does this
    scheduler.set_timesteps(device="cpu", **asked)
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(evaluation_sigmas(solver, levels))
    torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    assert scheduler.init_noise_sigma == 1.0


def pulled(solver: str, x: Tensor, levels: Any, prediction: Any = "flow") -> Tensor:
    def model(state: Tensor, sigma: Tensor) -> Tensor:
        level = float(levels[min(range(len(levels)), key=lambda i: abs(levels[i] - float(sigma[0])))])
        seen = state if prediction == "flow" else state / (level**2 + 1.0) ** 0.5
        return to_denoised(network(seen, level), state, level, prediction)

    return SOLVERS[solver](model, x, levels)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction", ["flow", "epsilon", "v"])
def test_pushed_and_pulled_solvers_agree_bit_for_bit(solver: str, shape: tuple[int, ...], prediction: Any) -> None:
    config = FLOW if prediction == "flow" else SDXL
    levels = native_sigmas(6, mu=0.7) if prediction == "flow" else model_sigmas(scaled_linear_sigmas(6), prediction)
    x = levels[0] * noise(*shape)
    scheduler = MrFlowScheduler.for_stage(config, levels, solver, prediction=prediction)
    state = x
    for time, level in zip(scheduler.timesteps, evaluation_sigmas(solver, levels), strict=True):
        seen = scheduler.scale_model_input(state, time)
        state = scheduler.step(network(seen, level), time, state, return_dict=False)[0]
    assert torch.equal(state, scheduler.final_state)
    if prediction == "flow":
        assert torch.equal(state, pulled(solver, x, levels))
    else:  # diffusers divides by the root of a float, the pulled model here by that of a tensor
        torch.testing.assert_close(state, pulled(solver, x, levels, prediction), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solver_steps_are_the_solver(solver: str) -> None:
    """The generator by hand: every evaluation that it asks for is on the list, and its value is the result."""
    levels, x = (0.9, 0.5, 0.2, 0.1), noise(2, 4)
    steps, asked = solver_steps(solver, x.half(), levels), []
    state, sigma = next(steps)
    assert state.dtype == torch.float32
    while True:
        asked.append(sigma)
        try:
            state, sigma = steps.send(to_denoised(network(state, sigma), state, sigma))
        except StopIteration as end:
            final = end.value
            break
    assert tuple(asked) == evaluation_sigmas(solver, levels)
    assert torch.equal(final, pulled(solver, x.half(), levels))
    with pytest.raises(ValueError, match="must fall"):
        solver_steps(solver, x, [0.1, 0.2])
    with pytest.raises(ValueError, match="'rk4'"):
        solver_steps("rk4", x, levels)


def test_heun_also_evaluates_the_end_of_each_step() -> None:
    assert evaluation_sigmas("heun", [0.9, 0.5, 0.0]) == (0.9, 0.5, 0.5)
    assert evaluation_sigmas("heun", [0.9, 0.5, 0.1]) == (0.9, 0.5, 0.5, 0.1)
    assert evaluation_sigmas("euler", torch.tensor([0.75, 0.5, 0.0])) == (0.75, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_state_keeps_float32_where_the_pipeline_does_not(dtype: torch.dtype, solver: str) -> None:
    """The network sees rounded states, the solver its own: nearer to the float32 run than a rounded loop comes."""
    levels, x = native_sigmas(24, mu=0.7), noise(4, 64)
    truth = pulled(solver, x, levels)
    scheduler = MrFlowScheduler.for_stage(FLOW, levels, solver, start=x)
    rounded = x.to(dtype)
    for time, level in zip(scheduler.timesteps, evaluation_sigmas(solver, levels), strict=True):
        output = network(rounded.float(), level).to(dtype)
        rounded = scheduler.step(output, time, rounded, return_dict=False)[0]
        assert rounded.dtype == dtype
    assert scheduler.final_state is not None
    assert scheduler.final_state.dtype == torch.float32
    assert torch.equal(scheduler.final_state.to(dtype), rounded)

    plain = x.to(dtype)
    for a, b in pairwise(levels):
        plain = (plain.float() + (b - a) * network(plain.float(), a).to(dtype).float()).to(dtype)
    if solver == "euler":
        ours, theirs = ((each.float() - truth).square().mean() for each in (scheduler.final_state, plain))
        assert ours < theirs / 2


def test_start_takes_the_place_of_the_pipelines_copy() -> None:
    x = noise(2, 4)
    scheduler = MrFlowScheduler.for_stage(FLOW, (0.12, 0.0), "multistep", start=x)
    velocity = network(x, 0.12).half()
    scheduler.step(velocity, scheduler.timesteps[0], x.half())
    assert scheduler.final_state is not None
    assert torch.equal(scheduler.final_state, x - torch.tensor(0.12) * velocity.float())
    scheduler = MrFlowScheduler.for_stage(FLOW, (0.12, 0.0), "multistep", start=noise(1, 2, 8))
    with pytest.raises(ValueError, match=r"start has shape \(1, 2, 8\) and the pipeline's latents \(1, 4, 4\)"):
        scheduler.step(noise(1, 4, 4), scheduler.timesteps[0], noise(1, 4, 4))


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_evaluation_is_heard_and_may_end_the_run(solver: str) -> None:
    heard: list[dict[str, Any]] = []
    levels, x = (0.9, 0.6, 0.3, 0.0), noise(2, 4)
    scheduler = MrFlowScheduler.for_stage(FLOW, levels, solver, on_evaluation=heard.append)
    assert scheduler.final_state is None
    walk(scheduler, x)
    assert [event["sigma"] for event in heard] == list(evaluation_sigmas(solver, levels))
    assert [event["i"] for event in heard] == ([0, 0, 1, 1, 2] if solver == "heun" else [0, 1, 2])
    for event in heard:
        expected = to_denoised(network(event["x"], event["sigma"]), event["x"], event["sigma"])
        torch.testing.assert_close(event["denoised"], expected, rtol=1e-5, atol=1e-5)

    def stop(event: dict[str, Any]) -> None:
        if event["i"] == 1:
            raise Cancelled

    scheduler = MrFlowScheduler.for_stage(FLOW, levels, solver, on_evaluation=stop)
    with pytest.raises(Cancelled):
        walk(scheduler, x)
    assert scheduler.final_state is None
    assert torch.equal(scheduler.state, heard[2 if solver == "heun" else 1]["x"])  # as it stood


def test_times_are_told_before_the_shift_to_models_that_want_that() -> None:
    """CogView4 conditions on the time before the shift; at its 0.12 it must hear what its own list has there."""
    theirs = theirs_with("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, time_shift_type="linear")
    times = np.linspace(1000.0, 1.0, 400).astype(np.float32)
    theirs.set_timesteps(timesteps=times, sigmas=times / 1000, mu=2.5)
    own = np.interp(0.12, theirs.sigmas[:-1].flip(0).numpy(), theirs.timesteps.flip(0).numpy())
    fixed = MrFlowScheduler.for_stage(theirs.config, (0.12, 0.0), "euler")
    refine = MrFlowScheduler.from_config(theirs.config, stage="refine", sigma=0.12)
    for scheduler in (fixed, refine):
        scheduler.set_timesteps(timesteps=[1000.0], sigmas=[1.0], mu=2.5)
        assert scheduler.sigmas.tolist() == pytest.approx([0.12, 0.0])
        assert float(scheduler.timesteps[0]) == pytest.approx(own, abs=0.05)
        assert float(scheduler.timesteps[0]) < 60.0  # and not 120


def test_stages_refuse_what_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match="sigmas must be at most 1 for flow"):
        MrFlowScheduler.for_stage(FLOW, (14.6, 1.0, 0.0), "euler")
    with pytest.raises(ValueError, match="sigmas must fall"):
        MrFlowScheduler.for_stage(FLOW, (0.1, 0.5, 0.0), "euler")
    with pytest.raises(ValueError, match="needs beta_start"):
        MrFlowScheduler.for_stage(FLOW, (14.6, 0.0), "euler", prediction="epsilon")
    with pytest.raises(ValueError, match="solver 'rk4' is unknown"):
        MrFlowScheduler.for_stage(FLOW, (0.5, 0.0), "rk4")
    with pytest.raises(ValueError, match="prediction_type 'sample', which is not flow, epsilon or v"):
        MrFlowScheduler.for_stage({"prediction_type": "sample"}, (0.5, 0.0), "euler")


def test_a_stage_does_not_mind_options_that_shape_other_lists() -> None:
    config = theirs_with("EulerDiscreteScheduler", **SDXL, use_karras_sigmas=True, final_sigmas_type="sigma_min").config
    scheduler = MrFlowScheduler.for_stage(config, (5.0, 1.0, 0.0), "euler", prediction="epsilon")
    assert scheduler.sigmas.tolist() == [5.0, 1.0, 0.0]


# ------------------------------------------------------------------------------------------- states that others changed


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_state_that_a_callback_changed_counts(solver: str) -> None:
    """Moved by a constant, on a field that does not see the constant: the whole run is moved by it, history and all."""
    levels, x, move = native_sigmas(6, mu=0.7), noise(2, 8), torch.full((2, 8), 0.25)
    weight = noise(8, 8, seed=3)
    weight = weight - weight.mean(dim=0)  # blind to constants

    def field(state: Tensor, level: float) -> Tensor:
        return torch.tanh(state @ weight) * (1 + level)

    def run(change_at: int | None, in_place: bool = False) -> tuple[Tensor, Tensor]:
        scheduler = MrFlowScheduler.for_stage(FLOW, levels, solver)
        state = x.clone()
        for index, level in enumerate(evaluation_sigmas(solver, levels)):
            if index == change_at:
                state = state.add_(move) if in_place else state + move
            state = scheduler.step(field(state, level), scheduler.timesteps[index], state, return_dict=False)[0]
        assert scheduler.final_state is not None
        return state, scheduler.final_state

    plain, _ = run(None)
    for in_place in (False, True):
        changed, final = run(3, in_place)
        assert torch.equal(changed, final)
        torch.testing.assert_close(changed, plain + move, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_copies_of_the_state_are_not_changes(solver: str) -> None:
    """Pipelines cast and copy between steps; the float32 state must survive that."""
    levels, x = native_sigmas(8, mu=0.7), noise(2, 4)

    def run(disguise: Any) -> Tensor:
        scheduler = MrFlowScheduler.for_stage(FLOW, levels, solver, start=x)
        state = x.bfloat16()
        for time, level in zip(scheduler.timesteps, evaluation_sigmas(solver, levels), strict=True):
            output = network(state.float(), level).bfloat16()
            state = disguise(scheduler.step(output, time, state, return_dict=False)[0])
        assert scheduler.final_state is not None
        return scheduler.final_state

    plain = run(lambda state: state)
    assert torch.equal(run(torch.clone), plain)
    assert torch.equal(run(lambda state: state.float()), plain)


def test_changes_are_seen_in_inference_mode_too() -> None:
    with torch.inference_mode():
        scheduler, x = flow(solver="euler"), noise(2, 4)
        state = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)[0]
        before = scheduler.state.clone()
        state.add_(1.0)
        scheduler.step(torch.zeros_like(x), scheduler.timesteps[1], state)
        torch.testing.assert_close(scheduler.state, before + 1.0)


def test_the_returned_state_is_not_the_solvers_own() -> None:
    scheduler, x = flow(), noise(2, 4)
    returned = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)[0]
    before = scheduler.state.clone()
    returned.zero_()
    assert torch.equal(scheduler.state, before)


# ------------------------------------------------------------------------------------------------------- real pipelines


@pytest.mark.parametrize("name", ["flux1-dev", "qwen-image", "sd3", "z-image", "lumina2", "sdxl"])
def test_a_real_pipeline_makes_the_same_picture_with_our_euler(name: str) -> None:
    from tiny_pipelines import make

    pipe = make(name)
    asked = {"prompt": "a red cube", "width": 64, "height": 64, "num_inference_steps": 4, "output_type": "latent"}

    def run() -> Tensor:
        found: Tensor = pipe(**asked, generator=torch.Generator().manual_seed(4)).images
        return found.float()

    theirs = run()
    pipe.scheduler = MrFlowScheduler.from_config(pipe.scheduler.config, solver="euler")
    torch.testing.assert_close(run(), theirs, rtol=2e-3, atol=2e-3)
    pipe.scheduler = MrFlowScheduler.from_config(pipe.scheduler.config, solver="multistep")
    assert not torch.allclose(run(), theirs, rtol=2e-3, atol=2e-3)
    assert pipe.scheduler.final_state.dtype == torch.float32


def test_inpainting_is_diffusers_own_with_our_euler() -> None:
    """Every step puts the kept region back, noised to the next sigma: the wrong one shows at the mask's border."""
    from tiny_pipelines import make

    pipe = diffusers.StableDiffusion3InpaintPipeline(**make("sd3").components)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros((1, 1, 64, 64))
    mask[..., 32:] = 1.0
    asked: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 6, "output_type": "latent"}

    def run() -> Tensor:
        drawn = torch.Generator().manual_seed(4)
        found: Tensor = pipe("a red cube", image=image, mask_image=mask, strength=0.7, generator=drawn, **asked).images
        return found

    theirs = run()
    pipe.scheduler = MrFlowScheduler.from_config(pipe.scheduler.config, solver="euler")
    torch.testing.assert_close(run(), theirs, rtol=1e-4, atol=1e-4)


def test_a_pipeline_is_saved_and_loaded_with_it(tmp_path: Any) -> None:
    from tiny_pipelines import make

    pipe = make("sd3")
    pipe.scheduler = MrFlowScheduler.from_config(pipe.scheduler.config, solver="careful", stage="refine", sigma=0.2)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert isinstance(loaded.scheduler, MrFlowScheduler)
    assert (loaded.scheduler.config.solver, loaded.scheduler.config.sigma) == ("careful", 0.2)


def timesteps_of(network: Any) -> list[float]:
    """A list that fills with what the network is told at each evaluation."""
    heard: list[float] = []

    def hear(_module: Any, _args: Any, named: dict[str, Any]) -> None:
        heard.append(float(named["timestep"].flatten()[0]))

    network.register_forward_pre_hook(hear, with_kwargs=True)
    return heard


def test_a_pipeline_and_its_image_to_image_twin_make_a_staged_image() -> None:
    """As docs/library.md shows it: twelve evaluations on the pipeline's own list, and one at the refine sigma."""
    from tiny_pipelines import make

    pipe = make("flux1-dev")
    own = pipe.scheduler.config
    pipe.scheduler = MrFlowScheduler.from_config(own, solver="multistep")
    heard = timesteps_of(pipe.transformer)
    image = pipe("a star", width=64, height=64, num_inference_steps=12).images[0]
    refine = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    refine.scheduler = MrFlowScheduler.from_config(own, stage="refine", sigma=0.12)
    refine.set_progress_bar_config(disable=True)
    large = image.resize((128, 128))
    sharp = refine("a star", image=large, width=128, height=128, strength=1.0, num_inference_steps=1).images[0]
    assert sharp.size == (128, 128)
    assert len(heard) == 13
    assert heard[0] == 1.0
    assert heard[-1] == pytest.approx(0.12)


def test_a_modular_pipeline_walks_a_stage() -> None:
    if not hasattr(diffusers, "ModularPipeline"):
        pytest.skip("the installed diffusers has no modular pipelines")
    from tiny_pipelines import make

    from mrflow_sched.engines.diffusers.modular import StageTimesteps

    flux = make("flux1-dev")
    blocks = import_module("diffusers.modular_pipelines").FluxAutoBlocks()
    core = blocks.sub_blocks["denoise"].sub_blocks
    core.insert("stage_timesteps", StageTimesteps(), list(core).index("denoise"))
    pipe = blocks.init_pipeline()
    pipe.update_components(**{name: part for name, part in flux.components.items() if name in pipe.component_names})
    asked = {"prompt": "a red cube", "width": 64, "height": 64, "num_inference_steps": 3, "output": "latents"}

    def run(**more: Any) -> Tensor:
        return pipe(**asked, max_sequence_length=32, generator=torch.Generator().manual_seed(1), **more)

    theirs = run()
    with pytest.raises(ValueError, match="scheduler is a FlowMatchEulerDiscreteScheduler; update_components"):
        run(stage_sigmas=[0.12, 0.0])
    pipe.update_components(scheduler=MrFlowScheduler.from_config(flux.scheduler.config, solver="euler"))
    torch.testing.assert_close(run(), theirs, rtol=1e-3, atol=1e-3)
    heard = timesteps_of(flux.transformer)
    run(latents=noise(1, 16, 64), stage_sigmas=[0.12, 0.05, 0.0])
    assert heard == pytest.approx([0.12, 0.05])
