"""The table of families: what every family must have, and each number against its source."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_pipelines

import mrflow_sched
from mrflow_sched.plan.cost import UPSCALER_FLOP, part_costs
from mrflow_sched.plan.families import (
    FAMILIES,
    PURPOSES,
    TIERS,
    Family,
    HostFacts,
    Preset,
    families_of,
    family_of_host,
    family_of_pipeline,
    get_family,
)
from mrflow_sched.plan.families.base import named_distilled
from mrflow_sched.plan.solver_table import SOLVERS
from mrflow_sched.plan.stages import StagedPlan

ALL = list(FAMILIES.values())
IDS = list(FAMILIES)
# Known from a WebUI's checkpoint; their diffusers pipelines are probed.
HOSTS_ONLY = {
    "lens",
    "lens-turbo",
    "mage-flow",
    "mage-flow-turbo",
    "moss-image",
}


@pytest.mark.parametrize("family", ALL, ids=IDS)
def test_a_family_can_be_copied_and_sent_to_another_process(family: Family) -> None:
    changed = replace(family, guidance=family.guidance + 1.0)
    for made in (pickle.loads(pickle.dumps(family)), copy.deepcopy(family)):
        assert made == family != changed
        assert dict(made.sources) == dict(family.sources)
        with pytest.raises(TypeError):
            made.sources["shift"] = "mine"  # pyright: ignore[reportIndexIssue]
    assert pickle.loads(pickle.dumps(changed)) == changed


def test_the_families_of_the_documentation_are_all_there() -> None:
    wanted = (
        "flux1-dev flux1-schnell flux1-krea qwen-image qwen-image-2512 qwen-image-2.1 qwen-image-2.1-turbo "
        "sd3 sd35 z-image "
        "z-image-turbo flux2-klein-base flux2-klein flux2-dev "
        "flux3-klein-base flux3-klein chroma lumina2 sana sana-sprint auraflow hunyuan-image "
        "hunyuan-image-distilled hidream hidream-dev krea2 krea2-turbo ernie-image ernie-image-turbo "
        "longcat-image ovis-image nucleus-image anima "
        "lens lens-turbo mage-flow mage-flow-turbo moss-image "
        "cogview4 glm-image cogview3-plus cosmos-predict2 omnigen "
        "sdxl sd15 kolors pixart-alpha pixart-sigma hunyuan-dit lcm "
        "wan wan-2.2 hunyuan-video hunyuan-video-1.5 ltx-video demo"
    )
    unusual = (
        "z-image-omni lumina-next ideogram4 bria bria-fibo bria-fibo2 kandinsky5 prx prx-pixel dreamlite "
        "dreamlite-mobile"
    )
    known = [name for name in FAMILIES if name not in unusual.split()]
    assert set(unusual.split()) < set(FAMILIES)
    assert known == wanted.split()


@pytest.mark.parametrize("family", ALL, ids=IDS)
class TestConformance:
    """What every family must have; a new one is held to it by being in the registry."""

    def test_every_number_has_a_source(self, family: Family) -> None:
        without = {"name", "title", "guidance_kind", "default_preset", "pipeline", "host", "sources"}
        for each in fields(family):
            if each.name not in without:
                assert family.sources.get(each.name), f"{family.name}.{each.name} has no source"
        assert all(preset.source for preset in family.presets)
        assert not any("spec " in source for source in family.sources.values())

    def test_rows_agree_with_themselves(self, family: Family) -> None:
        assert FAMILIES[family.name] is family
        assert family.grid % (family.vae_factor * family.patch) == 0
        assert all(side % family.grid == 0 for side in (*family.native_size, *(family.default_size or ())))
        assert family.get_preset().name == family.default_preset
        assert len({preset.name for preset in family.presets}) == len(family.presets)
        assert family.guidance == 1.0 or family.guidance_kind != "none"
        assert family.solver in SOLVERS
        for preset in family.presets:
            assert 0 < preset.sigma < 1
            if not preset.few_step:  # named for its LoRA
                assert preset.name == f"{preset.low_steps}+{preset.refine_steps}"

    def test_every_preset_plans_and_its_line_reads_back(self, family: Family) -> None:
        size = family.default_size or family.native_size
        for preset in family.presets:
            plan = mrflow_sched.make_plan(family, *size, preset.name)
            assert (plan.width, plan.height, plan.preset) == (*size, preset.name)
            assert [stage.steps for stage in plan.stages] == [preset.low_steps, preset.refine_steps]
            assert plan.stages[1].start_sigma == preset.sigma
            assert not any("Stage 1" in note for note in plan.notes), plan.notes
            assert StagedPlan.from_string(plan.to_string()) == plan
            assert StagedPlan.from_json(plan.to_json()) == plan

    def test_costs_are_positive(self, family: Family) -> None:
        assert family.linear_cost > 0
        assert family.attention_cost >= 0
        assert family.usual_upscaler in UPSCALER_FLOP
        if family.network_cost is not None:
            assert min(family.network_cost.weights, family.network_cost.alive) > 0
        if family.vae_cost is not None:
            for part in (family.vae_cost.decode, family.vae_cost.encode):
                assert min(part.linear, part.alive) > 0
            assert family.vae_cost.weights > 0
        parts = part_costs(mrflow_sched.make_plan(family, *(family.default_size or family.native_size)))
        assert parts
        assert all(part.flop > 0 for part in parts)

    def test_pipelines_are_described(self, family: Family) -> None:
        info = family.pipeline
        if family.name in HOSTS_ONLY:
            assert info is None
            return
        assert info is not None
        named = [name for each in FAMILIES.values() if each.pipeline for _, name in each.pipeline.titles]
        assert any(re.fullmatch(info.classes, name) for name in named)
        assert all(re.fullmatch(info.classes, name) for _, name in info.titles)
        layouts = pytest.importorskip("mrflow_sched.engines.diffusers.layouts.per_family")
        # What a call encodes itself is not returned to us.
        assert info.text_outputs or getattr(layouts, info.layout).remembered
        assert info.max_sequence_length in (None, family.text_tokens)
        assert issubclass(getattr(layouts, info.layout), layouts.Layout)


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        FAMILIES["mine"] = FAMILIES["demo"]  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        FAMILIES["demo"].guidance = 1.0  # type: ignore[misc]


GOLDEN = {  # name: (mu at 1024 and at 4096 tokens in 12 steps, guidance, native steps, presets, text tokens)
    # black-forest-labs/flux sampling.py: 0.5 at 256 tokens, 1.15 at 4096; T5 of 512 tokens, guidance 3.5
    "flux1-dev": (0.63, 1.15, 3.5, 50, "12+1@0.12 20+1@0.15 8+1@0.12 6+1@0.12", 512),
    # the same; schnell is not shifted, reads 256 tokens and takes 4 steps
    "flux1-schnell": (0.0, 0.0, 1.0, 4, "4+1@0.12 2+1@0.12 1+1@0.12", 256),
    "flux1-krea": (0.63, 1.15, 4.5, 28, "12+1@0.12 20+1@0.15 8+1@0.12 6+1@0.12", 512),
    # Qwen-Image scheduler_config.json: 0.5 at 256 tokens, 0.9 at 8192
    "qwen-image": (0.5387, 0.6935, 4.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 64),
    "qwen-image-2512": (0.5387, 0.6935, 4.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 64),
    # the same line; Turbo has sigmas of its own (None)
    "qwen-image-2.1": (0.5387, 0.6935, 1.0, 40, "12+1@0.12 20+1@0.15 8+1@0.12 6+1@0.12", 64),
    "qwen-image-2.1-turbo": (None, None, 1.0, 8, "8+1@0.12", 64),
    # diffusers Krea2Pipeline: 0.5 at 256 tokens, 1.15 at 6400; Turbo 1.15 everywhere
    "krea2": (0.5813, 0.9063, 4.5, 52, "12+1@0.12 20+1@0.15 8+1@0.12", 512),
    "krea2-turbo": (1.15, 1.15, 1.0, 8, "8+1@0.12", 512),
    # log(4), scheduler_config.json of ERNIE-Image; log(3), Forge Neo's and ComfyUI's shift of its Turbo and of Anima
    "ernie-image": (1.3863, 1.3863, 4.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 64),
    "ernie-image-turbo": (1.0986, 1.0986, 1.0, 8, "8+1@0.12", 64),
    # FLUX.1's line, diffusers' default
    "longcat-image": (0.63, 1.15, 4.5, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 512),
    "ovis-image": (0.63, 1.15, 5.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 256),
    "nucleus-image": (0.63, 1.15, 4.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    "anima": (1.0986, 1.0986, 4.0, 30, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    # static shifts: log(3), log(6), log(5), log(1.73)
    "sd3": (1.0986, 1.0986, 7.0, 28, "12+1@0.12 20+1@0.15 8+1@0.12", 333),
    "sd35": (1.0986, 1.0986, 3.5, 28, "12+1@0.12 20+1@0.15 8+1@0.12", 333),
    "z-image": (1.7918, 1.7918, 5.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 64),
    "z-image-turbo": (1.0986, 1.0986, 1.0, 9, "8+1@0.11 9+1@0.11", 64),
    # compute_empirical_mu of diffusers' Flux2KleinPipeline
    "flux2-klein-base": (1.9736, 2.2446, 4.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 512),
    "flux2-klein": (1.9736, 2.2446, 1.0, 4, "4+1@0.25", 512),
    "flux2-dev": (1.9736, 2.2446, 4.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12 6+1@0.12", 512),
    # diffusers' Flux3ModularPipeline: log(6.93) everywhere, prompts padded to multiples of 80
    "flux3-klein-base": (1.9359, 1.9359, 3.5, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 80),
    "flux3-klein": (1.9359, 1.9359, 1.0, 16, "16+1@0.12", 80),
    # FLUX.2's line, which is ComfyUI's 1.829 at 1440x1440; log(6) and log(5) of ComfyUI and of a port
    "lens": (1.9736, 2.2446, 5.0, 20, "12+1@0.12 20+1@0.15 8+1@0.12", 64),
    "lens-turbo": (1.9736, 2.2446, 1.0, 4, "4+1@0.12", 64),
    "mage-flow": (1.7918, 1.7918, 5.0, 30, "12+1@0.12 20+1@0.15 8+1@0.12", 64),
    "mage-flow-turbo": (1.7918, 1.7918, 1.0, 4, "4+1@0.12", 64),
    "moss-image": (1.6094, 1.6094, 3.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 64),
    "chroma": (0.0, 0.0, 5.0, 35, "12+1@0.12 20+1@0.15 8+1@0.12", 512),
    "lumina2": (1.7918, 1.7918, 4.0, 30, "12+1@0.12 20+1@0.15 8+1@0.12", 256),
    # angles instead of a shift: diffusers SanaSprintPipeline
    "sana-sprint": (None, None, 4.5, 2, "2+1@0.12 1+1@0.12 4+1@0.12", 0),
    # log(0.25 + 0.75 sqrt(tokens / 256)), calculate_shift of diffusers' CogView4Pipeline and GlmImagePipeline
    "cogview4": (0.5596, 1.1787, 5.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 64),
    "glm-image": (0.5596, 1.1787, 1.5, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 16),
    "omnigen": (0.0, 0.0, 2.5, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 64),
    # betas, or Karras' spacing of sigma_ve: no shift
    "cogview3-plus": (None, None, 5.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 224),
    "cosmos-predict2": (None, None, 7.0, 35, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    "kolors": (None, None, 5.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    "pixart-alpha": (None, None, 4.5, 20, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    "pixart-sigma": (None, None, 4.5, 20, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    "hunyuan-dit": (None, None, 5.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    "lcm": (None, None, 8.5, 4, "4+1@0.12 8+1@0.12", 0),
    "sana": (1.0986, 1.0986, 4.5, 20, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    "auraflow": (0.5481, 0.5481, 3.5, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 256),
    "hunyuan-image": (1.6094, 1.6094, 3.5, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 192),
    "hunyuan-image-distilled": (1.6094, 1.6094, 3.25, 8, "8+1@0.12", 192),
    "hidream": (1.0986, 1.0986, 5.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 256),
    "hidream-dev": (1.7918, 1.7918, 1.0, 28, "12+1@0.12 20+1@0.15", 256),
    # diffusers' Ideogram4Pipeline: half the logarithm of tokens over those of 512 px
    "ideogram4": (0.0, 0.6931, 7.0, 48, "12+1@0.12 20+1@0.15 8+1@0.12", 2048),
    # no shift without a mu; FLUX.1's line of diffusers' scheduler
    "bria": (0.0, 0.0, 5.0, 30, "12+1@0.12 20+1@0.15 8+1@0.12", 128),
    "bria-fibo": (0.63, 1.15, 5.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 1500),
    "bria-fibo2": (0.63, 1.15, 5.0, 30, "12+1@0.12 20+1@0.15 8+1@0.12", 256),
    "kandinsky5": (1.0986, 1.0986, 3.5, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    "prx": (1.0986, 1.0986, 5.0, 28, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    "prx-pixel": (1.0986, 1.0986, 5.0, 28, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    # diffusers' DreamLitePipeline: 0.5 at 256 tokens, 1.16 at 4096
    "dreamlite": (0.632, 1.16, 3.5, 30, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    "dreamlite-mobile": (0.632, 1.16, 1.0, 4, "4+1@0.12", 0),
    "lumina-next": (0.0, 0.0, 4.0, 30, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    "z-image-omni": (1.7918, 1.7918, 5.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 64),
    "sdxl": (None, None, 5.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    "sd15": (None, None, 7.5, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    # scheduler_config.json: log(3) of Wan, log(7) and log(5) of HunyuanVideo; of LTX 0.95 at 1024, 2.05 at 4096 tokens
    "wan": (1.0986, 1.0986, 5.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    "wan-2.2": (1.0986, 1.0986, 4.0, 40, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    "hunyuan-video": (1.9459, 1.9459, 6.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12 6+1@0.12", 256),
    "hunyuan-video-1.5": (1.6094, 1.6094, 6.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 1000),
    "ltx-video": (0.95, 2.05, 3.0, 50, "12+1@0.12 20+1@0.15 8+1@0.12", 0),
    # FLUX.1's line over the tokens of 64 and 256 px
    "demo": (1.15, 3.23, 3.5, 50, "12+1@0.6 20+1@0.6 8+1@0.6 6+1@0.6 turbo@0.6", 32),
}


@pytest.mark.parametrize("name", IDS)
def test_each_number_is_that_of_its_source(name: str) -> None:
    family, (low, high, guidance, steps, presets, text) = FAMILIES[name], GOLDEN[name]
    for tokens, mu in ((1024, low), (4096, high)):
        low_steps = None if family.shift.kind == "list" else 12
        plan = mrflow_sched.make_plan(family, *family.native_size, low_steps=low_steps, shift_tokens=tokens)
        assert plan.stages[0].mu == (None if mu is None else pytest.approx(mu, abs=1e-4))
    assert (family.guidance, family.native_steps, family.text_tokens) == (guidance, steps, text)
    assert " ".join(f"{preset.name}@{preset.sigma}" for preset in family.presets) == presets


def test_text_lengths_the_pipelines_are_asked_for() -> None:
    asked = {name: family.pipeline.max_sequence_length for name, family in FAMILIES.items() if family.pipeline}
    given = {name: length for name, length in asked.items() if length is not None}
    assert given == {"flux1-dev": 512, "flux1-krea": 512, "flux1-schnell": 256, "demo": 32}


def test_who_puts_the_positive_branch_first() -> None:
    first = [name for name, family in FAMILIES.items() if family.pipeline and family.pipeline.positive_first]
    assert first == ["z-image", "z-image-turbo", "z-image-omni", "lumina-next", "omnigen"]


# ------------------------------------------------------------------------------------------- where a family is found


def pipe_of(name: str, **parts: Any) -> Any:
    """A stand-in of a pipeline class called `name`: parts hold the configurations that families are told by."""
    return type(name, (), {})() if not parts else _filled(type(name, (), {})(), parts)


def _filled(pipe: Any, parts: dict[str, Any]) -> Any:
    for part, config in parts.items():
        setattr(pipe, part, SimpleNamespace(config=SimpleNamespace(**config)))
    return pipe


def configured(kind: str, **config: Any) -> Any:
    pipe = pipe_of(kind)
    pipe.config = config
    return pipe


def named(kind: str, name: str) -> Any:
    pipe = pipe_of(kind)
    pipe.name_or_path = name
    return pipe


def scheduled(kind: str, **config: Any) -> Any:
    pipe = pipe_of(kind)
    pipe.scheduler = SimpleNamespace(config=config)
    return pipe


EIGHT, FOUR = {"block_out_channels": (1, 1, 1, 1)}, {"block_out_channels": (1, 1, 1)}


@pytest.mark.parametrize(
    ("pipe", "name"),
    [
        (pipe_of("FluxPipeline", transformer={"guidance_embeds": True}, vae=EIGHT), "flux1-dev"),
        (pipe_of("FluxPipeline", transformer={"guidance_embeds": True}, vae=FOUR), "demo"),
        (pipe_of("FluxPipeline", transformer={"guidance_embeds": False}, vae=EIGHT), "flux1-schnell"),
        (pipe_of("StableDiffusion3Pipeline", transformer={"num_layers": 24}), "sd3"),
        (pipe_of("StableDiffusion3PAGPipeline", transformer={"num_layers": 38}), "sd35"),
        (pipe_of("HunyuanImagePipeline", transformer={"guidance_embeds": True}), "hunyuan-image-distilled"),
        (pipe_of("QwenImageControlNetPipeline"), "qwen-image"),
        (named("QwenImagePipeline", "Qwen/Qwen-Image"), "qwen-image"),
        (named("QwenImagePipeline", "Qwen/Qwen-Image-2512"), "qwen-image-2512"),
        (named("QwenImagePipeline", "models/qwen-image-2512-int8/"), "qwen-image-2512"),
        (named("QwenImagePipeline", "models-of-2512/Qwen-Image"), "qwen-image"),
        (configured("QwenImage21Pipeline"), "qwen-image-2.1"),
        (configured("QwenImage21Pipeline", sample_sigmas=[1.0, 0.5]), "qwen-image-2.1-turbo"),
        (configured("Krea2Pipeline", is_distilled=False), "krea2"),
        (configured("Krea2Pipeline", is_distilled=True), "krea2-turbo"),
        (scheduled("ErnieImagePipeline", shift=4.0), "ernie-image"),
        (scheduled("ErnieImagePipeline", shift=3.0), "ernie-image-turbo"),
        (pipe_of("LongCatImagePipeline"), "longcat-image"),
        (pipe_of("StableDiffusionXLPipeline"), "sdxl"),
        (pipe_of("StableDiffusionPipeline"), "sd15"),
    ],
)
def test_a_pipeline_tells_its_family(pipe: Any, name: str) -> None:
    found = family_of_pipeline(pipe)
    assert found is FAMILIES[name]
    derived = type("Mine", (type(pipe),), {})()
    derived.__dict__.update(vars(pipe))
    assert family_of_pipeline(derived) is found
    assert family_of_pipeline(pipe_of("OtherPipeline")) is None


def test_no_checkpoint_is_of_two_families() -> None:
    engines = ("Flux", "Flux2", "QwenImage", "ZImage", "Chroma", "Lumina2", "StableDiffusion", "StableDiffusion2")
    engines = (*engines, "StableDiffusionXL", "StableDiffusion3", "DiffusionEngine", "Mugen", "Krea2", "Anima")
    engines = (*engines, "QwenImage21", "Qwen21", "ErnieImage", "ERNIE", "Zimage")
    names = ("", "flux1-schnell", "flux1-krea", "flux-2-klein-base", "z_image_turbo", "sd3.5_large", "sd3.5_medium")
    for engine, name, flow, scale, distilled, sd3, xl in product(
        engines, names, (True, False), (None, 1.0, 4.0), (True, False), (True, False), (True, False)
    ):
        if sd3 and not (flow and engine in ("StableDiffusion3", "DiffusionEngine")):
            continue
        facts = HostFacts(
            engine=engine, name=name, flow=flow, guidance=scale, distilled_scale=distilled, is_sd3=sd3, is_sdxl=xl
        )
        alike = [name for name, family in FAMILIES.items() if family.host(facts)]
        assert len(alike) <= 1, (facts, alike)
        assert flow or alike in (["sdxl"], ["sd15"])


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("sd3.5_large", "sd35"),
        ("sd3_5-large-turbo", "sd35"),
        ("sd3.5_medium", "sd3"),
        ("sd35_medium", "sd3"),
        ("sd3_large", "sd3"),
        ("sd3_medium", "sd3"),
    ],
)
def test_only_the_large_model_of_35_is_sd35(checkpoint: str, name: str) -> None:
    assert family_of_host(HostFacts(engine="StableDiffusion3", name=checkpoint)) is FAMILIES[name]


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ("z_image_turbo_bf16", True),
        ("zimageturbo_v1", True),
        ("flux-2-klein-9b-distilled-fp8", True),
        ("krea2 4 steps", True),
        ("qwen-image-lightning-8steps", True),
        ("klein-9b-base", False),
        ("flux2klein_9bbase", False),
        ("krea2-raw", False),
        ("chroma-undistilled", False),
        ("flux-de-distilled", False),
        ("z_image_bf16", None),
        ("strawberry", None),
        ("step-12steps", None),
    ],
)
def test_a_name_may_say_that_a_checkpoint_is_distilled(checkpoint: str, said: bool | None) -> None:
    assert named_distilled(checkpoint) is said


# --------------------------------------------------------------------------------------------------------- a new family

MINE = """
from mrflow_sched.plan.families.base import Family, HostFacts, PipelineInfo, Preset, ShiftRule, always

