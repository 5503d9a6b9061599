"""The command line, run in this process on the tiny random folder of conftest.py."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mrflow_sched
from mrflow_sched.apps.cli import main as cli
from mrflow_sched.images.files import read_png_text
from mrflow_sched.images.record import RunRecord
from mrflow_sched.plan.cost import part_costs
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.stages import StagedPlan

SMALL = ("--size", "32x32", "--low-steps", "3", "--refine-steps", "1", "--dtype", "float32", "--device", "cpu")


@pytest.fixture
def mrflow(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command; the model is the tiny folder wherever a model is taken. Returns (code, stdout, stderr)."""

    def run(command: str, *words: str, model: Path | None = tiny_folder) -> tuple[int, str, str]:
        where = ("--model", str(model)) if model and command != "plan" else ()
        code = cli.main([command, *words, *where])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@dataclass(frozen=True)
class Doubler:
    """A stand-in for a model file: every pixel twice as large."""

    name: str
    scale: int = 2

    def __call__(self, images: Any) -> Any:
        return images.repeat_interleave(2, -1).repeat_interleave(2, -2)


def pixels(path: Path | str) -> Any:
    with Image.open(path) as image:
        return np.array(image)


# --- plan


def test_plan_json_has_the_stable_keys_and_numbers(mrflow: Any) -> None:
    code, out, err = mrflow("plan", "--family", "flux1-dev", "--size", "1024x1024", "--preset", "12+1", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert {"family", "preset", "cost_ratio", "plan", "stages"} <= set(found)
    assert (found["family"], found["preset"]) == ("flux1-dev", "12+1")
    first, last = found["stages"]
    assert {"width", "height", "tokens", "mu", "sigmas", "forwards"} <= set(first)
    assert (first["width"], first["tokens"], len(first["sigmas"])) == (512, 1024, 13)
    assert first["mu"] == pytest.approx(0.63, abs=1e-3)
    assert last["sigmas"] == [0.12, 0.0]
    assert found["cost_ratio"] > 8
    assert StagedPlan.from_string(found["plan"]).stages[1].width == 1024


def test_plan_tells_work_memory_and_tiles(mrflow: Any) -> None:
    _, out, _ = mrflow("plan", "--family", "flux1-dev", "--json")
    found = json.loads(out)
    assert found["work_ratio"] == pytest.approx(10.58, abs=0.02)
    assert [part["name"] for part in found["work"]][2:4] == ["upscale", "encode"]
    _, out, _ = mrflow("plan", "--family", "flux1-dev")
    assert "native 10.58 times as much" in out
    assert "memory in 16 bits: about 23.9 GiB, most of it in stage 2 decode" in out
    _, out, _ = mrflow("plan", "--family", "hunyuan-image")
    assert "without the VAE, which was not counted" in out
    assert "memory" not in out
    code, out, _ = mrflow("plan", "--family", "flux1-dev", "--size", "4096x4096", "--stages", "3", "--tile", "1024")
    assert (code, "tile=1024" in out) == (0, True)
    _, out, _ = mrflow("plan", "--family", "sd35", "--guidance-interval", "0.3-0.9")
    assert " guidance_interval=0.3/0.9 " in out
    code, _, err = mrflow("plan", "--family", "sd35", "--guidance-interval", "wide")
    assert (code, "write LOW-HIGH" in err) == (2, True)
    code, _, err = mrflow("plan", "--family", "flux1-dev", "--native", "--tile", "1024")
    assert (code, "--tile has no meaning" in err) == (2, True)


def test_plan_foretells_seconds_from_a_comparison(mrflow: Any, tmp_path: Path) -> None:
    plan = make_plan("flux1-dev", 1024, 1024)
    parts = part_costs(plan) or ()
    file = tmp_path / "timings.json"
    stages = [{"name": part.name, "seconds": part.flop * 1e-12} for part in parts]
    file.write_text(json.dumps({"plan": plan.to_string(), "stages": stages}))
    _, out, _ = mrflow("plan", "--family", "flux1-dev", "--native", "--timings", str(file), "--json")
    told = {part["name"]: part["seconds"] for part in json.loads(out)["seconds"]}
    assert told["stage 1 sample"] == pytest.approx(50 * 74.36, rel=1e-3)
    _, out, _ = mrflow("plan", "--family", "flux1-dev", "--timings", str(file))
    assert "expected seconds on the measured machine: 352." in out
    code, _, err = mrflow("plan", "--family", "sd35", "--timings", str(file))
    assert (code, "is of family flux1-dev, not sd35" in err) == (2, True)
    for text in ("no json", "{}", '{"plan": "x", "stages": []}'):
        file.write_text(text)
        code, _, err = mrflow("plan", "--family", "flux1-dev", "--timings", str(file))
        assert (code, "cannot be read" in err, err.count("\n")) == (2, True, 1)


def test_plan_text_says_the_same(mrflow: Any) -> None:
    code, out, _ = mrflow("plan", "--family", "flux1-dev", "--size", "1000x1000", "--refine-steps", "0")
    assert code == 0
    assert "stage 1: " in out
    assert "the upscaled picture is kept" in out
    assert "note: " in out
    line = next(line for line in out.splitlines() if line.startswith("plan: "))
    assert StagedPlan.from_string(line.removeprefix("plan: ")).family == "flux1-dev"


def test_plan_takes_every_override(mrflow: Any) -> None:
    words = "--low-steps 7 --refine-steps 2 --sigma 0.2 --solver euler --factor 2 --stages 3 --refine-curve shifted"
    more = "--shift-tokens final --guidance 2 --refine-guidance 3 --seed 9 --seed-rule hash --posterior sample --json"
    _, out, _ = mrflow("plan", "--family", "flux1-dev", "--size", "2048x2048", *words.split(), *more.split())
    plan = StagedPlan.from_string(json.loads(out)["plan"])
    assert [stage.width for stage in plan.stages] == [512, 1024, 2048]
    assert [stage.steps for stage in plan.stages] == [7, 2, 2]
    assert plan.stages[1].start_sigma == 0.2
    assert plan.stages[1].sigmas[1] > 0.1  # shifted, not linear
    assert [stage.guidance for stage in plan.stages] == [2, 3, 3]
    assert (plan.seed, plan.seed_rule, plan.posterior) == (9, "hash", "sample")
    _, out, _ = mrflow("plan", "--family", "flux1-dev", "--mu", "0.5", "--json")
    assert json.loads(out)["stages"][0]["mu"] == 0.5
    _, out, _ = mrflow("plan", "--family", "flux1-dev", "--native", "--steps", "9", "--json")
    assert [stage["forwards"] for stage in json.loads(out)["stages"]] == [9]


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("flux1-dev", [512, 1024]), ("sdxl", [768, 1024]), ("sd15", [512, 1024]), ("demo", [128, 256])],
)
def test_the_default_size_stays_in_the_familys_range(mrflow: Any, family: str, sizes: list[int]) -> None:
    _, out, _ = mrflow("plan", "--family", family, "--json")
    found = json.loads(out)
    assert [stage["width"] for stage in found["stages"]] == sizes
    assert not any("Stage 1" in note for note in found["notes"])


