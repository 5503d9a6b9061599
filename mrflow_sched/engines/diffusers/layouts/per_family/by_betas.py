"""Models trained on betas, besides Stable Diffusion: CogView3-Plus, Hunyuan-DiT and LCM."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.base import Layout
from mrflow_sched.engines.diffusers.layouts.per_family.stable_diffusion import StableDiffusionLayout

__all__ = ["CogView3Layout", "HunyuanDitLayout", "LatentConsistencyLayout"]


class CogView3Layout(Layout):
    """CogView3-Plus, which has an embedding of zeros for no negative prompt, also where one was given as embeddings."""

    @override
    def view_attributes(self, guidance: float, width: int, height: int) -> dict[str, Any]:
        encode = self.pipe.encode_prompt

        @functools.wraps(encode)
        def encode_unless_given(*prompts: Any, **named: Any) -> Any:
            if named.get("prompt_embeds") is None:
                return encode(*prompts, **named)
            return named["prompt_embeds"], named.get("negative_prompt_embeds")

        return {"encode_prompt": encode_unless_given}

    @override
    def encode_text(
        self,
        prompts: Sequence[str] | None,
        negative_prompts: Sequence[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        # Embeddings of a negative prompt among the options stay as they are.
        text = super().encode_text(prompts, negative_prompts, options)
        ready = dict(options or {}).get("negative_prompt_embeds")
        return text if ready is None else {**text, "negative_prompt_embeds": ready}


class HunyuanDitLayout(StableDiffusionLayout):
    """Hunyuan-DiT: two text encoders, each asked by itself."""

    @override
    def encode_text(
        self,
        prompts: Sequence[str] | None,
        negative_prompts: Sequence[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        # The second encoder's results have the same names with a "_2" behind them.
        text: dict[str, Any] = {}
        for index, (suffix, longest) in enumerate((("", 77), ("_2", 256))):  # lengths that the call itself asks for
            own = {
                name.removesuffix("_2"): value
                for name, value in dict(options or {}).items()
                if name.endswith("_2") == bool(suffix)
            }
            own |= {"text_encoder_index": index, "max_sequence_length": longest, "dtype": self.dtype}
            found = super().encode_text(prompts, negative_prompts, own)
            text |= {f"{name}{suffix}": value for name, value in found.items()}
        return text


class LatentConsistencyLayout(StableDiffusionLayout):
    """LCM: the network reads the guidance scale, and is handed the state as it is."""

    preserving: ClassVar[bool] = True
