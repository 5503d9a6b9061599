"""Single-file checkpoints: read with a local folder's configuration, and what is missing told in a sentence."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from safetensors.torch import save_file

from mrflow_sched import MrFlow
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.folder import check_model, load_pipeline, read_layout
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine


def original_keys(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Z-Image's weights as its authors and hosts name them."""
    names = {
        "all_final_layer.2-1.": "final_layer.",
        "all_x_embedder.2-1.": "x_embedder.",
        ".attention.to_out.0.": ".attention.out.",
        ".attention.norm_k.": ".attention.k_norm.",
        ".attention.norm_q.": ".attention.q_norm.",
    }
    found: dict[str, torch.Tensor] = {}
    for key, weight in weights.items():
        if ".attention.to_k." in key or ".attention.to_v." in key:
            continue
        if ".attention.to_q." in key:
            fused = [weights[key.replace("to_q", each)] for each in ("to_q", "to_k", "to_v")]
            found["model.diffusion_model." + key.replace("to_q", "qkv")] = torch.cat(fused)
            continue
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        found["model.diffusion_model." + key] = weight.clone()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Z-Image folder; copy it to change it."""
    place = tmp_path_factory.mktemp("models") / "z-image"
    pipe = tiny_pipelines.make("z-image")
    if not hasattr(pipe, "from_single_file"):
        pytest.skip("the installed diffusers reads no single files of Z-Image")
    pipe.save_pretrained(place)
    return place


@pytest.fixture
def checkpoint(folder: Path, tmp_path: Path) -> Path:
    """A network of other weights than the folder's, alone in a file."""
    network = load_pipeline(folder, device="cpu", dtype="float32").transformer
    weights = {key: weight * 1.5 for key, weight in network.state_dict().items()}
    save_file(original_keys(weights), tmp_path / "tuned.safetensors")
    return tmp_path / "tuned.safetensors"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("offline")
def test_a_network_alone_takes_the_other_parts_from_the_folder(folder: Path, checkpoint: Path) -> None:
    plain = load_pipeline(folder, device="cpu", dtype="float32")
    engine = PipelineEngine.from_folder(checkpoint, device="cpu", dtype="float32", config=folder)
    assert (engine.name, engine.family.name) == (
        "tuned.safetensors",
        read_layout(checkpoint, config=folder).family.name,
    )
    assert len(engine.fingerprint) == 16
    ours, theirs = engine.network.state_dict(), plain.transformer.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key] * 1.5) for key in theirs)
    for part in ("vae", "text_encoder"):
        ours, theirs = (dict(getattr(pipe, part).state_dict()) for pipe in (engine.pipe, plain))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not any(weight.requires_grad for weight in engine.network.parameters())
    mixed = load_pipeline(checkpoint, device="cpu", dtype={"default": "bfloat16", "vae": "float32"}, config=folder)
    assert (mixed.transformer.dtype, mixed.vae.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.usefixtures("offline")
def test_the_folder_beside_a_file_describes_it(folder: Path, checkpoint: Path) -> None:
    with pytest.raises(
        MrFlowError, match=r"a single file of Z-Image, which lacks the settings of its pipeline.*--model-config"
    ):
        check_model(checkpoint)
    shutil.copytree(folder, checkpoint.with_suffix(""))
    assert check_model(checkpoint)["_class_name"] == "ZImagePipeline"
    mrflow = MrFlow.from_pretrained(checkpoint, device="cpu", dtype="float32", family="z-image-turbo")
    assert mrflow.family.name == "z-image-turbo"
    with pytest.raises(MrFlowError, match=r"nonsense is no option of MrFlow\.from_pretrained"):
        MrFlow.from_pretrained(checkpoint, device="cpu", nonsense=1)


@pytest.mark.usefixtures("offline")
def test_what_a_file_cannot_be(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    def said(file: Path, config: Path | None = folder) -> str:
        with pytest.raises(MrFlowError) as caught:
            PipelineEngine.from_folder(file, device="cpu", dtype="float32", config=config)
        assert str(caught.value).isprintable()
        return str(caught.value)

    assert "does not exist" in said(tmp_path / "absent.safetensors")
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"PK")
    assert "does not end in .safetensors; convert it" in said(pickled)
    assert "has no model_index.json" in said(checkpoint, tmp_path / "nowhere")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(checkpoint.read_bytes()[:-64])
    assert "cannot be read" in said(broken)
    other = tmp_path / "other.safetensors"
    save_file({"model.diffusion_model.a": torch.zeros(2**20)}, other)
    assert "holds 1,048,576 weights of the transformer" in said(other)
    small = tmp_path / "small.safetensors"
    save_file({"model.diffusion_model.a": torch.zeros(4)}, small)
    assert "holds 4 weights" in said(small) or "more layers" in said(small)
    lean = Path(shutil.copytree(folder, tmp_path / "lean"))
    (lean / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert "holds no vae, and" in said(checkpoint, lean)
    (lean / "vae" / "evil.py").write_text("raise SystemExit('ran')")
    assert "holds code (vae/evil.py)" in said(checkpoint, lean)


def test_a_folder_in_one_line(tiny_folder: Path) -> None:
    mrflow = MrFlow.from_pretrained(tiny_folder, device="cpu", dtype="float32")
    assert mrflow.family.name == "demo"
    output = mrflow("a red star", width=64, height=64, low_steps=1, refine_steps=1, seed=1)
    assert output.images[0].size == (64, 64)
    with pytest.raises(MrFlowError, match="not a folder"):
        MrFlow.from_pretrained(tiny_folder / "nowhere")
