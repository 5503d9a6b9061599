"""The staged sampler on the analytic field: order, progress, cancelling, cleaning up, batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.analytic import GaussianFieldEngine
from mrflow_sched.plan.make import make_native_plan, make_plan
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import StagedResult, sample_staged
from mrflow_sched.sampling.engine import Capabilities
from mrflow_sched.sampling.method import Plain, StageRun
from mrflow_sched.sampling.noise import draw_noise
from mrflow_sched.sampling.progress import Progress, wait_for
from mrflow_sched.sampling.solvers import get_solver
from mrflow_sched.upscaling.fit import upscale_to

ENGINE = GaussianFieldEngine(means={"red": (2.0, -1.0, -1.0), "blue": (-1.0, -1.0, 2.0)})
FAMILY = ENGINE.family
FIRST = ("text", "stage 1 sample", "stage 1 decode")
TIMINGS = [*FIRST, "upscale", "encode", "noise", "stage 2 sample", "stage 2 decode"]


class Recording:
    """An engine around another that notes every call, and can be told to fail at the nth evaluation."""

    def __init__(self, inner: GaussianFieldEngine = ENGINE, on_denoise: Callable[[int], None] | None = None) -> None:
        self.inner = inner
        self.family, self.device = inner.family, inner.device
        self.calls: list[tuple[str, Any]] = []
        self.on_denoise = on_denoise

    def encode_text(self, prompts, negative_prompts=None):
        self.calls.append(("text", (tuple(prompts), None if negative_prompts is None else tuple(negative_prompts))))
        return self.inner.encode_text(prompts, negative_prompts)

    def latent_shape(self, width, height):
        return self.inner.latent_shape(width, height)

    def denoise(self, x, sigma, text, *, guidance):
        self.calls.append(("denoise", (tuple(x.shape), round(sigma[0].item(), 6), guidance)))
        if self.on_denoise:
            self.on_denoise(sum(name == "denoise" for name, _ in self.calls))
        return self.inner.denoise(x, sigma, text, guidance=guidance)

    def encode(self, images, *, posterior="mode", seeds=None):
        self.calls.append(("encode", (tuple(images.shape), posterior, seeds)))
        return self.inner.encode(images, posterior=posterior, seeds=seeds)

    def decode(self, latents):
        self.calls.append(("decode", tuple(latents.shape)))
        return self.inner.decode(latents)

    def count(self, name: str) -> int:
        return sum(call == name for call, _ in self.calls)


class Doubler:
    """A pixel upscaler of scale 2 by repetition; calls `during` while it works."""

    name, scale = "doubler", 2

    def __init__(self, during: Callable[[], None] = lambda: None) -> None:
        self.during = during

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.during()
        return images.repeat_interleave(2, -1).repeat_interleave(2, -2)


def plan_of(width: int = 32, height: int = 32, **changes: Any) -> StagedPlan:
    settings: dict[str, Any] = {"low_steps": 4, "refine_steps": 1, "sigma": 0.2, "seed": 11, "solver": "euler"}
    return make_plan(FAMILY, width, height, **(settings | changes))


def run(engine: Any = ENGINE, plan: StagedPlan | None = None, prompt: Any = "red", **changes: Any) -> StagedResult:
    settings: dict[str, Any] = {"upscaler": Doubler(), **changes}
    return sample_staged(engine, plan or plan_of(), prompt, **settings)


# -------------------------------------------------------------------------------------------------------- the order


def test_a_two_stage_run_is_the_method_step_by_step() -> None:
    """The whole run written out again with nothing but tensors (docs/method.md, section 1.2)."""
    result = run()
    text = ENGINE.encode_text(["red"])

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return ENGINE.denoise(x, torch.tensor([sigma]), text, guidance=1.0)

    plan = plan_of()
    z = draw_noise((48, 4, 4), [11])
    for now, then in pairwise(plan.stages[0].sigmas):
        z = z + (then - now) * (z - denoise(z, now)) / now
    low = ENGINE.decode(z)
    clean = ENGINE.encode(Doubler()(low))
    z = 0.8 * clean + 0.2 * draw_noise((48, 8, 8), [12])
    torch.testing.assert_close(result.images, ENGINE.decode(denoise(z, 0.2)), rtol=0, atol=1e-6)
    assert result.images.shape == (1, 3, 32, 32)
    assert result.images.dtype == torch.float32
    assert not result.images.requires_grad


def test_parts_come_in_order_and_are_timed() -> None:
    engine = Recording()
    result = run(engine)
    assert [name for name, _ in engine.calls] == ["text"] + ["denoise"] * 4 + ["decode", "encode", "denoise", "decode"]
    assert [timing.name for timing in result.timings] == TIMINGS
    assert all(timing.seconds >= 0 for timing in result.timings)
    assert result.forwards == 5
    assert result.seeds == (11,)
    assert result.plan == plan_of()
    assert not result.cancelled
    assert result.warnings == ()
    assert result.stages == ()


def test_three_stages_and_kept_stages() -> None:
    plan = plan_of(64, 32, stages=3, refine_steps=[2, 1], sigma=[0.3, 0.1])
    engine = Recording()
    result = run(engine, plan, keep_stages=True)
    assert [(stage.name, tuple(stage.image.shape[2:])) for stage in result.stages] == [
        ("stage 1", (8, 16)),
        ("stage 2 upscaled", (16, 32)),
        ("stage 2", (16, 32)),
        ("stage 3 upscaled", (32, 64)),
    ]
    levels = [call[1] for name, call in engine.calls if name == "denoise"]
    assert levels[4:] == [0.3, 0.15, 0.1]
    assert [timing.name for timing in result.timings][-2:] == ["stage 3 sample", "stage 3 decode"]
    assert result.images.shape == (1, 3, 32, 64)


def test_native_plan_runs_one_stage() -> None:
    engine = Recording()
    result = run(engine, make_native_plan(FAMILY, 32, 16, steps=3, seed=4))
    assert [timing.name for timing in result.timings] == TIMINGS[:3]
    assert engine.count("encode") == 0
    assert result.images.shape == (1, 3, 16, 32)


def test_no_refine_steps_keep_the_upscaled_image() -> None:
    engine = Recording()
    result = run(engine, plan_of(refine_steps=0), keep_stages=True)
    assert torch.equal(result.images, Doubler()(result.stages[0].image))
    assert [name for name, _ in engine.calls] == ["text"] + ["denoise"] * 4 + ["decode"]
    assert [timing.name for timing in result.timings] == TIMINGS[:4]


def test_a_stage_without_steps_can_be_followed_by_one_with() -> None:
    result = run(plan=plan_of(64, 64, stages=3, refine_steps=[0, 1]), keep_stages=True)
    assert [stage.name for stage in result.stages] == ["stage 1", "stage 2 upscaled", "stage 3 upscaled"]
    assert result.forwards == 5


def test_latents_are_those_that_the_images_were_decoded_from() -> None:
    whole = run()
    assert whole.latents is not None
    assert torch.equal(ENGINE.decode(whole.latents), whole.images)
    # An upscaled image was not decoded from anything: the latents of stage 1 are another, smaller image's.
    assert run(plan=plan_of(refine_steps=0)).latents is None
    assert run(plan=plan_of(64, 64, stages=3, refine_steps=[1, 0])).latents is None


@pytest.mark.parametrize("more", [{}, {"native": True, "low_steps": None, "refine_steps": None, "sigma": None}])
def test_a_size_off_the_grid_is_made_on_it_and_trimmed_at_its_edges(more: dict[str, Any]) -> None:
    given = {name: value for name, value in more.items() if value is not None}
    kept = {
        name: value for name, value in {"low_steps": 4, "refine_steps": 1, "sigma": 0.2}.items() if name not in more
    }
    grid = FAMILY.grid
    odd = make_plan(FAMILY, 4 * grid - 3, 2 * grid - 2, seed=11, **kept, **given)
    even = make_plan(FAMILY, 4 * grid, 2 * grid, seed=11, **kept, **given)
    trimmed, whole = run(plan=odd), run(plan=even)
    assert torch.equal(trimmed.images, whole.images[..., 1:-1, 1:-2])
    assert trimmed.images.shape[-2:] == (2 * grid - 2, 4 * grid - 3)
    assert trimmed.latents is not None
    assert whole.latents is not None
    assert torch.equal(trimmed.latents, whole.latents)


def test_upscale_mode_starts_from_a_picture() -> None:
    engine = Recording()
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    events: list[Progress] = []
    result = run(engine, image=picture, batch=2, callback=events.append)
    assert [name for name, _ in engine.calls] == ["text", "encode", "denoise", "decode"]
    assert [timing.name for timing in result.timings] == ["text", *TIMINGS[3:]]
    assert {event.stage for event in events} == {2}
    assert events[0].fraction == 0.0
    assert next(event.fraction for event in events if event.name == "stage 2 decode") == 1.0
    assert events[-1].fraction == 1.0
    alone = run(image=picture[None], plan=plan_of(seed=12))
    torch.testing.assert_close(result.images[1:], alone.images, rtol=0, atol=1e-6)


def test_upscale_mode_without_refinement_has_no_network_cost_to_divide_by() -> None:
    events: list[Progress] = []
    run(image=torch.full((3, 16, 16), 0.5), plan=plan_of(refine_steps=0), callback=events.append)
    assert [event.fraction for event in events] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep", "careful"])
def test_forwards_are_counted_as_they_are_made(solver: str) -> None:
    engine = Recording()
    plan = plan_of(solver=solver, refine_steps=2)
    result = run(engine, plan)
    assert engine.count("denoise") == plan.forwards == result.forwards


def test_classifier_free_guidance_counts_twice() -> None:
    family = replace(FAMILY, guidance_kind="cfg", guidance=4.0)
    plan = make_plan(family, 32, 32, low_steps=3, refine_steps=1, refine_guidance=1.0)
    engine = Recording(replace(ENGINE, family=family))
    result = run(engine, plan)
    assert plan.forwards == result.forwards == 3 * 2 + 1
    assert [call[2] for name, call in engine.calls if name == "denoise"] == [4.0, 4.0, 4.0, 1.0]


class OwnLoop(Recording):
    """An engine that walks stages itself, at one guidance scale."""

    capabilities = Capabilities(whole_stages=True)

    def sample_stage(self, solver, latents, sigmas, text, *, guidance, progress=None, callback=None):
        self.calls.append(("stage", guidance))

        def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return self.inner.denoise(x, sigma, text, guidance=guidance)

        return get_solver(solver)(model, latents, sigmas, callback=callback)


def test_an_engines_own_loop_of_one_guidance_is_not_given_an_interval() -> None:
    """It is asked step by step in that stage, which is slower and the same."""
    family = replace(FAMILY, guidance_kind="cfg", guidance=4.0)
    engine = OwnLoop(replace(ENGINE, family=family))
    stepped = Recording(engine.inner)
    plan = make_plan(family, 32, 32, low_steps=4, refine_steps=1, solver="euler", guidance_interval=(0.3, 0.9))
    result = run(engine, plan)
    assert [call for call in engine.calls if call[0] == "stage"] == [("stage", 4.0)]  # the refine stage
    scales = [call[2] for name, call in engine.calls if name == "denoise"]
    assert scales == [4.0 if 0.3 <= sigma <= 0.9 else 1.0 for sigma in plan.stages[0].sigmas[:-1]]
    assert len(set(scales)) == 2
    assert torch.equal(result.images, run(stepped, plan).images)
    assert result.forwards == plan.forwards


def test_variance_exploding_engines_get_sigma_ve() -> None:
    family = replace(FAMILY, prediction="epsilon")
    engine = Recording(replace(ENGINE, family=family))
    plan = make_plan(family, 32, 32, low_steps=2, refine_steps=1, sigma=0.2, solver="euler", mu=None)
    run(engine, plan)
    levels = [call[1] for name, call in engine.calls if name == "denoise"]
    assert levels[0] == pytest.approx(14.6146, abs=1e-3)
    assert levels[-1] == pytest.approx(0.25)


# -------------------------------------------------------------------------------------------------- batches and seeds


@pytest.mark.parametrize("solver", ["euler", "careful"])
def test_a_batch_equals_its_images_made_alone(solver: str) -> None:
    plan = plan_of(solver=solver, posterior="sample")
    together = run(plan=plan, prompt=["red", "blue", ""])
    assert together.seeds == (11, 12, 13)
    for i, prompt in enumerate(["red", "blue", ""]):
        alone = run(plan=replace(plan, seed=11 + i), prompt=prompt)
        torch.testing.assert_close(together.images[i : i + 1], alone.images, rtol=0, atol=1e-6)


def test_one_prompt_serves_a_whole_batch_and_text_is_encoded_once() -> None:
    engine = Recording()
    result = run(engine, prompt="red", batch=3, negative_prompt="blue")
    assert [call for name, call in engine.calls if name == "text"] == [(("red",) * 3, ("blue",) * 3)]
    assert result.images.shape[0] == 3
    assert not torch.equal(result.images[0], result.images[1])


def test_later_stages_may_be_told_something_else() -> None:
    engine = Recording()
    asked: Any = {"plan": plan_of(sigma=0.9), "batch": 2, "keep_stages": True}
    result = run(engine, **asked, refine_prompt=["blue", "red"], refine_negative_prompt="red")
    assert [call for name, call in engine.calls if name == "text"] == [
        (("red", "red"), None),
        (("blue", "red"), ("red", "red")),
    ]
    plain = run(**asked)
    assert torch.equal(result.stages[0].image, plain.stages[0].image)
    assert torch.equal(result.images[1], plain.images[1])
    assert float((result.images[0] - plain.images[0]).abs().max()) > 1e-3
    assert torch.equal(result.images[:1], run(plan=asked["plan"], image=plain.stages[0].image[0], prompt="blue").images)


def test_the_colour_guard_compares_with_stage_1_or_with_the_given_image() -> None:
    class Tinting(Doubler):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return (super().__call__(images) + torch.tensor([0.05, 0.0, -0.05]).view(1, 3, 1, 1)).clamp(0, 1)

    for more in ({}, {"image": torch.full((3, 16, 16), 0.4)}):
        asked: Any = {"upscaler": Tinting(), "batch": 2, "keep_stages": True, **more}
        tinted, guarded = run(**asked), run(**asked, colour_guard=True)
        low = asked.get("image", tinted.stages[0].image).mean((-1, -2))
        assert float((tinted.images.mean((-1, -2)) - low).abs().max()) > 0.03
        assert float((guarded.images.mean((-1, -2)) - low).abs().max()) < 2e-3
        assert tinted.latents is not None
        assert guarded.latents is None
        assert torch.equal(tinted.stages[0].image, guarded.stages[0].image)
    plain, guarded = run(batch=2), run(batch=2, colour_guard=True)
    assert torch.equal(plain.images, guarded.images)
    assert guarded.latents is not None


def test_hash_seeds_differ_from_stage_to_stage() -> None:
    plan = plan_of(seed_rule="hash")
    result = run(plan=plan, batch=2)
    assert len(set(result.seeds)) == 2
    assert torch.equal(result.images, run(plan=plan, batch=2).images)
    assert not torch.equal(result.images, run(batch=2).images)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch": 0}, "batch must be 1 or more"),
        ({"prompt": ["a", "b"], "batch": 3}, "prompt must be one text or one per image"),
        ({"prompt": []}, "prompt must be one text"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c", "d", "e"]}, "negative_prompt must be one"),
        ({"image": torch.zeros(4, 8, 8)}, r"image must be .* got \(4, 8, 8\); drop the alpha channel"),
        ({"image": torch.zeros(8, 8, 3)}, r"image must be .* got \(8, 8, 3\); RGB comes first"),
        ({"image": torch.zeros(8, 8)}, "image must be"),
        ({"image": torch.zeros(2, 3, 8, 8)}, "image holds 2 images for 1 prompt; give one prompt per image"),
        ({"image": torch.zeros(3, 3, 8, 8), "batch": 2}, "image holds 3 images for 2 prompts"),
        ({"image": np.zeros((8, 8, 3))}, "image is ndarray; give a tensor .*from_pictures of a PIL image"),
        ({"image": "a.png"}, "image is str; give a tensor .* load_image of a file"),
        ({"image": torch.full((3, 8, 8), torch.nan)}, "image holds NaN or infinity"),
        ({"prompt": None}, "prompt is None; give a text"),
        ({"prompt": 3}, "prompt must be a text or a list of texts, got int"),
        ({"prompt": b"red"}, "prompt must be a text or a list of texts, got bytes"),
        ({"prompt": ["red", None]}, "prompt must be a text or a list of texts, got None"),
        ({"negative_prompt": ["c", "d"]}, "negative_prompt must be one text or one per image, got 2 for a batch of 1"),
        ({"negative_prompt": [1]}, "negative_prompt must be a text or a list of texts, got int"),
        ({"refine_prompt": "a", "plan": make_native_plan(FAMILY, 16, 16)}, "refine_prompt is for the stages after"),
        ({"refine_prompt": ["a", "b"]}, "refine_prompt must be one text or one per image, got 2 for a batch of 1"),
        ({"refine_lora_scale": 0.5}, "refine_lora_scale=0.5 cannot be used, as Gaussian field takes no LoRA"),
        ({"refine_lora_scale": True}, "refine_lora_scale must be a finite number; .* got True"),
        ({"batch": 1.5}, "batch must be 1 or more, got 1.5"),
        ({"batch": "2"}, "batch must be 1 or more, got '2'"),
        ({"seeds": 7}, r"seeds must hold one whole number per image \('int' object is not iterable\)"),
        ({"seeds": [1.5]}, "seeds must hold one whole number per image"),
        ({"seeds": "1"}, "seeds must hold one whole number per image"),
        ({"callback": 3}, "callback is int; give a function"),
        ({"cancel": True}, "cancel is bool; give a function"),
        ({"method": "tiled"}, "method is str, which has no gradients; give a method"),
        ({"engine": None}, "engine is None, which has no family; give an engine"),
        ({"plan": "flux"}, "plan is str; give what make_plan or StagedPlan.from_string returns"),
        ({"image": torch.zeros(3, 8, 8), "start_sigma": "0.5"}, "start_sigma must be above 0 and at most 1, got '0.5'"),
        ({"image": torch.zeros(3, 8, 8), "start_sigma": float("nan")}, "start_sigma must be above 0 and at most 1"),
        ({"image": torch.zeros(3, 8, 8, dtype=torch.uint8)}, "image must hold floats"),
        ({"image": torch.full((3, 8, 8), 2.0)}, "got 2 to 2; divide them by 255"),
        ({"image": torch.zeros(3, 8, 8), "plan": make_native_plan(FAMILY, 16, 16)}, "two stages or more"),
    ],
)
def test_arguments_that_do_not_fit_get_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        run(**changes)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- progress


@pytest.mark.parametrize("plan", [plan_of(), plan_of(64, 64, stages=3, solver="heun"), plan_of(refine_steps=0)])
def test_progress_rises_from_0_to_1_by_cost(plan: StagedPlan) -> None:
    events: list[Progress] = []
    run(plan=plan, callback=events.append)
    fractions = [event.fraction for event in events]
    assert fractions[0] == 0.0
    assert fractions[-1] == 1.0
    assert fractions == sorted(fractions)
    assert events[-1].name == "done"
    costs = plan.stage_costs()
    after_stage_1 = next(event for event in events if event.name == "stage 1 decode")
    assert after_stage_1.fraction == pytest.approx(costs[0] / sum(costs))
    stage_1 = [event.fraction for event in events if event.name == "stage 1 sample"]
    gaps = [b - a for a, b in pairwise(stage_1)]
    assert max(gaps) == pytest.approx(min(gaps))


def test_progress_says_where_it_is_and_shows_the_estimate() -> None:
    events: list[Progress] = []
    run(callback=events.append)
    sampling = [event for event in events if event.name == "stage 1 sample"]
    assert [(e.stage, e.stages, e.step, e.steps) for e in sampling] == [(1, 2, i, 4) for i in range(5)]
    assert sampling[0].denoised is None
    assert all(event.denoised is not None and event.denoised.shape == (1, 48, 4, 4) for event in sampling[1:])
    assert [event.name for event in events if event.step == 0] == [
        "text", "stage 1 sample", "upscale", "encode", "noise", "stage 2 sample"
    ]  # fmt: skip


def test_a_run_with_and_without_a_listener_is_the_same() -> None:
    assert torch.equal(run().images, run(callback=lambda _: None, cancel=lambda: False, keep_stages=True).images)


# ------------------------------------------------------------------------------------- seeds, a picture to begin from


def test_every_image_may_have_a_seed_of_its_own() -> None:
    both = run(prompt=["red", "blue"], seeds=[5, 90])
    assert both.seeds == (5, 90)
    for number, (prompt, seed) in enumerate((("red", 5), ("blue", 90))):
        alone = run(plan=plan_of(seed=seed), prompt=prompt)
        torch.testing.assert_close(alone.images[0], both.images[number], rtol=0, atol=1e-6)
    assert torch.equal(run(batch=2, seeds=[11, 12]).images, run(batch=2).images)
    with pytest.raises(ValueError, match="seeds must hold one seed per image, got 1 for a batch of 2"):
        run(batch=2, seeds=[1])


def test_stage_1_may_begin_at_a_picture() -> None:
    picture = torch.rand((3, 24, 24), generator=torch.Generator().manual_seed(3))
    plan = plan_of()
    engine = Recording()
    result = run(engine, plan, image=picture, start_sigma=0.5)
    levels = [call[1][1] for call in engine.calls if call[0] == "denoise"]
    below = [sigma for sigma in plan.stages[0].sigmas if 0 < sigma < 0.49]
    assert levels == pytest.approx([0.5, *below, 0.2], abs=1e-6)
    assert result.forwards == len(levels)
    assert [name for name, _ in engine.calls][:2] == ["text", "encode"]
    low = run(plan=plan, image=picture, start_sigma=0.01, keep_stages=True).stages[0].image
    torch.testing.assert_close(low, upscale_to(picture[None], 16, 16), rtol=0, atol=0.05)
    noise = run(plan=plan, image=picture, start_sigma=1.0)
    torch.testing.assert_close(noise.images, run(plan=plan).images, rtol=0, atol=1e-6)
    events: list[Progress] = []
    run(plan=plan, image=picture, start_sigma=0.5, callback=events.append)
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


class FirstState(Recording):
    """Keeps the state of the first evaluation."""

    state: torch.Tensor | None = None

    def denoise(self, x, sigma, text, *, guidance):
        self.state = x if self.state is None else self.state
        return super().denoise(x, sigma, text, guidance=guidance)


@pytest.mark.parametrize(("posterior", "after"), [("mode", 0), ("sample", 1)])
def test_an_image_to_begin_at_gets_noise_that_its_encoding_did_not_use(posterior: str, after: int) -> None:
    """A posterior that is drawn takes the first numbers of the seed, the noise those after them."""
    picture = torch.full((3, 16, 16), 0.4)
    engine = FirstState()
    run(engine, plan_of(posterior=posterior), image=picture, start_sigma=0.5)
    encoded = ENGINE.encode(picture[None], posterior=posterior, seeds=[11])
    wanted = 0.5 * encoded + 0.5 * draw_noise((48, 4, 4), [11], after=after)
    assert engine.state is not None
    torch.testing.assert_close(engine.state, wanted, rtol=0, atol=1e-6)


def test_only_a_first_step_of_no_length_is_left_out() -> None:
    """A sigma of the schedule within 2 % of the start would cost a forward and change nothing; the next counts."""
    sigmas = plan_of().stages[0].sigmas
    assert sigmas[2] < 0.97
    for start, first in ((sigmas[2] / 0.99, 3), (sigmas[2] / 0.97, 2), (sigmas[2] / 0.9, 2)):
        engine = Recording()
        run(engine, plan_of(), image=torch.full((3, 16, 16), 0.4), start_sigma=start)
        levels = [call[1] for name, call in engine.calls if name == "denoise"]
        assert levels == pytest.approx([start, *sigmas[first:-1], 0.2], abs=1e-6)


def test_progress_from_an_image_counts_the_steps_that_are_left() -> None:
    plan = plan_of()
    events: list[Progress] = []
    run(plan=plan, image=torch.full((3, 16, 16), 0.4), start_sigma=plan.stages[0].sigmas[2], callback=events.append)
    low, full = plan.stage_costs()
    left = low * (plan.stages[0].steps - 2) / plan.stages[0].steps
    after_stage_1 = next(event for event in events if event.name == "stage 1 decode")
    assert after_stage_1.fraction == pytest.approx(left / (left + full))
    sampled = [event for event in events if event.name == "stage 1 sample"]
    assert [(event.step, event.steps) for event in sampled] == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"start_sigma": 0.5}, "start_sigma=0.5 needs an image to start from"),
        ({"start_sigma": 0.0, "image": torch.zeros(3, 8, 8)}, "start_sigma must be above 0 and at most 1, got 0.0"),
    ],
)
def test_a_start_that_cannot_be_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(**changes)


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("part", "side"), [("encode", 32), ("denoise", 32), ("decode", 32), ("upscale", 16)])
def test_memory_that_runs_out_after_stage_1_gives_the_best_picture_so_far(part: str, side: int) -> None:
    class Full(Recording):
        def _fill(self, name: str, large: bool) -> None:
            if name == part and large:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        def denoise(self, x, sigma, text, *, guidance):
            self._fill("denoise", x.shape[-1] > 4)
            return super().denoise(x, sigma, text, guidance=guidance)

        def encode(self, images, *, posterior="mode", seeds=None):
            self._fill("encode", True)
            return super().encode(images, posterior=posterior, seeds=seeds)

        def decode(self, latents):
            self._fill("decode", latents.shape[-1] > 4)
            return super().decode(latents)

    def fill() -> None:
        if part == "upscale":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    result = run(Full(), upscaler=Doubler(fill))
    assert result.images.shape == (1, 3, side, side)
    assert result.unfinished
    assert not result.cancelled
    assert sum("Memory ran out in" in warning for warning in result.warnings) == 1


def test_memory_that_runs_out_before_there_is_a_picture_is_an_error() -> None:
    def fill(_count: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        run(Recording(on_denoise=fill))


# --------------------------------------------------------------------------------------------------------- cancelling


class StopAt:
    """A cancel function and callback in one: asks to stop once the wanted moment has been reported."""

    def __init__(self, name: str, step: int = 0) -> None:
        self.name, self.step, self.stop = name, step, False
        self.denoised: torch.Tensor | None = None

    def hear(self, event: Progress) -> None:
        if event.name == self.name and event.step >= self.step:
            self.stop = True
            self.denoised = event.denoised

    def asked(self) -> bool:
        return self.stop


def stopped_at(name: str, step: int = 0, **changes: Any) -> tuple[StagedResult, StopAt]:
    stop = StopAt(name, step)
    result = run(callback=stop.hear, cancel=stop.asked, keep_stages=True, **changes)
    assert result.cancelled
    return result, stop


def test_cancel_before_the_first_step_gives_an_empty_picture_and_says_so() -> None:
    for name in ("text", "stage 1 sample"):
        result, _ = stopped_at(name)
        assert result.images.shape == (1, 3, 16, 16)
        assert bool((result.images == 0.5).all())
        assert "before its first step" in result.warnings[0]
        assert result.forwards == 0


def test_cancel_inside_stage_1_decodes_the_current_estimate() -> None:
    result, stop = stopped_at("stage 1 sample", 2)
    assert stop.denoised is not None
    assert torch.equal(result.images, ENGINE.decode(stop.denoised))
    assert result.forwards == 2
    assert [timing.name for timing in result.timings] == TIMINGS[:2]


@pytest.mark.parametrize("name", ["stage 1 decode", "upscale"])
def test_cancel_before_the_upscaler_is_done_gives_the_low_image(name: str) -> None:
    result, _ = stopped_at(name)
    assert result.images.shape == (1, 3, 16, 16)
    assert torch.equal(result.images, result.stages[0].image)
    assert result.forwards == 4


@pytest.mark.parametrize(("name", "step"), [("encode", 0), ("noise", 0), ("stage 2 sample", 0), ("stage 2 sample", 1)])
def test_cancel_after_the_upscaler_gives_its_image(name: str, step: int) -> None:
    result, _ = stopped_at(name, step)
    assert result.images.shape == (1, 3, 32, 32)
    assert torch.equal(result.images, Doubler()(result.stages[0].image))


@pytest.mark.parametrize(("refine_steps", "last"), [(0, "upscale"), (1, "noise")])
def test_cancel_at_the_end_of_the_handoff_is_heard_before_anything_else_begins(refine_steps: int, last: str) -> None:
    asked: list[bool] = []

    class Late(Plain):
        def handoff(self, run: StageRun, images: torch.Tensor) -> torch.Tensor | None:
            state = super().handoff(run, images)
            asked.append(True)  # too late for the handoff's own parts to hear it
            return state

    events: list[Progress] = []
    plan = plan_of(refine_steps=refine_steps)
    result = run(plan=plan, method=Late(), callback=events.append, cancel=lambda: bool(asked))
    assert result.cancelled
    assert result.unfinished
    assert result.images.shape == (1, 3, 32, 32)
    assert events[-1].name == result.timings[-1].name == last


def test_finished_latents_are_decoded_even_if_a_stop_is_asked_for() -> None:
    stop = StopAt("stage 2 decode")
    result = run(callback=stop.hear, cancel=stop.asked)
    assert not result.cancelled
    assert torch.equal(result.images, run().images)


def test_a_callback_may_raise_cancelled_itself() -> None:
    def stop(event: Progress) -> None:
        if event.name == "encode":
            raise Cancelled

    result = run(callback=stop)
    assert result.cancelled
    assert result.images.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("name", ["stage 1 decode", "stage 2 decode"])
def test_a_callback_that_raises_cancelled_at_a_decode_loses_no_image(name: str) -> None:
    def stop(event: Progress) -> None:
        if event.name == name:
            raise Cancelled

    result, whole = run(callback=stop), run(keep_stages=True)
    assert result.cancelled
    assert result.warnings == ()
    torch.testing.assert_close(result.images, whole.stages[name == "stage 2 decode"].image, rtol=0, atol=1e-6)


def test_upscale_mode_cancelled_at_once_returns_the_picture() -> None:
    picture = torch.full((1, 3, 16, 16), 0.25)
    result = run(image=picture, cancel=lambda: True)
    assert torch.equal(result.images, picture)
    assert result.cancelled


# --------------------------------------------------------------------------------------------------- leaving no trace


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("where", ["stage 1", "upscaler", "stage 2", "callback"])
@pytest.mark.parametrize("gradients", [True, False])
def test_errors_pass_through_and_leave_everything_as_it_was(error: BaseException, where: str, gradients: bool) -> None:
    error = type(error)(*error.args)  # a caller's error is marked as such for good

    def fail(*_: Any) -> None:
        raise error

    def fail_at(wanted: int) -> Callable[[int], None]:
        return lambda count: fail() if count == wanted else None

    engine = Recording(on_denoise=fail_at({"stage 1": 2, "stage 2": 5}.get(where, 0)))
    names = set(vars(engine))
    upscaler = Doubler(fail) if where == "upscaler" else Doubler()
    state = torch.get_rng_state()
    with torch.set_grad_enabled(gradients):
        # A failing upscaler costs the detail; stopping the program is no failure.
        told = where == "upscaler" and isinstance(error, Exception)
        with nullcontext() if told else pytest.raises(type(error)):
            result = run(engine, upscaler=upscaler, callback=fail if where == "callback" else None)
            assert any("the upscaler doubler failed (RuntimeError: boom)" in said for said in result.warnings)
        assert torch.is_grad_enabled() == gradients
    assert set(vars(engine)) == names
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrong", ["x2.pth", torch.nn.Identity(), 7])
def test_what_is_no_upscaler_is_refused_before_anything_is_sampled(wrong: Any) -> None:
    engine = Recording()
    with pytest.raises(MrFlowError, match="upscaler is"):
        run(engine, upscaler=wrong)
    assert engine.calls == []


def test_no_global_random_state_is_read_or_changed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run(plan=plan_of(posterior="sample"), batch=2).images
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(run(plan=plan_of(posterior="sample"), batch=2).images, first)


def test_the_plan_and_the_given_picture_stay_as_they_are() -> None:
    plan, picture = plan_of(), torch.full((3, 16, 16), 0.3)
    line = plan.to_string()
    run(plan=plan, image=picture)
    assert plan.to_string() == line
    assert bool((picture == 0.3).all())


# ---------------------------------------------------------------------------------------------------------- warnings


def test_what_went_less_than_well_is_said() -> None:
    assert any("Lanczos" in warning for warning in run(upscaler=None).warnings)


def test_a_plan_for_another_family_is_refused() -> None:
    other = replace(ENGINE, family=replace(FAMILY, name="other"))
    with pytest.raises(MrFlowError, match="the plan is for family 'analytic' but the engine is 'other'"):
        run(Recording(other))
    run(replace(ENGINE, family=replace(FAMILY, title="A copy", guidance=2.0)))  # the same family, told apart by a user


def test_clocks_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for name in ("cpu", "cuda:1", "mps"):
        wait_for(torch.device(name))
    assert waited == [torch.device("cuda:1"), "mps"]
