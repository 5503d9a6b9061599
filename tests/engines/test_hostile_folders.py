"""Model folders made to do harm: no code of theirs runs, none works without end, each gets one sentence everywhere."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.folder import load_pipeline, read_layout
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.measure.doctor import examine

Damage = Callable[[Path], object]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


def edit(file: str, **entries: Any) -> Damage:
    """Set entries of a JSON file of the folder."""

    def damage(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return damage


def write(file: str, text: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)

    return damage


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def payload(mark: Path) -> str:
    """Python that leaves a mark when it runs, whichever class is asked of it."""
    return (
        f"open({str(mark)!r}, 'w').close()\n"
        "from diffusers import FluxPipeline\n"
        "class Evil(FluxPipeline):\n"
        "    @classmethod\n"
        "    def from_pretrained(cls, *_, **__): return cls\n"
        "def __getattr__(name): return Evil\n"
    )


def refused(folder: Path, *sentences: str) -> str:
    """What loading says; the doctor must refuse the folder too. Each says it on one printable line."""
    with pytest.raises(MrFlowError) as caught:
        PipelineEngine.from_folder(folder, device="cpu", dtype="float32")
    last = list(examine(str(folder)))[-1]
    assert not last.good
    said = (str(caught.value), f"{last.name}: {last.text}")
    for line in said:
        assert line.isprintable()
        assert len(line) < 700
        assert any(sentence in line for sentence in sentences), line
    return said[0]


# ---------------------------------------------------------------------------------------------------------- code


CODE: dict[str, Damage] = {
    "a part's own module": edit("model_index.json", vae=["evil", "Evil"]),
    "a module that is a part": edit("model_index.json", vae=["vae", "Evil"]),
    "a file of the folder": edit("model_index.json", vae=["vae.evil", "Evil"]),
    "the pipeline by a file": edit("model_index.json", _class_name=["evil", "Evil"]),
    "the pipeline by a module": edit("model_index.json", _class_name="evil.Evil"),
    "a pipeline as a part": both(
        edit("model_index.json", vae=["diffusers", "DiffusionPipeline"]),
        write("vae/model_index.json", '{"_class_name": ["evil", "Evil"]}'),
    ),
    "an automatic model": both(
        edit("model_index.json", text_encoder=["transformers", "AutoModel"]),
        edit("text_encoder/config.json", auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}),
    ),
    "an automatic tokenizer": both(
        edit("model_index.json", tokenizer=["transformers", "AutoTokenizer"]),
        edit("tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
    ),
    "auto_map beside a plain class": edit("text_encoder/config.json", auto_map={"AutoModel": "evil.Evil"}),
    "auto_map deep inside": edit("text_encoder/config.json", text_config={"x": [{"auto_map": {"AutoModel": "e.E"}}]}),
    "auto_map of a tokenizer": edit("tokenizer_2/tokenizer_config.json", auto_map={"AutoTokenizer": "evil.Evil"}),
    "a custom pipeline": edit("model_index.json", custom_pipeline="evil"),
    "another module": edit("model_index.json", tokenizer=["subprocess", "Popen"]),
    "a function": edit("model_index.json", tokenizer=["transformers", "pipeline"]),
    "a trainer": edit("model_index.json", tokenizer=["transformers", "Trainer"]),
    "a module of diffusers": edit("model_index.json", vae=["diffusers", "utils"]),
    "a private module": edit("model_index.json", vae=["pipeline_utils", "os"]),
    "an attention kernel": edit("text_encoder_2/config.json", attn_implementation="evil/kernel"),
    "a kernel of a nested model": edit("text_encoder_2/config.json", vision={"_attn_implementation": "evil/kernel"}),
    "a backbone from elsewhere": edit("text_encoder_2/config.json", use_pretrained_backbone=True),
    "weights under another name": edit("text_encoder/config.json", transformers_weights="../evil.bin"),
    "an adapter": write("text_encoder/adapter_config.json", '{"base_model_name_or_path": "/evil"}'),
    "a folder up": edit("model_index.json", **{"../evil": ["diffusers", "AutoencoderKL"]}),
    "half a part": edit("model_index.json", vae=["evil", None]),
    "three halves of a part": edit("model_index.json", vae=["evil", "Evil", "x"]),
}


@pytest.mark.parametrize("case", CODE)
def test_no_python_runs_whatever_a_folder_names(
    case: str, tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    CODE[case](tiny_copy)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "evil.py").write_text(payload(mark))  # importable, as from the current folder
    (elsewhere / "vae.py").write_text(payload(mark))
    monkeypatch.syspath_prepend(elsewhere)
    monkeypatch.chdir(elsewhere)
    refused(tiny_copy, "model is ", "model ")
    with pytest.raises(MrFlowError):
        read_layout(tiny_copy)
    assert not mark.exists()


@pytest.mark.parametrize("place", ["None.py", "pipeline.py", "evil.py", "vae/evil.py", "vae/AutoencoderKL.py"])
def test_a_folder_with_python_in_it_is_refused_by_name(place: str, tiny_copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tiny_copy / place).write_text(payload(mark))
    refused(tiny_copy, f"holds code ({place}), which is never run; remove it first")
    assert not mark.exists()


def test_the_payload_does_leave_its_mark(tmp_path: Path) -> None:
    exec(payload(tmp_path / "mark"), {})
    assert (tmp_path / "mark").exists()


# ---------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "file",
    ["model_index.json", "vae/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"],
)
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[]", "no JSON object"),
        ("null", "no JSON object"),
        ("\x00", "cannot be read"),
        ('{"a": 1' + "0" * 5000 + "}", "cannot be read"),
        (" " * (17 * 2**20) + "{}", "more than any model's"),
    ],
)
def test_json_that_is_none(tiny_copy: Path, file: str, text: str, sentence: str) -> None:
    (tiny_copy / file).write_text(text)
    assert file in refused(tiny_copy, sentence)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (edit("transformer/config.json", num_layers=10**6), "more layers than its weight files hold"),
        (edit("transformer/config.json", num_layers=10**5), "more layers than its weight files hold"),
        (edit("transformer/config.json", num_layers=-1), "which cannot be negative"),
        (edit("transformer/config.json", num_layers=0), "weights, while its files hold"),
        (edit("transformer/config.json", num_layers="many"), "a number or true or false belongs"),
        (edit("transformer/config.json", num_layers=None), "cannot be read"),
        (edit("transformer/config.json", attention_head_dim=2**20, axes_dims_rope=[2**20]), "while its files hold"),
        (edit("transformer/config.json", in_channels=10**12), "more than any model has"),
        (edit("transformer/config.json", in_channels=[64]), "cannot be read"),
        (edit("transformer/config.json", in_channels={}), "a number or true or false belongs"),
        (edit("vae/config.json", block_out_channels=[8] * 100_000), "more entries than any model's"),
        (edit("vae/config.json", block_out_channels=[8] * 4000), "vae"),
        (edit("vae/config.json", block_out_channels=8), "cannot be read"),
        (edit("vae/config.json", latent_channels=True), "vae"),
        (edit("text_encoder/config.json", num_hidden_layers=10**6), "more layers than its weight files hold"),
        (edit("text_encoder/config.json", vocab_size=2**24), "while its files hold"),
        (edit("text_encoder/config.json", max_position_embeddings=2**24), "while its files hold"),
        (edit("text_encoder/config.json", hidden_size=-16), "which cannot be negative"),
        (edit("text_encoder_2/config.json", num_layers=10**6), "more layers than its weight files hold"),
        (edit("text_encoder_2/config.json", d_model="16"), "cannot be read"),
        (edit("scheduler/scheduler_config.json", num_train_timesteps=10**9), "more than any model has"),
        (edit("scheduler/scheduler_config.json", num_train_timesteps=10**6), "between 1 and 100000"),
        (edit("scheduler/scheduler_config.json", num_train_timesteps=0), "between 1 and 100000"),
        (edit("scheduler/scheduler_config.json", shift="much"), "scheduler"),
        (edit("tokenizer/tokenizer_config.json", model_max_length=-5), "must be at least 1"),
        (edit("tokenizer/tokenizer_config.json", model_max_length="long"), "must be at least 1"),
        (edit("tokenizer_2/tokenizer_config.json", model_max_length=None), "must be at least 1"),
        (edit("model_index.json", vae=7), "do not make a FluxPipeline"),
    ],
)
def test_numbers_and_types_that_no_model_has(tiny_copy: Path, damage: Damage, sentence: str) -> None:
    damage(tiny_copy)
    refused(tiny_copy, sentence)


# ---------------------------------------------------------------------------------------------------------- weights


def shard(weight_map: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return damage


def header(text: bytes, length: int | None = None) -> Damage:
    size = len(text) if length is None else length
    return lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + text)


def huge(folder: Path) -> None:
    """A header that declares more than the file holds."""
    entry = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    header(json.dumps({"x_embedder.weight": entry}).encode())(folder)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (shard(None), "lists no shards"),
        (shard({}), "lists no shards"),
        (shard(["a"]), "lists no shards"),
        (shard({"a": None}), "names a shard None"),
        (shard({"a": 5}), "names a shard 5"),
        (shard({"a": ["x"]}), "names a shard"),
        (shard({"a": "../../other.safetensors"}), "names a shard"),
        (shard({"a": "/etc/passwd"}), "names a shard"),
        (shard({"a": "..\\x.safetensors"}), "names a shard"),
        (shard({"a": "x\x1b[31m.safetensors"}), "names a shard"),
        (shard({"a": "weights.bin"}), "names a shard"),
        (shard({"a": "absent.safetensors"}), "lacks transformer/absent.safetensors"),
        (shard({"no such weight": "diffusion_pytorch_model.safetensors"}), "lacks 'no such weight'"),
        (write(INDEX, "[" * 200_000), "nested too deeply"),
        (write(WEIGHTS, ""), "whose transformer cannot be read"),
        (header(b"{}", 2**62), "whose transformer cannot be read"),
        (header(b"{" * 1000), "whose transformer cannot be read"),
        (header(b"{}"), "while its files hold 0"),
        (huge, "whose transformer cannot be read"),
    ],
)
def test_weight_files_that_lie(tiny_copy: Path, damage: Damage, sentence: str) -> None:
    damage(tiny_copy)
    refused(tiny_copy, sentence)


def test_a_tensor_of_another_shape(tiny_copy: Path) -> None:
    weights = load_file(tiny_copy / WEIGHTS)
    name = "x_embedder.bias"
    save_file({**weights, name: weights[name][:3].clone()}, tiny_copy / WEIGHTS)
    with pytest.raises(MrFlowError, match="whose transformer cannot be read"):
        load_pipeline(tiny_copy, device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("place", "name"),
    [("vae", "scaling_factor"), ("vae", "shift_factor"), ("transformer", "guidance_embeds"), ("vae", "use_quant_conv")],
)
def test_text_in_place_of_a_number(tiny_copy: Path, place: str, name: str) -> None:
    file = tiny_copy / place / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: "\x1b[31mred"}))
    refused(tiny_copy, f"whose {place}/config.json has {name}: '\\x1b[31mred', where a number or true or false belongs")


def test_links_are_what_they_lead_to(tiny_copy: Path, tmp_path: Path) -> None:
    """Users share a text encoder between models, and the Hub's cache holds nothing but links."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (tiny_copy / "vae").rename(shared / "vae")
    (tiny_copy / "vae").symlink_to(shared / "vae")
    for number, file in enumerate(path for path in sorted(tiny_copy.rglob("*")) if path.is_file()):
        file.symlink_to(os.path.relpath(file.rename(shared / str(number)), file.parent))
    assert load_pipeline(tiny_copy, device="cpu", dtype="float32").transformer is not None
    (tiny_copy / "vae" / "config.json").unlink()
    (tiny_copy / "vae" / "config.json").symlink_to("/dev/zero")
    refused(tiny_copy, "whose vae/config.json is not a plain file")


