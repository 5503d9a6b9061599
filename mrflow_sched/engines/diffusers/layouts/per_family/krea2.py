"""Krea 2 Raw and Turbo."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.per_family.packed import PackedLayout, VideoVaeLayout
from mrflow_sched.engines.diffusers.layouts.per_family.two_texts import TwoTextsLayout
from mrflow_sched.plan.families import Family, ShiftRule

__all__ = ["Krea2Layout"]

_DISTILLED_MU = 1.15


class Krea2Layout(TwoTextsLayout, VideoVaeLayout, PackedLayout):
    """Krea 2: Qwen-Image's VAE, and a scale g that means p + g (p - n), which is a CFG scale of 1 + g."""

    @classmethod
    @override
    def stage_one_rule(cls, pipe: Any, family: Family) -> ShiftRule:
        # The distilled model has one mu for every size.
        rule = super().stage_one_rule(pipe, family)
        fixed = rule.kind == "exponential" and pipe.config.get("is_distilled")
        return replace(rule, base_shift=_DISTILLED_MU, max_shift=_DISTILLED_MU) if fixed else rule

    @override
    def plan_guidance(self, guidance: float) -> float:
        return 1.0 + max(guidance, 0.0)

    @override
    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        return {"guidance_scale": guidance - 1.0}