def test_the_native_default_size_is_the_models_own(mrflow: Any) -> None:
    _, out, _ = mrflow("plan", "--family", "sd15", "--native", "--json")
    assert [stage["width"] for stage in json.loads(out)["stages"]] == [512]


# --- refusals


BAD = {
    "size 0": ["generate", "p", "--size", "0"],
    "size 0x0": ["generate", "p", "--size", "0x0"],
    "size 13x": ["generate", "p", "--size", "13x"],
    "size huge": ["generate", "p", "--size", "9999999x8"],
    "negative size": ["generate", "p", "--size", "-8x8"],
    "sigma 1.5": ["generate", "p", "--sigma", "1.5"],
    "sigma nan": ["generate", "p", "--sigma", "nan"],
    "sigma word": ["generate", "p", "--sigma", "much"],
    "unknown family": ["plan", "--family", "flux9", "--size", "64x64"],
    "family of the embedded model": ["generate", "p", "--family", "sdxl"],
    "unknown preset": ["generate", "p", "--preset", "99+1"],
    "unknown solver": ["generate", "p", "--solver", "rk45"],
    "missing file": ["generate", "p", "--upscaler", "nothing.pth"],
    "empty prompt": ["generate", " "],
    "no prompt": ["generate"],
    "not UTF-8": ["generate", "a \udcff star"],
    "batch 0": ["generate", "p", "--batch", "0"],
    "batch word": ["generate", "p", "--batch", "two"],
    "seed -1": ["generate", "p", "--seed", "-1"],
    "seed 1.5": ["generate", "p", "--seed", "1.5"],
    "seed too large": ["generate", "p", "--seed", str(2**63)],
    "guidance": ["generate", "p", "--guidance", "-1"],
    "mu": ["plan", "--family", "demo", "--mu", "inf"],
    "shift tokens": ["generate", "p", "--shift-tokens", "some"],
    "factor": ["generate", "p", "--factor", "9"],
    "unknown word": ["generate", "p", "--frobnicate"],
    "abbreviation": ["generate", "p", "--siz", "32x32"],
    "unknown command": ["improve", "p"],
    "no family": ["plan"],
    "native and sigma": ["generate", "p", "--native", "--sigma", "0.1"],
    "native and stages saved": ["generate", "p", "--native", "--save-stages"],
    "mu and shift tokens": ["plan", "--family", "demo", "--mu", "0.5", "--shift-tokens", "low"],
    "sigma without a refine step": ["generate", "p", "--refine-steps", "0", "--sigma", "0.2"],
    "curve without a refine step": ["plan", "--family", "demo", "--refine-steps", "0", "--refine-curve", "linear"],
    "native and upscaler": ["generate", "p", "--native", "--upscaler", "lanczos"],
    "steps without native": ["generate", "p", "--steps", "5"],
    "one stage compared": ["compare", "p", "--stages", "1"],
    "repeats 0": ["compare", "p", "--repeats", "0"],
    "from nothing": ["generate", "--from", "nothing.png"],
    "device": ["generate", "p", "--device", "quantum"],
    "device without numbers": ["generate", "p", "--device", "meta"],
    "too large for the schedule": ["plan", "--family", "flux1-dev", "--size", "32768x32768"],
    "from and family": ["generate", "--from", "nothing.png", "--family", "flux1-dev"],
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_one_sentence_and_code_2(
    name: str, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = BAD[name]
    if name not in ("family of the embedded model", "unknown command") and words[0] != "plan":
        words = [*words, "--model", str(tiny_folder)]
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mrflow: ")
    assert len(err.strip().splitlines()) == 1
    assert err.strip()[-1] in ".)?!"
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_is_a_refusal(mrflow: Any, tmp_path: Path) -> None:
    code, _, err = mrflow("generate", "p", "--out", str(tmp_path / "o"), model=tmp_path / "none")
    assert code == 2
    assert "not a folder" in err
    assert not (tmp_path / "o").exists()


def test_no_command_shows_help_and_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "generate" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"mrflow {mrflow_sched.__version__}\n"


def test_debug_and_faults_of_ours_show_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="flux9"):
        cli.main(["plan", "--family", "flux9", "--debug"])

    def broken(_args: Any) -> int:
        raise TypeError("a fault")

    monkeypatch.setattr(cli, "run_plan", broken)
    with pytest.raises(TypeError, match="a fault"):
        cli.main(["plan", "--family", "demo"])


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")],
)
def test_memory_that_runs_out_is_a_refusal(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hungry(_args: Any) -> int:
        raise error

    monkeypatch.setattr(cli, "run_plan", hungry)
    assert cli.main(["plan", "--family", "demo"]) == 2
    assert "not enough memory" in capsys.readouterr().err


def test_an_out_that_takes_no_files(mrflow: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for out, which in ((file, "that"), (file / "below" / "it", repr(str(file)))):
        code, _, err = mrflow("generate", "p", *SMALL, "--out", str(out))
        assert code == 2
        assert f"--out is {str(out)!r}, but {which} is not a folder; give another." in err
    assert file.read_text() == "x"


def test_a_full_disk_leaves_nothing(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = mrflow("generate", "p", *SMALL, "--out", str(tmp_path / "new" / "o"))
    assert (code, out) == (2, "")
    assert "No space left" in err
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_full_from_the_start(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    code, _, err = mrflow("generate", "p", *SMALL, "--out", str(tmp_path))
    assert code == 2
    assert "the disk is full" in err


def test_a_reader_that_went_away_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(tmp_path / "stdout", "w") as stream:

        class Closed(io.StringIO):
            def write(self, _text: str) -> int:
                raise BrokenPipeError

            def fileno(self) -> int:
                return stream.fileno()

        monkeypatch.setattr(sys, "stdout", Closed())
        assert cli.main(["plan", "--family", "demo"]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_result_that_cannot_be_printed_is_a_refusal(unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "mrflow_sched", "plan", "--family", "demo"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    assert found.returncode == 2
    assert found.stderr.startswith("mrflow: the disk is full")
    assert len(found.stderr.splitlines()) == 1


# --- generate


def test_generate_prints_json_alone_and_repeats_bit_for_bit(mrflow: Any, tmp_path: Path) -> None:
    words = ("a red star", *SMALL, "--seed", "5", "--batch", "2", "--out", str(tmp_path / "o"), "--json")
    code, out, err = mrflow("generate", *words)
    found = json.loads(out)
    assert code == 0
    assert set(found) == {"images", "stages", "plan", "seed"}
    assert found["seed"] == 5
    assert [Path(path).name for path in found["images"]] == ["mrflow-5.png", "mrflow-6.png"]
    assert [stage["name"] for stage in found["stages"]][:2] == ["text", "stage 1 sample"]
    assert all(stage["seconds"] >= 0 for stage in found["stages"])
    assert "Lanczos" in err

    second = found["images"][1]
    record = RunRecord.from_json(read_png_text(second)["mrflow"])
    assert (record.plan, record.prompt, record.batch, record.image) == (found["plan"], "a red star", 2, 1)
    assert (record.upscaler, record.upscaler_sha256, record.dtype) == ("Lanczos", None, "float32")
    code, out, err = mrflow("generate", "--from", second, "--out", str(tmp_path / "again"))
    assert code == 0
    assert "may differ" not in err
    assert out == f"{tmp_path / 'again' / 'mrflow-6.png'}\n"
    assert np.array_equal(pixels(second), pixels(out.strip()))
    assert not np.array_equal(pixels(second), pixels(found["images"][0]))
    assert read_png_text(out.strip()) == read_png_text(second)


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
    assert mrflow("generate", *words)[1].strip().endswith("mrflow-0-3.png")


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
    assert RunRecord.from_json(read_png_text(out.strip())["mrflow"]).upscaler == "none"


def spoil(monkeypatch: pytest.MonkeyPatch, *numbers: int, width: int = 32) -> None:
    """Make the decoder return no numbers for those images of a batch, at that size."""
    from mrflow_sched.engines.diffusers.flux import FluxEngine

    usual = FluxEngine.decode

    def decode(self: Any, latents: Any) -> Any:
        images = usual(self, latents).clone()
        for number in numbers if images.shape[-1] == width else ():
            images[number] = float("nan")
        return images

    monkeypatch.setattr(FluxEngine, "decode", decode)


def test_one_bad_picture_does_not_lose_the_others(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("a star", *SMALL, "--batch", "3", "--out", str(tmp_path / "o"))
    with monkeypatch.context() as patch:
        spoil(patch, 1)
        code, out, err = mrflow("generate", *words, "--json")
    assert code == 2
    assert [Path(path).name for path in json.loads(out)["images"]] == ["mrflow-0.png", "mrflow-2.png"]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["mrflow-0.png", "mrflow-2.png"]
    assert [line for line in err.splitlines() if "mrflow-" in line] == [
        "mrflow: not saved, for values that are no numbers: mrflow-1.png; try --dtype float32."
    ]


def test_where_every_picture_is_bad_nothing_is_left(
    mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 0)
    code, out, err = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path / "o"), "--json")
    assert (code, out) == (2, "")
    assert "not saved, for values that are no numbers: mrflow-0.png" in err
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
    record = RunRecord.from_json(read_png_text(out.strip())["mrflow"])
    assert record.upscaler == "double"
    assert record.upscaler_sha256 == hashlib.sha256(b"weights").hexdigest()
    code, _, err = mrflow("generate", "--from", out.strip(), "--out", str(tmp_path / "again"))
    assert code == 2
    assert "made with the upscaler 'double'" in err


def test_the_embedded_model_is_the_default(
    mrflow: Any, tmp_path: Path, tiny_engine: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mrflow_sched import demo
    from mrflow_sched.upscaling import load as upscale

    monkeypatch.setattr(demo, "load_engine", lambda **_: tiny_engine)
    monkeypatch.setattr(demo, "upscaler_path", lambda: tiny_folder / "model_index.json")
    monkeypatch.setattr(upscale, "load_upscaler", lambda _path, **_: Doubler("own"))
    code, out, err = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path), model=None)
    assert code == 0
    assert "Lanczos" not in err
    path = out.strip()
    record = RunRecord.from_json(read_png_text(path)["mrflow"])
    assert (record.model, record.upscaler) == ("embedded", "own")
    code, out, _ = mrflow("generate", "--from", path, "--out", str(tmp_path / "again"), model=None)
    assert code == 0
    assert np.array_equal(pixels(path), pixels(out.strip()))
    code, _, err = mrflow("generate", "a star", *SMALL, "--offload-text", "--out", str(tmp_path / "o"), model=None)
    assert code == 0
    assert "--offload-text has no effect on the embedded model" in err
    code, _, err = mrflow("generate", "--from", path, "--out", str(tmp_path / "again"))
    assert code == 2
    assert "leave out --model" in err
    words = ("a star", *SMALL, "--upscaler", "lanczos", "--out", str(tmp_path / "soft"))
    path = mrflow("generate", *words, model=None)[1].strip()
    code, out, _ = mrflow("generate", "--from", path, "--out", str(tmp_path / "again"), model=None)
    assert code == 0
    assert np.array_equal(pixels(path), pixels(out.strip()))


def test_from_takes_family_and_device_from_the_picture(
    mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path))
    text = read_png_text(out.strip())["mrflow"]
    plan = StagedPlan.from_string(RunRecord.from_json(text).plan)
    altered = json.dumps(json.loads(text) | {"device": "quantum", "plan": replace(plan, family="sdxl").to_string()})
    monkeypatch.setattr("mrflow_sched.images.files.read_png_text", lambda _path: {"mrflow": altered})
    code, _, err = mrflow("generate", "--from", out.strip(), "--out", str(tmp_path))
    assert code == 2
    assert "'sdxl'" in err
    altered = json.dumps(json.loads(text) | {"device": "quantum"})
    code, _, err = mrflow("generate", "--from", out.strip(), "--out", str(tmp_path))
    assert code == 0
    assert "device 'quantum' is now 'cpu'" in err


def test_from_refuses_what_it_cannot_repeat(mrflow: Any, tmp_path: Path, tiny_copy: Path) -> None:
    _, out, _ = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path))
    path = out.strip()
    for extra in (("--seed", "1"), ("--batch", "2"), ("--native",), ("--size", "8x8"), ("a star",)):
        code, _, err = mrflow("generate", "--from", path, *extra)
        assert code == 2
        assert "has no place" in err
    code, _, err = mrflow("generate", "--from", path, model=None)
    assert code == 2
    assert "name it with --model DIR" in err
    (tiny_copy / "text_encoder" / "config.json").write_text(
        (tiny_copy / "text_encoder" / "config.json").read_text() + "\n"
    )
    code, _, err = mrflow("generate", "--from", path, "--out", str(tmp_path / "again"), model=tiny_copy)
    assert code == 2
    assert "other weights" in err
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    code, _, err = mrflow("generate", "--from", str(tmp_path / "plain.png"))
    assert code == 2
    assert "holds no mrflow record" in err


def test_from_says_what_moves_the_last_bits(mrflow: Any, tmp_path: Path) -> None:
    _, out, _ = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path))
    code, _, err = mrflow("generate", "--from", out.strip(), "--dtype", "bfloat16", "--out", str(tmp_path))
    assert code == 0
    assert "dtype 'float32' is now 'bfloat16'" in err


