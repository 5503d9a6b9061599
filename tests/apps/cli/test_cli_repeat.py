"""`mrflow generate --from`: an image's run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import RECORD, SMALL, pixels
from PIL import Image

from mrflow_sched.apps.cli import load
from mrflow_sched.images.files import load_image, read_text, save_png
from mrflow_sched.images.record import RunRecord
from mrflow_sched.plan.stages import StagedPlan


def test_from_takes_family_and_device_from_the_picture(
    mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path))
    text = read_text(out.strip())["mrflow"]
    plan = StagedPlan.from_string(RunRecord.from_json(text).plan)
    altered = json.dumps(json.loads(text) | {"device": "quantum", "plan": replace(plan, family="sdxl").to_string()})
    monkeypatch.setattr("mrflow_sched.images.files.read_text", lambda _path: {"mrflow": altered})
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
        assert "has no meaning" in err
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
    assert "has no mrflow record" in err


def test_from_says_what_moves_the_last_bits(mrflow: Any, tmp_path: Path) -> None:
    _, out, _ = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path))
    code, _, err = mrflow("generate", "--from", out.strip(), "--dtype", "bfloat16", "--out", str(tmp_path))
    assert code == 0
    assert "dtype of transformer 'float32' is now 'bfloat16'" in err


def records(folder: Path) -> RunRecord:
    (path,) = folder.glob("*.png")
    return RunRecord.from_json(read_text(path)["mrflow"])


def test_the_command_repeats_an_image_bit_for_bit_in_a_new_process(tmp_path: Path) -> None:
    """All defaults: on hardware with bfloat16 the network, the VAE and the upscaler differ in their dtypes."""

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "mrflow_sched", "generate", *words]
        found = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
        assert found.returncode == 0, found.stderr
        assert "may differ" not in found.stderr
        return found.stdout.strip()

    prompt = "a red striped circle and a blue star over green hills"
    first = run(prompt, "--size", "128x128", "--low-steps", "2", "--out", str(tmp_path / "first"))
    again = run("--from", first, "--out", str(tmp_path / "again"))
    assert np.array_equal(pixels(first), pixels(again))
    assert read_text(first) == read_text(again)
    assert {"transformer", "vae", "upscaler"} <= set(records(tmp_path / "first").dtypes)


@pytest.mark.parametrize("network", ["float32", "bfloat16"])
def test_every_part_is_loaded_in_its_recorded_dtype(
    mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    from mrflow_sched import demo

    vae = {"float32": "bfloat16", "bfloat16": "float32"}[network]
    usual = load.load_engine
    with monkeypatch.context() as patch:
        parts = {"transformer": network, "text_encoder": network, "text_encoder_2": network, "vae": vae}
        patch.setattr(load, "load_engine", lambda model, _dtypes: usual(model, parts))
        words = [word for word in SMALL if word not in ("--dtype", "float32")]
        words += ["--upscaler", str(demo.upscaler_path())]
        code, out, _ = mrflow("generate", "a star", *words, "--out", str(tmp_path / "first"))
    assert code == 0
    first = records(tmp_path / "first")
    assert (first.dtypes["transformer"], first.dtypes["vae"]) == (network, vae)
    assert (first.dtype, first.vae_dtype) == (network, vae)
    upscaler = ("--upscaler", str(demo.upscaler_path()))
    code, again, err = mrflow("generate", "--from", out.strip(), *upscaler, "--out", str(tmp_path / "again"))
    assert code == 0
    assert "may differ" not in err
    assert records(tmp_path / "again") == first
    assert np.array_equal(pixels(out.strip()), pixels(again.strip()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_upscaler_runs_in_its_recorded_dtype(mrflow: Any, tmp_path: Path, dtype: str) -> None:
    from mrflow_sched import demo

    upscaler = ("--upscaler", str(demo.upscaler_path()))
    _, out, _ = mrflow("generate", "a star", *SMALL, *upscaler, "--out", str(tmp_path / "first"))
    record = records(tmp_path / "first")
    altered = replace(record, dtypes={**record.dtypes, "upscaler": dtype})
    save_png(tmp_path / "altered.png", load_image(out.strip()), {"mrflow": altered.to_json()})
    code, out, err = mrflow(
        "generate", "--from", str(tmp_path / "altered.png"), *upscaler, "--out", str(tmp_path / "again")
    )
    assert (code, "may differ" in err) == (0, False)
    assert records(tmp_path / "again").dtypes["upscaler"] == dtype


def test_an_older_record_repeats_with_its_two_dtypes(mrflow: Any, tmp_path: Path) -> None:
    _, out, _ = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path / "first"))
    older = json.loads(records(tmp_path / "first").to_json())
    del older["dtypes"]
    save_png(tmp_path / "older.png", load_image(out.strip()), {"mrflow": json.dumps(older)})
    code, again, err = mrflow("generate", "--from", str(tmp_path / "older.png"), "--out", str(tmp_path / "again"))
    assert code == 0
    assert "may differ" not in err
    assert np.array_equal(pixels(out.strip()), pixels(again.strip()))


@pytest.mark.parametrize("change", [{"threads": 10**6}, {"seed": -1}, {"dtypes": {"vae": 3}}, {"plan": "mrflow1;x"}])
def test_an_altered_record_is_one_sentence(mrflow: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    _, out, _ = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path / "first"))
    text = json.dumps(json.loads(records(tmp_path / "first").to_json()) | change)
    save_png(tmp_path / "altered.png", load_image(out.strip()), {"mrflow": text})
    code, out, err = mrflow("generate", "--from", str(tmp_path / "altered.png"), "--out", str(tmp_path / "again"))
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_from_takes_what_another_program_wrote_and_says_what_not(mrflow: Any, tmp_path: Path) -> None:
    text = "a red star\nNegative prompt: blur\nSteps: 30, Sampler: Euler, CFG scale: 7, Seed: 41, Size: 64x32, Model: x"
    save_png(tmp_path / "a1111.png", load_image_of(tmp_path), {"parameters": text})
    code, out, err = mrflow("generate", "--from", str(tmp_path / "a1111.png"), "--out", str(tmp_path / "o"))
    assert code == 0
    assert "made by A1111. Taken from it: the prompt, the negative prompt, the seed, the size. Not taken: model" in err
    path = Path(out.strip())
    assert path.name == "mrflow-41.png"
    assert pixels(path).shape == (32, 64, 3)
    record = records(tmp_path / "o")
    assert (record.prompt, record.negative, record.seed) == ("a red star", "blur", 41)
    # What we write, other programs read: and so do we, where our record was lost.
    parameters = read_text(path)["parameters"]
    assert parameters.startswith("a red star\nNegative prompt: blur\nSteps: ")
    assert "Seed: 41, Size: 64x32" in parameters
    save_png(tmp_path / "lost.png", load_image(path), {"parameters": parameters})
    code, out, _ = mrflow("generate", "--from", str(tmp_path / "lost.png"), "--out", str(tmp_path / "again"))
    assert code == 0
    assert np.array_equal(pixels(path), pixels(out.strip()))


def test_an_image_of_another_program_lets_its_numbers_be_replaced(mrflow: Any, tmp_path: Path) -> None:
    text = "a red star\nNegative prompt: blur\nSteps: 30, Seed: 41, Size: 64x32"
    save_png(tmp_path / "a1111.png", load_image_of(tmp_path), {"parameters": text})
    words = ("--seed", "9", "--size", "32x64", "--preset", "3+1", "--batch", "2", "--negative", "fog")
    code, out, err = mrflow("generate", "--from", str(tmp_path / "a1111.png"), *words, "--out", str(tmp_path / "o"))
    assert code == 0
    assert "Taken from it: the prompt. Not taken: model" in err
    paths = [Path(line) for line in out.splitlines()]
    assert [path.name for path in paths] == ["mrflow-9.png", "mrflow-10.png"]
    assert pixels(paths[0]).shape == (64, 32, 3)
    record = RunRecord.from_json(read_text(paths[0])["mrflow"])
    assert (record.prompt, record.negative) == ("a red star", "fog")
    assert "preset=3+1" in record.plan
    for more in (("--strength", "0.5"), ("--image", str(paths[0])), ("--prompts", "list.txt"), ("a star",)):
        code, _, err = mrflow("generate", "--from", str(tmp_path / "a1111.png"), *more, "--out", str(tmp_path / "o"))
        assert (code, err.count("\n")) == (2, 1)
        assert "leave" in err


def comfyui_image(tmp_path: Path, kind: str = "MrFlowSampler", **widgets: Any) -> Path:
    """An image with the graph of one of MrFlow's nodes, on the embedded model."""
    numbers = {"width": 64, "height": 32, "seed": 41, "preset": "3+1", "sigma": 0.2, "cfg": 0.0, "refine_steps": 0}
    links = {"model": ["m", 0], "positive": ["p", 0], "negative": ["n", 0], "upscale_model": ["m", 3]}
    graph = {
        "m": {"class_type": "MrFlowDemoModel", "inputs": {}},
        "p": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red star", "clip": ["m", 1]}},
        "n": {"class_type": "CLIPTextEncode", "inputs": {"text": "blur", "clip": ["m", 1]}},
        "s": {"class_type": kind, "inputs": {**links, **numbers, **widgets}},
        "o": {"class_type": "SaveImage", "inputs": {"images": ["s", 0]}},
    }
    save_png(tmp_path / "comfy.png", load_image_of(tmp_path), {"prompt": json.dumps(graph)})
    return tmp_path / "comfy.png"


