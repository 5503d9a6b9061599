"""Nucleus-Image."""

from __future__ import annotations

from typing import Any

from mrflow_sched.engines.diffusers.layouts.per_family.qwen import MaskedTextLayout

__all__ = ["NucleusImageLayout"]


class NucleusImageLayout(MaskedTextLayout):
    """Nucleus-Image: Qwen-Image's VAE, and CFG whose result keeps the positive branch's norm."""

    def _encode_branch(self, prompts: list[str] | None, options: dict[str, Any]) -> dict[str, Any]:
        # The call replaces None by the pipeline's own length, encode_prompt does not.
        length = options.get("max_sequence_length") or self.pipe.default_max_sequence_length
        return super()._encode_branch(prompts, {**options, "max_sequence_length": length})
