"""Single files of whole models, as WebUIs keep them: the model of its folder, or a sentence that says what to do."""

from __future__ import annotations

import json
import shutil
import socket
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import original_names
import pytest
import tiny_pipelines
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mrflow_sched import MrFlow, ShiftRule
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers import single_file
from mrflow_sched.engines.diffusers.folder import check_model, load_pipeline, model_fingerprint, read_layout
from mrflow_sched.engines.diffusers.layouts import find_layout

Weights = dict[str, Tensor]

WHOLE: dict[str, Callable[[Any], Weights]] = {
    "sd15": original_names.stable_diffusion,
    "sdxl": original_names.stable_diffusion,
    "sd3": original_names.stable_diffusion_3,
}


class Evil:
    """What makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each kind a folder (sdxl), its settings alone (sdxl-settings) and the same model in a file; only to read."""
    place = tmp_path_factory.mktemp("models")
    for name, table in WHOLE.items():
        pipe = tiny_pipelines.make(name)
        if name == "sd15":  # as the real ones
            torch.manual_seed(1)
            pipe.vae = type(pipe.vae).from_config({**pipe.vae.config, "mid_block_add_attention": True})
        if name == "sd3":  # its files leave this one out
            pipe.text_encoder.text_projection.weight.copy_(torch.eye(16))
        pipe.save_pretrained(place / name)
        shutil.copytree(
            place / name, place / f"{name}-settings", ignore=shutil.ignore_patterns("*.safetensors", "*.bin")
        )
        save_file(table(pipe), place / f"tuned-{name}.safetensors")
    return place


def file_of(models: Path, name: str) -> Path:
    return models / f"tuned-{name}.safetensors"


def changed(models: Path, name: str, target: Path, change: Callable[[Weights], Weights]) -> Path:
    """A file of other tensors, made from the one of a kind."""
    save_file(change(load_file(file_of(models, name))), target)
    return target


def without(*prefixes: str) -> Callable[[Weights], Weights]:
    return lambda table: {key: weight for key, weight in table.items() if not key.startswith(prefixes)}


def in_dtype(dtype: torch.dtype) -> Callable[[Weights], Weights]:
    return lambda table: {key: weight.to(dtype) for key, weight in table.items()}


def loaded(model: Path, config: Path | None = None, dtype: Any = "float32") -> Any:
    return load_pipeline(model, device="cpu", dtype=dtype, config=config)


def refused(model: Path, config: Path | None = None) -> str:
    """The sentence about a model, which is the same before its weights are read."""
    with pytest.raises(MrFlowError) as caught:
        loaded(model, config)
    assert str(caught.value).isprintable()
    assert str(caught.value).endswith(".")
    return str(caught.value)


def differing(one: Any, other: Any) -> list[str]:
    """The weights of two pipelines that are not equal, bit for bit."""
    found: list[str] = []
    for name, part in one.components.items():
        if isinstance(part, torch.nn.Module):
            ours, theirs = part.state_dict(), other.components[name].state_dict()
            found += [f"{name}.{key}" for key in ours if not torch.equal(ours[key], theirs[key])]
            assert ours.keys() == theirs.keys()
    return found


def image_of(mrflow: MrFlow) -> Any:
    output = mrflow("a harbour at dawn", width=64, height=64, low_steps=2, refine_steps=1, seed=3)
    return np.array(output.images[0])