def test_what_is_no_file(tiny_copy: Path) -> None:
    os.mkfifo(tiny_copy / "tokenizer" / "pipe.json")
    refused(tiny_copy, "whose tokenizer/pipe.json is not a plain file")


# ---------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "damage",
    [
        edit("model_index.json", _class_name="\x1b]0;title\x07"),
        edit("model_index.json", _class_name="x" * 100_000),
        edit("model_index.json", vae=["transformers\x1b[31m", "CLIPTextModel"]),
        edit("model_index.json", vae=["transformers", "CLIP\x1b[31m"]),
        edit("model_index.json", vae=["x" * 100_000, "y" * 100_000]),
        edit("model_index.json", **{"\x1b[31mpart": ["x", "y"]}),
        edit("model_index.json", **{"p" * 100_000: ["diffusers", "AutoencoderKL"]}),
        edit("model_index.json", **{f"part{number}": ["diffusers", "AutoencoderKL"] for number in range(2000)}),
        edit("vae/config.json", **{"\x1b[31m_hidden_size": -1}),
        shard({"a\x1b[31m" * 1000: "diffusion_pytorch_model.safetensors"}),
    ],
)
def test_names_do_not_reach_the_terminal_raw(tiny_copy: Path, damage: Damage) -> None:
    damage(tiny_copy)
    refused(tiny_copy, "model is ", "model ")
