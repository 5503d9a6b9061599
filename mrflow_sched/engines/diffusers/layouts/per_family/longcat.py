"""LongCat-Image."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.per_family.packed import PackedLayout
from mrflow_sched.engines.diffusers.layouts.per_family.rewriting import RewritingLayout
from mrflow_sched.engines.diffusers.layouts.per_family.two_texts import TwoTextsLayout

__all__ = ["LongCatImageLayout"]


class LongCatImageLayout(RewritingLayout, TwoTextsLayout, PackedLayout):
    """LongCat-Image: CFG whose result is scaled back to the positive branch's norm, and prompts that it rewrites."""

    rewrite_switch: ClassVar[str] = "enable_prompt_rewrite"

    def _encode_branch(self, prompts: list[str] | None, options: dict[str, Any]) -> dict[str, Any]:
        return (
            {"prompt_embeds": options["prompt_embeds"]} if prompts is None else super()._encode_branch(prompts, options)
        )

    @override
    def view_attributes(self, guidance: float, width: int, height: int) -> dict[str, Any]:
        return {"encode_prompt": _counting_embeddings(self.pipe.encode_prompt)}

    @override
    def stage_arguments(self, text: Any, guidance: float, width: int, height: int) -> dict[str, Any]:
        made = super().stage_arguments(text, guidance, width, height)
        return {**made, self.rewrite_switch: False}  # done already, and it needs a prompt

    def _rewrite(self, prompt: str, size: tuple[int, int]) -> str:
        return self.pipe.rewire_prompt([prompt], self.device)[0]


def _counting_embeddings(encode_prompt: Callable[..., Any]) -> Callable[..., Any]:
    """The pipeline's `encode_prompt`, which counts prompts also where it is given embeddings in their place."""

    @functools.wraps(encode_prompt)
    def called(prompt: Any = None, *, prompt_embeds: Any = None, **named: Any) -> Any:
        counted = prompt if prompt_embeds is None else [""] * len(prompt_embeds)
        return encode_prompt(prompt=counted, prompt_embeds=prompt_embeds, **named)

    return called
