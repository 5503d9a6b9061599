"""Lumina-Next."""

from __future__ import annotations

from mrflow_sched.engines.diffusers.layouts.per_family.text_in_call import RowByRow

__all__ = ["LuminaNextLayout"]


class LuminaNextLayout(RowByRow):
    """Lumina-Next: a negative prompt is cut off where its prompt ends."""
