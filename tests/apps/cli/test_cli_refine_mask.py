"""`mrflow generate --refine-mask`, and `MrFlow(...)(refine_mask=...)`: later stages refine where a picture is white."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
from cli_tools import SMALL, pixels
from PIL import Image
from tiny_pipelines import TWICE

from mrflow_sched import MrFlow, MrFlowError
from mrflow_sched.images.files import read_text
from mrflow_sched.images.record import RunRecord
from mrflow_sched.methods import Plain

_RUN = ("a star", *SMALL, "--size", "64x64")


@pytest.fixture
def half(tmp_path: Path) -> str:
    mask = np.zeros((64, 64), np.uint8)
    mask[32:] = 255
    Image.fromarray(mask).save(tmp_path / "half.png")
    return str(tmp_path / "half.png")


def test_it_is_recorded_and_asked_for_again(mrflow: Any, tmp_path: Path, half: str) -> None:
    out, white = ("--out", str(tmp_path / "out")), str(tmp_path / "white.png")
    Image.new("L", (64, 64), 255).save(white)
    made = mrflow("generate", *_RUN, *out, "--refine-mask", half)[1].strip()
    plain = mrflow("generate", *_RUN, *out)[1].strip()
    whole = mrflow("generate", *_RUN, *out, "--refine-mask", white)[1].strip()
    assert np.array_equal(pixels(whole), pixels(plain))
    assert not np.array_equal(pixels(made), pixels(plain))
    assert RunRecord.from_json(read_text(made)["mrflow"]).refine_mask is not None
    assert RunRecord.from_json(read_text(plain)["mrflow"]).refine_mask is None
    for source, given, words in (
        (made, (), "with a mask of what to refine, which it does not hold; give the same file with --refine-mask"),
        (made, ("--refine-mask", white), "is not the mask that"),
        (plain, ("--refine-mask", half), "was made without a mask; leave out --refine-mask"),
    ):
        code, _, err = mrflow("generate", "--from", source, *out, *given)
        assert code == 2
        assert words in err
    again = mrflow("generate", "--from", made, *out, "--refine-mask", half)[1].strip()
    assert np.array_equal(pixels(again), pixels(made))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--refine-steps", "0"), "--refine-mask says where to refine, and this run refines nothing; leave it out"),
        (("--refine-tokens", "0.5"), "and so does --refine-tokens; leave one of the two out"),
        (("--tile", "64"), "--refine-mask does not go with --tile 64; leave one of the two out"),
    ],
    ids=str,
)
def test_what_it_does_not_go_with_is_refused(mrflow: Any, half: str, given: Any, words: str) -> None:
    code, _, err = mrflow("generate", "a star", *SMALL, "--refine-mask", half, *given)
    assert code == 2
    assert words in err


def test_a_mask_that_is_none_is_refused(mrflow: Any, tmp_path: Path) -> None:
    Image.new("L", (8, 8), 60).save(tmp_path / "dark.png")
    for name, words in (("dark.png", "has nothing lighter than middle grey"), ("none.png", "there is no image file")):
        code, _, err = mrflow("generate", "a star", *SMALL, "--refine-mask", str(tmp_path / name))
        assert code != 0
        assert words in err


def test_mrflow_takes_it_and_refuses_it_before_anything_runs() -> None:
    size: dict[str, Any] = {"width": 128, "height": 128, "seed": 3, "low_steps": 2, "output_type": "pt"}
    mask = np.zeros((2, 1), np.float32)
    mask[1] = 1.0
    mrflow = MrFlow(tiny_pipelines.make("flux1-dev"), upscaler=TWICE)
    made, plain = mrflow("a cat", refine_mask=mask, **size), mrflow("a cat", **size)
    assert not bool((made.images == plain.images).all())
    with pytest.raises(MrFlowError, match="leave method out, or give it the mask itself"):
        mrflow("a cat", refine_mask=mask, method=Plain(), **size)
    seen: list[Any] = []
    other = MrFlow(tiny_pipelines.make("sd3"), upscaler=TWICE)
    with pytest.raises(MrFlowError, match="does not: leave refine_tokens at 1, and refine_mask out"):
        other("a cat", refine_mask=mask, callback=lambda step: seen.append(step.step), **size)
    assert not any(seen)