def test_mrflows_nodes_in_comfyui_give_every_number(mrflow: Any, tmp_path: Path) -> None:
    file = comfyui_image(tmp_path, batch_size=3, solver="heun", noise="nested", cfg=2.0)
    code, out, err = mrflow("generate", "--from", str(file), "--out", str(tmp_path / "o"))
    assert code == 0
    said = "made by MrFlow's nodes in ComfyUI. Taken from it: the prompt, the size, seed 41, preset 3+1, solver heun,"
    assert said in err
    assert "Not taken: cfg, as embedded demo model takes its guidance as an input, the negative prompt, as" in err
    assert "one of 3 images of a run, and the file does not say which: this makes the first; --batch 3 makes all" in err
    assert Path(out.strip()).name == "mrflow-41.png"
    words = "--preset 3+1 --sigma 0.2 --solver heun --noise nested --seed 41"
    assert records(tmp_path / "o").plan == plan_of(mrflow, tmp_path, words)


def plan_of(mrflow: Any, tmp_path: Path, words: str) -> str:
    """The plan of a run that is asked for in full."""
    run = ("generate", "a red star", "--size", "64x32", *words.split())
    code, _, err = mrflow(*run, "--out", str(tmp_path / "full"))
    assert code == 0, err
    return records(tmp_path / "full").plan


