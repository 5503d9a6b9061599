"""Families of the models that hosts load: ComfyUI's names of all that it knows, and the stand-in for the others."""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import product
from typing import Any

import pytest

from mrflow_sched import make_plan
from mrflow_sched.plan.cost import part_costs
from mrflow_sched.plan.families import (
    FAMILIES,
    HostFacts,
    families_alike,
    family_of_host,
    get_family,
    unknown_flow,
)
from mrflow_sched.plan.families.base import KL_VAE, GuidanceKind

FLUX: dict[str, Any] = {"image_model": "flux", "hidden_size": 3072, "depth": 19, "context_in_dim": 4096}
FLUX2: dict[str, Any] = {"image_model": "flux2", "depth": 5}
UNET: dict[str, Any] = {"model_channels": 320}

# ComfyUI's class of the configuration, what it found out about the network, the file's name, the CFG scale: the family.
COMFY: list[tuple[str, dict[str, Any], str, float | None, str | None]] = [
    ("Flux", FLUX, "flux1-dev", None, "flux1-dev"),
    ("Flux", FLUX, "", 1.0, "flux1-dev"),
    ("Flux", FLUX, "flux1-krea-dev_fp8_scaled", None, "flux1-krea"),
    ("FluxSchnell", FLUX, "flux1-schnell", None, "flux1-schnell"),
    ("FluxSchnell", FLUX, "", None, "flux1-schnell"),
    ("FluxSchnell", {**FLUX, "context_in_dim": 2048}, "ovis_image_bf16", None, "ovis-image"),
    ("FluxInpaint", FLUX, "flux1-fill-dev", None, None),
    ("LongCatImage", {**FLUX, "context_in_dim": 3584}, "longcat_image_bf16", None, "longcat-image"),
    ("DemoFlux", {**FLUX, "hidden_size": 256}, "", None, "demo"),
    ("Flux2", {**FLUX2, "hidden_size": 6144, "depth": 8}, "flux2_dev_fp8mixed", None, "flux2-dev"),
    ("Flux2", {**FLUX2, "hidden_size": 6144, "depth": 8}, "", 1.0, "flux2-dev"),
    ("Flux2", {**FLUX2, "hidden_size": 3072}, "flux-2-klein-4b", None, "flux2-klein"),
    ("Flux2", {**FLUX2, "hidden_size": 3072}, "flux-2-klein-base-4b", None, "flux2-klein-base"),
    ("Flux2", {**FLUX2, "hidden_size": 4096}, "flux-2-klein-9b-fp8", 1.0, "flux2-klein"),
    ("Flux2", {**FLUX2, "hidden_size": 4096}, "", 4.0, "flux2-klein-base"),
    ("QwenImage", {"in_channels": 64}, "qwen_image_2512_fp8", None, "qwen-image-2512"),
    ("QwenImage", {"in_channels": 64}, "qwen_image_fp8", None, "qwen-image"),
    ("QwenImage21", {"in_channels": 64}, "", None, "qwen-image-2.1"),
    ("QwenImage21", {"in_channels": 64}, "qwen_image_2.1_turbo_bf16", None, "qwen-image-2.1-turbo"),
    ("SD3", {"depth": 24}, "sd3_medium", None, "sd3"),
    ("SD3", {"depth": 24, "qk_norm": "rms"}, "sd3.5_medium", None, "sd3"),
    ("SD3", {"depth": 38, "qk_norm": "rms"}, "", None, "sd35"),
    ("SD3", {"depth": 38, "qk_norm": "rms"}, "my merge", None, "sd35"),
    ("SD3", {"depth": 24, "qk_norm": "rms"}, "as large as sd3.5", None, "sd3"),
    ("ZImage", {"dim": 3840}, "z_image_turbo_bf16", None, "z-image-turbo"),
    ("ZImage", {"dim": 3840}, "z_image_bf16", None, "z-image"),
    ("ZImage", {"dim": 3840}, "my merge", 1.0, "z-image-turbo"),
    ("ZImagePixelSpace", {"dim": 3840}, "zeta", None, None),
    ("Lumina2", {"dim": 2304}, "lumina_2", None, "lumina2"),
    ("Chroma", {"image_model": "chroma"}, "chroma-hd", None, "chroma"),
    ("ChromaRadiance", {"image_model": "chroma_radiance"}, "radiance", None, None),
    ("AuraFlow", {"cond_seq_dim": 2048}, "aura_flow_0.3", None, "auraflow"),
    ("HunyuanImage21", {"guidance_embed": False}, "hunyuanimage2.1_bf16", None, "hunyuan-image"),
    ("HunyuanImage21", {"guidance_embed": True}, "", None, "hunyuan-image-distilled"),
    ("HunyuanImage21Refiner", {"guidance_embed": False}, "", None, None),
    ("HiDream", {"num_layers": 16}, "hidream_i1_full_fp8", None, "hidream"),
    ("HiDream", {"num_layers": 16}, "hidream_i1_full_fp8", 1.0, "hidream"),
    ("HiDream", {"num_layers": 16}, "hidream_i1_dev_bf16", 5.0, "hidream-dev"),
    ("HiDream", {"num_layers": 16}, "hidream-i1-fast", None, "hidream-dev"),
    ("HiDream", {"num_layers": 16}, "device", None, "hidream"),
    ("HiDream", {"num_layers": 16}, "", 1.0, "hidream-dev"),
    ("HiDreamO1", {}, "hidream_o1", None, None),
    ("Krea2", {"features": 6144}, "krea2_turbo", None, "krea2-turbo"),
    ("Krea2", {"features": 6144}, "krea2_raw", None, "krea2"),
    ("ErnieImage", {"image_model": "ernie"}, "ernie-image-turbo", None, "ernie-image-turbo"),
    ("ErnieImage", {"image_model": "ernie"}, "ernie-image", None, "ernie-image"),
    ("Anima", {"image_model": "anima"}, "anima-preview", None, "anima"),
    ("SDXL", UNET, "sd_xl_base_1.0", None, "sdxl"),
    ("SSD1B", UNET, "", None, "sdxl"),
    ("SD15", UNET, "v1-5-pruned-emaonly", None, "sd15"),
    ("SD20", UNET, "v2-1_768", None, "sd15"),
    ("SDXLRefiner", UNET, "", None, None),
    ("SDXL_instructpix2pix", UNET, "", None, None),
    ("PixArtSigma", {"depth": 28}, "", None, None),
    ("HunyuanDiT", {"depth": 40}, "", None, None),
    ("Stable_Cascade_C", {"c_cond": 2048}, "", None, None),
    ("SVD_img2vid", UNET, "", None, None),
    ("MageFlow", {"num_layers": 12}, "", None, "mage-flow"),
    ("MageFlow", {"num_layers": 12}, "mage_flow_turbo_int8", None, "mage-flow-turbo"),
    ("MageFlow", {"num_layers": 12}, "my merge", 1.0, "mage-flow-turbo"),
    ("Lens", {"image_model": "lens"}, "lens_bf16", None, "lens"),
    ("Lens", {"image_model": "lens"}, "lens_turbo_mxfp8", 1.0, "lens-turbo"),
    ("Flux3", {"image_model": "flux3"}, "flux3_klein", None, "flux3-klein"),
    ("Flux3", {"image_model": "flux3"}, "flux3_klein_base", 1.0, "flux3-klein-base"),
    ("Flux3", {"image_model": "flux3"}, "", 3.5, "flux3-klein-base"),
]
NOT_FLOW = {"SDXL", "SSD1B", "SD15", "SD20", "SDXLRefiner", "SDXL_instructpix2pix", "PixArtSigma", "HunyuanDiT"}
NOT_FLOW |= {"Stable_Cascade_C", "SVD_img2vid"}


