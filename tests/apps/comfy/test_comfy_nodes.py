"""ComfyUI's nodes on doubles of it: what they make, what runs again, what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from comfy_bench import LATER, PLAN, Bench, pictures, refined, whole
from comfy_doubles import (
    Interrupted,
    Model,
    UpscaleModel,
    Vae,
)

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.families import get_family
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.stages import StagedPlan

pytestmark = pytest.mark.usefixtures("comfy")


# ------------------------------------------------------------------------------------------------------------ one node


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({}, {}),
        ({"solver": "euler", "sigma": 0.3}, {"solver": "euler", "sigma": 0.3}),
        ({"stages": 3, "width": 128, "height": 96}, {"stages": 3}),
        ({"noise": "nested"}, {"noise": "nested"}),
        ({"width": 90, "height": 70}, {}),
        ({"refine_steps": 2, "refine_cfg": 1.0}, {"refine_steps": 2, "refine_guidance": 1.0}),
        ({"shift": "final", "low_steps": 4, "cfg": 2.0}, {"shift_tokens": "final", "low_steps": 4, "guidance": 2.0}),
        ({"factor": 1.5, "preset": "fast"}, {"factor": 1.5}),
    ],
    ids=str,
)
def test_one_node_makes_the_picture_of_sample_staged(values: dict[str, Any], options: dict[str, Any]) -> None:
    size = values.get("width", 64), values.get("height", 64)
    plan = make_plan("z-image", *size, seed=3, **{"preset": values.get("preset", "6+1"), **options})
    image: Any = Bench().sampler(**values)
    assert tuple(image.shape) == (1, size[1], size[0], 3)
    torch.testing.assert_close(image, pictures(whole(plan)), rtol=0, atol=2e-6)


def test_the_draft_and_the_plan_are_those_of_the_run() -> None:
    bench = Bench()
    result = whole(make_plan("z-image", 64, 64, "6+1", seed=3, sigma=0.2))
    draft = bench.sampler(output=1, sigma=0.2)
    torch.testing.assert_close(draft, result.stages[0].image.movedim(1, -1), rtol=0, atol=2e-6)
    text = bench.sampler(output=2, sigma=0.2)
    assert StagedPlan.from_string(text.splitlines()[-1].removeprefix("plan: ")) == result.plan
    assert text.splitlines()[:2] == [
        "6 steps at 32x32, then upscaled to 64x64, then 1 step from sigma 0.2. The network costs 8.2 times less than "
        "50 steps at 64x64.",
        "",
    ]
    assert "0.2 0" in text


def test_every_image_of_a_batch_is_what_its_seed_makes_alone() -> None:
    both = Bench().sampler(batch_size=2)
    for number in range(2):
        torch.testing.assert_close(both[number], Bench().sampler(seed=3 + number)[0], rtol=0, atol=2e-6)


def test_only_what_a_change_concerns_runs_again() -> None:
    bench = Bench()
    counts: list[int] = []
    asked: list[dict[str, Any]] = [
        {"sigma": 0.3},
        {"refine_steps": 2},
        {"refine_cfg": 1.0},
        {},
        {"seed": 4},
        {"cfg": 2},
    ]
    for changes in ({}, *asked):
        bench.sampler(**changes)
        counts.append(len(bench.model.calls))
    assert counts == [7, 1, 2, 1, 0, 7, 7]
    bench.upscale_model = UpscaleModel()
    bench.sampler()
    assert len(bench.model.calls) == 1
    bench.sampler(upscale_model=None)
    assert len(bench.model.calls) == 1


def test_cfg_evaluates_two_rows_and_can_be_off_in_the_last_step() -> None:
    bench = Bench()
    bench.sampler(cfg=2.0, refine_cfg=1.0)
    assert [rows for _, rows in bench.model.calls] == [2] * 6 + [1]
    bench.sampler(cfg=1.0)
    assert [rows for _, rows in bench.model.calls] == [1] * 7


@pytest.mark.parametrize("scale", ["cfg", "refine_cfg"])
def test_cfg_without_a_negative_is_refused_before_anything_runs(scale: str) -> None:
    bench = Bench()
    changes: dict[str, Any] = {scale: 2.0}
    with pytest.raises(MrFlowError, match=f"negative is not connected, and {scale} 2 needs it"):
        bench.sampler(negative=None, **changes)
    # The family's own scale is found out by a node, which comes before the sampler.
    with pytest.raises(MrFlowError, match="negative is not connected, and cfg 5 needs it"):
        bench.sampler(negative=None)
    assert bench.model.calls == []


def test_a_list_of_ones_own_takes_the_place_of_stage_1s() -> None:
    own = torch.tensor([1.0, 0.8, 0.3, 0.0])
    bench = Bench()
    graph = {"own": {"class_type": "Value", "inputs": {"value": own}}}
    sockets = bench.links("model", "positive", "negative", "vae", "upscale_model")
    values = {**PLAN, **LATER, "batch_size": 1, "low_sigmas": ["own", 0]}
    graph["it"] = {"class_type": "MrFlowSampler", "inputs": {**sockets, **values}}
    image = bench.nodes(graph, "it")
    assert [sigma for sigma, _ in bench.model.calls] == pytest.approx([1.0, 0.8, 0.3, 0.12], abs=1e-6)
    plan = make_plan("z-image", 64, 64, "6+1", seed=3, sigmas=[1.0, float(own[1]), float(own[2]), 0.0])
    torch.testing.assert_close(image, pictures(whole(plan)), rtol=0, atol=2e-6)
    assert "1 0.8 0.3 0" in bench.nodes(graph, "it", 2)
    graph["own"]["inputs"]["value"] = torch.tensor([0.6, 0.3, 0.0])
    with pytest.raises(MrFlowError, match="low_sigmas must fall from the model's pure noise, which is sigma 1, to 0"):
        bench.nodes(graph, "it")


# ------------------------------------------------------------------------------------------------------------- by parts


def fit() -> Any:
    """Of the bench's model."""
    from mrflow_sched.apps.comfy.family import fit_of

    return fit_of(Model())


