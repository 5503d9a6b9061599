"""Qwen-Image and Qwen-Image 2.1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.layouts.per_family.packed import PackedLayout, VideoVaeLayout
from mrflow_sched.engines.diffusers.layouts.per_family.two_texts import TwoTextsLayout
from mrflow_sched.plan.checks import MAX_STEPS, checked_numbers
from mrflow_sched.plan.families import Family, ShiftRule
from mrflow_sched.plan.schedule import shift_sigma, stretched

__all__ = ["MaskedTextLayout", "QwenImage21Layout", "QwenImageLayout"]


class MaskedTextLayout(TwoTextsLayout, VideoVaeLayout, PackedLayout):
    """A video VAE with one frame, packed latents, and text with a mask that is left out where it hides nothing."""

    def _named(self, found: Any) -> dict[str, Any]:
        """A mask that hides nothing is returned as None, which some calls warn about; it becomes one of ones."""
        text = super()._named(found)
        embeds: Tensor = text["prompt_embeds"]
        return {"prompt_embeds_mask": torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device), **text}


class QwenImageLayout(MaskedTextLayout):
    """Qwen-Image: true CFG, a video VAE with one frame, statistics per channel."""

    no_negative: ClassVar[str] = " "
    one_negative: ClassVar[bool] = True

    @override
    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        # A guidance-distilled network reads `guidance_scale` as well.
        embedded = {"guidance_scale": guidance} if getattr(self.network.config, "guidance_embeds", False) else {}
        return {"true_cfg_scale": guidance, **embedded}


class QwenImage21Layout(QwenImageLayout):
    """Qwen-Image 2.1: a latent pixel is a token, images have alpha, and Turbo brings its own sigmas.

    Its image tokens stand behind those of the text, padding included, so texts are as long as their tokens.
    """

    # Its loop keeps the text's keys and values of the first step, so a branch that was skipped there is missing later.
    independent_calls: ClassVar[Mapping[str, Any]] = {"use_kv_cache": False}

    @classmethod
    @override
    def stage_one_rule(cls, pipe: Any, family: Family) -> ShiftRule:
        # `sample_sigmas` of model_index.json, given to the scheduler in place of evenly spaced ones.
        given = pipe.config.get("sample_sigmas")
        rule = super().stage_one_rule(pipe, family)
        return rule if given is None else ShiftRule("list", lists=(_shifted(given, rule),))

    @override
    def select_text(self, text: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
        # No longer than the longest of them.
        picked = super().select_text(text, rows)
        for name in [name for name in picked if _masks_text(name)]:
            longest = int(picked[name].sum(dim=1).max())
            # Blocks of a modular pipeline mark the places of pictures besides.
            for each in (name, name.removesuffix("_mask"), name.replace("prompt_embeds", "image_pad")):
                if each in picked:
                    picked[each] = picked[each][:, :longest]
        return picked

    @override
    def runs_together(self, text: Mapping[str, Any]) -> bool:
        return all(bool(value.all()) for name, value in text.items() if _masks_text(name))


def _masks_text(name: str) -> bool:
    return name.endswith("prompt_embeds_mask")


def _shifted(given: Any, rule: ShiftRule) -> tuple[float, ...]:
    """A list of sigmas without its final 0, as the scheduler with this rule walks it."""
    listed = checked_numbers(given, "pipe.config.sample_sigmas", MAX_STEPS)
    moved = rule.kind == "exponential" and rule.base_shift != rule.max_shift
    if moved or rule.beta is not None or rule.roots is not None:
        raise MrFlowError(
            "pipe.scheduler moves the pipeline's own sample_sigmas, by size or by another spacing; turn "
            "use_dynamic_shifting, use_beta_sigmas, use_karras_sigmas and use_exponential_sigmas off."
        )
    shift = math.exp(rule.base_shift) if rule.kind == "exponential" else rule.shift
    sigmas = [shift_sigma(each, shift) for each in listed]
    return (*(sigmas if rule.terminal is None else stretched(sigmas, rule.terminal)), 0.0)