# ---------------------------------------------------------------------------------------------------------- whole files


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_file_is_the_model_of_its_folder(models: Path, name: str) -> None:
    folder = loaded(models / name)
    pipe = loaded(file_of(models, name), models / f"{name}-settings")
    assert differing(folder, pipe) == []
    assert type(pipe) is type(folder)
    assert dict(pipe.scheduler.config) == dict(folder.scheduler.config)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            assert not part.training
            assert not any(weight.requires_grad for weight in part.parameters())


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_file_makes_the_image_of_its_folder(models: Path, name: str) -> None:
    settings = models / f"{name}-settings"
    one = MrFlow.from_pretrained(models / name, device="cpu", dtype="float32", upscaler="lanczos")
    other = MrFlow.from_pretrained(
        file_of(models, name), config=settings, device="cpu", dtype="float32", upscaler="lanczos"
    )
    assert one.family == other.family == read_layout(file_of(models, name), config=settings).family
    first = image_of(one)
    assert np.ptp(first) > 20
    # The same weights elsewhere in memory: sums differ in their last bit, and so may the rounding to 8 bits.
    difference = np.abs(first.astype(int) - image_of(other))
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_the_command_line_makes_the_same_image_too(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mrflow_sched.apps.cli.main import main

    small = ("--size", "64x64", "--low-steps", "1", "--refine-steps", "1", "--dtype", "float32", "--device", "cpu")
    common = (*small, "--seed", "5", "--upscaler", "lanczos")
    images: list[Any] = []
    for given in (
        ("--model", str(models / "sdxl")),
        ("--model", str(file_of(models, "sdxl")), "--model-config", str(models / "sdxl-settings")),
    ):
        out = tmp_path / str(len(images))
        assert main(["generate", "a harbour", *given, *common, "--out", str(out)]) == 0, capsys.readouterr().err
        [file] = out.glob("*.png")
        images.append(np.array(Image.open(file)))
    assert np.array_equal(*images)
    assert np.ptp(images[0]) > 20


def test_each_part_is_rounded_once(models: Path) -> None:
    mixed = {"default": "bfloat16", "vae": "float32", "text_encoder": "float32"}
    exact, pipe = (
        loaded(model, config, mixed)
        for model, config in ((models / "sdxl", None), (file_of(models, "sdxl"), models / "sdxl-settings"))
    )
    assert differing(exact, pipe) == []
    assert {pipe.unet.dtype, pipe.text_encoder_2.dtype} == {torch.bfloat16}
    assert {pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_weights_of_fewer_bits_are_read(models: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    settings = models / "sdxl-settings"
    file = changed(models, "sdxl", tmp_path / "half.safetensors", in_dtype(dtype))
    rounded = changed(
        models, "sdxl", tmp_path / "round.safetensors", lambda t: in_dtype(torch.float32)(in_dtype(dtype)(t))
    )
    assert differing(loaded(rounded, settings), loaded(file, settings)) == []


# ------------------------------------------------------------------------------------------------------- parts of files


@pytest.mark.parametrize(
    ("name", "prefixes", "part"),
    [
        ("sd15", ("first_stage_model.",), "vae"),
        ("sd15", ("cond_stage_model.",), "text_encoder"),
        ("sdxl", ("first_stage_model.", "conditioner."), "text_encoder"),
        ("sdxl", ("conditioner.embedders.0.",), "text_encoder"),
        ("sd3", ("text_encoders.t5xxl.",), "text_encoder_3"),
        ("sd3", ("text_encoders.",), "text_encoder"),
    ],
)
def test_what_a_file_lacks_comes_from_the_folder(
    models: Path, tmp_path: Path, name: str, prefixes: tuple[str, ...], part: str
) -> None:
    file = changed(models, name, tmp_path / "part.safetensors", without(*prefixes))
    assert differing(loaded(models / name), loaded(file, models / name)) == []
    said = refused(file, models / f"{name}-settings")
    assert f"holds no {part}, and" in said
    assert f"lacks {part}/" in said or said.count(part) == 1
    assert "hf download " in said
    assert "--include" not in said


@pytest.fixture
def narrow_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' conversion of FLUX.1 for a network 16 wide instead of 3072, a number that it holds in its code."""
    tiny_pipelines.diffusers()
    from diffusers.loaders import single_file_model

    entry: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    usual: Any = entry["checkpoint_mapping_fn"]
    assert 3072 in usual.__code__.co_consts
    numbers = tuple(16 if each == 3072 else each for each in usual.__code__.co_consts)
    narrow = types.FunctionType(usual.__code__.replace(co_consts=numbers), usual.__globals__)
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", narrow)


@pytest.mark.usefixtures("narrow_flux")
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("prefix", ["", original_names.NETWORK])
def test_files_of_flux(tmp_path: Path, prefix: str, whole: bool) -> None:
    pipe = tiny_pipelines.make("flux1-dev")
    pipe.save_pretrained(tmp_path / "flux")
    table = {prefix + key: weight for key, weight in original_names.flux(pipe.transformer).items()}
    save_file(table | (original_names.beside_flux(pipe) if whole else {}), tmp_path / "tuned.safetensors")
    config = tmp_path / "flux"
    if whole:
        config = Path(shutil.copytree(config, tmp_path / "settings", ignore=shutil.ignore_patterns("*.safetensors")))
    assert differing(loaded(tmp_path / "flux"), loaded(tmp_path / "tuned.safetensors", config)) == []


def test_a_safety_checker_is_left_out_where_the_folder_has_none(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "sd15-settings", tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert loaded(file_of(models, "sd15"), folder).safety_checker is None


def test_averages_are_left_aside(models: Path, tmp_path: Path) -> None:
    def with_averages(table: Weights) -> Weights:
        return table | {f"model_ema.{key.replace('.', '')}": weight + 1 for key, weight in table.items()}

    file = changed(models, "sd15", tmp_path / "pruned.safetensors", with_averages)
    assert differing(loaded(models / "sd15"), loaded(file, models / "sd15-settings")) == []


def test_pickles_of_the_folder_are_not_touched(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "sdxl-settings", tmp_path / "model"))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
            torch.save(Evil(tmp_path / "ran"), folder / part / name)
    assert differing(loaded(models / "sdxl"), loaded(file_of(models, "sdxl"), folder)) == []
    file = changed(models, "sdxl", tmp_path / "less.safetensors", without("first_stage_model.", "conditioner."))
    assert "holds no " in refused(file, folder)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------- what its author says


@pytest.mark.parametrize(
    ("marks", "prediction", "zero_snr"),
    [((), "epsilon", False), (("v_pred",), "v", False), (("v_pred", "ztsnr"), "v", True)],
)
def test_marks_of_v_prediction_and_zero_snr_are_heeded(
    models: Path, tmp_path: Path, marks: tuple[str, ...], prediction: str, zero_snr: bool
) -> None:
    settings = models / "sdxl-settings"
    empty = {key: torch.zeros(0) for key in marks}
    file = changed(models, "sdxl", tmp_path / "vpred.safetensors", lambda table: table | empty)
    family = read_layout(file, config=settings).family
    assert (family.prediction, family.shift.kind == "zero-snr") == (prediction, zero_snr)
    pipe = loaded(file, settings)
    assert pipe.scheduler.config.prediction_type == {"v": "v_prediction"}.get(prediction, prediction)
    assert pipe.scheduler.config.rescale_betas_zero_snr is zero_snr
    assert find_layout(pipe).family == family


def test_an_edm_model_says_its_noise(models: Path, tmp_path: Path) -> None:
    ends = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
    file = changed(models, "sdxl", tmp_path / "cosxl.safetensors", lambda table: table | ends)
    family = read_layout(file, config=models / "sdxl-settings").family
    assert (family.prediction, family.shift.kind) == ("v", "edm")
    assert (family.shift.sigma_max, family.shift.rho) == (120.0, None)
    pipe = loaded(file, models / "sdxl-settings")
    assert find_layout(pipe).family == family
    shutil.copytree(models / "sdxl-settings", tmp_path / "playground")
    played = tmp_path / "playground" / "scheduler" / "scheduler_config.json"
    played.write_text(json.dumps({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}))
    index = tmp_path / "playground" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", "EDMEulerScheduler"]}))
    marks = {"edm_mean": torch.ones(4), "edm_std": torch.ones(4)}
    file = changed(models, "sdxl", tmp_path / "played.safetensors", lambda table: table | marks)
    pipe = loaded(file, tmp_path / "playground")
    assert find_layout(pipe).family.shift == ShiftRule("edm", sigma_max=160.0, sigma_min=0.004, rho=7.0)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "title", "line"),
    [
        ("sd15", "Stable Diffusion 1.5", "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --include"),
        ("sdxl", "Stable Diffusion XL", "hf download stabilityai/stable-diffusion-xl-base-1.0 --include"),
        ("sd3", "Stable Diffusion 3", "hf download stabilityai/stable-diffusion-3-medium-diffusers --include"),
    ],
)
def test_without_settings_the_sentence_says_how_to_get_them(models: Path, name: str, title: str, line: str) -> None:
    said = refused(file_of(models, name))
    assert f"a single file of {title}, which lacks the settings" in said
    assert "--model-config DIR" in said
    assert line in said


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("other", WHOLE)
def test_settings_of_another_kind(models: Path, name: str, other: str) -> None:
    if name == other:
        assert check_model(file_of(models, name), models / other)
        return
    said = refused(file_of(models, name), models / other)
    assert "a file of Stable Diffusion" in said
    assert "describes a StableDiffusion" in said


def test_settings_of_another_size(models: Path, tmp_path: Path) -> None:
    settings = Path(shutil.copytree(models / "sd15-settings", tmp_path / "wide"))
    config = json.loads((settings / "unet" / "config.json").read_text())
    (settings / "unet" / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
    assert "weights of the unet, while" in refused(file_of(models, "sd15"), settings)
    (settings / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
    assert "is not a checkpoint of StableDiffusionPipeline" in refused(file_of(models, "sd15"), settings)


def test_a_weight_that_is_missing(models: Path, tmp_path: Path) -> None:
    for name, key, part in (
        ("sd15", "model.diffusion_model.out.0.bias", "weights of the unet"),
        ("sdxl", "first_stage_model.decoder.conv_out.bias", "weights of the vae"),
        ("sdxl", "conditioner.embedders.1.model.ln_final.bias", "weights of the text"),
    ):
        file = changed(models, name, tmp_path / "cut.safetensors", without(key))
        said = refused(file, models / name)
        assert "lacks " in said
        assert part in said


def test_text_encoders_under_unread_names(models: Path, tmp_path: Path) -> None:
    def older(table: Weights) -> Weights:
        return {
            key.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."): weight
            for key, weight in table.items()
        }

    file = changed(models, "sd15", tmp_path / "older.safetensors", older)
    assert "text_encoder is kept in a way that diffusers does not read" in refused(file, models / "sd15")
    alone = changed(models, "sdxl", tmp_path / "alone.safetensors", without("conditioner.embedders.1."))
    assert "text_encoder is kept in a way that diffusers does not read" in refused(alone, models / "sdxl")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"scaled_fp8": torch.zeros(2)}, "quantised"),
        ({"model.diffusion_model.out.2.scale_weight": torch.ones(1)}, "quantised"),
        ({"model.diffusion_model.out.2.weight": torch.ones(4, 9, dtype=torch.uint8)}, "quantised"),
        ({"edm_mean": torch.ones(4), "edm_std": torch.ones(4)}, "an EDM model such as Playground 2.5; give the config"),
        ({"edm_vpred.sigma_max": torch.ones(3), "edm_vpred.sigma_min": torch.ones(1)}, "one number each"),
        ({"lora_unet_mid_block.lora_up.weight": torch.ones(1)}, "a LoRA"),
        ({"control_model.time_embed.0.weight": torch.ones(1)}, "a ControlNet"),
    ],
)
def test_models_with_more_than_a_loader_heeds(models: Path, tmp_path: Path, more: Weights, word: str) -> None:
    file = changed(models, "sdxl", tmp_path / "odd.safetensors", lambda table: table | more)
    assert word in refused(file, models / "sdxl")


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",), "a LoRA; give the model with --model and"),
        (("transformer.single_blocks.0.linear1.lora_A.weight",), "a LoRA"),
        (("controlnet_cond_embedding.conv_in.weight", "conv_in.weight"), "a ControlNet"),
        (("control_model.input_blocks.0.0.weight",), "a ControlNet"),
        (("ip_adapter.1.to_k_ip.weight", "image_proj.norm.weight"), "an IP-Adapter"),
        (("conv_first.weight", "conv_last.weight"), "an upscaler; give a model with --model and this file with --up"),
        (("params_ema.conv_first.weight",), "an upscaler"),
        (("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"), "an upscaler"),
        (("body.0.weight", "body.1.weight"), "an upscaler"),
        (("first_stage_model.decoder.conv_in.weight",), "a VAE alone"),
        (("encoder.conv_in.weight", "decoder.conv_in.weight"), "a VAE alone"),
        (("text_model.encoder.layers.0.layer_norm1.weight",), "a text encoder alone"),
        (("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"), "a text encoder alone"),
        (("emb_params",), "an embedding"),
        (("clip_g", "clip_l"), "an embedding"),
    ],
)
@pytest.mark.parametrize("config", ["sdxl", None])
def test_other_files_are_told_what_they_are(
    models: Path, tmp_path: Path, names: tuple[str, ...], what: str, config: str | None
) -> None:
    file = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, file)
    assert f"which is {what}" in refused(file, None if config is None else models / config)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".gguf", ".sft", ".SAFETENSORS"])
