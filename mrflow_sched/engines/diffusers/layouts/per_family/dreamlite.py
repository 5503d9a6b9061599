"""DreamLite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.per_family.text_in_call import TextInCall

__all__ = ["DreamLiteLayout", "DreamLiteMobileLayout"]


class DreamLiteLayout(TextInCall):
    """DreamLite: a call makes one image of one text, and always runs both branches."""

    always_guided: ClassVar[bool] = True

    @override
    def runs_together(self, text: Mapping[str, Any]) -> bool:
        return False

    @override
    def stage_arguments(self, text: Mapping[str, Any], guidance: float, width: int, height: int) -> dict[str, Any]:
        made = super().stage_arguments(text, guidance, width, height)
        return {name: value[0] if name.endswith("prompt") else value for name, value in made.items()}


class DreamLiteMobileLayout(DreamLiteLayout):
    """DreamLite Mobile: guidance is distilled away."""

    always_guided: ClassVar[bool] = False

    @override
    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        return {}
