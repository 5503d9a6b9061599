"""Pipelines whose `encode_prompt` knows one branch of CFG: it is asked twice."""

from __future__ import annotations

from typing import Any, ClassVar

from mrflow_sched.engines.diffusers.layouts.base import Layout, parameter_names

__all__ = ["TwoTextsLayout"]


class TwoTextsLayout(Layout):
    """CFG whose negative prompt is encoded by another call of `encode_prompt`."""

    # What stands for no negative prompt.
    no_negative: ClassVar[str] = ""

    def _encode_rows(
        self, prompts: list[str] | None, negatives: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        text = self._encode_branch(prompts, options)
        if not self._guided or "negative_prompt_embeds" in options:
            return text  # ready, and its text encoder may be gone
        own = {name: value for name, value in options.items() if not name.startswith("prompt_embeds")}
        other = self._encode_branch(negatives or [self.no_negative] * len(text["prompt_embeds"]), own)
        return text | {f"negative_{name}": value for name, value in other.items()}

    def _encode_branch(self, prompts: list[str] | None, options: dict[str, Any]) -> dict[str, Any]:
        """One branch's embeddings, by the names of the positive one's."""
        if prompts is None and "prompt_embeds" not in parameter_names(self.pipe.encode_prompt):
            return {name: options[name] for name in self.text_outputs if name in options}
        return super()._encode_rows(prompts, None, options)