def _host(facts: HostFacts) -> bool:
    return facts.engine == "Mine"

MINE = Family(
    name="mine", title="Mine", shift=ShiftRule("static", shift=2.0), guidance_kind="none", guidance=1.0,
    text_tokens=10, native_steps=8, presets=(Preset("4+1", 4, 1, 0.2, "measured"),), default_preset="4+1",
    pipeline=PipelineInfo(classes="MinePipeline", titles=(("Mine", "MinePipeline"),), tells=always), host=_host,
)
FAMILIES = (MINE,)
"""


def test_a_family_is_added_by_one_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    known: Any = SimpleNamespace(FAMILIES=tuple(FAMILIES.values()))
    added: Any = module
    families = families_of([known, added])
    assert list(families) == [*FAMILIES, "mine"]
    mine = get_family("mine", families)
    assert mrflow_sched.make_plan(mine, 1024, 1024).stages[1].sigmas == (0.2, 0.0)
    assert family_of_pipeline(pipe_of("MinePipeline"), families) is mine
    assert family_of_host(HostFacts(engine="Mine"), families) is mine
    assert "mine" not in FAMILIES
    with pytest.raises(ValueError, match="family 'mine' is unknown"):
        get_family("mine")
    with pytest.raises(ValueError, match="family 'mine' is there twice"):
        families_of([added, added])


NEWCOMER = """
from mrflow_sched.plan.families.base import Family, PipelineInfo, Preset, ShiftRule, always

