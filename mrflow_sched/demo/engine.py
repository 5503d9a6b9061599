"""The embedded model as an engine that says where a prompt leaves its world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mrflow_sched.demo.words import unknown_words_sentence
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine, PipelineText

__all__ = ["EmbeddedEngine"]


class EmbeddedEngine(PipelineEngine):
    """The embedded model. It notes words that it does not know, and samples all the same."""

    def encode_text(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None = None,
        *,
        lora_scale: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> PipelineText:
        """Embeddings for a batch of images, as `PipelineEngine.encode_text` makes them.

        Args:
            prompts: One text per image.
            negative_prompts: As many, or None.
            lora_scale: The scale of all LoRAs; None: as they are set.
            size: Of the final image; not read.

        Returns:
            The conditioning; its first note names unknown words.
        """
        sentence = unknown_words_sentence(prompts)
        text = super().encode_text(prompts, negative_prompts, lora_scale=lora_scale, size=size)
        return text if sentence is None else replace(text, notes=(sentence, *text.notes))
