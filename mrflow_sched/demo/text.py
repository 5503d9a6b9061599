"""The embedded model's text encoders by transformers alone, for a host that has no diffusers.

Texts are cut and padded to the lengths that FLUX.1's pipeline uses with this model, neither encoder masks its padding,
and a weight for a word in brackets is no part of its language.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mrflow_sched._runtime.chatter import without_chatter
from mrflow_sched._runtime.torchvision_ops import ensure_ops
from mrflow_sched.demo.paths import weights_path

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TextEncoders", "Tokenizers"]


class Tokenizers:
    """Both tokenizers of the embedded model."""

    def __init__(self) -> None:
        """Read them from the package."""
        self._clip = _tokenizer(weights_path() / "tokenizer")
        self._t5 = _tokenizer(weights_path() / "tokenizer_2")

    def clip(self, text: str) -> list[int]:
        """What the encoder of the whole text reads.

        Args:
            text: What an image shows; may be empty.

        Returns:
            77 numbers; the end of a longer text is cut off.
        """
        return self._clip.encode(text).ids

    def t5(self, text: str) -> list[int]:
        """What the encoder of single words reads.

        Args:
            text: As in `clip`.

        Returns:
            32 numbers; the end of a longer text is cut off.
        """
        return self._t5.encode(text).ids


def _tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer that gives the same length for every text."""
    from tokenizers import Tokenizer

    config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    length, padding = config["model_max_length"], config["pad_token"]
    tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id(padding), pad_token=padding)
    return tokenizer


class TextEncoders(nn.Module):
    """Both text encoders of the embedded model."""

    def __init__(self) -> None:
        """Read them from the package, in float32 on the CPU."""
        super().__init__()
        ensure_ops()
        with without_chatter():
            from transformers import CLIPTextModel, T5EncoderModel

        with _without_bars(), without_chatter():
            self.clip = cast("Any", CLIPTextModel).from_pretrained(weights_path() / "text_encoder")
            # The stack alone: around it the same table of words has a second name, and then no file can be saved.
            self.t5 = cast("Any", T5EncoderModel).from_pretrained(weights_path() / "text_encoder_2").encoder
        self.requires_grad_(False)

    def forward(self, clip: Sequence[Sequence[int]], t5: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Embeddings of texts.

        Args:
            clip: `Tokenizers.clip` of each.
            t5: `Tokenizers.t5` of each.

        Returns:
            What each word means (B, 32, 128), and what the whole text means (B, 128), on the encoders' device.
        """
        whole = self.clip(input_ids=torch.tensor(clip, device=self.clip.device)).pooler_output
        words = self.t5(input_ids=torch.tensor(t5, device=self.t5.device)).last_hidden_state
        return words, whole


@contextlib.contextmanager
def _without_bars() -> Generator[None, None, None]:
    """Load without transformers' bars of progress: these files take milliseconds."""
    from transformers.utils import logging

    library: Any = logging
    shown = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bar()
