"""`mrflow generate --reference`: editing models on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
from cli_tools import pixels
from PIL import Image

from mrflow_sched.images.files import read_text
from mrflow_sched.images.record import RunRecord

_RUN = ("--size", "128x128", "--preset", "1+1", "--upscaler", "lanczos", "--device", "cpu")


@pytest.fixture(scope="module")
def kontext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kontext")
    tiny_pipelines.make("flux1-kontext").save_pretrained(folder)
    return folder


def test_references_are_recorded_and_asked_for_again(mrflow: Any, tmp_path: Path, kontext: Path) -> None:
    seen, other = str(tmp_path / "seen.png"), str(tmp_path / "other.png")
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(seen)
    Image.new("RGB", (64, 64), "red").save(other)
    where = ("--out", str(tmp_path / "out"))
    code, out, _ = mrflow("generate", "a star", *_RUN, *where, "--reference", seen, model=kontext)
    assert code == 0
    made = out.strip()
    assert len(RunRecord.from_json(read_text(made)["mrflow"]).references) == 1
    for given, words in (((), "made with 1 reference"), (("--reference", other), "is not the reference")):
        code, _, err = mrflow("generate", "--from", made, *where, *given, model=kontext)
        assert code == 2
        assert words in err
    code, out, _ = mrflow("generate", "--from", made, *where, "--reference", seen, model=kontext)
    assert code == 0
    assert np.array_equal(pixels(out.strip()), pixels(made))


def test_models_that_take_no_reference_refuse_one(mrflow: Any, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    given = ("--size", "32x32", "--reference", str(tmp_path / "red.png"), "--out", str(tmp_path))
    code, _, err = mrflow("generate", "a star", *given)
    assert code == 2
    assert "takes no references" in err


def test_files_that_are_no_references_are_refused(mrflow: Any, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("a")
    for name, words in (("nope.png", "there is no image file"), ("", "is a folder"), ("text.png", "not an image file")):
        code, _, err = mrflow("generate", "a star", "--reference", str(tmp_path / name), "--out", str(tmp_path))
        assert code != 0
        assert "--reference: " in err
        assert words in err


@pytest.mark.parametrize("command", ["draft", "compare"])
def test_editing_models_are_for_generate(command: str, mrflow: Any, tmp_path: Path) -> None:
    tiny_pipelines.make("qwen-image-edit-plus").save_pretrained(tmp_path / "model")
    code, _, err = mrflow(command, "a star", *_RUN, "--out", str(tmp_path / "out"), model=tmp_path / "model")
    assert code == 2
    assert "--reference, which only mrflow generate has" in err


def test_inpainting_models_are_for_python(mrflow: Any, tmp_path: Path) -> None:
    tiny_pipelines.make("flux1-inpaint").save_pretrained(tmp_path / "model")
    code, _, err = mrflow("generate", "a star", *_RUN, "--out", str(tmp_path), model=tmp_path / "model")
    assert code == 2
    assert "use MrFlow in Python" in err