def graph_by_parts(**later: Any) -> dict[str, Any]:
    """The run of `Bench.sampler` from single nodes, by hand."""
    plan, stage = {"plan": ["plan", 0]}, {1: {"stage": 1}, 2: {"stage": 2}}
    texts = {"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0], "cfg": 0.0}
    sigmas = {"model": ["model", 0], "sigma": 0.0, "steps": 0, "curve": "linear"}
    graph: dict[str, Any] = {
        "plan": {"class_type": "MrFlowPlan", "inputs": {"model": ["model", 0], **PLAN}},
        "latent1": {"class_type": "MrFlowEmptyLatent", "inputs": {**plan, "model": ["model", 0], "batch_size": 1}},
        "solver": {"class_type": "MrFlowSolver", "inputs": {**plan, "solver": "family"}},
        "latent2": {
            "class_type": "MrFlowHandoff",
            "inputs": {
                **plan,
                **stage[2],
                "image": ["image1", 0],
                "vae": ["vae", 0],
                "index": 0,
                "upscale_model": ["upscale_model", 0],
            },
        },
    }
    for number in (1, 2):
        own = {**plan, **stage[number]}
        more = later if number == 2 else {}
        graph |= {
            f"noise{number}": {"class_type": "MrFlowNoise", "inputs": own},
            f"sigmas{number}": {"class_type": "MrFlowSigmas", "inputs": {**own, **sigmas, **more}},
            f"guider{number}": {"class_type": "MrFlowGuider", "inputs": {**own, **texts}},
            f"done{number}": {
                "class_type": "SamplerCustomAdvanced",
                "inputs": {
                    **{name: [f"{name}{number}", 0] for name in ("noise", "guider", "sigmas")},
                    "sampler": ["solver", 0],
                    "latent_image": [f"latent{number}", 0],
                },
            },
            f"image{number}": {
                "class_type": "MrFlowDecode",
                "inputs": {**own, "samples": [f"done{number}", 0], "vae": ["vae", 0]},
            },
        }
    return graph


def test_single_nodes_make_the_picture_of_the_one_node() -> None:
    bench = Bench()
    assert torch.equal(bench.nodes(graph_by_parts(), "image2"), Bench().sampler())
    assert torch.equal(bench.nodes(graph_by_parts(sigma=0.4), "image2"), Bench().sampler(sigma=0.4))
    assert [sigma for sigma, _ in bench.model.calls] == pytest.approx([0.4])  # stage 1 was not run again
    shifted = {"sigma": 0.4, "steps": 3, "curve": "shifted"}
    bench.nodes(graph_by_parts(**shifted), "image2")
    plan = make_plan("z-image", 64, 64, "6+1", sigma=0.4, refine_steps=3, refine_curve="shifted")
    assert [sigma for sigma, _ in bench.model.calls] == pytest.approx(plan.stages[1].sigmas[:-1], abs=1e-6)


def test_the_plan_node_tells_sizes() -> None:
    bench = Bench()
    found = [bench.nodes(graph_by_parts(), "plan", each) for each in range(1, 5)]
    assert found == [32, 32, 64, 64]


def test_stages_that_a_plan_does_not_have_are_refused() -> None:
    graph = graph_by_parts()
    graph["sigmas2"]["inputs"]["stage"] = 3
    with pytest.raises(MrFlowError, match="stage must be from 1 to 2, which the plan has, got 3"):
        Bench().nodes(graph, "image2")
    graph = graph_by_parts()
    graph["sigmas1"]["inputs"]["sigma"] = 0.2
    with pytest.raises(MrFlowError, match=r"sigma 0\.2 is where a later stage starts, and stage 1 starts at 1"):
        Bench().nodes(graph, "image2")
    solver = {"it": {"class_type": "MrFlowSolver", "inputs": {"solver": "family"}}}
    with pytest.raises(MrFlowError, match="solver is 'family', which a plan names"):
        Bench().nodes(solver, "it")
    solver["it"]["inputs"]["solver"] = "heun"
    assert Bench().nodes(solver, "it").function.__name__.endswith("heun")


# -------------------------------------------------------------------------------------------------------- draft, refine


def drafts(
    bench: Bench, index: int = 0, count: int = 1, node: str = "finish", output: int = 0, stages: int = 2, **later: Any
) -> Any:
    parts = bench.links("model", "positive", "negative", "vae")
    graph = {
        "draft": {"class_type": "MrFlowDraft", "inputs": {**parts, **PLAN, "batch_size": 3, "stages": stages}},
        "finish": {
            "class_type": "MrFlowFinish",
            "inputs": {
                **parts,
                "upscale_model": ["upscale_model", 0],
                "plan": ["draft", 1],
                "drafts": ["draft", 0],
                **LATER,
                "index": index,
                "count": count,
                **later,
            },
        },
    }
    return bench.nodes(graph, node, output)


def test_finishing_a_draft_makes_the_picture_of_its_seed_and_samples_no_draft_again() -> None:
    bench = Bench()
    assert len(drafts(bench, node="draft")) == 3
    assert len(bench.model.calls) == 6
    for index in (2, 0):
        image = drafts(bench, index)
        assert len(bench.model.calls) == 1
        torch.testing.assert_close(image, Bench().sampler(seed=3 + index), rtol=0, atol=2e-6)
    both = drafts(bench, 1, 0, sigma=0.3)
    assert len(both) == 2
    torch.testing.assert_close(both[1:], Bench().sampler(seed=5, sigma=0.3), rtol=0, atol=2e-6)
    assert "0.3 0" in drafts(bench, 1, 0, sigma=0.3, output=1)


def test_without_an_upscale_model_every_door_refines_more() -> None:
    whole_run = Bench().sampler(seed=5, preset="balanced", low_steps=2, upscale_model=None)
    parts = Bench().links("model", "positive", "negative", "vae")
    numbers = {**PLAN, "preset": "balanced", "low_steps": 2}
    graph = {
        "draft": {"class_type": "MrFlowDraft", "inputs": {**parts, **numbers, "batch_size": 3}},
        "finish": {
            "class_type": "MrFlowFinish",
            "inputs": {**parts, "plan": ["draft", 1], "drafts": ["draft", 0], **LATER, "index": 2, "count": 1},
        },
    }
    bench = Bench()
    torch.testing.assert_close(bench.nodes(graph, "finish"), whole_run, rtol=0, atol=2e-6)
    text = bench.nodes(graph, "finish", 1)
    assert "  sigmas 0.45 0.225 0\n" in text
    assert "gain little" not in text
    text = Bench().sampler(output=2, preset="balanced", upscale_model=None)
    assert "No network upscales the image, so it is refined more: 2 steps from sigma 0.45." in text
    assert "  sigmas 0.12 0\n" in Bench().sampler(output=2, preset="balanced")


def test_every_stage_of_a_picked_draft_has_its_own_noise() -> None:
    image = drafts(Bench(), 2, stages=3)
    torch.testing.assert_close(image, Bench().sampler(seed=5, stages=3), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("index", "count"), [(3, 1), (2, 2), (7, 0)])
def test_drafts_that_are_not_there_are_refused(index: int, count: int) -> None:
    with pytest.raises(MrFlowError, match=f"index {index} and count {count} pick images of a batch that holds 3"):
        drafts(Bench(), index, count)


def test_the_text_of_a_finished_draft_has_its_seed() -> None:
    bench = Bench()
    drafts(bench, 2)
    assert "seed 5" in drafts(bench, 2, output=1).splitlines()[2]
    plan = bench.run("MrFlowPlan", "model", **{**PLAN, "seed": 2**63 - 1})  # after which seeds begin anew
    text = bench.run("MrFlowPlanInfo", plan=plan, **LATER, index=2)
    assert text.splitlines()[2].endswith("seed 1")


def test_the_text_of_finished_drafts_has_the_sigmas_that_ran() -> None:
    bench = Bench()
    parts = bench.links("model", "positive", "negative", "vae")
    later = {**LATER, "index": 0, "count": 1, "upscale_model": ["upscale_model", 0]}
    own = {"class_type": "Value", "inputs": {"value": torch.tensor([1.0, 0.8, 0.3, 0.0])}}
    draft = {**parts, **PLAN, "batch_size": 2, "low_sigmas": ["own", 0]}
    graph = {
        "own": own,
        "draft": {"class_type": "MrFlowDraft", "inputs": draft},
        "finish": {
            "class_type": "MrFlowFinish",
            "inputs": {**parts, **later, "plan": ["draft", 1], "drafts": ["draft", 0]},
        },
    }
    for node, output in (("draft", 2), ("finish", 1)):
        assert "  sigmas 1 0.8 0.3 0\n" in bench.nodes(graph, node, output)


@pytest.mark.parametrize(
    ("values", "size"),
    [
        ({}, (96, 64)),
        ({"factor": 1.0}, (48, 32)),
        ({"width": 90}, (90, 60)),
        ({"height": 128}, (192, 128)),
        ({"width": 64, "height": 64, "sigma": 0.4}, (64, 64)),
    ],
    ids=str,
)
def test_any_picture_can_take_the_place_of_stage_1(values: dict[str, Any], size: tuple[int, int]) -> None:
    picture = torch.rand((1, 32, 48, 3), generator=torch.Generator().manual_seed(1)) * 0.2 + 0.4
    bench = Bench()
    image = refined(bench, picture, **values)
    assert (image.shape[2], image.shape[1]) == size
    assert [sigma for sigma, _ in bench.model.calls] == pytest.approx([values.get("sigma", 0.12)])
    plan = make_plan("z-image", *size, "12+1", seed=3, sigma=values.get("sigma"))
    expected = whole(plan, image=picture.movedim(-1, 1), keep_stages=False)
    torch.testing.assert_close(image, pictures(expected), rtol=0, atol=2e-6)
    text = refined(bench, picture, 1, **values)
    assert "stage 1" not in text
    assert text.splitlines()[-1].startswith("plan: mrflow2;")
    assert text.startswith(f"Upscaled to {plan.width}x{plan.height}, then 1 step from sigma")


# ---------------------------------------------------------------------------------------------------- images and models


def test_a_vae_with_an_axis_of_time_takes_pictures_one_by_one() -> None:
    model, vae = Model(config="Krea2", file="krea2-raw", dimensions=3), Vae(frames=True)
    bench = Bench(model=model, vae=vae)
    images = bench.sampler(batch_size=2, family="flow", cfg=1.0)
    assert tuple(images.shape) == (2, 64, 64, 3)
    assert vae.seen == [(1, 64, 64, 3)] * 2
    flat = Bench(model=Model(config="Krea2", file="krea2-raw")).sampler(batch_size=2, family="flow", cfg=1.0)
    torch.testing.assert_close(images, flat, rtol=0, atol=2e-6)
    nested = {"noise": "nested", "family": "flow", "cfg": 1.0}
    with_axis, without = Bench(model=model, vae=vae).sampler(**nested), Bench(model=replace(model, dimensions=2))
    torch.testing.assert_close(with_axis, without.sampler(**nested), rtol=0, atol=2e-6)


def test_transparency_is_enlarged_beside_the_colours() -> None:
    from mrflow_sched.apps.comfy.parts import handed_over
    from mrflow_sched.apps.comfy.planned import planned

    family = get_family("z-image")
    plan = planned(family, (64, 64), {"preset": "6+1"}, fit=fit())
    image = torch.full((1, 32, 32, 4), 0.5)
    image[..., 3] = torch.linspace(0, 1, 32)[None, None]
    vae = Vae()
    _, large, said = handed_over(plan, image, vae, UpscaleModel(), 2)
    assert tuple(large.shape) == (1, 64, 64, 4)
    assert vae.seen == [(1, 64, 64, 4)]
    assert said == ""
    assert float(large[0, 32, 0, 3]) < 0.05 < 0.95 < float(large[0, 32, -1, 3])


def test_an_upscaler_that_fails_costs_the_detail_and_says_so() -> None:
    bench = Bench(upscale_model=UpscaleModel(error=RuntimeError("weights are broken")))
    image, text = bench.sampler(), bench.sampler(output=2)
    assert tuple(image.shape) == (1, 64, 64, 3)
    assert "note: the upscaler upscale_model failed (RuntimeError: weights are broken)" in text
    no_model = Bench()
    torch.testing.assert_close(image, no_model.sampler(upscale_model=None, sigma=0.12, refine_steps=1), rtol=0, atol=0)
    assert "No upscale model is connected" in no_model.sampler(upscale_model=None, output=2)


def test_what_every_handoff_says_is_told_once() -> None:
    class SecondFails(UpscaleModel):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            if images.shape[-1] > 16:
                raise RuntimeError("too large for these weights")
            return super().__call__(images)

    text = Bench(upscale_model=SecondFails()).sampler(output=2, stages=3)
    assert text.count("too large for these weights") == 1
    text = Bench().sampler(output=2, stages=3, upscale_model=None)
    assert text.count("No upscale model is connected") == 1


@pytest.mark.parametrize("error", [Interrupted(), MemoryError("full")], ids=["interrupt", "memory"])
def test_interrupts_and_want_of_memory_reach_the_host_as_they_are(error: Exception) -> None:
    bench = Bench(upscale_model=UpscaleModel(error=error))
    with pytest.raises(type(error)):
        bench.sampler()


def test_areas_of_the_conditioning_follow_the_stage() -> None:
    from mrflow_sched.apps.comfy.parts import stage_guider
    from mrflow_sched.apps.comfy.planned import planned

    plan = planned(get_family("z-image"), (128, 64), {"preset": "6+1"}, fit=fit())
    spots = [["red", {"area": (8, 16, 2, 5), "strength": 1.0}], ["blue", {"area": ("percentage", 0.5, 0.5, 0, 0)}]]
    for number, area in ((1, (4, 8, 1, 2)), (2, (8, 16, 2, 5))):
        guider = stage_guider(plan, Model(), spots, None, number, 1.0)
        assert [facts["area"] for _, facts in guider.positive] == [area, ("percentage", 0.5, 0.5, 0, 0)]
    assert spots[0][1]["area"] == (8, 16, 2, 5)
    timed = stage_guider(plan, Model(), [["red", {"area": (1, 8, 16, 0, 2, 5)}]], None, 1, 1.0)
    assert timed.positive[0][1]["area"] == (1, 4, 8, 0, 1, 2)
    with pytest.raises(MrFlowError, match="concat_latent_image"):
        stage_guider(plan, Model(), [["red", {"concat_latent_image": torch.zeros(1)}]], None, 1, 1.0)


def test_noise_follows_the_numbers_of_images_in_their_batch() -> None:
    from mrflow_sched.apps.comfy.parts import StageNoise
    from mrflow_sched.apps.comfy.planned import planned

    plan = planned(get_family("z-image"), (64, 64), {"preset": "6+1", "seed": 3}, fit=fit())
    noise, samples = StageNoise(plan, 1), torch.zeros(2, 192, 4, 4)
    picked = noise.generate_noise({"samples": samples, "batch_index": [2, 0]})
    whole_batch = noise.generate_noise({"samples": torch.zeros(3, 192, 4, 4)})
    assert torch.equal(picked, whole_batch[[2, 0]])
    assert (noise.seed, StageNoise(plan, 2).seed) == (3, 4)


# ------------------------------------------------------------------------------------------------------------- the door


def test_every_node_has_words_and_only_known_inputs() -> None:
    from mrflow_sched.apps.comfy import expanding, nodes

    for room in (expanding, nodes):
        for name in room.__all__:
            schema = getattr(room, name).define_schema()
            assert (schema.node_id, schema.category) == (name, "sampling/MrFlow")
            assert schema.description.endswith(".")
            for each in schema.inputs:
                assert each.words["tooltip"].endswith("."), (name, each.id)
            whole_runs = room is expanding
            assert bool(vars(schema).get("enable_expand")) == whole_runs
            raw = {each.id for each in schema.inputs if each.extra_dict.get("rawLink")}
            sockets = {each.id for each in schema.inputs if "default" not in each.words}
            passed_on = {each.id for each in schema.inputs} & {"sigma", "refine_steps"}
            assert raw == (sockets - {"plan"} | passed_on if whole_runs else set()), name
            assert {each.id for each in schema.inputs if each.words.get("lazy")} == raw, name
