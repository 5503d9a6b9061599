"""Model folders: loaded part by part, each in its dtype, and what is wrong with one told in a sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from conftest import build_tiny_folder

from mrflow_sched._runtime import device
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers import folder as room
from mrflow_sched.engines.diffusers.files import folder_fingerprint
from mrflow_sched.engines.diffusers.folder import load_pipeline, read_layout, resolve_dtype
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine

NEWER = tuple(int(part) for part in version("diffusers").split(".")[:2]) >= (0, 32)


def read_family(folder: Path) -> str:
    return read_layout(folder).family.name


# --- what a pipeline of a folder is


def test_a_folders_pipeline_is_the_one_that_diffusers_loads(tiny_folder: Path, tiny_engine: PipelineEngine) -> None:
    library = tiny_pipelines.diffusers()
    theirs = library.FluxPipeline.from_pretrained(tiny_folder, local_files_only=True)
    ours = tiny_engine.pipe
    assert type(ours) is type(theirs)
    assert dict(ours.scheduler.config) == dict(theirs.scheduler.config)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        mine, other = (dict(getattr(pipe, name).state_dict()) for pipe in (ours, theirs))
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in other)
        assert not getattr(ours, name).training
        assert not any(weight.requires_grad for weight in getattr(ours, name).parameters())
    assert ours.tokenizer_2("red star").input_ids == theirs.tokenizer_2("red star").input_ids


def test_a_folder_with_our_own_scheduler_loads(tiny_folder: Path, tmp_path: Path) -> None:
    from mrflow_sched import MrFlowScheduler

    pipe = tiny_pipelines.diffusers().FluxPipeline.from_pretrained(tiny_folder, local_files_only=True)
    own = pipe.scheduler.config
    pipe.scheduler = MrFlowScheduler.from_config(own, solver="careful")
    folder = tmp_path / "saved"
    pipe.save_pretrained(folder)
    script = (
        f"from mrflow_sched import MrFlow; m = MrFlow.from_pretrained({str(folder)!r}, device='cpu', dtype='float32'); "
        "print(type(m.pipe.scheduler).__name__, m.pipe.scheduler.config.solver, m.family.name, m.family.shift.kind)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    family = read_layout(tiny_folder).family
    assert said.stdout.split() == ["MrFlowScheduler", "careful", family.name, family.shift.kind], said.stderr
    index = json.loads((folder / "model_index.json").read_text())
    assert index["scheduler"] == ["mrflow_sched.engines.diffusers.scheduler", "MrFlowScheduler"]
    for origin, kind in (("mrflow_sched.engines", "MrFlowScheduler"), (index["scheduler"][0], "ConfigMixin")):
        (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": [origin, kind]}))
        with pytest.raises(MrFlowError, match="which neither diffusers nor transformers has"):
            load_pipeline(folder, device="cpu")


def test_a_long_prompt_and_a_negative_one_are_spoken_of(tiny_engine: PipelineEngine) -> None:
    (cut,) = tiny_engine.encode_text(["flow " * 60]).notes
    assert cut.endswith("its end was cut off.")
    (ignored,) = tiny_engine.encode_text(["flow"], ["blur"]).notes
    assert ignored.endswith("has no negative prompt: it was ignored.")
    assert tiny_engine.encode_text(["flow"], [" "]).notes == ()


def test_schnell_embeds_no_guidance(tmp_path: Path) -> None:
    folder = build_tiny_folder(tmp_path / "schnell", guidance_embeds=False, family=None)
    assert read_family(folder) == "flux1-schnell"
    engine = PipelineEngine.from_folder(folder, device="cpu", dtype="float32")
    assert engine.family.guidance_kind == "none"
    text = engine.encode_text(["a red star"])
    x, sigma = torch.randn((1, 16, 4, 4)), torch.tensor([0.5])
    one, two = (engine.denoise(x, sigma, text, guidance=scale) for scale in (1.0, 9.0))
    assert torch.equal(one, two)


def test_the_dtype_of_each_part(tiny_folder: Path) -> None:
    auto = "bfloat16" if device.has_bfloat16(torch.device("cpu")) else "float32"
    models = ("transformer", "text_encoder", "text_encoder_2", "vae")
    cases: list[tuple[Any, dict[str, str]]] = [
        ("auto", {**dict.fromkeys(models, auto), "vae": "float32"}),
        ("bfloat16", dict.fromkeys(models, "bfloat16")),
        (
            {"transformer": "bfloat16", "text_encoder": "float32"},
            {
                "transformer": "bfloat16",
                "text_encoder": "float32",
                "text_encoder_2": auto,
                "vae": "float32",
            },
        ),
    ]
    for asked, expected in cases:
        engine = PipelineEngine.from_folder(tiny_folder, device="cpu", dtype=asked)
        assert engine.dtypes == expected
        again = PipelineEngine.from_folder(tiny_folder, device="cpu", dtype=engine.dtypes)
        assert again.dtypes == expected
    with pytest.raises(MrFlowError, match="int3"):
        load_pipeline(tiny_folder, device="cpu", dtype={"vae": "int3"})


def test_bfloat16_network_keeps_a_float32_state(tiny_folder: Path, tiny_engine: PipelineEngine) -> None:
    engine = PipelineEngine.from_folder(tiny_folder, device="cpu", dtype={"transformer": "bfloat16", "vae": "float32"})
    x, sigma = torch.randn((1, 16, 4, 4), generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    rough, exact = (
        each.denoise(x, sigma, each.encode_text(["a red star"]), guidance=3.5) for each in (engine, tiny_engine)
    )
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0.05)


def test_a_loader_that_ignores_the_dtype_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipelines.make("sd3")
    pipe.save_pretrained(tmp_path / "model")
    kind: Any = type(pipe.transformer)
    inner = kind.from_pretrained.__func__

    def in_the_files_dtype(cls: Any, *values: Any, **named: Any) -> Any:
        return inner(cls, *values, **{name: value for name, value in named.items() if "dtype" not in name})

    # As some pairs of diffusers and accelerate, or diffusers without it, load SD3's network.
    monkeypatch.setattr(kind, "from_pretrained", classmethod(in_the_files_dtype))
    loaded = load_pipeline(tmp_path / "model", device="cpu", dtype="bfloat16")
    assert {weight.dtype for weight in loaded.transformer.parameters()} == {torch.bfloat16}
    half = load_pipeline(tmp_path / "model", device="cpu", dtype={"default": "float16"})
    kept = {name for name, weight in half.text_encoder_3.named_parameters() if weight.dtype == torch.float32}
    assert kept, "T5 keeps its output projection in float32"
    assert all(".wo." in name for name in kept)


@pytest.mark.parametrize("name", ["sd3", "sd15", "z-image"])
def test_folders_of_other_pipelines_load_and_repeat(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipelines.make(name)
    pipe.save_pretrained(tmp_path / "model")
    engine = PipelineEngine.from_folder(tmp_path / "model", device="cpu", dtype="float32")
    assert type(engine.pipe) is type(pipe)
    assert engine.family == read_layout(tmp_path / "model").family
    assert set(engine.dtypes.values()) == {"float32"}


# --- folders


def test_family_comes_from_the_folder(tiny_folder: Path, tiny_copy: Path, tiny_engine: PipelineEngine) -> None:
    assert read_family(tiny_folder) == tiny_engine.family.name == "demo"
    index = json.loads((tiny_copy / "model_index.json").read_text())
    (tiny_copy / "model_index.json").write_text(json.dumps(index | {"_mrflow_family": "flux1-dev"}))
    assert read_family(tiny_copy) == "flux1-dev"
    del index["_mrflow_family"]  # then the configurations tell: a VAE of factor 4 is the embedded model's
    (tiny_copy / "model_index.json").write_text(json.dumps(index))
    assert read_family(tiny_copy) == "demo"
    (tiny_copy / "transformer" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="cannot be read"):
        read_family(tiny_copy)


def test_sharded_weights_load(tiny_copy: Path, tiny_engine: PipelineEngine) -> None:
    shutil.rmtree(tiny_copy / "transformer")
    tiny_engine.pipe.transformer.save_pretrained(tiny_copy / "transformer", max_shard_size="20KB")
    shards = sorted((tiny_copy / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    engine = PipelineEngine.from_folder(tiny_copy, device="cpu", dtype="float32")
    ours, theirs = (dict(e.network.named_parameters()) for e in (engine, tiny_engine))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    shards[0].unlink()
    with pytest.raises(ValueError, match=shards[0].name):
        PipelineEngine.from_folder(tiny_copy, device="cpu")


@pytest.mark.parametrize("shards", ["10GB", "40KB"])
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_a_folder_with_files_of_a_variant_alone(tmp_path: Path, name: str, shards: str) -> None:
    pipe = tiny_pipelines.make(name).to(torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size=shards)
    part = "unet" if name == "sdxl" else "transformer"
    files = sorted(file.name for file in (tmp_path / part).glob("*.safetensors"))
    assert files
    assert all("fp16" in file for file in files)
    # The list of the plain shards comes along where all .json files are downloaded.
    shards_of = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (tmp_path / part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(shards_of))
    loaded = load_pipeline(tmp_path, device="cpu", dtype="float16")
    for each in (part, "vae", "text_encoder"):
        ours, theirs = getattr(loaded, each).state_dict(), getattr(pipe, each).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    (tmp_path / part / files[-1]).unlink()
    with pytest.raises(MrFlowError, match=r"lacks .*diffusion_pytorch_model-00001-of-00002\.safetensors"):
        load_pipeline(tmp_path, device="cpu")


def _drop(name: str) -> Any:
    def damage(folder: Path) -> None:
        target = folder / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()

    return damage


def _write(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


def _cut(name: str) -> Any:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-64])


def _lose_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["decoder.conv_out.bias"]
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_drop("model_index.json"), "no model_index.json"),
        (_write("model_index.json", "{"), "model_index.json cannot be read"),
        (_write("model_index.json", "[]"), "model_index.json cannot be read"),
        (_write("model_index.json", "{}"), "names no pipeline"),
        (_write("model_index.json", '{"_class_name": "NoSuchPipeline"}'), "made for NoSuchPipeline"),
        (_drop("vae"), "lacks vae"),
        (_drop("tokenizer_2"), "lacks tokenizer_2"),
        (_drop("text_encoder/config.json"), "lacks text_encoder/config.json"),
        (
            _drop("transformer/diffusion_pytorch_model.safetensors"),
            "lacks transformer/diffusion_pytorch_model.safetensors",
        ),
        (_cut("transformer/diffusion_pytorch_model.safetensors"), "whose transformer cannot be read"),
        (_cut("text_encoder/model.safetensors"), "whose text_encoder cannot be read"),
        (_write("vae/config.json", "no"), "whose vae/config.json cannot be read"),
        (_write("tokenizer_2/tokenizer.json", "no"), "whose tokenizer_2 cannot be read"),
        (_lose_a_weight, "lacks 1 weights, first 'decoder.conv_out.bias'" if NEWER else "whose vae cannot be read"),
    ],
)
def test_a_damaged_folder_gets_one_sentence(tiny_copy: Path, damage: Any, sentence: str) -> None:
    damage(tiny_copy)
    with pytest.raises(ValueError) as caught:
        PipelineEngine.from_folder(tiny_copy, device="cpu", dtype="float32")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        PipelineEngine.from_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"hf download black-forest-labs/FLUX\.1-dev --local-dir DIR"):
        PipelineEngine.from_folder("black-forest-labs/FLUX.1-dev")


def test_fingerprint_follows_weights_and_settings(
    tiny_folder: Path, tiny_copy: Path, tiny_engine: PipelineEngine
) -> None:
    assert folder_fingerprint(tiny_copy) == tiny_engine.fingerprint
    assert len(tiny_engine.fingerprint) == 16
    path = tiny_copy / "vae" / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    changed = folder_fingerprint(tiny_copy)
    assert changed != tiny_engine.fingerprint
    path.write_bytes(bytes(200_000))
    large = folder_fingerprint(tiny_copy)
    path.write_bytes(bytes(199_999) + b"1")
    assert len({changed, large, folder_fingerprint(tiny_copy)}) == 3


def test_loading_leaves_the_libraries_talkative_as_they_were(tiny_folder: Path) -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logger in (diffusers_logging, transformers_logging):
        logger.set_verbosity_info()
        logger.enable_progress_bar()
    try:
        PipelineEngine.from_folder(tiny_folder, device="cpu", dtype="float32")
        for logger in (diffusers_logging, transformers_logging):
            assert logger.get_verbosity() == logger.INFO
            assert logger.is_progress_bar_enabled()
    finally:
        for logger in (diffusers_logging, transformers_logging):
            logger.set_verbosity_warning()


# --- device and dtype


def test_dtype_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for hardware, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(room, "has_bfloat16", lambda _, answer=hardware: answer)
        assert resolve_dtype("auto", cpu) == expected
    assert resolve_dtype("float16", cpu) == torch.float16
    assert resolve_dtype(torch.float64, cpu) == torch.float64
    with pytest.raises(ValueError, match="int3"):
        resolve_dtype("int3", cpu)


def test_importing_the_module_imports_no_model_library() -> None:
    code = (
        "import sys, mrflow_sched.engines.diffusers.pipeline; "
        "print([n for n in ('diffusers', 'transformers') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("offload", "called"),
    [
        (False, None),
        (True, "enable_model_cpu_offload"),
        ("model", "enable_model_cpu_offload"),
        ("layers", "enable_sequential_cpu_offload"),
    ],
)
def test_offload_is_by_part_or_by_layer(monkeypatch: pytest.MonkeyPatch, offload: Any, called: str | None) -> None:
    """On a card that this machine lacks: what is called of the pipeline, and with which device."""
    from diffusers import FluxPipeline

    from mrflow_sched import demo
    from mrflow_sched.engines.diffusers import folder

    heard: list[tuple[str, Any]] = []
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        monkeypatch.setattr(FluxPipeline, name, lambda _, device, name=name: heard.append((name, device)))
    monkeypatch.setattr(FluxPipeline, "to", lambda pipe, device: heard.append(("to", device)) or pipe)
    card = torch.device("cuda")
    monkeypatch.setattr(folder, "resolve_device", lambda _: card)
    folder.load_pipeline(demo.weights_path(), dtype="float32", offload=offload)
    assert heard == [("to" if called is None else called, card)]
