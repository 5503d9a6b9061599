"""What a beginner is told: options by their names, an unquoted prompt, paths that are no files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mrflow_sched.apps.cli.main import main
from mrflow_sched.apps.cli.wording import with_options
from mrflow_sched.plan.options import OPTIONS


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_an_unquoted_prompt_is_told_to_be_quoted(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "a", "blue", "star", "over", "--seed", "3", "hills"]) == 2
    err = capsys.readouterr().err
    assert "the words 'blue star over hills' follow the prompt 'a'; put the whole prompt in quotation marks" in err
    assert f'mrflow {command} "' in err


def test_an_unknown_option_points_to_its_own_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a star", "--lowsteps", "4"]) == 2
    assert "unrecognized arguments: --lowsteps 4; did you mean --low-steps? (see mrflow generate --help)" in (
        capsys.readouterr().err
    )
    assert main(["plan", "--family", "demo", "a", "star"]) == 2
    assert "unrecognized arguments: a star (see mrflow plan --help)" in capsys.readouterr().err


PLANS = {
    ("--sigma", "0.12,0.1"): "--sigma must be one number, as there is one later stage, got 0.12,0.1;",
    ("--refine-steps", "2,2"): "--refine-steps must be one number, as there is one later stage, got 2,2;",
    ("--refine-steps", "1,1", "--stages", "4"): "one number or 3, one for each later stage, got 1,1.",
    ("--preset", "12+1+1", "--stages", "2"): "--preset 12+1+1 has 3 stages, which contradicts --stages 2",
    ("--stages", "1"): "--stages must be a whole number from 2 to 8, got 1; ",
    ("--factors", "2", "--factor", "3"): "--factors 2.0 gives every size step; leave --factor and --stages out.",
    ("--sigmas", "1,0.5,0", "--low-steps", "5"): "--low-steps 5 does not fit --sigmas, which make 2 steps",
    ("--guidance-interval", "0.9-0.1"): "--guidance-interval must be two sigmas, 0 <= low < high <= 1, got 0.9-0.1",
    ("--size", "40000x40"): "the width of --size must be a whole number from 1 to 32768, got 40000",
    ("--low-steps", "0"): "mrflow: --low-steps must be a whole number from 1 to 1000, got 0",
    ("--tile", "3"): "--tile must be 0 (none) or 64 pixels and more a side, got 3.",
    ("--preset", "1001+1"): "--preset '1001+1' must have 1 to 1000 steps in stage 1",
    ("--sigmas", "0.9,0.5,0"): "--sigmas must start at 1, which is pure noise, got 0.9.",
    ("--guidance-interval", "0.1-0.9"): "--guidance-interval 0.1-0.9 is for CFG",
}


@pytest.mark.parametrize("words", PLANS, ids=" ".join)
def test_a_refused_plan_names_options(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--family", "demo", *words]) == 2
    err = capsys.readouterr().err
    assert PLANS[words] in err
    assert not [name for name in OPTIONS if "_" in name and name in err]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--factor", "9"), "mrflow: --factor must be a number from 1.25 to 4, got 9.0"),
        (("--factor", "abc"), "argument --factor: 'abc' is not a number"),
        (("--size", "8x40000"), "mrflow: the height of --size must be a whole number"),
    ],
)
def test_calibrate_names_options_too(words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "a star", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_note_names_options_too(tmp_path: Path) -> None:
    from mrflow_sched.apps.cli.inputs import read_start
    from mrflow_sched.apps.cli.load import Job
    from mrflow_sched.plan.make import make_plan

    Image.new("RGB", (64, 64)).save(tmp_path / "start.png")
    job = Job(make_plan("demo", 64, 64, sigma=0.3), "a star", start=read_start(tmp_path / "start.png", 0.1))
    assert "--strength 0.1 is below the sigma 0.3" in job.notes[-1]
    assert job.notes[-1].endswith("lower --sigma too, or leave --strength out.")


def test_a_family_that_is_no_family_is_named_by_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--family", "mu or sigma"]) == 2
    assert "--family 'mu or sigma' is unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sentence",
    [
        "preset 'give mu.' is odd",
        "'low_steps=3' and \"leave sigma out\" came from a file",
        "The model's sigma and its guidance fit, and stages 2 to 3 are larger.",
        "choose more stages or a larger factor.",
        "Stage 1 at 64x64 is smaller than 128 px; expect weaker composition, or choose a larger size or factor.",
    ],
)
def test_text_from_outside_and_plain_words_stay(sentence: str) -> None:
    assert with_options(sentence).removeprefix("--") == sentence


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--model", "nothing"), "mrflow: --model is 'nothing'"),
        (("--model", ""), "argument --model: it is empty"),
        (("--upscaler", ""), "argument --upscaler: it is empty"),
        (("--device", "quantum"), "mrflow: --device is 'quantum'"),
        (("--image", "https://example.org/a.png"), "'https://example.org/a.png' is an address and not a file here"),
        (("--image", "."), "'.' is a folder; give an image file in it."),
    ],
)
def test_what_is_loaded_is_named_by_its_option(
    words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a star", *words]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for words in (("a star", "--image"), ("--from",)):
        assert main(["generate", *words, str(tmp_path / "pipe.png")]) == 2
        assert "is a pipe or a device; save the image as a file" in capsys.readouterr().err


def test_an_image_that_is_too_large_is_told_the_limit_that_it_passed(tmp_path: Path, capsys: Any) -> None:
    for size, most in (((32769, 1), "more than 32768 a side;"), ((20000, 20000), "more than 268 million in all;")):
        Image.new("1", size).save(tmp_path / "large.png")
        assert main(["generate", "a star", "--image", str(tmp_path / "large.png")]) == 2
        assert most in capsys.readouterr().err
