"""The kinds of previews of a native run, and what was measured of them; without torch, for the command line.

`mrflow_sched.measure.previews` makes them, `mrflow preview --check` measures them on any model.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["FEW_STEPS", "KINDS", "MEASURED", "kind_note"]

FEW_STEPS = 6
"""Steps of the kind "few": on the embedded model 4, 6 and 8 come to 25, 32 and 35 dB of the full run."""

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "few": "the full run in a few multistep steps, shrunk",
        "nested": "a small run from the shrunk noise of the full run",
        "chain-pixels": "the first third of the full run, its clean estimate shrunk as an image, the rest small",
        "chain-average": "the same with block means of the latents, at the noise level that they have",
        "chain-polyphase": "the same with every second latent, as published (arXiv 2604.09227)",
    }
)
"""The kinds of previews, each with what it is."""

MEASURED: Mapping[str, Mapping[str, bool]] = MappingProxyType(
    {"demo": MappingProxyType({"chain-pixels": True, "chain-average": True, "chain-polyphase": False})}
)
"""By family, whether a chain keeps its word by the rule of `mrflow preview --check` (bench/results/previews.md)."""


def kind_note(kind: str, family: str) -> str | None:
    """What a user should know of a kind of preview before it is trusted.

    Args:
        kind: A key of `KINDS`.
        family: Name of the model's family.

    Returns:
        A sentence; None for the kinds that need no downsampler, and for chains that keep their word on the family.
    """
    if not kind.startswith("chain-"):
        return None
    keeps = MEASURED.get(family, {}).get(kind)
    if keeps is None:
        return (
            f"{kind} was never checked on {family}: whether its downsampler keeps its word depends on the model; see "
            "mrflow preview --check."
        )
    better = "nested, which costs less, is as near"
    return None if keeps else f"{kind} does not keep its word on {family}: {better}; few is nearest."