def test_the_bar_is_on_stderr_and_only_when_wanted(mrflow: Any, tmp_path: Path) -> None:
    _, out, err = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path), "--json", "--progress")
    assert json.loads(out)["seed"] == 0
    assert "stage 1 sample" in err
    assert "100%" in err
    _, _, err = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path))
    assert "%|" not in err


# --- Ctrl-C


def press_at(monkeypatch: pytest.MonkeyPatch, forward: int, presses: int = 1) -> None:
    """Press Ctrl-C while the network makes its `forward`-th evaluation."""
    from mrflow_sched.engines.diffusers.flux import FluxEngine

    usual, count = FluxEngine.denoise, [0]

    def denoise(self: Any, *args: Any, **words: Any) -> Any:
        count[0] += 1
        if count[0] == forward:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
        return usual(self, *args, **words)

    monkeypatch.setattr(FluxEngine, "denoise", denoise)


def test_ctrl_c_keeps_the_best_picture_so_far(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        press_at(patch, forward=2)
        code, out, err = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path), "--json")
    assert code == 130
    assert "Stopped; the best picture so far is" in err
    [path] = json.loads(out)["images"]
    assert path.endswith("mrflow-0-unfinished.png")
    assert pixels(path).shape == (16, 16, 3)
    assert RunRecord.from_json(read_png_text(path)["mrflow"]).unfinished
    assert signal.getsignal(signal.SIGINT) is before
    code, out, err = mrflow("generate", "--from", path, "--out", str(tmp_path))
    assert code == 0
    assert "now made whole" in err
    assert pixels(out.strip()).shape == (32, 32, 3)