@pytest.mark.parametrize(("engine", "config", "name", "cfg", "family"), COMFY)
def test_a_model_of_comfyui_tells_its_family(
    engine: str, config: dict[str, Any], name: str, cfg: float | None, family: str | None
) -> None:
    facts = HostFacts(engine=engine, config=config, name=name, guidance=cfg, flow=engine not in NOT_FLOW)
    assert [each for each, known in FAMILIES.items() if known.host(facts)] == ([] if family is None else [family])
    assert family_of_host(facts) is (None if family is None else FAMILIES[family])


def test_every_family_that_comfyui_has_is_in_the_table() -> None:
    # Not loaded by the version tried, or described by their diffusers pipelines alone.
    others = {"sana", "sana-sprint", "moss-image", "nucleus-image", "cogview3-plus", "cogview4", "cosmos-predict2"}
    others |= {"glm-image", "hunyuan-dit", "kolors", "lcm", "omnigen", "pixart-alpha", "pixart-sigma"}
    others |= {"z-image-omni", "lumina-next", "ideogram4", "bria", "bria-fibo", "bria-fibo2", "kandinsky5"}
    others |= {"prx", "prx-pixel", "dreamlite", "dreamlite-mobile"}
    others |= {"wan", "wan-2.2", "hunyuan-video", "hunyuan-video-1.5", "ltx-video"}  # models of videos there
    assert set(FAMILIES) - {row[-1] for row in COMFY} == others