@pytest.mark.parametrize(
    ("words", "full"),
    [
        ("--low-steps 2", "--low-steps 2 --refine-steps 1 --sigma 0.2 --seed 41 --shift-tokens final"),
        ("--preset 2+1", "--preset 2+1 --sigma 0.2 --seed 41 --shift-tokens final"),
        ("--mu 0.5", "--preset 3+1 --sigma 0.2 --seed 41 --mu 0.5"),
        ("--sigmas 1,0.7,0.5,0", "--preset 3+1 --sigma 0.2 --seed 41 --sigmas 1,0.7,0.5,0"),
        ("--native --steps 2", "--native --steps 2 --seed 41"),
        ("--sigma 0.3 --seed 5", "--preset 3+1 --sigma 0.3 --seed 5 --shift-tokens final"),
    ],
)
def test_options_replace_what_the_nodes_say(mrflow: Any, tmp_path: Path, words: str, full: str) -> None:
    file = comfyui_image(tmp_path, shift="final", factor=2.0, stages=2)
    code, _, err = mrflow("generate", "--from", str(file), *words.split(), "--out", str(tmp_path / "o"))
    assert code == 0, err
    assert records(tmp_path / "o").plan == plan_of(mrflow, tmp_path, full)


def test_an_image_refined_by_our_node_is_refined_again_from_its_image(mrflow: Any, tmp_path: Path) -> None:
    start = tmp_path / "start.png"
    Image.new("RGB", (24, 16)).save(start)
    file = comfyui_image(tmp_path, "MrFlowRefine", width=0, height=0, factor=2.0)
    code, _, err = mrflow("generate", "--from", str(file), "--image", str(start), "--out", str(tmp_path / "o"))
    assert code == 0, err
    record = records(tmp_path / "o")
    plan = StagedPlan.from_string(record.plan)
    assert (plan.requested_width, plan.requested_height, plan.stages[1].start_sigma) == (48, 32, 0.2)
    assert record.start_sha256 is not None
    one_side = comfyui_image(tmp_path, "MrFlowRefine", width=64, height=0)
    code, _, err = mrflow("generate", "--from", str(one_side), "--image", str(start), "--out", str(tmp_path / "p"))
    assert StagedPlan.from_string(records(tmp_path / "p").plan).requested_height == 43
    code, _, err = mrflow("generate", "--from", str(file), "--size", "64x64", "--out", str(tmp_path / "q"))
    assert code == 0
    assert "made from another image, which the file does not hold, so this is a new image" in err
    whole = comfyui_image(tmp_path)
    code, _, err = mrflow("generate", "--from", str(whole), "--image", str(start), "--out", str(tmp_path / "r"))
    assert (code, err.count("\n")) == (2, 1)
    assert "leave out --image" in err


