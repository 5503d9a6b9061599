"""Kandinsky 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.per_family.text_in_call import RowByRow

__all__ = ["Kandinsky5Layout"]


class Kandinsky5Layout(RowByRow):
    """Kandinsky 5 Image: channels last behind a frame axis; the VAE's shift is not used; text is not masked."""

    @override
    def pack(self, latents: Tensor) -> Tensor:
        return latents.permute(0, 2, 3, 1)[:, None]

    @override
    def unpack(self, state: Tensor, width: int, height: int) -> Tensor:
        return state[:, 0].permute(0, 3, 1, 2)

    def _normalise(self, latents: Tensor) -> Tensor:
        return latents * self.pipe.vae.config.scaling_factor

    def _denormalise(self, latents: Tensor) -> Tensor:
        return latents / self.pipe.vae.config.scaling_factor

    @override
    def view_attributes(self, guidance: float, width: int, height: int) -> dict[str, Any]:
        # Every other size would be replaced by one of the list.
        return {"resolutions": [(width, height)]}

    @override
    def encode_text(
        self,
        prompts: Sequence[str] | None,
        negative_prompts: Sequence[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        # `encode_prompt` takes no embeddings: those that are given are text already.
        own = dict(options or {})
        if prompts is not None:
            return super().encode_text(prompts, negative_prompts, own)
        ready = {name: value for name, value in own.items() if value is not None and name in _EMBEDDINGS}
        if self._guided and "negative_prompt_embeds_qwen" not in ready:
            count = len(ready["prompt_embeds_qwen"])
            rest = {name: value for name, value in own.items() if name not in ready}
            other = super().encode_text(negative_prompts or [""] * count, None, rest)
            ready |= {name: value for name, value in other.items() if name.startswith("negative_")}
        return ready

    def _encode_rows(
        self, prompts: list[str] | None, negatives: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        own = {**options, "dtype": self.dtype}
        text = super()._encode_rows(prompts, None, own)
        if not self._guided or "negative_prompt_embeds_qwen" in options:
            return text
        other = super()._encode_rows(negatives or [""] * len(prompts or ()), None, own)
        return text | {f"negative_{name}": value for name, value in other.items()}

    # The pipeline counts tokens up over the batch. Here each row has its length: that can be selected and joined.

    def _named(self, found: Any) -> dict[str, Any]:
        return _by_length(super()._named(found))

    @override
    def select_text(self, text: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
        return super().select_text(_by_length(text), rows)

    @override
    def runs_together(self, text: Mapping[str, Any]) -> bool:
        # Padding would be read as text.
        lengths: list[Tensor] = [value for name, value in _by_length(text).items() if name.endswith(_LENGTHS)]
        return all(bool((each == each[0]).all()) for each in lengths)

    @override
    def stage_arguments(self, text: Mapping[str, Any], guidance: float, width: int, height: int) -> dict[str, Any]:
        made = super().stage_arguments(_by_length(text), guidance, width, height)
        for name in [name for name in made if name.endswith(_LENGTHS)]:
            embeddings, lengths = name.replace(_LENGTHS, _QWEN), made[name].to(torch.int32)
            made[name] = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            made[embeddings] = made[embeddings][:, : int(lengths.max())]
        return made


_QWEN, _LENGTHS = "prompt_embeds_qwen", "prompt_cu_seqlens"
_EMBEDDINGS = tuple(f"{sign}{name}" for sign in ("", "negative_") for name in (_QWEN, "prompt_embeds_clip", _LENGTHS))


def _by_length(text: Mapping[str, Any]) -> dict[str, Any]:
    """Text with a length for each row in place of sums over the batch, which are one more."""
    made = dict(text)
    for name in [name for name in made if name.endswith(_LENGTHS)]:
        embeddings: Tensor | None = made.get(name.replace(_LENGTHS, _QWEN))
        if embeddings is not None and len(made[name]) == len(embeddings) + 1:
            made[name] = made[name].diff()
    return made
