"""MrFlow's own nodes in ComfyUI's graph, as people put them together and as nobody should."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.images.foreign import ForeignRun, NodeSettings, read_foreign
from mrflow_sched.plan.families import get_family
from mrflow_sched.plan.make import make_plan

Nodes = dict[str, Any]

LOADED: Nodes = {
    "u": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev.safetensors"}},
    "lo": {"class_type": "LoraLoaderModelOnly", "inputs": {"lora_name": "ink.safetensors", "model": ["u", 0]}},
    "m": {"class_type": "ModelSamplingFlux", "inputs": {"model": ["lo", 0], "max_shift": 1.15}},
    "x2": {"class_type": "UpscaleModelLoader", "inputs": {"model_name": "x2plus.pth"}},
    "p": {"class_type": "CLIPTextEncode", "inputs": {"text": "a harbour", "clip": ["c", 0]}},
    "n": {"class_type": "CLIPTextEncode", "inputs": {"text": "fog", "clip": ["c", 0]}},
}
LEFT = (
    "what the node 'ModelSamplingFlux' did to the model",
    "the LoRA 'ink.safetensors' (see --lora)",
    "the model 'flux1-dev.safetensors' (see --model)",
    "the upscaler 'x2plus.pth' (see --upscaler)",
)
LINKS: Nodes = {"model": ["m", 0], "positive": ["p", 0], "negative": ["n", 0], "vae": ["v", 0]}
WIDGETS: Nodes = {
    "family": "auto",
    "factor": 0.0,
    "stages": 2,
    "low_steps": 0,
    "solver": "family",
    "shift": "low",
    "preset": "balanced",
    "cfg": 0.0,
    "noise": "own",
}
LATER: Nodes = {"sigma": 0.0, "refine_steps": 0, "refine_cfg": 0.0}
OWN = {"preset": "balanced", "stages": 2, "noise": "own"}


def saved(link: list[Any], nodes: Nodes) -> Nodes:
    return {**LOADED, **nodes, "o": {"class_type": "SaveImage", "inputs": {"images": link, "filename_prefix": "x"}}}


def sampler(**inputs: Any) -> Nodes:
    own = {"width": 1024, "height": 768, "batch_size": 1, "seed": 7, "upscale_model": ["x2", 0]}
    both = {**LINKS, **WIDGETS, **LATER, **own, **inputs}
    kept = {name: value for name, value in both.items() if value is not None}
    return saved(["s", 0], {"s": {"class_type": "MrFlowSampler", "inputs": kept}})


def read(nodes: Nodes) -> ForeignRun | None:
    return read_foreign({"prompt": json.dumps(nodes)})


def run_of(nodes: Nodes) -> tuple[ForeignRun, NodeSettings]:
    found = read(nodes)
    assert found is not None
    assert found.nodes is not None
    return found, found.nodes


def test_the_sampler_as_it_comes() -> None:
    found, nodes = run_of(sampler())
    assert (found.prompt, found.negative, found.seed, found.width, found.height) == ("a harbour", "fog", 7, 1024, 768)
    assert nodes == NodeSettings(options=nodes.options, left=LEFT)
    assert (found.guidance, found.unusable, nodes.options) == (None, (), OWN)
    plain = make_plan("qwen-image", 1024, 768, seed=7)
    assert make_plan("qwen-image", 1024, 768, **found.options_for(get_family("qwen-image"))) == plain


def test_every_widget_of_the_sampler_becomes_its_option() -> None:
    found, nodes = run_of(
        sampler(
            preset="20+1",
            sigma=0.18,
            factor=1.5,
            stages=3,
            low_steps=9,
            refine_steps=2,
            cfg=3.5,
            refine_cfg=2.0,
            solver="heun",
            shift="final",
            noise="nested",
            family="qwen-image",
            batch_size=4,
            upscale_model=None,
        )
    )
    numbers = {"preset": "20+1", "sigma": 0.18, "factor": 1.5, "stages": 3, "low_steps": 9, "refine_steps": 2}
    assert nodes.options == {**numbers, "solver": "heun", "shift_tokens": "final", "noise": "nested"}
    assert (nodes.cfg, nodes.refine_cfg, nodes.family, nodes.batch) == (3.5, 2.0, "qwen-image", 4)
    assert nodes.left == (*LEFT[:3], "the upscaler, which was Lanczos (see --upscaler)")
    options = found.options_for(get_family("qwen-image"))
    assert (options.get("guidance"), options.get("refine_guidance"), options.get("seed")) == (3.5, 2.0, 7)
    assert "guidance" not in found.options_for(get_family("flux1-dev"))


def test_links_to_primitives_and_the_embedded_guidance_are_followed() -> None:
    more: Nodes = {
        "i": {"class_type": "PrimitiveInt", "inputs": {"value": 2**40}},
        "f": {"class_type": "PrimitiveFloat", "inputs": {"value": 0.2}},
        "t": {"class_type": "PrimitiveString", "inputs": {"value": "a fox"}},
        "w": {"class_type": "PrimitiveInt", "inputs": {"value": 512}},
        "p": {"class_type": "CLIPTextEncode", "inputs": {"text": ["t", 0]}},
        "g": {"class_type": "FluxGuidance", "inputs": {"guidance": 2.5, "conditioning": ["p", 0]}},
        "z": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["p", 0]}},
    }
    links = {"seed": ["i", 0], "sigma": ["f", 0], "width": ["w", 0], "positive": ["g", 0], "negative": ["z", 0]}
    found, nodes = run_of({**sampler(**links), **more})
    assert (found.prompt, found.negative, found.seed, found.width) == ("a fox", None, 2**40, 512)
    assert (nodes.options.get("sigma"), found.guidance) == (0.2, 2.5)
    assert found.options_for(get_family("flux1-dev")).get("guidance") == 2.5
    assert "guidance" not in found.options_for(get_family("qwen-image"))


def test_sigmas_of_stage_1_take_the_place_of_its_steps_and_shift() -> None:
    listed: Nodes = {"l": {"class_type": "ManualSigmas", "inputs": {"sigmas": "1, 0.8, .4, 0"}}}
    found, nodes = run_of({**sampler(low_sigmas=["l", 0], low_steps=9, shift="final", preset="8+1"), **listed})
    assert nodes.options == {"preset": "8+1", "stages": 2, "noise": "own", "sigmas": [1.0, 0.8, 0.4, 0.0]}
    made = make_plan("qwen-image", 1024, 768, **found.options_for(get_family("qwen-image")))
    assert made.stages[0].sigmas == (1.0, 0.8, 0.4, 0.0)
    for inputs in ({"sigmas": "1, 1e-3"}, {"sigmas": "5, 1, 0"}, {"sigmas": 3}, {"steps": 4}):
        other: Nodes = {"l": {"class_type": "X", "inputs": inputs}}
        _, nodes = run_of({**sampler(low_sigmas=["l", 0], low_steps=9), **other})
        assert "the sigmas of stage 1 (low_sigmas)" in nodes.left
        assert nodes.options.get("low_steps") == 9


def drafted(index: Any = 2, count: Any = 1, **draft: Any) -> Nodes:
    numbers = {"width": 512, "height": 512, "batch_size": 6, "seed": 20}
    finish = {**LINKS, **LATER, "plan": ["d", 1], "drafts": ["d", 0], "index": index, "count": count, "sigma": 0.16}
    return saved(
        ["f", 0],
        {
            "d": {"class_type": "MrFlowDraft", "inputs": {**LINKS, **WIDGETS, **numbers, **draft}},
            "f": {"class_type": "MrFlowFinish", "inputs": {**finish, "upscale_model": ["x2", 0]}},
        },
    )


def test_a_finished_draft_has_the_seed_of_its_number() -> None:
    found, nodes = run_of(drafted(low_steps=5))
    assert (found.seed, found.width, nodes.batch, nodes.left) == (22, 512, 1, LEFT)
    assert nodes.options == {**OWN, "sigma": 0.16, "low_steps": 5}
    assert [run_of(drafted(1, count))[1].batch for count in (0, 3, "x")] == [5, 3, 5]
    assert run_of(drafted("x"))[0].unusable == ("the index 'x'",)


def test_a_draft_that_was_saved_says_what_becomes_of_it() -> None:
    nodes = drafted()
    nodes["o"]["inputs"]["images"] = ["d", 0]
    del nodes["f"]
    found, of_draft = run_of(nodes)
    assert (found.seed, of_draft.batch) == (20, 6)
    whole = sampler()
    whole["o"]["inputs"]["images"] = ["s", 1]
    for each in (of_draft, run_of(whole)[1]):
        assert "its being a draft (the whole image is made)" in each.left
    assert "its being a draft (the whole image is made)" not in run_of(sampler())[1].left


def test_a_finish_with_another_prompt() -> None:
    nodes = drafted()
    nodes["q"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "a harbour at dusk"}}
    nodes["f"]["inputs"]["positive"] = ["q", 0]
    found, own = run_of(nodes)
    assert (found.prompt, own.refine_prompt) == ("a harbour", "a harbour at dusk")


def stage(number: int, latent: list[Any], **sigmas: Any) -> Nodes:
    own: Nodes = {"plan": ["pl", 0], "stage": number}
    guider = {**own, "model": ["m", 0], "positive": ["p", 0], "negative": ["n", 0], "cfg": 4.0 if number == 1 else 2.5}
    parts = {"noise": ["no", 0], "guider": ["gu", 0], "sigmas": ["si", 0]}
    links = {name: [f"{link[0]}{number}", 0] for name, link in parts.items()}
    return {
        f"no{number}": {"class_type": "MrFlowNoise", "inputs": own},
        f"si{number}": {
            "class_type": "MrFlowSigmas",
            "inputs": {**own, "model": ["m", 0], "sigma": 0.0, "steps": 0, "curve": "linear", **sigmas},
        },
        f"gu{number}": {"class_type": "MrFlowGuider", "inputs": guider},
        f"sa{number}": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {**links, "sampler": ["so", 0], "latent_image": latent},
        },
        f"de{number}": {
            "class_type": "MrFlowDecode",
            "inputs": {"plan": ["pl", 0], "samples": [f"sa{number}", 0], "vae": ["v", 0], "stage": number},
        },
    }


def handoff(number: int, image: list[Any], **more: Any) -> Nodes:
    own = {"plan": ["pl", 0], "image": image, "vae": ["v", 0], "upscale_model": ["x2", 0], "stage": number, "index": 0}
    return {f"ha{number}": {"class_type": "MrFlowHandoff", "inputs": {**own, **more}}}


def composed(third: Nodes | None = None, **plan: Any) -> Nodes:
    numbers = {"model": ["m", 0], "width": 1024, "height": 1024, "seed": 33}
    nodes: Nodes = {
        "pl": {"class_type": "MrFlowPlan", "inputs": {**numbers, **WIDGETS, **plan}},
        "so": {"class_type": "MrFlowSolver", "inputs": {"plan": ["pl", 0], "solver": "heun"}},
        "el": {"class_type": "MrFlowEmptyLatent", "inputs": {"plan": ["pl", 0], "model": ["m", 0], "batch_size": 3}},
        "info": {"class_type": "MrFlowPlanInfo", "inputs": {"plan": ["pl", 0], "sigma": 0.9}},
        **stage(1, ["el", 0], steps=10),
        **handoff(2, ["de1", 0]),
        **stage(2, ["ha2", 0], sigma=0.14, steps=2, curve="shifted"),
    }
    return saved(["de3", 0] if third else ["de2", 0], {**nodes, **(third or {})})


def test_single_nodes_are_put_together() -> None:
    found, nodes = run_of(composed(preset="6+1", family="sd3"))
    assert (found.prompt, found.negative, found.seed, found.width) == ("a harbour", "fog", 33, 1024)
    sampled = {"preset": "6+1", "stages": 2, "noise": "own", "low_steps": 10, "solver": "heun"}
    assert nodes.options == {**sampled, "sigma": 0.14, "refine_steps": 2, "refine_curve": "shifted"}
    assert (nodes.cfg, nodes.refine_cfg, nodes.family, nodes.batch) == (4.0, 2.5, "sd3", 3)
    assert (nodes.left, nodes.from_image) == (LEFT, False)


def test_later_stages_that_differ_are_said() -> None:
    alike = {**handoff(3, ["de2", 0]), **stage(3, ["ha3", 0], sigma=0.14, steps=1, curve="shifted")}
    _, nodes = run_of(composed(alike, stages=3))
    assert (nodes.options.get("sigma"), nodes.options.get("stages")) == (0.14, 3)
    assert "refine_steps" not in nodes.options
    assert nodes.left[0] == "the refine steps of each later stage, which differ"


def test_parts_of_comfyui_in_the_place_of_ours_are_said() -> None:
    nodes = composed()
    nodes["no1"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 3}}
    nodes["si1"] = {"class_type": "BasicScheduler", "inputs": {"steps": 20}}
    nodes["so"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "er_sde"}}
    _, own = run_of(nodes)
    assert own.left[:3] == ("the sigmas of stage 1", "the noise of stage 1", "the sampler of stage 1")
    nodes["so"]["inputs"]["sampler_name"] = "euler"
    assert run_of(nodes)[1].options.get("solver") == "euler"


def test_what_other_nodes_did_before_the_image_was_saved_is_said() -> None:
    larger = {"class_type": "ImageScaleBy", "inputs": {"image": ["s", 0], "scale_by": 2.0}}
    nodes = saved(["sc", 0], {**sampler(), "sc": larger})
    assert run_of(nodes)[1].left == (*LEFT, "what the node 'ImageScaleBy' did to the image")
    again = {
        "en": {"class_type": "VAEEncode", "inputs": {"pixels": ["de2", 0], "vae": ["v", 0]}},
        "ks": {"class_type": "KSampler", "inputs": {"latent_image": ["en", 0], "denoise": 0.5, "seed": 1}},
        "vd": {"class_type": "VAEDecode", "inputs": {"samples": ["ks", 0], "vae": ["v", 0]}},
    }
    assert run_of(saved(["vd", 0], {**composed(), **again}))[1].left == (
        *LEFT,
        "what the node 'KSampler' did to the image",
    )
    assert run_of(composed())[1].left == LEFT


def test_what_mixes_prompts_is_said() -> None:
    other = {"class_type": "CLIPTextEncode", "inputs": {"text": "a lighthouse", "clip": ["c", 0]}}
    both = {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["p", 0], "conditioning_2": ["p2", 0]}}
    found, nodes = run_of({**sampler(positive=["both", 0]), "p2": other, "both": both})
    assert found.prompt == "a harbour"
    assert "what the node 'ConditioningCombine' did to the prompt" in nodes.left


def test_a_graph_of_two_runs_says_that_the_first_is_taken() -> None:
    nodes = sampler()
    second = {**nodes["s"], "inputs": {**nodes["s"]["inputs"], "seed": 8}}
    nodes |= {"s2": second, "o2": {"class_type": "SaveImage", "inputs": {"images": ["s2", 0]}}}
    found, own = run_of(nodes)
    assert found.seed == 7
    assert own.left[-1] == "which of the graph's runs made it (the first is taken)"
    _, own = run_of(drafted())  # Finish and its Draft are one run
    assert not any("the first is taken" in words for words in own.left)


def test_a_saved_stage_1_of_single_nodes_is_a_draft() -> None:
    nodes = saved(["de1", 0], composed())
    assert "its being a draft (the whole image is made)" in run_of(nodes)[1].left


def test_a_picked_draft_of_single_nodes_has_its_own_seed() -> None:
    nodes = composed()
    nodes["pick"] = {"class_type": "MrFlowPick", "inputs": {"image": ["de1", 0], "index": 2, "count": 1}}
    nodes |= handoff(2, ["pick", 0], index=2)
    found, own = run_of(nodes)
    assert (found.seed, own.batch) == (35, 1)


def refined(image: list[Any], **inputs: Any) -> Nodes:
    own = {"width": 0, "height": 0, "seed": 3, "preset": "balanced", "sigma": 0.3, "cfg": 0.0, "family": "auto"}
    numbers = {**LINKS, **own, "factor": 2.0, "refine_steps": 2, "image": image, "upscale_model": ["x2", 0], **inputs}
    return saved(["r", 0], {"r": {"class_type": "MrFlowRefine", "inputs": numbers}})


def test_a_refined_picture_needs_the_picture() -> None:
    found, nodes = run_of(refined(["load", 0]))
    assert (found.seed, found.width, found.height, nodes.from_image) == (3, None, None, True)
    assert nodes.options == {"preset": "balanced", "factor": 2.0, "sigma": 0.3, "refine_steps": 2}
    planned = saved(["de2", 0], {**composed(image=["load", 0]), "l": {"class_type": "LoadImage", "inputs": {}}})
    found, nodes = run_of(planned)
    assert nodes.from_image
    assert not {"low_steps", "noise"} & {*nodes.options}


@pytest.mark.parametrize("before", ["s", "de2"])
def test_an_image_that_was_refined_again_is_read_at_its_first_run(before: str) -> None:
    nodes = {**(sampler() if before == "s" else composed()), **refined([before, 0])}
    found, own = run_of(nodes)
    assert (found.seed, own.from_image) == (7 if before == "s" else 33, False)
    assert own.left[-1] == "its being enlarged again by MrFlow Refine"


def test_the_nodes_behind_the_saved_image_count() -> None:
    """Not those that lie about, nor ComfyUI's own samplers beside them."""
    other = sampler(seed=99)["s"]
    core = {"class_type": "KSampler", "inputs": {"seed": 1, "positive": ["n", 0], "latent_image": ["e", 0]}}
    found = read({"a": other, "k": core, **sampler()})
    assert found is not None
    assert found.seed == 7
    unconnected = sampler(positive=None)
    unconnected["k"] = {"class_type": "KSampler", "inputs": {**core["inputs"], "positive": ["p", 0]}}
    assert read(unconnected) == ForeignRun("ComfyUI", "a harbour", seed=1)


