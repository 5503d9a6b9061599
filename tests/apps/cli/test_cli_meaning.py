"""Options that do not go together are refused, by both names; those that do are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_tools import SMALL, pixels
from PIL import Image

from mrflow_sched.apps.cli.main import main
from mrflow_sched.images.files import read_text


@pytest.fixture
def image(tmp_path: Path) -> str:
    Image.new("RGB", (24, 16), "blue").save(tmp_path / "start.png")
    return str(tmp_path / "start.png")


@pytest.mark.parametrize(
    "words",
    [
        ("--low-steps", "5"),
        ("--mu", "1"),
        ("--sigmas", "1,0.5,0"),
        ("--shift-tokens", "final"),
        ("--guidance-interval", "0.2-0.8"),
        ("--factor", "2", "--size", "48x48"),
        ("--factors", "2", "--size", "48x48"),
    ],
)
def test_an_image_in_place_of_stage_1_leaves_its_options_no_meaning(
    mrflow: Any, image: str, words: tuple[str, ...]
) -> None:
    code, out, err = mrflow("generate", "a star", "--image", image, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{words[0]} has no meaning" in err


def test_an_image_with_options_of_the_refine_stage_runs_and_says_its_own_steps(
    mrflow: Any, tmp_path: Path, image: str
) -> None:
    words = ("--image", image, "--preset", "12+2", "--factor", "3", "--out", str(tmp_path / "o"), "--device", "cpu")
    code, out, err = mrflow("generate", "a star", *words, "--dtype", "float32")
    assert code == 0, err
    assert pixels(out.strip()).shape == (48, 72, 3)
    assert "\nSteps: 2, " in read_text(out.strip())["parameters"]


PAIRS = {
    ("--preset", "12+1", "--low-steps", "8"): "--preset 12+1 has 12 steps in stage 1, which contradicts --low-steps 8",
    ("--preset", "12+1", "--sigmas", "1,0.5,0"): "which contradicts --sigmas, which makes 2",
    ("--preset", "12+1", "--refine-steps", "2"): "which contradicts --refine-steps",
    ("--preset", "12+1+2", "--refine-steps", "1,1"): "which contradicts --refine-steps",
    ("--preset", "12+0", "--sigma", "0.2"): "--sigma has no meaning",
    ("--stages", "3", "--refine-steps", "0,0", "--tile", "128"): "--tile has no meaning",
    ("--mu", "0.5", "--shift-tokens", "low"): "--shift-tokens has no meaning",
}


@pytest.mark.parametrize("words", PAIRS, ids=" ".join)
def test_a_pair_that_contradicts_itself_is_refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--family", "demo", *words]) == 2
    assert PAIRS[words] in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("--preset", "12+1", "--low-steps", "12", "--refine-steps", "1"),
        ("--preset", "2+1", "--sigmas", "1,0.5,0"),
        ("--preset", "2+1", "--sigmas", "1,0.5"),
        ("--preset", "best", "--low-steps", "8"),
        ("--preset", "12+1", "--stages", "3", "--refine-steps", "1,1"),
        ("--preset", "12+1+1", "--stages", "3"),
        ("--preset", "12+1+2", "--refine-steps", "1,2"),
        ("--stages", "3", "--refine-steps", "0,1", "--sigma", "0.2"),
    ],
    ids=" ".join,
)
def test_a_pair_that_agrees_is_taken(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--family", "demo", *words]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--refine-steps", "0", "--refine-prompt", "b"), "--refine-prompt has no meaning"),
        (("--preset", "4+0", "--refine-negative", "b"), "--refine-negative has no meaning"),
        (("--native", "--upscaler-tile", "64"), "--upscaler-tile has no meaning"),
        (("--native", "--upscaler-dtype", "float32"), "--upscaler-dtype has no meaning"),
        (("--upscaler", "lanczos", "--upscaler-tile", "64"), "--upscaler-tile is for an upscaler from a file"),
        (("--upscaler-dtype", "float32"), "--upscaler-dtype is for an upscaler from a file"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(mrflow: Any, words: tuple[str, ...], sentence: str) -> None:
    code, out, err = mrflow("generate", "a star", *words)
    assert (code, out) == (2, "")
    assert sentence in err


def test_model_config_needs_a_model(mrflow: Any, tmp_path: Path) -> None:
    code, _, err = mrflow("generate", "a star", *SMALL, "--model-config", str(tmp_path), model=None)
    assert code == 2
    assert "give --model FILE too" in err