def test_other_formats_are_not_opened(models: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    shutil.copy(file_of(models, "sdxl"), file)
    said = refused(file, models / "sdxl")
    assert "does not end in .safetensors; " in said
    assert ("rename it" if suffix == ".SAFETENSORS" else "convert it") in said


def test_a_pickle_under_the_name_of_safetensors_is_not_run(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    torch.save({"state_dict": Evil(tmp_path / "ran")}, file)
    assert "cannot be read as safetensors" in refused(file, models / "sdxl")
    file.write_bytes(b"GGUF" + bytes(64))
    assert "cannot be read as safetensors" in refused(file, models / "sdxl")
    file.write_bytes(file_of(models, "sdxl").read_bytes()[:-1000])
    assert "cannot be read as safetensors" in refused(file, models / "sdxl")
    assert not (tmp_path / "ran").exists()


def test_without_accelerate_a_file_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_file, "find_spec", lambda _: None)
    assert "needs the package accelerate" in refused(file_of(models, "sdxl"), models / "sdxl")


def test_a_fingerprint_holds_what_comes_from_the_folder(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "sdxl", tmp_path / "model"))
    whole, network = file_of(models, "sdxl"), tmp_path / "network.safetensors"
    changed(models, "sdxl", network, without("first_stage_model."))
    before = [model_fingerprint(file, folder) for file in (whole, network)]
    assert before[0] == model_fingerprint(whole, models / "sdxl-settings")
    table = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(
        {key: weight + 1 for key, weight in table.items()}, folder / "vae" / "diffusion_pytorch_model.safetensors"
    )
    after = [model_fingerprint(file, folder) for file in (whole, network)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False]
    assert len({*before, *after}) == 3
