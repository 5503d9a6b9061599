"""ERNIE-Image and ERNIE-Image-Turbo."""

from __future__ import annotations

from typing import Any, ClassVar

from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.per_family.flux import Flux2VaeLayout
from mrflow_sched.engines.diffusers.layouts.per_family.rewriting import RewritingLayout
from mrflow_sched.engines.diffusers.layouts.per_family.two_texts import TwoTextsLayout
from mrflow_sched.plan.families import Family

__all__ = ["ErnieImageLayout"]


class ErnieImageLayout(RewritingLayout, TwoTextsLayout, Flux2VaeLayout):
    """ERNIE-Image: FLUX.2's VAE, latents that are not packed into tokens, and a model that rewrites prompts."""

    rewrite_switch: ClassVar[str] = "use_pe"

    @classmethod
    @override
    def latent_numbers(cls, pipe: Any, family: Family) -> tuple[int, int]:
        # Patches of 2x2 count as part of the VAE.
        return int(pipe.vae_scale_factor), int(pipe.transformer.config.in_channels)

    @property
    def _epsilon(self) -> float:
        return 1e-5  # the pipeline's own number, whatever the VAE's configuration says

    @override
    def _can_rewrite(self) -> bool:
        return self.pipe.pe is not None and self.pipe.pe_tokenizer is not None

    def _rewrite(self, prompt: str, size: tuple[int, int]) -> str:
        return self.pipe._enhance_prompt_with_pe(prompt, self.device, width=size[0], height=size[1])