def test_a_second_ctrl_c_stops_at_once(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    press_at(monkeypatch, forward=2, presses=2)
    code, out, err = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path / "o"))
    assert (code, out) == (130, "")
    assert "Stopped." in err
    assert not (tmp_path / "o").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_off_the_main_thread_no_signal_is_touched(tiny_folder: Path, tmp_path: Path) -> None:
    codes: list[int] = []
    words = ["generate", "a star", *SMALL, "--out", str(tmp_path), "--model", str(tiny_folder)]
    thread = threading.Thread(target=lambda: codes.append(cli.main(words)))
    thread.start()
    thread.join()
    assert codes == [0]


# --- compare


def test_compare_measures_both_and_draws_them(mrflow: Any, tmp_path: Path) -> None:
    words = (*SMALL, "--steps", "4", "--repeats", "2", "--out", str(tmp_path))
    code, out, err = mrflow("compare", "a red star", *words, "--json", "--progress")
    found = json.loads(out)
    assert code == 0
    assert "warm-up, native" in err
    assert err.count("enlarged with Lanczos") == 1
    wanted = {"native_seconds", "staged_seconds", "speedup", "overhead_share", "peak_memory_ratio", "stages"}
    assert wanted | {"native", "staged", "sheet"} <= set(found)
    assert found["speedup"] == pytest.approx(found["native_seconds"] / found["staged_seconds"])
    parts = {part["name"]: part["seconds"] for part in found["stages"]}
    assert next(iter(parts)) == "text"
    assert list(parts)[-1] == "save"
    assert 0.9 * found["staged_seconds"] <= sum(parts.values()) <= found["staged_seconds"] * 1.001
    network = parts["stage 1 sample"] + parts["stage 2 sample"]
    assert found["overhead_share"] == pytest.approx(1 - network / found["staged_seconds"])
    assert found["peak_memory_ratio"] == found["staged_peak_bytes"] / found["native_peak_bytes"]
    assert 0.5 < found["peak_memory_ratio"] < 2
    assert (found["warmup"], found["repeats"]) == (True, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.png", "native.png", "staged.png"]
    assert pixels(found["native"]).shape == pixels(found["staged"]).shape == (32, 32, 3)
    sheet = pixels(found["sheet"])
    assert sheet.shape[1] > 1000
    record = RunRecord.from_json(read_png_text(found["native"])["mrflow"])
    plan = StagedPlan.from_string(record.plan)
    assert [(stage.steps, stage.solver) for stage in plan.stages] == [(4, "euler")]


def test_compare_in_words_and_its_pictures_repeat(mrflow: Any, tmp_path: Path) -> None:
    code, out, _ = mrflow("compare", "a red star", *SMALL, "--steps", "2", "--solver", "heun", "--out", str(tmp_path))
    assert code == 0
    assert "times as fast" in out
    assert f"picture: {tmp_path / 'compare.png'}" in out
    code, out, _ = mrflow("generate", "--from", str(tmp_path / "staged.png"), "--out", str(tmp_path / "again"))
    assert code == 0
    assert np.array_equal(pixels(tmp_path / "staged.png"), pixels(out.strip()))


def test_the_module_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    monkeypatch.setattr(sys, "argv", ["mrflow", "plan", "--family", "demo", "--json"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("mrflow_sched", run_name="__main__")
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out)["family"] == "demo"


def test_a_failure_leaves_an_older_folder_alone(mrflow: Any, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine.txt").write_text("x")
    code, _, _ = mrflow("generate", "p", *SMALL, "--device", "quantum", "--out", str(tmp_path / "o"))
    assert code == 2
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["mine.txt"]
