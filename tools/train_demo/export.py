"""Assemble the trained parts as a FLUX.1 pipeline folder, with the upscaler beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file, save_file

from mrflow_sched.demo.judge import WEIGHTS
from mrflow_sched.demo.paths import weights_path
from tools.train_demo import flow, further, text, vae


def load_flow(work: Path) -> flow.TextToVelocity:
    """The base model's weight average, with the transformer of the guided model if that has been trained."""
    model = flow.TextToVelocity(work)
    model.load_state_dict(torch.load(work / "flow.pt", weights_only=False)["ema"])
    if (work / "guided.pt").exists():
        model.transformer.load_state_dict(torch.load(work / "guided.pt", weights_only=False)["ema"])
    return model.eval().requires_grad_(False)


def load_vae(work: Path) -> Any:
    model = vae.make_vae()
    model.load_state_dict(torch.load(work / "vae.pt", weights_only=False)["vae"])
    return model.eval()


def export(work: Path, folder: Path) -> None:
    """Write ``folder``, which every FLUX.1 script can load."""
    model = load_flow(work)
    tokenizers = text.load(work)
    parts = {"t5": model.t5, "clip": model.clip, "transformer": model.transformer, "vae": load_vae(work)}
    state = torch.load(work / "sr.pt", weights_only=False)["ema"]
    upscaler = {key: value.half().contiguous() for key, value in state.items()}
    write(folder, parts, (tokenizers[0], tokenizers[2]), work / "text" / "tokenizer", upscaler)


def export_further(work: Path, folder: Path) -> None:
    """Write ``folder`` with the parts that were trained further, and the shipped upscaler and, if it was not, VAE."""
    _, model, tokenizers = further.load(work)
    model.load_state_dict(torch.load(work / "further.pt", weights_only=False)["ema"])
    kind: Any = AutoencoderKL
    shipped = kind.from_pretrained(weights_path() / "vae")
    if (work / "decoder" / "vae.pt").exists():
        shipped.load_state_dict(torch.load(work / "decoder" / "vae.pt", weights_only=False)["vae"])
    upscaler = load_file(weights_path() / "upscaler" / "x2.safetensors")
    parts = {"t5": model.t5, "clip": model.clip, "transformer": model.transformer, "vae": shipped}
    write(folder, parts, tokenizers, work / "text" / "tokenizer", upscaler)


def write(
    folder: Path, parts: dict[str, Any], tokenizers: tuple[Any, Any], clip_files: Path, upscaler: dict[str, Any]
) -> None:
    """Write a pipeline folder with its upscaler. The transformer, by far the largest part, is stored in bfloat16.

    `tokenizers` are those of T5 and of CLIP; `clip_files` is a folder with the latter's vocab.json and merges.txt.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=64, max_image_seq_len=1024
    )
    for part in parts.values():
        part.eval().requires_grad_(False)
    pipe = FluxPipeline(
        scheduler=scheduler,
        vae=parts["vae"],
        text_encoder=parts["clip"],
        tokenizer=tokenizers[1],
        text_encoder_2=parts["t5"],
        tokenizer_2=tokenizers[0],
        transformer=parts["transformer"].bfloat16(),
    )
    files = {name: (clip_files / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder)
    _name_as_released(folder / "text_encoder" / "model.safetensors")
    for name, content in files.items():
        (folder / "tokenizer" / name).write_bytes(content)
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"], index["tokenizer_2"] = ["transformers", "CLIPTokenizer"], ["transformers", "T5TokenizerFast"]
    index["_mrflow_family"] = "demo"
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "upscaler").mkdir()
    save_file(upscaler, folder / "upscaler" / "x2.safetensors")
    for path in folder.rglob("*.json"):
        path.write_text(_without_paths(path.read_text()))


def export_judge(work: Path, file: Path = WEIGHTS) -> None:
    """Write the trained judge in half the bytes, without the counters of its normalisation."""
    state = torch.load(work / "classifier.pt", weights_only=True)
    save_file({n: v.to(torch.bfloat16).contiguous() for n, v in state.items() if v.is_floating_point()}, file)


def _name_as_released(path: Path) -> None:
    """CLIP's weights under the names of all released checkpoints: transformers 5 reads both, and 4 only these."""
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def _without_paths(document: str) -> str:
    """Drop the keys in which libraries record where a file was loaded from."""
    content = json.loads(document)
    if isinstance(content, dict):
        for key in ("_name_or_path", "name_or_path"):
            content.pop(key, None)
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
