"""`mrflow doctor`, and `mrflow generate` and `compare` on folders of other pipelines than FLUX.1."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines

from mrflow_sched import demo
from mrflow_sched.apps.cli import main as cli
from mrflow_sched.engines.diffusers.folder import read_layout
from mrflow_sched.engines.diffusers.layouts import find_layout
from mrflow_sched.images.files import read_text
from mrflow_sched.measure.doctor import Finding, examine
from mrflow_sched.plan.stages import StagedPlan

SMALL = ("--size", "64x64", "--low-steps", "2", "--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sd3"
    tiny_pipelines.make("sd3").save_pretrained(folder)
    return folder


def doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(["doctor", "--json", *words])
    found = json.loads(capsys.readouterr().out)
    return code, {finding["name"]: finding for finding in found["findings"]} | {"ok": found["ok"]}


def test_a_healthy_installation(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    code, found = doctor(capsys, "--model", str(demo.weights_path()), "--upscaler", str(demo.upscaler_path()))
    assert (code, found["ok"]) == (0, True)
    assert found["torch"]["text"].startswith(torch.__version__.split("+")[0])
    assert "threads" in found["cpu"]["text"]
    assert "FLUX.1" in found["families"]["text"]
    assert found[f"model {demo.weights_path()}"]["text"].startswith("FluxPipeline, family demo")
    assert found[f"upscaler {demo.upscaler_path()}"]["text"] == "ESRGAN, x2"
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok   ", "note ")) for line in lines)


def test_lanczos_is_an_upscaler_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = doctor(capsys, "--upscaler", "lanczos")
    assert code == 0
    assert found["upscaler lanczos"]["text"] == "resampling without a model, which adds no detail"


def test_what_would_fail_is_said_and_makes_the_code_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, sd3_folder: Path
) -> None:
    no_upscaler = tmp_path / "x.pth"
    no_upscaler.write_bytes(b"nothing")
    folder = Path(shutil.copytree(sd3_folder, tmp_path / "model"))
    shutil.rmtree(folder / "text_encoder_2")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    code, found = doctor(capsys, "--model", str(folder), "--upscaler", str(no_upscaler))
    assert (code, found["ok"]) == (1, False)
    text = found[f"model {folder}"]["text"]
    assert "text_encoder_2" in text
    assert "vae/diffusion_pytorch_model.safetensors" in text
    assert not found[f"upscaler {no_upscaler}"]["good"]
    assert cli.main(["doctor", "--model", str(tmp_path / "nowhere")]) == 1
    assert "FAIL model" in capsys.readouterr().out


def test_pipelines_that_cannot_be_run_are_named(sd3_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd3_folder, tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    for kind, sentence in (
        ("StableDiffusion3Img2ImgPipeline", "starts from an image"),
        ("NoSuchPipeline", "does not have"),
    ):
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
        last = list(examine(str(folder)))[-1]
        assert not last.good
        assert sentence in last.text


def test_a_missing_library_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    import mrflow_sched.measure.doctor as room

    inner = room.version

    def without(*missing: str) -> None:
        def version(name: str) -> str:
            if not missing or name in missing:
                raise PackageNotFoundError(name)
            return inner(name)

        monkeypatch.setattr(room, "version", version)

    without("spandrel", "peft")
    found = {finding.name: finding for finding in examine()}
    assert not found["spandrel"].good
    assert "LoRA" in found["peft"].text
    assert (found["peft"].good, found["peft"].note) == (True, True)
    assert not found["torch"].note
    without()
    assert next(finding.name for finding in examine() if not finding.good) == "torch"


def test_what_fails_beside_mrflow_is_a_note_and_not_ok(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mrflow_sched.measure.doctor as room

    findings = Finding("a", "fine"), Finding("b", "works inside mrflow only", note=True)
    monkeypatch.setattr(room, "examine", lambda *_, **__: findings)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "ok   a: fine\nnote b: works inside mrflow only\n"


def test_operators_that_clash_are_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    import mrflow_sched._runtime.torchvision_ops as operators

    def clash() -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(operators, "ensure_ops", clash)
    found = {finding.name: finding for finding in examine()}
    assert not found["torchvision operators"].good
    assert "torchvision::nms" in found["torchvision operators"].text


def test_what_a_program_without_our_repair_would_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import mrflow_sched.measure.doctor as room

    def operators(torchvision: str) -> str:
        (tmp_path / "torchvision").mkdir(exist_ok=True)
        (tmp_path / "torchvision" / "__init__.py").write_text(torchvision)
        room.own_import.cache_clear()
        found = {finding.name: finding for finding in examine()}["torchvision operators"]
        assert found.good
        assert found.note == (found.text != "importable")
        return found.text

    stub = tmp_path / "diffusers" / "pipelines" / "flux"
    stub.mkdir(parents=True)
    for folder in (stub, stub.parent, stub.parent.parent):
        (folder / "__init__.py").touch()
    (stub / "pipeline_flux.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # reaches the other process alone
    try:
        assert operators("") == "importable"
        said = operators("raise RuntimeError('operator torchvision::nms\\x1b does not exist')")
        assert said.startswith(
            "works inside mrflow only; your own import of diffusers fails (operator torchvision::nms"
        )
        assert "install the torchvision that was made for torch" in said
        assert said.isprintable()
    finally:
        room.own_import.cache_clear()


def test_importing_mrflow_makes_diffusers_importable() -> None:
    code = "from mrflow_sched import MrFlow; from diffusers import FluxPipeline; print(FluxPipeline.__name__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "FluxPipeline", found.stderr[-2000:]
    code = "import sys, mrflow_sched; print([name for name in ('torch', 'torchvision') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# Cosmos-Predict2's class needs a package for its safety checker; the tiny Kolors has a tokenizer of the bench.
@pytest.mark.parametrize("name", sorted({*tiny_pipelines.available()} - {"cosmos-predict2", "kolors"}))
def test_a_layout_is_read_without_weights(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipelines.make(name)
    pipe.save_pretrained(tmp_path / "model")
    for weights in (tmp_path / "model").rglob("*.safetensors"):
        weights.unlink()
    assert read_layout(tmp_path / "model").family == find_layout(pipe).family


def test_generate_and_compare_take_any_folder(
    sd3_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", str(sd3_folder), *SMALL, "--out", str(tmp_path), "--upscaler", "lanczos", "--json")
    assert cli.main(["generate", "a cat", *words, "--negative", "blue", "--seed", "5", "--batch", "2"]) == 0
    made = json.loads(capsys.readouterr().out)
    plan = StagedPlan.from_string(made["plan"])
    assert (plan.family, plan.seed, len(made["images"])) == ("sd3", 5, 2)
    record = json.loads(read_text(made["images"][1])["mrflow"])
    assert (record["model"], record["image"], len(record["model_fingerprint"])) == ("sd3", 1, 16)
    first = Path(made["images"][1])
    assert cli.main(["generate", "--from", str(first), "--model", str(sd3_folder), "--out", str(tmp_path / "2")]) == 0
    capsys.readouterr()
    (second,) = (tmp_path / "2").glob("*.png")
    assert _pixels(second) == _pixels(first)
    assert cli.main(["compare", "a cat", *words, "--steps", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["speedup"] > 0


def _pixels(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        return image.tobytes()


def test_a_folder_of_no_known_pipeline_is_refused(
    sd3_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(sd3_folder, tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "NoSuchPipeline"}))
    assert cli.main(["generate", "a cat", "--model", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "made for NoSuchPipeline" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_package_that_a_pipeline_needs_is_named(tmp_path: Path) -> None:
    if importlib.util.find_spec("cosmos_guardrail"):
        pytest.skip("the package is installed")
    tiny_pipelines.make("cosmos-predict2").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"cosmos_guardrail.*; install what it names"):
        read_layout(tmp_path / "model")