@pytest.mark.parametrize(
    ("widget", "value"),
    [
        *(("seed", -1), ("seed", 2**63), ("seed", "1e5"), ("seed", True), ("width", 10**400), ("width", "wide")),
        *(("sigma", 1.5), ("sigma", "0.2"), ("sigma", math.nan), ("sigma", [0.1, 0.2]), ("sigma", {"a": 1})),
        *(("stages", 400), ("stages", 2.5), ("factor", 99), ("low_steps", 10**30), ("refine_steps", -3)),
        *(("preset", "x" * 9), ("preset", "12 + 1"), ("preset", "9" * 10_000), ("solver", "er_sde"), ("noise", 7)),
        *(("cfg", 1e9), ("cfg", "high"), ("refine_cfg", -1), ("batch_size", 0)),
    ],
)
def test_a_value_that_no_widget_has_is_named_and_not_taken(widget: str, value: Any) -> None:
    found, nodes = run_of(sampler(**{widget: value}))
    if widget == "preset" and value == "x" * 9:  # a word like those of other families: the plan says what it knows
        assert nodes.options.get("preset") == value
        return
    plain = {"preset": "balanced", "stages": 2, "noise": "own"}
    assert nodes.options == {name: each for name, each in plain.items() if name != widget}
    assert len(found.unusable) == 1
    assert found.unusable[0].startswith(f"the {widget.replace('_', ' ')} ")
    assert len(found.unusable[0]) < 80


