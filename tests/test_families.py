from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import pytest

import mrflow_sched
from mrflow_sched.plan.families import FAMILIES, TIERS, Family, get_family

ALL = list(FAMILIES.values())
IDS = list(FAMILIES)


def test_the_families_of_the_documentation_are_all_there() -> None:
    wanted = (
        "flux1-dev flux1-schnell flux1-krea qwen-image sd3 sd35 z-image z-image-turbo flux2-klein-base flux2-klein "
        "flux2-dev chroma lumina2 sana auraflow hunyuan-image hunyuan-image-distilled hidream hidream-dev sdxl sd15 "
        "demo"
    )
    assert list(FAMILIES) == wanted.split()


@pytest.mark.parametrize("family", ALL, ids=IDS)
def test_every_number_has_a_source(family: Family) -> None:
    without = {"name", "title", "guidance_kind", "default_preset", "sources"}
    for each in fields(family):
        if each.name not in without:
            assert family.sources.get(each.name), f"{family.name}.{each.name} has no source"
    assert all(preset.source for preset in family.presets)


@pytest.mark.parametrize("family", ALL, ids=IDS)
def test_rows_agree_with_themselves(family: Family) -> None:
    assert FAMILIES[family.name] is family
    assert family.grid == family.vae_factor * family.patch
    assert all(side % family.grid == 0 for side in (*family.native_size, *(family.default_size or ())))
    assert family.get_preset().name == family.default_preset
    assert len({preset.name for preset in family.presets}) == len(family.presets)
    assert family.guidance == 1.0 or family.guidance_kind != "none"
    for preset in family.presets:
        assert 0 < preset.sigma < 1
        assert preset.name in (f"{preset.low_steps}+{preset.refine_steps}", "text")


@pytest.mark.parametrize("family", ALL, ids=IDS)
def test_the_defaults_of_a_family_stay_in_its_range(family: Family) -> None:
    plan = mrflow_sched.make_plan(family, *(family.default_size or family.native_size))
    assert not any("Stage 1" in note for note in plan.notes), plan.notes


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        FAMILIES["mine"] = FAMILIES["demo"]  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        FAMILIES["demo"].guidance = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "near"), [("flux1_dev", "'flux1-dev'"), ("SDXL", "sdxl"), ("qqqq", "; known families are flux1-dev")]
)
def test_an_unknown_family_gets_one_sentence_with_the_names(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=near) as caught:
        get_family(name)
    assert "lumina2" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "; Known" not in str(caught.value)


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


def test_an_unknown_preset_gets_one_sentence_with_the_names() -> None:
    with pytest.raises(ValueError, match=r"preset '99\+9'.*12\+1, 20\+1, text, 8\+1, fast, balanced, best"):
        get_family("qwen-image").get_preset("99+9")


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
