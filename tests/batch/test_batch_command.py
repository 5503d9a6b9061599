"""`mrflow batch`: each image once, the same from a worker as alone, whatever is killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mrflow_sched.images.files import read_text
from mrflow_sched.images.record import KEY, RunRecord

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--size", "32x32", "--low-steps", "3", "--refine-steps", "1", "--dtype", "float32", "--device", "cpu")


def table(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def entries(folder: Path) -> list[dict[str, Any]]:
    """The manifest, which is true: its files are there with these bytes, and no others are."""
    text = (folder / "manifest.jsonl").read_text()
    assert text.endswith("\n")
    found = [json.loads(line) for line in text.splitlines()]
    last = {(entry["kind"], entry["key"]): entry for entry in found}
    done = {entry["file"]: entry for entry in last.values() if entry["status"] == "done"}
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {"manifest.jsonl", *done}
    for name, entry in done.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
    return found


def single(mrflow: Any, out: Path, prompt: str, seed: int, *more: str) -> bytes:
    """The file of `mrflow generate`."""
    code, found, _ = mrflow("generate", prompt, *SMALL, *more, "--seed", str(seed), "--out", str(out))
    assert code == 0
    return Path(found.strip()).read_bytes()


def test_each_image_is_that_of_its_single_run(mrflow: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a red circle", "batch": 2, "seed": 7, "id": "first"},
        {"prompt": "a star", "size": "48x32", "low_steps": 2, "negative": "blue"},
        {"prompt": "a star", "native": True, "steps": 2, "negative": None},
    ]
    words = ["--size", "32x32", "--dtype", "float32", "--device", "cpu", "--out", str(tmp_path / "out"), "--json"]
    code, out, _ = mrflow("batch", table(tmp_path, rows), *words)
    assert code == 0
    assert (json.loads(out)["made"], json.loads(out)["failed"]) == (4, [])
    found = {(entry["row"], entry["seed"]): entry for entry in entries(tmp_path / "out")}
    assert found[1, 7]["id"] == "first"
    assert found[2, 0]["size"] == "48x32"
    small = ("--dtype", "float32", "--device", "cpu", "--out", str(tmp_path / "alone"))
    for key, more in {
        (1, 8): ("a red circle", "--size", "32x32", "--seed", "8"),
        (2, 0): ("a star", "--size", "48x32", "--low-steps", "2", "--negative", "blue"),
        (3, 0): ("a star", "--size", "32x32", "--native", "--steps", "2"),
    }.items():
        _, path, _ = mrflow("generate", *more, *small)
        assert Path(path.strip()).read_bytes() == (tmp_path / "out" / found[key]["file"]).read_bytes()


def test_a_rerun_makes_only_what_is_missing(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [table(tmp_path, [{"prompt": "a star", "batch": 3}]), *SMALL, "--out", str(tmp_path / "out"), "--json"]
    mrflow("batch", *words)
    lines = entries(tmp_path / "out")
    (tmp_path / "out" / lines[1]["file"]).unlink()
    code, out, _ = mrflow("batch", *words)
    assert (code, json.loads(out)["made"], json.loads(out)["there"]) == (0, 1, 2)
    assert entries(tmp_path / "out")[3]["sha256"] == lines[1]["sha256"]
    # A run that was killed between a file and its line: the line is added, and no model is loaded.
    text = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "manifest.jsonl").write_text("".join(text[:2]) + text[3][:20])
    monkeypatch.setattr("mrflow_sched.apps.cli.batch_worker.load", None)
    code, out, err = mrflow("batch", *words)
    assert (code, json.loads(out)["made"], json.loads(out)["there"]) == (0, 0, 3)
    assert "All 3 images were there already" in err
    assert {entry["sha256"] for entry in entries(tmp_path / "out")} == {entry["sha256"] for entry in lines}


def test_what_decides_an_image_is_in_its_key(mrflow: Any, tmp_path: Path) -> None:
    path = table(tmp_path, [{"prompt": "a star"}])
    for more in ((), ("--seed", "1"), ("--negative", "red"), ("--low-steps", "2"), ("--format", "webp")):
        assert mrflow("batch", path, *SMALL, *more, "--out", str(tmp_path / "out"))[0] == 0
    assert len(entries(tmp_path / "out")) == 5
    mrflow("batch", path, *SMALL, "--out", str(tmp_path / "out"), "--together", "4", "--threads", "1")
    assert len(entries(tmp_path / "out")) == 5


def test_the_bar_tells_rate_and_time_left(mrflow: Any, tmp_path: Path) -> None:
    path = table(tmp_path, [{"prompt": "a star", "batch": 3}])
    _, _, err = mrflow("batch", path, *SMALL, "--out", str(tmp_path / "out"), "--progress")
    assert "1 image, " in err
    assert " a minute" in err
    assert "<00:" in err


def test_images_sampled_together_are_those_of_generate(mrflow: Any, tmp_path: Path) -> None:
    path = table(tmp_path, [{"prompt": "a star", "batch": 3}])
    words = [path, *SMALL, "--out", str(tmp_path / "out"), "--together", "2"]
    assert mrflow("batch", *words)[0] == 0
    first = entries(tmp_path / "out")
    _, out, _ = mrflow("generate", "a star", *SMALL, "--batch", "2", "--out", str(tmp_path / "alone"))
    for line, entry in zip(out.splitlines(), first, strict=False):
        assert Path(line).read_bytes() == (tmp_path / "out" / entry["file"]).read_bytes()
    record = RunRecord.from_json(read_text(tmp_path / "out" / first[1]["file"])[KEY])
    assert (record.batch, record.image, record.seed) == (2, 1, 0)
    (tmp_path / "out" / first[1]["file"]).unlink()
    mrflow("batch", *words)  # the two are sampled again, and the one that is missing is kept
    assert entries(tmp_path / "out")[3]["sha256"] == first[1]["sha256"]
    assert mrflow("batch", *words[:-1], "auto", "--seed", "9")[0] == 0


def test_drafts_are_kept_by_their_scores(mrflow: Any, tmp_path: Path) -> None:
    path = table(tmp_path, [{"prompt": "a star", "batch": 4}, {"prompt": "a red circle", "batch": 2}])
    words = [path, *SMALL, "--out", str(tmp_path / "out"), "--draft", "--score", "contrast"]
    code, out, _ = mrflow("batch", *words, "--keep", "1", "--json")
    assert (code, json.loads(out)["made"]) == (0, 8)
    found = entries(tmp_path / "out")
    for row in (1, 2):
        drafts = [entry for entry in found if entry["kind"] == "draft" and entry["row"] == row]
        (best,) = [entry for entry in found if entry["kind"] == "image" and entry["row"] == row]
        assert best["seed"] == max(drafts, key=lambda entry: entry["scores"]["contrast"])["seed"]
        image = (tmp_path / "out" / best["file"]).read_bytes()
        assert image == single(mrflow, tmp_path / "alone", best["prompt"], best["seed"])
    code, out, _ = mrflow("batch", *words, "--keep", "2", "--json")
    assert (json.loads(out)["made"], json.loads(out)["there"]) == (2, 8)
    code, out, _ = mrflow("batch", *words, "--score", "sharpness", "--json")  # they are scored again
    assert set(entries(tmp_path / "out")[-1]["scores"]) == {"contrast", "sharpness"}
    draft = next(entry["file"] for entry in found if entry["kind"] == "draft")
    assert mrflow("finish", str(tmp_path / "out" / draft), "--out", str(tmp_path / "picked"))[0] == 0


def test_rows_have_loras_of_their_own(mrflow: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(3)
    weights = {
        f"transformer.single_transformer_blocks.0.attn.{name}.{side}.weight": torch.randn(shape, generator=generator)
        for name in ("to_q", "to_k", "to_v")
        for side, shape in (("lora_A", (2, 16)), ("lora_B", (16, 2)))
    }
    lora = tmp_path / "style.safetensors"
    save_file(weights, lora)
    rows: list[dict[str, Any]] = [
        {"prompt": "a star"},
        {"prompt": "a star", "lora": f"{lora}:0.5"},
        {"prompt": "a star", "lora": [str(lora)], "seed": 1},
        {"prompt": "a star", "seed": 2},
    ]
    assert mrflow("batch", table(tmp_path, rows), *SMALL, "--out", str(tmp_path / "out"))[0] == 0
    found = {entry["row"]: (tmp_path / "out" / entry["file"]).read_bytes() for entry in entries(tmp_path / "out")}
    alone = tmp_path / "alone"
    assert found[1] == single(mrflow, alone, "a star", 0)
    assert found[2] == single(mrflow, alone, "a star", 0, "--lora", f"{lora}:0.5")
    assert found[3] == single(mrflow, alone, "a star", 1, "--lora", str(lora))
    assert found[4] == single(mrflow, alone, "a star", 2)


def test_rows_that_ask_for_one_image_twice_make_it_once(mrflow: Any, tmp_path: Path) -> None:
    path = table(tmp_path, [{"prompt": "a star", "batch": 2}, {"prompt": "a star", "seed": 1, "mood": "calm"}])
    code, _, err = mrflow("batch", path, *SMALL, "--out", str(tmp_path / "out"))
    assert code == 0
    assert "The columns mood of" in err
    assert "An image is asked for twice and made once; the first stands in line 2, as in line 1." in err
    assert len(entries(tmp_path / "out")) == 2


def test_output_goes_through_fsspec(mrflow: Any, tmp_path: Path) -> None:
    fsspec: Any = pytest.importorskip("fsspec")
    path = table(tmp_path, [{"prompt": "a star", "batch": 2}])
    out = f"memory://{tmp_path}/images"
    assert mrflow("batch", path, *SMALL, "--out", out)[0] == 0
    _, found, _ = mrflow("batch", path, *SMALL, "--out", out, "--json")
    assert (json.loads(found)["made"], json.loads(found)["there"]) == (0, 2)
    files: Any = fsspec.filesystem("memory")
    names = sorted(Path(name).name for name in files.ls(f"{tmp_path}/images", detail=False))
    assert len(names) == 3
    lines = files.cat(f"{tmp_path}/images/manifest.jsonl").decode().splitlines()
    assert sorted(json.loads(line)["file"] for line in lines) == names[1:]
    image = files.cat(f"{tmp_path}/images/{json.loads(lines[0])['file']}")
    assert image == single(mrflow, tmp_path / "alone", "a star", 0)


@pytest.mark.parametrize(
    ("rows", "words", "sentence"),
    [
        ([{"prompt": "a"}, {"prompt": "b", "size": "big"}], (), "line 2 of .*: size: 'big' is not a size"),
        ([{"prompt": "a", "width": 64}], (), "line 1 of .*: width and height go together"),
        ([{"prompt": "a", "size": "64x64", "width": 64}], (), "line 1 of .* leave one out"),
        ([{"prompt": "a", "seed": -1}], (), "line 1 of .*: seed: '-1' is not a whole number"),
        ([{"prompt": "a", "seed": 2**63 - 1, "batch": 2}], (), "line 1 of .*: --seed is"),
        ([{"prompt": "a", "solver": "magic"}], (), "line 1 of .*: solver cannot be 'magic'"),
        ([{"prompt": "a", "native": "maybe"}], (), "line 1 of .*: native is 'maybe'; write true or false"),
        ([{"prompt": "a", "lora": "no.safetensors"}], (), "line 1 of .*: --lora is 'no.safetensors'"),
        ([{"prompt": "a"}], ("--score", "contrast"), "--score is for drafts"),
        ([{"prompt": "a"}], ("--draft", "--keep", "1"), "nothing says which those are"),
        ([{"prompt": "a"}], ("--draft", "--native"), "no first stage to draft"),
        ([{"prompt": "a", "native": True}], ("--draft",), "a row asks for one"),
        ([{"prompt": "a"}], ("--draft", "--together", "2"), "each draft is sampled alone"),
        ([{"prompt": "a"}], ("--ray", "local", "--together", "auto"), "give a number"),
        ([{"prompt": "a"}], ("--timeout", "60"), "here this process makes the images itself; give --workers 1"),
        ([{"prompt": "a"}], ("--workers", "1", "--timeout", "0"), "'0' is not a number of seconds from 1 to 1e9, nor"),
        ([{"prompt": "a"}], ("--workers", "1", "--timeout", "soon"), "'soon' is not a number of seconds"),
        ([{"prompt": "a"}], ("--workers", "0"), "'0' is not a whole number"),
        ([{"prompt": "a"}], ("--out", "nosuch://a/b"), "cannot be used"),
    ],
)
def test_refusals_come_before_anything_is_loaded(
    mrflow: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[dict[str, Any]],
    words: tuple[str, ...],
    sentence: str,
) -> None:
    import re

    monkeypatch.setattr("mrflow_sched.apps.cli.batch_worker.load", None)
    code, out, err = mrflow("batch", table(tmp_path, rows), "--out", str(tmp_path / "out"), *words)
    assert (code, out) == (2, "")
    assert re.search(sentence, err), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [(), ("--workers", "1")])
def test_a_score_that_is_not_known_ends_the_run_at_once(mrflow: Any, tmp_path: Path, more: tuple[str, ...]) -> None:
    path = table(tmp_path, [{"prompt": "a star", "batch": 3}])
    out = tmp_path / "out"
    code, _, err = mrflow("batch", path, *SMALL, "--out", str(out), "--draft", "--score", "beauty", *more)
    assert code == 2
    assert "beauty" in err
    assert not list(out.glob("*.png"))


def test_images_that_cannot_be_made_are_set_aside(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mrflow_sched.sampling.faults import Fault

    sampler: Any = sys.modules.get("mrflow_sched.sampler") or __import__("mrflow_sched.sampler").sampler
    usual = sampler.sample_staged

    def sample(engine: Any, plan: Any, prompt: str, **more: Any) -> Any:
        from dataclasses import replace

        result = usual(engine, plan, prompt, **more)
        if prompt == "full":
            return replace(result, unfinished=True, warnings=("memory ran out in stage 2.",))
        if prompt == "soft":
            return replace(result, warnings=("the upscaler failed.",))
        return replace(result, faults=(Fault("decode", 2),), unfinished=True) if prompt == "nan" else result

    monkeypatch.setattr(sampler, "sample_staged", sample)
    path = table(tmp_path, [{"prompt": "nan"}, {"prompt": "full"}, {"prompt": "soft"}])
    code, out, err = mrflow("batch", path, *SMALL, "--out", str(tmp_path / "out"), "--json")
    value = json.loads(out)
    assert (code, value["made"], len(value["failed"])) == (2, 1, 2)
    assert "2 images could not be made" in value["error"]
    assert value["error"] in err.replace("mrflow: ", "")
    assert "mrflow: the upscaler failed." in err
    failed = {entry["row"]: entry for entry in entries(tmp_path / "out") if entry["status"] == "failed"}
    (soft,) = [entry for entry in entries(tmp_path / "out") if entry["status"] == "done"]
    assert soft["warnings"] == ["the upscaler failed."]
    assert "VAE's decoder returned NaN" in failed[1]["error"]
    assert (failed[2]["tries"], "memory ran out" in failed[2]["error"]) == (3, True)
    monkeypatch.setattr(sampler, "sample_staged", usual)
    assert mrflow("batch", path, *SMALL, "--out", str(tmp_path / "out"))[0] == 0
    assert len({entry["file"] for entry in entries(tmp_path / "out") if entry["status"] == "done"}) == 3


# --- processes ---------------------------------------------------------------------------------


def driver(path: str, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mrflow_sched", "batch", path, *SMALL, "--out", str(out), "--json", *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        found = psutil.Process(process.pid).children(recursive=True)
        return [each for each in found if any("multiprocessing.spawn" in word for word in each.cmdline())]
    except psutil.NoSuchProcess:
        return []


def until(ready: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_workers_and_the_driver_are_killed_and_nothing_is_lost(mrflow: Any, tmp_path: Path) -> None:
    path = table(tmp_path, [{"prompt": "a red circle", "batch": 12}, {"prompt": "a blue star", "batch": 12}])
    out = tmp_path / "out"

    def images() -> int:
        return len(list(out.glob("*.png"))) if out.exists() else 0

    first = driver(path, out, "--workers", "2")
    until(lambda: images() >= 2)
    for each in workers(first)[:1]:
        each.kill()
    until(lambda: images() >= 4)
    first.kill()
    first.communicate()
    there = images()
    second = driver(path, out, "--workers", "2")
    found, err = second.communicate(timeout=240)
    assert second.returncode == 0, err
    value = json.loads(found)
    assert (value["made"], value["there"], value["failed"]) == (24 - there, there, [])
    assert len([entry for entry in entries(out) if entry["status"] == "done"]) == 24
    alone = tmp_path / "alone"
    code, _, _ = mrflow("batch", path, *SMALL, "--out", str(alone), "--threads", "1", model=None)
    assert code == 0
    for file in alone.glob("*.png"):
        assert file.read_bytes() == (out / file.name).read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGSTOP")
def test_a_worker_that_hangs_is_ended_and_nothing_is_lost(tmp_path: Path) -> None:
    path, out = table(tmp_path, [{"prompt": "a red circle", "batch": 12}]), tmp_path / "out"
    process = driver(path, out, "--workers", "1", "--timeout", "4")
    until(lambda: out.exists() and len(list(out.glob("*.png"))) >= 2)
    (worker,) = workers(process)
    worker.suspend()
    found, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert (json.loads(found)["made"], json.loads(found)["failed"]) == (12, [])
    assert "Worker 0 was silent for 4 seconds and is ended" in err
    assert sorted(entry["tries"] for entry in entries(out))[-2:] == [1, 2]
    assert not worker.is_running()


def test_two_commands_at_once_write_each_file_once(tmp_path: Path) -> None:
    path = table(tmp_path, [{"prompt": "a red circle", "batch": 10}])
    both = [driver(path, tmp_path / "out") for _ in range(2)]
    found = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], found
    assert sum(json.loads(out)["made"] for out, _ in found) == 10
    assert len({entry["file"] for entry in entries(tmp_path / "out")}) == 10


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    path = table(tmp_path, [{"prompt": "a red circle", "batch": 1000}])
    for more in ((), ("--workers", "1")):
        out = tmp_path / f"out{len(more)}"
        process = driver(path, out, *more)
        until(lambda out=out: out.exists() and len(list(out.glob("*.png"))) >= 2)
        children = workers(process)
        process.send_signal(signal.SIGINT)
        found, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        value = json.loads(found)
        assert value["cancelled"]
        assert "The same command goes on" in value["error"]
        assert "Traceback" not in err
        assert len(entries(out)) == value["made"]
        assert not psutil.wait_procs(children, timeout=10)[1]
