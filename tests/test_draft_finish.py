"""Draft, pick, finish: a finished draft is its whole run, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.drafts import Draft, draft, finish
from mrflow_sched.engines.analytic import GaussianFieldEngine
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.plan.make import make_native_plan, make_plan, with_first_steps
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import sample_staged
from mrflow_sched.sampling.noise import draw_noise
from mrflow_sched.sampling.shrink import shrink_noise

FIELD = GaussianFieldEngine(means={"red": (2.0, -1.0, -1.0), "blue": (-1.0, -1.0, 2.0)})
PROMPT = "a red circle"


class NotedEngine(GaussianFieldEngine):
    """The analytic field, noting what is asked of it."""

    def __init__(self) -> None:
        super().__init__(means={"red": (2.0, -1.0, -1.0), "blue": (-1.0, -1.0, 2.0)})
        self.texts: list[list[str]] = []
        self.evaluated: list[tuple[int, ...]] = []

    def encode_text(self, prompts, negative_prompts=None):
        self.texts.append(list(prompts))
        return super().encode_text(prompts, negative_prompts)

    def denoise(self, x, sigma, text, *, guidance):
        self.evaluated.append(tuple(x.shape))
        return super().denoise(x, sigma, text, guidance=guidance)


@pytest.fixture(scope="module")
def engines(tiny_folder: Any) -> dict[str, PipelineEngine]:
    return {
        dtype: PipelineEngine.from_folder(tiny_folder, device="cpu", dtype=dtype)
        for dtype in ("float32", "bfloat16", "float16")
    }


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {}),
        ("bfloat16", {}),
        ("float16", {}),
        ("float32", {"stages": 3}),
        ("bfloat16", {"stages": 3}),
        ("float32", {"noise": "nested"}),
        ("bfloat16", {"posterior": "sample"}),
        ("float32", {"refine_steps": 0}),
        ("float32", {"seed_rule": "hash"}),
        ("bfloat16", {"solver": "euler", "factor": 1.5}),
    ],
    ids=str,
)
def test_a_finished_draft_is_the_whole_run(
    engines: dict[str, PipelineEngine], dtype: str, options: dict[str, Any]
) -> None:
    engine = engines[dtype]
    plan = make_plan(engine.family, 64, 96, low_steps=3, seed=5, **options)
    texts: dict[str, Any] = {"negative_prompt": "blue", "refine_prompt": "a red star"} if plan.stages[1].sigmas else {}
    picked = draft(engine, plan, PROMPT, batch=3, **texts)[2]
    assert picked.seed == 7
    whole = sample_staged(engine, replace(plan, seed=7), PROMPT, keep_stages=True, **texts)
    finished = finish(engine, picked, keep_stages=True)
    assert torch.equal(finished.images, whole.images)
    assert torch.equal(picked.image, whole.stages[0].image[0])
    assert torch.equal(finished.stages[0].image, whole.stages[0].image)
    assert finished.forwards == whole.forwards - plan.stages[0].forwards


def test_every_prompt_gets_every_seed_and_is_read_once() -> None:
    engine = NotedEngine()
    plan = make_plan(engine.family, 64, 64, seed=3)
    made = draft(engine, plan, ["red", "blue"], seeds=[8, 2, 9])
    assert [(each.prompt, each.seed) for each in made] == [
        (text, seed) for text in ("red", "blue") for seed in (8, 2, 9)
    ]
    assert engine.texts == [["red"], ["blue"]]
    assert set(engine.evaluated) == {(1, *engine.latent_shape(32, 32))}


def test_finishing_takes_the_later_stages_alone() -> None:
    engine = NotedEngine()
    plan = make_plan(engine.family, 64, 64, seed=3)
    (made,) = draft(engine, plan, "red")
    engine.evaluated.clear()
    told: list[float] = []
    finish(engine, made, callback=lambda step: told.append(step.fraction))
    assert set(engine.evaluated) == {(1, *engine.latent_shape(64, 64))}
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0.0, 1.0)


def test_cheap_drafts_rank_and_are_no_part_of_the_image() -> None:
    engine = NotedEngine()
    plan = make_plan(engine.family, 64, 64, low_steps=6, seed=3)
    (made,) = draft(engine, plan, "red", steps=2)
    assert (made.steps, made.latents) == (2, None)
    assert len(engine.evaluated) == 2
    assert made.plan == plan
    assert torch.equal(finish(engine, made).images, sample_staged(engine, plan, "red").images)
    (own,) = draft(engine, plan, "red", steps=6)
    assert own.steps is None
    assert own.latents is not None


@pytest.mark.parametrize(
    ("plan", "steps", "of_the_run", "of_native"),
    [
        (make_plan("demo", 256, 256), None, 0.70, 0.05),
        (make_plan("demo", 256, 256), 6, 0.35, 0.03),
        (make_plan("demo", 512, 512, stages=3), None, 0.35, 0.02),
        (make_plan("flux1-dev", 2048, 2048, stages=3), None, 0.35, 0.02),
    ],
)
def test_what_a_draft_costs(plan: StagedPlan, steps: int | None, of_the_run: float, of_native: float) -> None:
    drafted = plan if steps is None else with_first_steps(plan, steps)
    assert drafted.stage_costs()[0] / sum(plan.stage_costs()) <= of_the_run
    assert drafted.stage_costs()[0] / plan.native_forwards <= of_native


def test_drafts_come_one_by_one_and_cancelling_keeps_those_that_are_there() -> None:
    plan = make_plan(FIELD.family, 64, 64)
    seen: list[int] = []
    made = draft(
        FIELD, plan, "red", batch=5, on_draft=lambda each: seen.append(each.seed), cancel=lambda: len(seen) == 2
    )
    assert seen == [each.seed for each in made] == [0, 1]


def test_a_spoiled_draft_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Spoiling(GaussianFieldEngine):
        def decode(self, latents):
            self.count = getattr(self, "count", 0) + 1
            return super().decode(latents) * (torch.nan if self.count == 2 else 1.0)

    engine = Spoiling(means={"red": (2.0, -1.0, -1.0)})
    made = draft(engine, make_plan(engine.family, 64, 64), "red", batch=3)
    assert [each.seed for each in made] == [0, 2]
    assert "decod" in caplog.text


def test_nested_noise_starts_from_the_native_noise_of_the_seed() -> None:
    starts: list[torch.Tensor] = []

    class Starting(GaussianFieldEngine):
        def denoise(self, x, sigma, text, *, guidance):
            starts.append(x)
            return super().denoise(x, sigma, text, guidance=guidance)

    engine = Starting(means={"red": (2.0, -1.0, -1.0)})
    cases: list[tuple[tuple[int, int], dict[str, Any]]] = [
        ((64, 64), {}),
        ((96, 64), {"factor": 1.5}),
        ((72, 40), {"stages": 3}),
    ]
    for size, options in cases:
        starts.clear()
        plan = make_plan(engine.family, *size, noise="nested", seed=4, **options)
        sample_staged(engine, plan, "red")
        native = make_native_plan(engine.family, *size, seed=4, steps=2)
        first = starts[0]
        starts.clear()
        sample_staged(engine, native, "red")
        assert torch.equal(first, shrink_noise(starts[0], *first.shape[-2:]))
        assert torch.equal(starts[0], draw_noise(starts[0].shape[1:], [4]))


def test_nested_noise_is_kept_by_the_plans_line() -> None:
    plan = make_plan("demo", 256, 256, noise="nested")
    assert "noise=nested" in plan.to_string()
    assert type(plan).from_string(plan.to_string()) == plan
    assert type(plan).from_json(plan.to_json()) == plan
    assert "noise" not in make_plan("demo", 256, 256).to_string()
    with pytest.raises(MrFlowError, match="noise must be 'own' or 'nested', got 'shared'"):
        make_plan("demo", 256, 256, noise="shared")  # pyright: ignore[reportArgumentType]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"until": 0}, "until must be a whole number from 1 to 2, got 0"),
    ({"until": 3}, "until must be a whole number from 1 to 2, got 3"),
    ({"until": 1, "image": torch.zeros(3, 32, 32)}, "until=1 ends with stage 1, which image replaces"),
    ({"latents": "file"}, "latents is str; give the latents of stage 1"),
    ({"latents": torch.zeros(3, 8, 9)}, "latents must be"),
    ({"latents": torch.zeros(2, 3, 32, 32)}, "latents must be"),
    ({"latents": torch.full(FIELD.latent_shape(32, 32), torch.nan)}, "latents hold NaN or infinity"),
    ({"latents": torch.zeros(FIELD.latent_shape(32, 32), dtype=torch.int64)}, "in floats"),
    ({"latents": torch.zeros(FIELD.latent_shape(32, 32)), "image": torch.zeros(3, 32, 32)}, "both replace stage 1"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MrFlowError, match=sentence):
        sample_staged(FIELD, make_plan(FIELD.family, 64, 64), "red", **arguments)


def test_drafts_that_cannot_be_made_are_refused() -> None:
    plan = make_plan(FIELD.family, 64, 64)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"seeds": []}, "seeds must be a list of at least one seed"),
        ({"seeds": 5}, "seeds must be a list of at least one seed, got 5"),
        ({"seeds": "12"}, "seeds must be a list of at least one seed, got '12'"),
        ({"steps": 90}, "steps must be at most the 12 of the plan's stage 1, got 90"),
        ({"seeds": [-1]}, "seeds must be a whole number from 0"),
        ({"batch": 0}, "batch must be a whole number"),
        ({"steps": 0}, "steps must be a whole number from 1"),
    ]
    for arguments, sentence in cases:
        with pytest.raises(MrFlowError, match=sentence):
            draft(FIELD, plan, "red", **arguments)
    with pytest.raises(MrFlowError, match="the plan has one; plan with stages=2"):
        draft(FIELD, make_native_plan(FIELD.family, 64, 64), "red")
    with pytest.raises(MrFlowError, match="draft is str"):
        finish(FIELD, "draft.png")  # pyright: ignore[reportArgumentType]


def test_seeds_of_other_libraries_are_seeds() -> None:
    plan = make_plan(FIELD.family, 64, 64)
    for seeds in (torch.tensor([4, 2]), range(4, 6), (4, 2)):
        assert [each.seed for each in draft(FIELD, plan, "red", seeds=seeds)] == [int(seed) for seed in seeds]  # pyright: ignore


def test_a_draft_is_a_value() -> None:
    (made,) = draft(FIELD, make_plan(FIELD.family, 64, 64), "red")
    assert isinstance(made, Draft)
    assert made.image.dtype == torch.float32
    assert made.latents is not None
    assert made.latents.device.type == "cpu"


def test_a_changed_image_is_finished_in_place_of_the_latents() -> None:
    (made,) = draft(FIELD, make_plan(FIELD.family, 64, 64), "red")
    whole = finish(FIELD, made).images
    changed = finish(FIELD, made, pixels=made.image.flip(-1)).images
    assert not torch.equal(changed, whole)
    assert torch.equal(changed, sample_staged(FIELD, made.plan, "red", image=made.image.flip(-1)).images)


def test_fewer_steps_of_a_list_lie_between_its_values() -> None:
    plan = make_plan(FIELD.family, 64, 64, sigmas=(1.0, 0.8, 0.4, 0.1, 0.0))
    assert with_first_steps(plan, 2).stages[0].sigmas == pytest.approx((1.0, 0.4, 0.0))
    assert with_first_steps(plan, 3).stages[0].sigmas == pytest.approx((1.0, 2 / 3, 0.2, 0.0))
    assert with_first_steps(plan, 4) is plan
