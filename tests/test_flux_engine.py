"""FluxEngine against diffusers' own FluxPipeline, on a tiny random folder of the same classes."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_folder
from torch import Tensor

from mrflow_sched.engines.diffusers import flux
from mrflow_sched.engines.diffusers.flux import FluxEngine, FluxText

NEWER = tuple(int(part) for part in version("diffusers").split(".")[:2]) >= (0, 32)
newer = pytest.mark.skipif(not NEWER, reason="FluxPipeline takes sigmas from diffusers 0.32 on")
PROMPTS = ["a red striped circle", "the word FLOW over blue hills"]


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path) -> Any:
    flux.prepare_imports()
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    pipe = FluxPipeline.from_pretrained(tiny_folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def text(tiny_engine: FluxEngine) -> FluxText:
    return tiny_engine.encode_text(PROMPTS)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- parity with the pipeline


def test_packing_is_the_pipelines_and_inverts(pipeline: Any) -> None:
    latents = noise(2, 16, 6, 4)
    packed = flux.pack(latents)
    assert torch.equal(packed, pipeline._pack_latents(latents, 2, 16, 6, 4))
    assert torch.equal(flux.unpack(packed, 6, 4), latents)


def test_text_is_what_the_pipeline_encodes(pipeline: Any, tiny_engine: FluxEngine, text: FluxText) -> None:
    assert tiny_engine.text_tokens == tiny_engine.family.text_tokens == 32
    tokens, pooled, _ = pipeline.encode_prompt(PROMPTS, None, max_sequence_length=tiny_engine.text_tokens)
    torch.testing.assert_close(text.tokens, tokens, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(text.pooled, pooled, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(text.tokens[0], text.tokens[1])


@newer
def test_the_network_sees_the_pipelines_inputs_and_the_loop_gives_its_latents(
    pipeline: Any, tiny_engine: FluxEngine, text: FluxText
) -> None:
    sigmas = [1.0, 0.7, 0.25, 0.0]
    start = noise(2, 16, 8, 4)
    seen: list[dict[str, Any]] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw), with_kwargs=True)
    try:
        theirs = pipeline(
            prompt_embeds=text.tokens,
            pooled_prompt_embeds=text.pooled,
            height=32,
            width=16,
            sigmas=sigmas[:-1],
            latents=flux.pack(start),
            guidance_scale=3.5,
            output_type="latent",
        ).images
    finally:
        hook.remove()

    ours_seen: list[dict[str, Any]] = []
    hook = tiny_engine._transformer.register_forward_pre_hook(lambda _m, _a, kw: ours_seen.append(kw), with_kwargs=True)
    try:
        x = start
        for now, then in itertools.pairwise(sigmas):
            denoised = tiny_engine.denoise(x, torch.full((2,), now), text, guidance=3.5)
            x = x + (then - now) / now * (x - denoised)
    finally:
        hook.remove()

    assert len(seen) == len(ours_seen) == 3
    for their, our in zip(seen, ours_seen, strict=True):
        for name in ("hidden_states", "timestep", "guidance", "img_ids", "txt_ids"):
            torch.testing.assert_close(our[name], their[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(flux.pack(x), theirs, atol=1e-5, rtol=1e-5)


@newer
def test_decode_is_the_pipelines(pipeline: Any, tiny_engine: FluxEngine, text: FluxText) -> None:
    latents = noise(1, 16, 4, 4)
    theirs = pipeline(
        prompt_embeds=text.tokens[:1],
        pooled_prompt_embeds=text.pooled[:1],
        height=16,
        width=16,
        sigmas=[1e-9],
        latents=flux.pack(latents),
        output_type="pt",
    ).images
    torch.testing.assert_close(tiny_engine.decode(latents), theirs, atol=1e-5, rtol=1e-5)


def test_encode_normalises_as_the_image_to_image_pipeline_does(pipeline: Any, tiny_engine: FluxEngine) -> None:
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        spread = pipeline.vae.encode(2 * images - 1).latent_dist
    expected = (spread.mode() - 0.1) * 0.9
    torch.testing.assert_close(tiny_engine.encode(images), expected, atol=1e-5, rtol=1e-5)


def test_a_borrowed_pipeline_gives_the_same_and_is_left_as_it_was(pipeline: Any, tiny_engine: FluxEngine) -> None:
    before = dict(pipeline.scheduler.config)
    borrowed = FluxEngine.from_pipeline(pipeline, family="demo")
    x, sigma = noise(1, 16, 4, 4), torch.tensor([0.5])
    ours = tiny_engine.denoise(x, sigma, tiny_engine.encode_text(PROMPTS[:1]), guidance=2.0)
    theirs = borrowed.denoise(x, sigma, borrowed.encode_text(PROMPTS[:1]), guidance=2.0)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert dict(pipeline.scheduler.config) == before
    assert all(p.requires_grad for p in pipeline.transformer.parameters())


# --- what the protocol asks


def test_every_sample_of_a_batch_stands_for_itself(tiny_engine: FluxEngine, text: FluxText) -> None:
    x, sigma = noise(2, 16, 4, 4), torch.tensor([0.9, 0.3])
    both = tiny_engine.denoise(x, sigma, text, guidance=3.5)
    for i in range(2):
        alone = tiny_engine.denoise(x[i : i + 1], sigma[i : i + 1], tiny_engine.encode_text([PROMPTS[i]]), guidance=3.5)
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-5, rtol=1e-5)
    assert both.dtype == torch.float32


def test_guidance_reaches_the_network(tiny_engine: FluxEngine, text: FluxText) -> None:
    x, sigma = noise(2, 16, 4, 4), torch.tensor([0.9, 0.3])
    low, high = (tiny_engine.denoise(x, sigma, text, guidance=scale) for scale in (1.0, 6.0))
    assert not torch.allclose(low, high)


def test_posterior_samples_come_from_their_seeds_alone(tiny_engine: FluxEngine) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    state = torch.get_rng_state()
    drawn = tiny_engine.encode(images, posterior="sample", seeds=[5, 6])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn[1:], tiny_engine.encode(images[1:], posterior="sample", seeds=[6]))
    assert not torch.allclose(drawn, tiny_engine.encode(images))
    with pytest.raises(ValueError, match="one seed for each"):
        tiny_engine.encode(images, posterior="sample", seeds=[5])
    with pytest.raises(ValueError, match="use mode or sample"):
        tiny_engine.encode(images, posterior="mean")


def test_images_stay_in_range_and_shapes_follow_the_grid(tiny_engine: FluxEngine) -> None:
    images = tiny_engine.decode(9 * noise(1, 16, 4, 6))
    assert images.shape == (1, 3, 16, 24)
    assert images.min() >= 0
    assert images.max() <= 1
    assert tiny_engine.latent_shape(24, 16) == (16, 4, 6)
    for size in ((0, 8), (12, 8), (8, -8)):
        with pytest.raises(ValueError, match="multiples of 8"):
            tiny_engine.latent_shape(*size)


def test_gradients_flow_only_where_asked_for(tiny_engine: FluxEngine, text: FluxText) -> None:
    x, sigma = noise(2, 16, 4, 4), torch.tensor([0.9, 0.3])
    assert not tiny_engine.denoise(x, sigma, text, guidance=3.5).requires_grad
    x.requires_grad_()
    tiny_engine.denoise(x, sigma, text, guidance=3.5).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_equal_prompts_are_encoded_once(tiny_engine: FluxEngine) -> None:
    calls: list[int] = []
    hook = tiny_engine._t5.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        found = tiny_engine.encode_text([PROMPTS[0]] * 3)
    finally:
        hook.remove()
    assert len(calls) == 1
    assert len(found) == 3


def test_a_long_prompt_and_a_negative_one_are_spoken_of(tiny_engine: FluxEngine) -> None:
    with pytest.warns(UserWarning, match="its end was cut off"):
        tiny_engine.encode_text(["flow " * 60])
    with pytest.warns(UserWarning, match="no negative prompt"):
        tiny_engine.encode_text(["flow"], ["blur"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_engine.encode_text(["flow"], [" "])


def test_text_encoders_can_wait_on_the_cpu(tiny_folder: Path, text: FluxText) -> None:
    engine = FluxEngine.from_folder(tiny_folder, device="cpu", dtype="float32", offload_text=True)
    moved: list[str] = []
    for name in ("_clip", "_t5"):
        module = getattr(engine, name)
        module.to = lambda place, name=name: moved.append(f"{name} {place}")
    assert torch.equal(engine.encode_text(PROMPTS).tokens, text.tokens)
    assert moved == ["_clip cpu", "_t5 cpu"] * 2


def test_schnell_embeds_no_guidance(tmp_path: Path) -> None:
    folder = build_tiny_folder(tmp_path / "schnell", guidance_embeds=False, family=None)
    assert flux.read_family(folder) == "flux1-schnell"
    with pytest.raises(ValueError, match="VAE factor of 8"):
        FluxEngine.from_folder(folder, device="cpu", dtype="float32")
    engine = FluxEngine.from_folder(folder, device="cpu", dtype="float32", family="demo")
    text = engine.encode_text(PROMPTS[:1])
    x, sigma = noise(1, 16, 4, 4), torch.tensor([0.5])
    one, two = (engine.denoise(x, sigma, text, guidance=scale) for scale in (1.0, 9.0))
    assert torch.equal(one, two)


def test_bfloat16_network_keeps_a_float32_state(tiny_folder: Path, tiny_engine: FluxEngine) -> None:
    engine = FluxEngine.from_folder(tiny_folder, device="cpu", dtype="bfloat16")
    assert (engine.dtype, engine.vae_dtype) == (torch.bfloat16, torch.float32)
    x, sigma = noise(1, 16, 4, 4), torch.tensor([0.5])
    rough = engine.denoise(x, sigma, engine.encode_text(PROMPTS[:1]), guidance=3.5)
    exact = tiny_engine.denoise(x, sigma, tiny_engine.encode_text(PROMPTS[:1]), guidance=3.5)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0.05)


# --- folders


def test_family_comes_from_the_folder(tiny_folder: Path, tiny_copy: Path, tiny_engine: FluxEngine) -> None:
    assert flux.read_family(tiny_folder) == tiny_engine.family.name == "demo"
    index = json.loads((tiny_copy / "model_index.json").read_text())
    del index["_mrflow_family"]
    (tiny_copy / "model_index.json").write_text(json.dumps(index))
    assert flux.read_family(tiny_copy) == "flux1-dev"
    (tiny_copy / "transformer" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="cannot be read"):
        flux.read_family(tiny_copy)


def test_sharded_weights_load(tiny_copy: Path, tiny_engine: FluxEngine, pipeline: Any) -> None:
    shutil.rmtree(tiny_copy / "transformer")
    pipeline.transformer.save_pretrained(tiny_copy / "transformer", max_shard_size="20KB")
    shards = sorted((tiny_copy / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    engine = FluxEngine.from_folder(tiny_copy, device="cpu", dtype="float32")
    ours, theirs = (dict(e._transformer.named_parameters()) for e in (engine, tiny_engine))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    shards[0].unlink()
    with pytest.raises(ValueError, match=shards[0].name):
        FluxEngine.from_folder(tiny_copy, device="cpu")


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
        (_write("model_index.json", "[]"), "not for FluxPipeline"),
        (_write("model_index.json", '{"_class_name": "SanaPipeline"}'), "made for SanaPipeline"),
        (_write("model_index.json", '{"_mrflow_family": "fluxx"}'), "fluxx"),
        (_drop("vae"), "lacks vae"),
        (_drop("tokenizer_2"), "lacks tokenizer_2"),
        (_drop("text_encoder/config.json"), "lacks text_encoder/config.json"),
        (_drop("transformer/diffusion_pytorch_model.safetensors"), "lacks transformer/*.safetensors"),
        (_write("transformer/x.safetensors.index.json", "{}"), "in readable form"),
        (_cut("transformer/diffusion_pytorch_model.safetensors"), "whose transformer cannot be read"),
        (_cut("text_encoder/model.safetensors"), "whose text_encoder cannot be read"),
        (_write("vae/config.json", "no"), "whose vae cannot be read"),
        (_write("tokenizer_2/tokenizer.json", "no"), "whose tokenizer_2 cannot be read"),
        (_lose_a_weight, "lacks 1 weights, first 'decoder.conv_out.bias'" if NEWER else "whose vae cannot be read"),
    ],
)
def test_a_damaged_folder_gets_one_sentence(tiny_copy: Path, damage: Any, sentence: str) -> None:
    damage(tiny_copy)
    with pytest.raises(ValueError) as caught:
        FluxEngine.from_folder(tiny_copy, device="cpu", dtype="float32")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        FluxEngine.from_folder(tmp_path / "nowhere")


def test_fingerprint_follows_weights_and_settings(tiny_folder: Path, tiny_copy: Path, tiny_engine: FluxEngine) -> None:
    assert flux.folder_fingerprint(tiny_copy) == tiny_engine.fingerprint
    assert len(tiny_engine.fingerprint) == 16
    path = tiny_copy / "vae" / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    changed = flux.folder_fingerprint(tiny_copy)
    assert changed != tiny_engine.fingerprint
    path.write_bytes(bytes(200_000))
    large = flux.folder_fingerprint(tiny_copy)
    path.write_bytes(bytes(199_999) + b"1")
    assert len({changed, large, flux.folder_fingerprint(tiny_copy)}) == 3


def test_loading_leaves_the_libraries_talkative_as_they_were(tiny_folder: Path) -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logger in (diffusers_logging, transformers_logging):
        logger.set_verbosity_info()
        logger.enable_progress_bar()
    try:
        FluxEngine.from_folder(tiny_folder, device="cpu", dtype="float32")
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
        monkeypatch.setattr(flux, "has_bfloat16", lambda _, answer=hardware: answer)
        assert flux.resolve_dtype("auto", cpu) == expected
    assert flux.resolve_dtype("float16", cpu) == torch.float16
    assert flux.resolve_dtype(torch.float64, cpu) == torch.float64
    with pytest.raises(ValueError, match="int3"):
        flux.resolve_dtype("int3", cpu)


def test_importing_the_module_imports_no_model_library() -> None:
    code = (
        "import sys, mrflow_sched.engines.diffusers.flux; "
        "print([n for n in ('diffusers', 'transformers') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