INFO = PipelineInfo(
    classes="MinePipeline", titles=(("Mine", "MinePipeline"),), tells=always, layout="FluxLayout",
    text_outputs=("prompt_embeds", "pooled_prompt_embeds", ""), max_sequence_length=24,
)
FAMILIES = (
    Family(
        name="mine", title="Mine", shift=ShiftRule("static", shift=2.0), guidance_kind="embedded", guidance=2.5,
        text_tokens=24, native_steps=8, presets=(Preset("3+1", 3, 1, 0.2, "measured"),), default_preset="3+1",
        solver="euler", pipeline=INFO,
    ),
)
"""

NEWCOMERS_RUN = """
import tiny_pipelines
from pipeline_tools import listening

from mrflow_sched import MrFlow, StagedPlan, make_plan
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.plan.families import get_family

class MinePipeline(tiny_pipelines.diffusers().FluxPipeline):
    pass

pipe = MinePipeline(**tiny_pipelines.make("flux1-dev").components)
pipe.set_progress_bar_config(disable=True)
assert PipelineEngine(pipe, family="mine").family.name == MrFlow(pipe).family.name == "mine"
assert PipelineEngine(tiny_pipelines.make("flux1-dev")).family.name == "flux1-dev"
plan = make_plan("mine", 64, 64)
assert StagedPlan.from_string(plan.to_string()) == plan
with listening(pipe) as heard:
    made = MrFlow(pipe)("a cat", width=64, height=64, seed=3, output_type="pt")