def test_hostile_graphs_of_our_nodes_end_soon() -> None:
    ring = {
        str(at): {
            "class_type": ("MrFlowFinish", "MrFlowRefine", "MrFlowDecode", "MrFlowPlan", "MrFlowSampler")[at % 5],
            "inputs": {name: [str((at + 1) % 5000), 0] for name in ("plan", "image", "model", "positive", "seed")},
        }
        for at in range(5000)
    }
    assert read(ring) is None
    nodes = sampler()
    nodes["m"]["inputs"]["model"] = ["m", 0]
    assert run_of(nodes)[1].left == (LEFT[0], LEFT[3])
    for broken in (None, 3, [], "s", {"class_type": 5}, {"class_type": "MrFlowSampler"}, {"inputs": 5}):
        assert read({**sampler(), "s": broken}) is None


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([[name, 0] for name in ("s", "d", "f", "m", "p", "pl", "sa1", "de2", "gone")])
    | st.lists(st.integers(), max_size=2)
)
GRAPHS = (sampler(), drafted(), composed(), refined(["de2", 0]), {**composed(), **refined(["de2", 0])})


@settings(max_examples=200)
@given(st.data())
def test_any_value_anywhere_is_read_without_a_fault_into_a_plan_or_a_sentence(data: st.DataObject) -> None:
    nodes = copy.deepcopy(data.draw(st.sampled_from(GRAPHS)))
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(sorted(nodes)))
        inputs = nodes[name]["inputs"]
        inputs[data.draw(st.sampled_from(sorted(inputs)))] = data.draw(VALUES)
    found = read(nodes)
    if found is not None and found.nodes is not None:
        options = found.options_for(get_family("sd3"))
        with contextlib.suppress(MrFlowError):
            make_plan("sd3", found.width or 512, found.height or 512, **options)