def test_no_model_of_comfyui_is_of_two_families() -> None:
    configs: list[dict[str, Any]] = [
        {},
        FLUX,
        {"hidden_size": 6144, "depth": 38, "guidance_embed": True},
        {"depth": "38"},
    ]
    names = ("", "full-dev-fast", "turbo base", "krea schnell", "sd3.5_large")
    for engine, config, name, cfg, flow, channels in product(
        {row[0] for row in COMFY}, configs, names, (None, 1.0, 4.0), (True, False), (16, 64)
    ):
        facts = HostFacts(engine=engine, config=config, name=name, guidance=cfg, flow=flow, latent_channels=channels)
        alike = [each.name for each in FAMILIES.values() if each.host(facts)]
        assert len(alike) <= 1, (facts, alike)
        assert flow is (alike[0] not in ("sdxl", "sd15")) if alike else True


def test_latents_of_64_channels_are_those_of_qwen_image_21() -> None:
    for channels, family in ((16, "qwen-image"), (None, "qwen-image"), (64, "qwen-image-2.1")):
        facts = HostFacts(engine="QwenImage", config={"in_channels": 64}, latent_channels=channels)
        assert family_of_host(facts) is FAMILIES[family]


@pytest.mark.parametrize(
    ("engine", "name", "cfg", "found", "others"),
    [
        ("ZImage", "", None, "z-image", ["z-image-turbo"]),
        ("ZImage", "my merge", 1.0, "z-image-turbo", ["z-image"]),
        ("ZImage", "z_image_turbo", None, "z-image-turbo", []),
        ("Flux2", "flux-2-klein-4b", None, "flux2-klein", ["flux2-klein-base"]),
        ("Flux2", "flux-2-klein-base-4b", None, "flux2-klein-base", []),
        ("HiDream", "hidream_i1_full", None, "hidream", []),
        ("HiDream", "", None, "hidream", ["hidream-dev"]),
        ("Flux", "", None, "flux1-dev", []),
    ],
)
def test_what_else_a_model_could_be(engine: str, name: str, cfg: float | None, found: str, others: list[str]) -> None:
    facts = HostFacts(engine=engine, name=name, guidance=cfg)
    assert family_of_host(facts) is FAMILIES[found]
    assert [family.name for family in families_alike(facts)] == others


# ------------------------------------------------------------------------------------------------------- a stand-in


@pytest.mark.parametrize("kind", ["cfg", "embedded", "none"])
@pytest.mark.parametrize(
    ("factor", "patch", "channels"), [(8, 2, 16), (16, 1, 128), (32, 1, 64), (4, 2, 16), (8, 1, 4)]
)
def test_an_unknown_flow_model_can_be_planned(factor: int, patch: int, channels: int, kind: GuidanceKind) -> None:
    family = unknown_flow(
        "Newcomer", shift=2.5, vae_factor=factor, patch=patch, latent_channels=channels, guidance_kind=kind
    )
    assert (family.name, family.title, family.grid) == ("flow", "Newcomer", factor * patch)
    assert (family.guidance == 1.0) is (kind == "none")
    plan = make_plan(family, 1024, 1024)
    assert plan.stages[0].mu == pytest.approx(math.log(2.5))
    assert (plan.stages[0].width, plan.stages[1].sigmas) == (512, (0.12, 0.0))
    assert all(part.flop > 0 for part in part_costs(plan, family) or ())
    assert (family.vae_cost is KL_VAE) is (factor == 8)
    for each in fields(family):
        if each.name not in {"name", "title", "guidance_kind", "default_preset", "pipeline", "host", "sources"}:
            assert family.sources[each.name].startswith(("assumed", "said by the host", "vae_factor"))
    assert not family.host(HostFacts(engine="ZImage"))
    assert "flow" not in FAMILIES


@pytest.mark.parametrize(("said", "used"), [(0.2, 1.0), (-3.0, 1.0), (math.nan, 1.0), (math.inf, 1.0), (6.0, 6.0)])
def test_the_shift_of_a_host_is_made_one_that_can_be_planned(said: float, used: float) -> None:
    assert unknown_flow("", shift=said).shift.shift == used


def test_a_stand_in_may_be_like_another_family() -> None:
    family, like = unknown_flow("", shift=12.0, like=get_family("sdxl")), get_family("sdxl")
    assert (family.title, family.prediction, family.grid) == ("flow model", "flow", like.grid)
    assert (family.factor, family.text_tokens, family.min_low_side) == (like.factor, 0, like.min_low_side)
    assert (family.sources["patch"], family.sources["shift"]) == (
        "assumed: nothing is known of this model",
        "said by the host",
    )