assert made.images.shape == (1, 3, 64, 64) and bool(made.images.isfinite().all())
assert made.plan.family == "mine" and not any("family" in warning for warning in made.warnings)
sigmas = [sigma for stage in made.plan.stages for sigma in stage.sigmas[:-1]]
told = [float(time[0]) for time in heard.timesteps]
assert len(told) == len(sigmas) == 5 and max(abs(a - b) for a, b in zip(told, sigmas)) < 1e-6
assert {float(each["guidance"][0]) for each in heard.arguments} == {2.5}
assert {each["encoder_hidden_states"].shape[1] for each in heard.arguments} == {24}
print("made")
"""


def test_a_newcomers_family_of_one_file_plans_and_samples(tmp_path: Path) -> None:
    """In a copy of the package: the file, and its name in `_MODULES`, and nothing else is new."""
    package = Path(mrflow_sched.__file__).parent
    copied = shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    room = copied / "plan" / "families"
    (room / "mine.py").write_text(NEWCOMER, encoding="utf-8")
    registry = (room / "__init__.py").read_text("utf-8")
    for opening in ("from mrflow_sched.plan.families import (\n", "_MODULES: tuple[FamilyModule, ...] = (\n"):
        assert registry.count(opening) == 1
        registry = registry.replace(opening, f"{opening}    mine,\n")
    (room / "__init__.py").write_text(registry, encoding="utf-8")
    tests = Path(tiny_pipelines.__file__).parent
    paths = os.pathsep.join(map(str, (tmp_path, tests, tests.parent)))
    command = [sys.executable, "-c", NEWCOMERS_RUN]
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "made"


def test_a_family_of_ones_own_may_be_changed() -> None:
    assert replace(get_family("sd3"), name="mine").get_preset("fast").name == "8+1"


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("flux1_dev", "did you mean 'flux1-dev'"),
        ("flux", "did you mean 'flux1-dev'"),
        ("FLUX.1-dev", "did you mean 'flux1-dev'"),
        ("flux.1 dev", "did you mean 'flux1-dev'"),
        ("schnell", "did you mean 'flux1-schnell'"),
        ("flux.2", "did you mean 'flux2-"),
        ("SDXL", "did you mean 'sdxl'"),
        ("sdxl 1.0", "did you mean 'sdxl'"),
        ("Stable Diffusion 3.5", "did you mean 'sd35'"),
        ("qwen", "did you mean 'qwen-image'"),
        ("Z Image Turbo", "did you mean 'z-image-turbo'"),
        ("auroflow", "did you mean 'auraflow'"),
        ("qqqq", "; use flux1-dev, "),
        ("", "; use flux1-dev, "),
        ("!?", "; use flux1-dev, "),
    ],
)
def test_an_unknown_family_gets_one_sentence_with_near_names(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=near) as caught:
        get_family(name)
    assert str(caught.value).endswith(f" `mrflow families` lists all {len(FAMILIES)}.")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("family", "fast", "balanced", "best"),
    [
        ("flux1-dev", "6+1", "12+1", "20+1"),
        ("qwen-image", "8+1", "12+1", "20+1"),
        ("z-image-turbo", "8+1", "8+1", "9+1"),
        ("flux2-klein", "4+1", "4+1", "4+1"),
    ],
)
def test_every_family_has_a_preset_of_each_tier(family: str, fast: str, balanced: str, best: str) -> None:
    assert [get_family(family).get_preset(tier).name for tier in TIERS] == [fast, balanced, best]
    for known in FAMILIES.values():
        steps = [known.get_preset(tier).low_steps for tier in TIERS]
        assert steps == sorted(steps)
        assert known.get_preset("balanced") == known.get_preset()


@pytest.mark.parametrize(
    ("family", "text", "detail"),
    [
        ("flux1-dev", (12, 1, 0.18), (12, 4, 0.75)),
        ("qwen-image", (12, 1, 0.18), (12, 4, 0.75)),
        ("z-image-turbo", (8, 1, 0.18), (8, 4, 0.75)),
        ("flux2-klein", (4, 1, 0.25), (4, 2, 0.75)),  # made for four steps: no more than half of a native run
    ],
)
def test_every_family_has_a_preset_for_lettering_and_for_detail(
    family: str, text: tuple[int, int, float], detail: tuple[int, int, float]
) -> None:
    for name, numbers in zip(PURPOSES, (text, detail), strict=True):
        preset = get_family(family).get_preset(name)
        assert (preset.name, preset.low_steps, preset.refine_steps, preset.sigma) == (name, *numbers)
    for known in FAMILIES.values():
        for name in PURPOSES:
            size = known.default_size or known.native_size
            plan = mrflow_sched.make_plan(known, *size, name)
            assert plan.preset == name
            assert StagedPlan.from_string(plan.to_string()) == plan


def test_a_family_s_own_preset_of_a_purpose_comes_first() -> None:
    own = Preset("detail", 9, 3, 0.5, "measured")
    known = get_family("flux1-dev")
    assert replace(known, presets=(*known.presets, own)).get_preset("Detail") == own


def test_an_unknown_preset_gets_one_sentence_with_near_names() -> None:
    with pytest.raises(
        ValueError, match=r"preset 'quick'.*fast, balanced, best, text, detail, 12\+1, 20\+1, 8\+1, or any .*10\+1"
    ):
        get_family("qwen-image").get_preset("quick")


@pytest.mark.parametrize(
    ("name", "steps", "sigma"),
    [
        ("10+1", (10, 1), 0.12),
        ("16+2", (16, 2), 0.12),
        ("010+01", (10, 1), 0.12),
        ("1000+0", (1000, 0), 0.12),
        ("20+1", (20, 1), 0.15),  # the family's own preset of that name
        ("BEST", (20, 1), 0.15),
        ("Text", (12, 1), 0.18),
    ],
)
def test_any_step_counts_are_a_preset(name: str, steps: tuple[int, int], sigma: float) -> None:
    preset = get_family("flux1-dev").get_preset(name)
    assert ((preset.low_steps, preset.refine_steps), preset.sigma) == (steps, sigma)
    assert preset.name == ("text" if name == "Text" else "{}+{}".format(*steps))


@pytest.mark.parametrize("name", ["0+1", "1001+1", "1+1001", "+".join("1" * 9), "9" * 50 + "+1"])
def test_step_counts_out_of_range_are_told_the_range(name: str) -> None:
    with pytest.raises(ValueError, match="1 to 1000 steps in stage 1, and 0 to 1000 in each of up to 7 later stages"):
        get_family("flux1-dev").get_preset(name)


@pytest.mark.parametrize("name", ["12", "12+", "+1", "12+1 ", "12 + 1", "-1+1", "1.5+1", "١٢+١"])
def test_what_is_no_step_count_is_no_preset(name: str) -> None:
    with pytest.raises(ValueError, match=r"choose from fast, .*detail, 12\+1, .*, or any"):
        get_family("flux1-dev").get_preset(name)


@pytest.mark.parametrize(
    ("name", "tokens", "tflop"),
    [  # counted with torch's FlopCounterMode on diffusers' classes
        ("flux1-dev", 1024, 21.503),
        ("flux1-dev", 4096, 74.385),
        ("sd3", 1024, 2.107),
        ("sd3", 4096, 8.904),
        ("sd35", 1024, 7.978),
        ("sd35", 4096, 31.121),
    ],
)
def test_transformer_costs_match_a_flop_count(name: str, tokens: int, tflop: float) -> None:
    assert get_family(name).forward_cost(tokens) / 1e12 == pytest.approx(tflop, rel=0.02)


@pytest.mark.parametrize(
    ("name", "tokens", "tflop"),
    [("sd15", 4096, 0.803), ("sd15", 16384, 4.674), ("sdxl", 4096, 1.589), ("sdxl", 16384, 6.761)],
)
def test_unet_costs_match_a_flop_count(name: str, tokens: int, tflop: float) -> None:
    assert get_family(name).forward_cost(tokens) / 1e12 == pytest.approx(tflop, rel=0.08)


def test_public_names_are_found_when_asked_for() -> None:
    assert mrflow_sched.__version__ == "0.1.0"
    assert mrflow_sched.get_family is get_family
    assert {"make_plan", "Family", "sample_staged"} <= set(dir(mrflow_sched))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mrflow_sched.nonsense  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_the_package_and_planning_need_no_torch() -> None:
    code = (
        "import sys, mrflow_sched; mrflow_sched.make_plan('demo', 256, 256); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'diffusers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