@pytest.mark.parametrize("widgets", [{"preset": "unheard"}, {"low_steps": 900, "preset": "3+1", "stages": 9}])
def test_nodes_that_make_no_plan_end_in_one_sentence(mrflow: Any, tmp_path: Path, widgets: dict[str, Any]) -> None:
    file = comfyui_image(tmp_path, **widgets)
    words = ("--preset", "2+1") if "stages" in widgets else ()
    code, out, err = mrflow("generate", "--from", str(file), *words, "--out", str(tmp_path / "o"))
    if words:  # a preset of one's own replaces the file's counts
        assert (code, "Not taken, as it cannot be used here: the stages 9." in err) == (0, True)
        return
    assert (code, out) == (2, "")
    assert "preset 'unheard' is not one of family 'demo'; choose from" in err


def test_numbers_of_another_program_that_cannot_be_used_are_named(mrflow: Any, tmp_path: Path) -> None:
    text = "a red star\nSteps: 20, Seed: -1, Size: 99999x99999"
    save_png(tmp_path / "a1111.png", load_image_of(tmp_path), {"parameters": text})
    words = ("--size", "32x32", "--preset", "2+1")
    code, _, err = mrflow("generate", "--from", str(tmp_path / "a1111.png"), *words, "--out", str(tmp_path / "o"))
    assert code == 0
    assert "the prompt. Not taken, as it cannot be used here: the seed '-1', the size '99999x99999'. Not" in err


@pytest.mark.parametrize("words", [("--seed", "9"), ("--size", "64x64"), ("--batch", "2"), ("--family", "flux1-krea")])
def test_a_record_lets_nothing_be_replaced(mrflow: Any, tmp_path: Path, words: tuple[str, ...]) -> None:
    save_png(tmp_path / "mine.png", load_image_of(tmp_path), {"mrflow": RECORD.to_json()})
    code, _, err = mrflow("generate", "--from", str(tmp_path / "mine.png"), *words, "--out", str(tmp_path / "o"))
    assert (code, err.count("\n")) == (2, 1)
    assert f"all numbers from the image's record, so {words[0]} has no meaning" in err


def load_image_of(folder: Path) -> Any:
    Image.new("RGB", (8, 8)).save(folder / "small.png")
    return load_image(folder / "small.png")
