"""What pipelines share whose text cannot be joined in any batch, or is only encoded inside their call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.base import Layout, parameter_names

__all__ = ["RowByRow", "TextInCall"]


class TextInCall(Layout):
    """The call takes text and no embeddings, or does more with text than encode it: it gets the text itself.

    What it encodes is remembered for the later stages. Images of different texts are not made together, as text that is
    padded for the batch is not what a prompt gives by itself.
    """

    remembered: ClassVar[str | None] = "encode_prompt"

    @override
    def encode_text(
        self,
        prompts: Sequence[str] | None,
        negative_prompts: Sequence[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        # Options about text are passed on with it.
        about_text = self.call_names & parameter_names(self.pipe.encode_prompt)
        text = {name: value for name, value in dict(options or {}).items() if name in about_text and value is not None}
        if prompts is not None:
            text["prompt"] = list(prompts)
        if negative_prompts is not None and "negative_prompt" in self.call_names:
            text["negative_prompt"] = list(negative_prompts)
        return text

    @override
    def select_text(self, text: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
        # Only what there is one of for each image.
        names = ("prompt", "negative_prompt")
        own = {name: value for name, value in text.items() if name in names or "prompt_embeds" in name}
        return {**text, **super().select_text(own, rows)}

    @override
    def runs_together(self, text: Mapping[str, Any]) -> bool:
        if any("prompt_embeds" in name for name in text):
            return False
        return all(len(set(value)) == 1 for name, value in text.items() if name in ("prompt", "negative_prompt"))


class RowByRow(Layout):
    """`encode_prompt` lets the prompts of a batch change each other: each is encoded by itself, then padded."""

    def _encode_rows(
        self, prompts: list[str] | None, negatives: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        if prompts is None:
            return super()._encode_rows(prompts, negatives, options)
        made = [
            super(RowByRow, self)._encode_rows([prompt], None if negatives is None else [negatives[row]], options)
            for row, prompt in enumerate(prompts)
        ]
        return {name: joined([each[name] for each in made]) for name in made[0]}


def joined(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different lengths as one batch, padded with zeros behind.

    Args:
        rows: (1, L, ...) each, or (1,).

    Returns:
        (B, L, ...) of the greatest L, or (B,).
    """
    if rows[0].ndim == 1:
        return torch.cat(list(rows))
    longest = max(row.shape[1] for row in rows)
    padded = [torch.cat([row, row.new_zeros(len(row), longest - row.shape[1], *row.shape[2:])], dim=1) for row in rows]
    return torch.cat(padded)
