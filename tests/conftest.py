"""Shared fixtures: a random FLUX.1-layout model folder, tiny, of the very classes that a real folder holds."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A test is no clock: a machine may do other work beside it.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Nothing in the tests may reach for a network; the libraries ask before they try.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent


class RootIsNoPackage:
    """The root's __init__.py is ComfyUI's door: pytest, to which it makes a package, would go in and import it."""

    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture(autouse=True)
def signals_are_heard() -> Iterator[None]:
    """Processes inherit what a test's own process ignores: SIGINT in the background of a shell, all of them once it
    has run `python -m mrflow_sched` in itself."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def logging_is_left_as_it_was() -> Iterator[None]:
    """A test that silences all logging would make tests of log lines fail that happen to follow it in its process."""
    before = logging.root.manager.disable
    yield
    after, logging.root.manager.disable = logging.root.manager.disable, before
    assert after == before, f"the test left logging.disable at {after}; it was {before}"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RootIsNoPackage())


WORDS = ("a", "red", "blue", "circle", "star", "striped", "over", "hills", "the", "word", "flow")


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_clip_tokenizer(folder: Path) -> None:
    """A byte-pair tokenizer without merges: every letter is a token."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>", **special}
    _write_json(folder / "tokenizer_config.json", settings)


def write_t5_tokenizer(folder: Path) -> None:
    """A unigram tokenizer over a handful of words and all letters, padded to 40 like the embedded model's."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import Unigram

    letters = [chr(code) for code in range(33, 127)]
    pieces = [(f"▁{word}", -2.0) for word in WORDS] + [("▁", -3.0)] + [(letter, -6.0) for letter in letters]
    tokenizer = Tokenizer(Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *pieces], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 0}
    _write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "T5TokenizerFast", "model_max_length": 40, **special}
    )


def build_tiny_folder(folder: Path, *, guidance_embeds: bool = True, family: str | None = "demo") -> Path:
    """Write a FluxPipeline folder of random weights: VAE factor 4, 16 latent channels, patches of 2x2."""
    from mrflow_sched._runtime.torchvision_ops import ensure_ops

    ensure_ops()
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    library: Any = diffusers  # its annotations speak of tuples of one
    write_clip_tokenizer(folder / "tokenizer")
    write_t5_tokenizer(folder / "tokenizer_2")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        parts: dict[str, Any] = {
            "transformer": library.FluxTransformer2DModel(
                in_channels=64,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=16,
                pooled_projection_dim=16,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(2, 2, 4),
            ),
            "vae": library.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(8, 8, 8),
                layers_per_block=1,
                norm_num_groups=4,
                latent_channels=16,
                scaling_factor=0.9,
                shift_factor=0.1,
                use_quant_conv=False,
                use_post_quant_conv=False,
                mid_block_add_attention=False,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=190,
                    hidden_size=16,
                    intermediate_size=32,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    max_position_embeddings=77,
                    bos_token_id=188,
                    eos_token_id=189,
                    pad_token_id=189,
                )
            ),
            "text_encoder_2": T5EncoderModel(
                T5Config(vocab_size=120, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
            ),
        }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index: dict[str, Any] = {
        "_class_name": "FluxPipeline",
        "_diffusers_version": "0.31.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(folder / "model_index.json", index | ({"_mrflow_family": family} if family else {}))
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0, "use_dynamic_shifting": False},
    )
    return folder


@pytest.fixture(autouse=True)
def gradients_are_on() -> None:
    """A test that sends a signal may end within a block without gradients, and leave them off for the next."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_grad_enabled(True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stays as it is; copy it (`tiny_copy`) to damage it."""
    return build_tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def tiny_copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A private copy of the tiny folder."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def tiny_engine(tiny_folder: Path) -> Any:
    """The tiny folder as a float32 CPU engine."""
    from mrflow_sched.engines.diffusers.pipeline import PipelineEngine

    return PipelineEngine.from_folder(tiny_folder, device="cpu", dtype="float32")


@pytest.fixture
def mrflow(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command; the model is the tiny folder wherever a model is taken. Returns (code, stdout, stderr)."""
    from mrflow_sched.apps.cli.main import main

    def run(command: str, *words: str, model: Path | None = tiny_folder) -> tuple[int, str, str]:
        where = ("--model", str(model)) if model and command != "plan" else ()
        code = main([command, *words, *where])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ComfyUI's doubles in place of its modules, and the pack's own made anew with them: for tests/apps/comfy.

    Here, as other tests import from the module that is called conftest.
    """
    doubles: Any = import_module("comfy_doubles")
    for name, module in doubles.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    doubles.forget()
    yield
    doubles.forget()
