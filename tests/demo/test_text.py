"""The text encoders without diffusers are the engine's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mrflow_sched import demo
from mrflow_sched.demo.text import TextEncoders, Tokenizers

TEXTS = (
    *demo.example_prompts(),
    "",
    " \n\t ",
    "A RED Star, a  blue\nheart; the word FLOW!",
    "a photograph of a cat on a sofa, (masterpiece:1.3), 4k",
    "ein roter Stern, étoile rouge и звезда \U0001f600",
    "<|endoftext|> a red star </s> <pad>",
    "the word MAGIC in white letters on a blue wall " * 12,
)


@pytest.fixture(scope="module")
def encoders() -> TextEncoders:
    return TextEncoders()


@pytest.fixture(scope="module")
def engine() -> Any:
    return demo.load_engine(device="cpu", dtype="float32")


@pytest.mark.parametrize("text", TEXTS)
@torch.no_grad()
def test_embeddings_are_the_engines(encoders: TextEncoders, engine: Any, text: str) -> None:
    words, whole = encoders([Tokenizers().clip(text)], [Tokenizers().t5(text)])
    expected = engine.encode_text([text]).arguments
    assert (words.dtype, whole.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(words, expected["prompt_embeds"], atol=1e-5, rtol=0)
    torch.testing.assert_close(whole, expected["pooled_prompt_embeds"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_batch_is_its_texts_alone(encoders: TextEncoders) -> None:
    tokenizers = Tokenizers()
    clip, t5 = [tokenizers.clip(text) for text in TEXTS], [tokenizers.t5(text) for text in TEXTS]
    assert {len(ids) for ids in clip} == {77}
    assert {len(ids) for ids in t5} == {32}
    words, whole = encoders(clip, t5)
    assert (words.shape, whole.shape) == ((len(TEXTS), 32, 128), (len(TEXTS), 128))
    alone = [encoders([a], [b]) for a, b in zip(clip, t5, strict=True)]
    torch.testing.assert_close(words, torch.cat([pair[0] for pair in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole, torch.cat([pair[1] for pair in alone]), atol=1e-5, rtol=0)


def test_they_can_be_saved(encoders: TextEncoders, tmp_path: Path) -> None:
    save_file(encoders.state_dict(), tmp_path / "text.safetensors")


def test_neither_room_needs_diffusers_and_loading_says_nothing() -> None:
    script = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from mrflow_sched.demo.text import TextEncoders; from mrflow_sched.demo.autoencoder import load_autoencoder\n"
        "assert 'transformers' not in sys.modules\n"
        "TextEncoders(); load_autoencoder()\n"
        "from transformers.utils import logging; assert logging.is_progress_bar_enabled()\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
