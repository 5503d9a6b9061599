"""What other programs wrote of an image, and what they read of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from mrflow_sched.images.files import read_text, save_new
from mrflow_sched.images.foreign import ForeignRun, read_foreign
from mrflow_sched.images.parameters import parameters_text
from mrflow_sched.images.record import RunRecord
from mrflow_sched.plan.make import make_plan

A1111 = """a lighthouse, (dusk:1.2)
second line <lora:x:0.8>
Negative prompt: blurry, people
hands
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 1234567890, Size: 768x512, \
Model hash: 6ce0161689, Model: v1-5, Lora hashes: "x: 12, Seed: 99", Version: v1.10.0"""


def test_a1111() -> None:
    assert read_foreign({"parameters": A1111}) == ForeignRun(
        program="A1111",
        prompt="a lighthouse, (dusk:1.2)\nsecond line <lora:x:0.8>",
        negative="blurry, people\nhands",
        seed=1234567890,
        width=768,
        height=512,
        steps=20,
        guidance=7.5,
    )
    forge = "a fox\nSteps: 20, Sampler: Euler, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 5, Size: 64x64"
    assert read_foreign({"parameters": forge}) == ForeignRun("A1111", "a fox", None, 5, 64, 64, 20, 3.5)
    assert read_foreign({"parameters": "only a prompt"}) == ForeignRun("A1111", "only a prompt")


@pytest.mark.parametrize(
    ("line", "field"),
    [
        *(("Seed: -1", "seed"), ("Seed: " + "9" * 400, "seed"), ("Seed: 1e5", "seed"), ("Size: 0x64", "width")),
        *(("Size: 64", "height"), ("Size: 99999x64", "width"), ("CFG scale: nan", "guidance")),
        *(("CFG scale: 1e400", "guidance"), ("CFG scale: 101", "guidance")),
    ],
)
def test_a_number_out_of_range_counts_as_missing(line: str, field: str) -> None:
    found = read_foreign({"parameters": f"a fox\nSteps: 7, {line}"})
    assert found is not None
    assert getattr(found, field) is None
    assert found.steps == 7
    name, value = line.split(": ")
    told = () if name == "CFG scale" else (f"the {name.lower()} {value[:40]!r}",)
    assert [each[:40] for each in found.unusable] == [each[:40] for each in told]


SIMPLE: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 42,
            "steps": 25,
            "cfg": 6.5,
            "sampler_name": "euler",
            "model": ["4", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 832, "height": 1216, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a harbour", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "fog", "clip": ["4", 1]}},
}
FLUX: dict[str, Any] = {
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["40", 0], "clip": ["11", 0]}},
    "40": {"class_type": "PrimitiveString", "inputs": {"value": "a fox"}},
    "13": {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            "noise": ["25", 0],
            "guider": ["22", 0],
            "sampler": ["16", 0],
            "sigmas": ["17", 0],
            "latent_image": ["27", 0],
        },
    },
    "17": {"class_type": "BasicScheduler", "inputs": {"scheduler": "simple", "steps": 20, "denoise": 1.0}},
    "22": {"class_type": "BasicGuider", "inputs": {"model": ["30", 0], "conditioning": ["26", 0]}},
    "25": {"class_type": "RandomNoise", "inputs": {"noise_seed": ["41", 0]}},
    "41": {"class_type": "PrimitiveInt", "inputs": {"value": 2**40}},
    "26": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["6", 0]}},
    "27": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1024, "height": 768, "batch_size": 1}},
}


def graph(nodes: Any) -> ForeignRun | None:
    return read_foreign({"prompt": json.dumps(nodes)})


def test_comfyui() -> None:
    assert graph(SIMPLE) == ForeignRun("ComfyUI", "a harbour", "fog", 42, 832, 1216, 25, 6.5)
    assert graph(FLUX) == ForeignRun("ComfyUI", "a fox", None, 2**40, 1024, 768, 20, 3.5)


def test_comfyui_two_passes_are_read_at_the_first() -> None:
    second = {
        "class_type": "KSamplerAdvanced",
        "inputs": {
            "noise_seed": 7,
            "steps": 10,
            "cfg": 4,
            "positive": ["8", 0],
            "negative": ["9", 0],
            "latent_image": ["2", 0],
        },
    }
    scale = {"class_type": "LatentUpscale", "inputs": {"samples": ["3", 0], "width": 1664, "height": 2432}}
    more = {
        "8": {"class_type": "ControlNetApplyAdvanced", "inputs": {"positive": ["6", 0], "negative": ["7", 0]}},
        "9": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["6", 0]}},
    }
    assert graph({"1": second, "2": scale, **more, **SIMPLE}) == graph(SIMPLE)
    alone = {**SIMPLE, "3": {**second, "inputs": {**second["inputs"], "latent_image": ["5", 0]}}, **more}
    assert graph(alone) == ForeignRun("ComfyUI", "a harbour", None, 7, 832, 1216, 10, 4.0)


def test_hostile_graphs_end_soon_in_nothing_or_in_what_is_there() -> None:
    ring = {
        str(at): {"class_type": "X", "inputs": {"text": [str((at + 1) % 50), 0], "positive": [str(at), 0]}}
        for at in range(50)
    }
    many = {
        f"s{at}": {"class_type": "KSampler", "inputs": {"positive": ["0", 0], "seed": ["0", 0]}} for at in range(20_000)
    }
    texts = [
        *("", "{", "[]", "null", "{}", '{"a":' * 100_000, "[" * 100_000, '{"3": 5}', json.dumps({**ring, **many})),
        *(
            '{"3": {"class_type": "KSampler"}}',
            '{"3": {"class_type": "KSampler", "inputs": []}}',
            "{" + " " * 9_000_000 + "}",
        ),
        json.dumps({"3": {"class_type": "KSampler", "inputs": {"positive": [["6"], 0], "seed": float("nan")}}}),
        json.dumps({"3": {"class_type": ["KSampler"], "inputs": {}}, "4": {"class_type": {}, "inputs": {}}}),
        '{"3": {"class_type": "KSampler", "inputs": {"seed": ' + "9" * 5000 + "}}}",
    ]
    assert [read_foreign({"prompt": text}) for text in texts] == [None] * len(texts)
    for text in ("a\nSteps: " + "1, Seed" * 300_000, "Negative prompt: x", "\n" * 1_000_000, "\ud800", "x" * 9_000_000):
        assert read_foreign({"parameters": text}) is None or text.startswith("a")
    wild = {
        **SIMPLE,
        "3": {**SIMPLE["3"], "inputs": {**SIMPLE["3"]["inputs"], "seed": 10**400, "cfg": 10**400, "steps": True}},
    }
    unusable = (f"the seed 1{'0' * 36}...",)
    assert graph(wild) == ForeignRun("ComfyUI", "a harbour", "fog", None, 832, 1216, None, None, unusable)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["3", "5", "6", "KSampler"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["class_type", "inputs", "positive", "seed", "text", "3", "5", "6"]), inner, max_size=5
        )
    ),
    max_leaves=20,
)


@settings(max_examples=200)
@given(st.tuples(JSON, JSON).map(lambda two: {**SIMPLE, "3": two[0], "6": two[1]}) | JSON, st.text())
def test_any_texts_are_read_without_a_fault(nodes: Any, text: str) -> None:
    read_foreign({"prompt": json.dumps(nodes), "parameters": text})


RECORD = RunRecord(
    plan=make_plan("flux1-dev", 1000, 750, seed=7).to_string(),
    prompt="a harbour,\nSteps: up",
    negative="fog",
    seed=7,
    batch=4,
    image=2,
    model="/models/FLUX.1-dev, mine",
    model_fingerprint="f",
    upscaler="x2",
    upscaler_sha256=None,
    device="cpu",
    dtype="float32",
    vae_dtype="float32",
    threads=2,
    versions={"torch": "2", "mrflow-sched": "0.1.0"},
)


def test_our_text_in_the_layout_of_others() -> None:
    text = parameters_text(RECORD)
    assert text == (
        "a harbour,\nSteps: up\nNegative prompt: fog\nSteps: 12, Sampler: Adams-Bashforth 2, CFG scale: 3.5, Seed: 9, "
        'Size: 1000x750, Model: "FLUX.1-dev, mine", Refine steps: 1, Refine sigma: 0.12, Upscaler: x2, '
        "Version: mrflow-sched 0.1.0"
    )
    assert read_foreign({"parameters": text}) == ForeignRun(
        "A1111", "a harbour,\nSteps: up", "fog", 9, 1000, 750, 12, 3.5
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("size", [10, 200_000])
def test_texts_survive_every_format(tmp_path: Path, suffix: str, size: int) -> None:
    image = torch.linspace(0, 1, 3 * 8 * 8).reshape(3, 8, 8)
    texts = {"mrflow": RECORD.to_json(), "parameters": f"漢字 🎨 {'x' * size}\nSteps: 1"}
    path = save_new(tmp_path, "a", image, texts, suffix)
    assert path == tmp_path / f"a{suffix}"
    assert read_text(path) == texts
    kept = Image.open(path)
    assert kept.format == {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[suffix]
    assert "icc_profile" not in kept.info
    assert 0x0112 not in kept.getexif()
    levels = (
        torch.frombuffer(bytearray(kept.convert("RGB").tobytes()), dtype=torch.uint8).reshape(8, 8, 3).permute(2, 0, 1)
    )
    worst = float((levels / 255 - image).abs().max())
    assert worst <= (0.03 if suffix == ".jpg" else 0.51 / 255)
    if suffix != ".png" and size < 1000:  # where A1111's readers look
        comment = kept.getexif().get_ifd(0x8769)[0x9286]
        assert comment == b"UNICODE\0" + texts["parameters"].encode("utf-16-be")
    assert read_text(save_new(tmp_path, "none", image, suffix=suffix)) == {}


def test_texts_of_other_programs_files(tmp_path: Path) -> None:
    image, words = Image.new("RGB", (8, 8)), "a fox\nSteps: 5, Seed: 3"
    for name, comment in (
        ("be", b"UNICODE\0" + words.encode("utf-16-be")),
        ("le", b"UNICODE\0" + words.encode("utf-16-le")),
        ("ascii", b"ASCII\0\0\0" + words.encode()),
    ):
        exif = Image.Exif()
        exif[0x8769] = {0x9286: comment}
        image.save(tmp_path / f"{name}.jpg", exif=exif)
        assert read_text(tmp_path / f"{name}.jpg") == {"parameters": words}
    exif = Image.Exif()
    exif[0x0110], exif[0x010F] = "prompt:" + json.dumps(SIMPLE), "workflow:{}"
    image.save(tmp_path / "comfy.webp", exif=exif)
    assert read_foreign(read_text(tmp_path / "comfy.webp")) == graph(SIMPLE)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("prompt", json.dumps(FLUX))
    image.save(tmp_path / "comfy.png", pnginfo=chunks)
    assert read_foreign(read_text(tmp_path / "comfy.png")) == graph(FLUX)
    exif = Image.Exif()
    exif[0x010E] = "A photo of mine"
    image.save(tmp_path / "photo.jpg", exif=exif, comment="hello")
    assert read_text(tmp_path / "photo.jpg") == {}
