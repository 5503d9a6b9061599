"""`mrflow generate` from a prompt, on the tiny random folder of conftest.py."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import SMALL, change_engines, pixels

from mrflow_sched.images.files import read_text
from mrflow_sched.images.record import RunRecord


@dataclass(frozen=True)
class Doubler:
    """A stand-in for a model file: every pixel twice as large."""

    name: str
    scale: int = 2

    def __call__(self, images: Any) -> Any:
        return images.repeat_interleave(2, -1).repeat_interleave(2, -2)


def test_generate_prints_json_alone_and_repeats_bit_for_bit(mrflow: Any, tmp_path: Path) -> None:
    words = ("a red star", *SMALL, "--seed", "5", "--batch", "2", "--out", str(tmp_path / "o"), "--json")
    code, out, err = mrflow("generate", *words)
    found = json.loads(out)
    assert code == 0
    assert set(found) == {
        *("images", "details", "lost", "stages", "plan", "seed", "upscaler", "notes", "cancelled", "unfinished"),
    }
    assert (found["seed"], found["upscaler"], found["lost"]) == (5, "Lanczos", [])
    assert (found["cancelled"], found["unfinished"]) == (False, False)
    assert [(each["path"], each["seed"], each["prompt"], each["stages"]) for each in found["details"]] == [
        (path, seed, "a red star", []) for path, seed in zip(found["images"], (5, 6), strict=True)
    ]
    assert [f"mrflow: {note}" for note in found["notes"]] == err.splitlines()
    assert [Path(path).name for path in found["images"]] == ["mrflow-5.png", "mrflow-6.png"]
    assert [stage["name"] for stage in found["stages"]][:2] == ["text", "stage 1 sample"]
    assert all(stage["seconds"] >= 0 for stage in found["stages"])
    assert "Lanczos" in err

    second = found["images"][1]
    record = RunRecord.from_json(read_text(second)["mrflow"])
    assert (record.plan, record.prompt, record.batch, record.image) == (found["plan"], "a red star", 2, 1)
    assert (record.upscaler, record.upscaler_sha256, record.dtype) == ("Lanczos", None, "float32")
    code, out, err = mrflow("generate", "--from", second, "--out", str(tmp_path / "again"))
    assert code == 0
    assert "may differ" not in err
    assert out == f"{tmp_path / 'again' / 'mrflow-6.png'}\n"
    assert np.array_equal(pixels(second), pixels(out.strip()))
    assert not np.array_equal(pixels(second), pixels(found["images"][0]))
    assert read_text(out.strip()) == read_text(second)


def test_generate_writes_over_nothing_and_saves_stages(mrflow: Any, tmp_path: Path) -> None:
    words = ("a red star", *SMALL, "--upscaler", "lanczos", "--save-stages", "--out", str(tmp_path))
    assert mrflow("generate", *words)[0] == 0
    (tmp_path / "mrflow-0.png").write_bytes(b"mine")
    code, out, err = mrflow("generate", *words)
    assert code == 0
    assert "Lanczos" in err
    assert out.strip().endswith("mrflow-0-2.png")
    assert (tmp_path / "mrflow-0.png").read_bytes() == b"mine"
    names = sorted(path.name for path in tmp_path.glob("mrflow-0-2-*"))
    assert names == ["mrflow-0-2-part1-stage-1.png", "mrflow-0-2-part2-stage-2-upscaled.png"]
    assert pixels(tmp_path / names[0]).shape == (16, 16, 3)
    assert pixels(tmp_path / names[1]).shape == (32, 32, 3)
    (tmp_path / "mrflow-0-2.png").unlink()
    found = json.loads(mrflow("generate", *words, "--json")[1])
    assert [Path(path).name for path in found["images"]] == ["mrflow-0-2.png"]
    assert [Path(path).name for path in found["details"][0]["stages"]] == [
        *("mrflow-0-2-part1-stage-1-2.png", "mrflow-0-2-part2-stage-2-upscaled-2.png"),
    ]
    assert pixels(tmp_path / names[0]).shape == (16, 16, 3)


def test_generate_says_a_thing_once(mrflow: Any, tmp_path: Path) -> None:
    words = (*SMALL, "--stages", "3", "--out", str(tmp_path))
    code, _, err = mrflow("generate", "star " * 600, *words)
    assert code == 0
    assert err.count("Lanczos") == 1
    assert err.count("its end was cut off") == 1
    assert "indexing errors" not in err


def test_generate_native_needs_no_upscaler(mrflow: Any, tmp_path: Path) -> None:
    words = ("--native", "--steps", "2", "--size", "16x24", "--dtype", "float32", "--negative", "blur")
    code, out, err = mrflow("generate", "a star", *words, "--out", str(tmp_path))
    assert code == 0
    assert "Lanczos" not in err
    assert "no negative prompt" in err
    assert pixels(out.strip()).shape == (24, 16, 3)
    assert RunRecord.from_json(read_text(out.strip())["mrflow"]).upscaler == "none"


def spoil(monkeypatch: pytest.MonkeyPatch, *numbers: int, width: int = 32) -> None:
    """Make the decoder return NaN for those images of a batch, at that size."""

    def change(engine: Any) -> None:
        usual, done = engine.decode, [0]

        def decode(latents: Any) -> Any:
            images = usual(latents).clone()
            for image in images if images.shape[-1] == width else ():
                if done[0] in numbers:
                    image.fill_(float("nan"))
                done[0] += 1
            return images

        engine.decode = decode

    change_engines(monkeypatch, change)


def test_a_picture_that_goes_bad_in_the_last_stage_is_saved_as_it_was_before(
    mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("a star", *SMALL, "--batch", "3", "--out", str(tmp_path / "o"))
    with monkeypatch.context() as patch:
        spoil(patch, 1)
        code, out, err = mrflow("generate", *words, "--json")
    assert code == 2
    names = [Path(path).name for path in json.loads(out)["images"]]
    assert names == ["mrflow-0.png", "mrflow-1-unfinished.png", "mrflow-2.png"]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == names
    marked = [RunRecord.from_json(read_text(tmp_path / "o" / name)["mrflow"]).unfinished for name in names]
    assert marked == [False, True, False]
    assert "Image 2: the VAE's decoder returned NaN" in err
    assert json.loads(out)["error"] == f"not finished: {tmp_path / 'o' / names[1]}."


def test_one_bad_picture_does_not_lose_the_others(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("a star", *SMALL, "--batch", "3", "--out", str(tmp_path / "o"))
    with monkeypatch.context() as patch:
        spoil(patch, 1, width=16)
        code, out, err = mrflow("generate", *words, "--json")
    assert code == 2
    assert [Path(path).name for path in json.loads(out)["images"]] == ["mrflow-0.png", "mrflow-2.png"]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["mrflow-0.png", "mrflow-2.png"]
    assert [line for line in err.splitlines() if "mrflow-" in line] == [
        "mrflow: not saved, because of NaN or infinity in the image: mrflow-1-unfinished.png; try --dtype float32."
    ]
    assert f"mrflow: {json.loads(out)['error']}\n" in err


def test_where_every_picture_is_bad_nothing_is_left(
    mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 0, width=16)
    code, out, err = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path / "o"), "--json")
    found = json.loads(out)
    assert (code, found["images"], found["lost"]) == (2, [], ["mrflow-0-unfinished.png"])
    assert "not saved, because of NaN or infinity in the image: mrflow-0-unfinished.png" in found["error"]
    assert f"mrflow: {found['error']}\n" in err
    assert not (tmp_path / "o").exists()


def test_generate_uses_an_upscaler_file(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mrflow_sched.upscaling import load as upscale

    taken: list[Any] = []

    def load(path: Any, **_: Any) -> Any:
        taken.append(path)
        return Doubler("double")

    monkeypatch.setattr(upscale, "load_upscaler", load)
    file = tmp_path / "x2.safetensors"
    file.write_bytes(b"weights")
    code, out, _ = mrflow("generate", "a star", *SMALL, "--upscaler", str(file), "--out", str(tmp_path))
    assert code == 0
    assert taken == [file]
    record = RunRecord.from_json(read_text(out.strip())["mrflow"])
    assert record.upscaler == "double"
    assert record.upscaler_sha256 == hashlib.sha256(b"weights").hexdigest()
    code, _, err = mrflow("generate", "--from", out.strip(), "--out", str(tmp_path / "again"))
    assert code == 2
    assert "made with the upscaler 'double'" in err


def test_the_embedded_model_is_the_default(
    mrflow: Any, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mrflow_sched import demo
    from mrflow_sched.upscaling import load as upscale

    monkeypatch.setattr(demo, "upscaler_path", lambda: tiny_folder / "model_index.json")
    monkeypatch.setattr(upscale, "load_upscaler", lambda _path, **_: Doubler("own"))
    monkeypatch.setattr(demo, "weights_path", lambda: tiny_folder)
    code, out, err = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path), model=None)
    assert code == 0
    assert "Lanczos" not in err
    path = out.strip()
    record = RunRecord.from_json(read_text(path)["mrflow"])
    assert (record.model, record.upscaler) == ("embedded", "own")
    code, out, _ = mrflow("generate", "--from", path, "--out", str(tmp_path / "again"), model=None)
    assert code == 0
    assert np.array_equal(pixels(path), pixels(out.strip()))
    code, _, err = mrflow("generate", "a star", *SMALL, "--offload-text", "--out", str(tmp_path / "o"), model=None)
    assert code == 0
    assert "--offload has no effect on the embedded model" in err
    code, _, err = mrflow("generate", "--from", path, "--out", str(tmp_path / "again"))
    assert code == 2
    assert "leave out --model" in err
    words = ("a star", *SMALL, "--upscaler", "lanczos", "--out", str(tmp_path / "soft"))
    path = mrflow("generate", *words, model=None)[1].strip()
    code, out, _ = mrflow("generate", "--from", path, "--out", str(tmp_path / "again"), model=None)
    assert code == 0
    assert np.array_equal(pixels(path), pixels(out.strip()))


def test_the_bar_is_on_stderr_and_only_when_wanted(mrflow: Any, tmp_path: Path) -> None:
    _, out, err = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path), "--json", "--progress")
    assert json.loads(out)["seed"] == 0
    assert "stage 1 sample" in err
    assert "100%" in err
    _, _, err = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path))
    assert "%|" not in err


def test_offloading_without_its_library_is_a_refusal(
    mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr("mrflow_sched._runtime.device.resolve_device", lambda _device: torch.device("cuda"))
    monkeypatch.setattr("mrflow_sched.apps.cli.load.find_spec", lambda _name: None)
    code, out, err = mrflow("generate", "a star", "--offload-text", "--out", str(tmp_path / "o"))
    assert (code, out) == (2, "")
    assert "--offload model needs the package accelerate, which is not installed" in err
