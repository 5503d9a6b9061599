"""What is known of each kind of model: one file a family, every number with its source.

`FAMILIES` maps a name such as "flux1-dev" to a `Family`; `get_family` finds one or says which exist. A new family is
one file with a tuple `FAMILIES`, and its name in `_MODULES` here. A source is a file, a paper, a model card or a
section of docs/method.md. Where nobody has published or measured a number, its source says "not measured" and what the
value was chosen from. Nothing here needs torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol, cast

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.plan.families import (
    anima,
    auraflow,
    bria,
    by_betas,
    chroma,
    cogview,
    cosmos,
    demo,
    dreamlite,
    ernie,
    flux1,
    flux2,
    flux3,
    hidream,
    hunyuan,
    ideogram4,
    kandinsky5,
    krea2,
    lens,
    longcat,
    lumina2,
    mage,
    moss,
    nucleus,
    omnigen,
    ovis,
    prx,
    qwen,
    sana,
    sd3,
    sdxl,
    video,
    zimage,
)
from mrflow_sched.plan.families.base import (
    PURPOSES,
    TIERS,
    Family,
    GuidanceKind,
    HostFacts,
    PipelineInfo,
    Prediction,
    Preset,
    ShiftRule,
)
from mrflow_sched.plan.families.unknown import unknown_flow

__all__ = [
    "FAMILIES",
    "PURPOSES",
    "TIERS",
    "Family",
    "GuidanceKind",
    "HostFacts",
    "PipelineInfo",
    "Prediction",
    "Preset",
    "ShiftRule",
    "families_alike",
    "families_of",
    "family_of_host",
    "family_of_pipeline",
    "get_family",
    "unknown_flow",
]


class FamilyModule(Protocol):
    """A file of this folder: the families that it describes."""

    @property
    def FAMILIES(self) -> tuple[Family, ...]: ...


_MODULES: tuple[FamilyModule, ...] = (
    flux1,
    qwen,
    sd3,
    zimage,
    flux2,
    flux3,
    chroma,
    lumina2,
    sana,
    auraflow,
    hunyuan,
    hidream,
    krea2,
    ernie,
    longcat,
    ovis,
    nucleus,
    anima,
    ideogram4,
    bria,
    kandinsky5,
    prx,
    dreamlite,
    lens,
    mage,
    moss,
    cogview,
    cosmos,
    omnigen,
    sdxl,
    by_betas,
    video,
    demo,
)


def families_of(modules: Iterable[FamilyModule]) -> Mapping[str, Family]:
    """The families of several files by name.

    Args:
        modules: Files of this folder, or others like them.

    Returns:
        A read-only mapping, in the order of the files.

    Raises:
        MrFlowError: Two families have the same name.
    """
    found: dict[str, Family] = {}
    for module in modules:
        for family in module.FAMILIES:
            if family.name in found:
                raise MrFlowError(f"family {family.name!r} is there twice; give the second one another name.")
            found[family.name] = family
    return MappingProxyType(found)


FAMILIES: Mapping[str, Family] = families_of(_MODULES)


def get_family(name: str, families: Mapping[str, Family] = FAMILIES) -> Family:
    """The family of a name.

    Args:
        name: A name such as "flux1-dev".
        families: Where to look; by default all that the package knows.

    Returns:
        The family.

    Raises:
        MrFlowError: The name is unknown; the sentence has the nearest known name, or some.
    """
    family = families.get(name) if isinstance(cast("object", name), str) else None
    if family is None:
        near = _nearest(name, families) if isinstance(cast("object", name), str) else None
        hint = f"did you mean {near!r}?" if near else f"use {', '.join(tuple(families)[:8])} or another:"
        raise MrFlowError(f"family {quoted(name)} is unknown; {hint} `mrflow families` lists all {len(families)}.")
    return family


def _nearest(name: str, families: Mapping[str, Family]) -> str | None:
    """The family that a person most likely means, by its name, its title or a part of them; None for no idea."""
    wanted = _letters(name[:100])
    known = {_letters(text): family.name for family in families.values() for text in (family.name, family.title)}
    if not wanted:
        return None
    likeness: tuple[Callable[[str], bool], ...] = (
        lambda text: text == wanted,
        lambda text: text.startswith(wanted),
        lambda text: wanted.startswith(text),
        lambda text: len(wanted) > 2 and wanted in text,
    )
    for alike in likeness:
        found = [text for text in known if alike(text)]
        if found:
            return known[found[0]]
    near = difflib.get_close_matches(wanted, known, n=1)
    return known[near[0]] if near else None


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def family_of_pipeline(pipe: Any, families: Mapping[str, Family] = FAMILIES) -> Family | None:
    """The family of a loaded diffusers pipeline, by its class or a base class.

    Args:
        pipe: The pipeline.
        families: Where to look; by default all that the package knows.

    Returns:
        The family; None for a class that no family names.
    """
    for base in type(pipe).__mro__:
        for family in families.values():
            info = family.pipeline
            if info is not None and re.fullmatch(info.classes, base.__name__) and info.tells(pipe):
                return family
    return None


def family_of_host(facts: HostFacts, families: Mapping[str, Family] = FAMILIES) -> Family | None:
    """The family of the model that a host has loaded.

    Args:
        facts: What the WebUI or ComfyUI says of the model.
        families: Where to look; by default all that the package knows.

    Returns:
        The family; None where no family recognises it.
    """
    return next((family for family in families.values() if family.host(facts)), None)


def families_alike(facts: HostFacts, families: Mapping[str, Family] = FAMILIES) -> tuple[Family, ...]:
    """Families that the CFG scale alone tells from the one that was found, as their networks are the same.

    Args:
        facts: What the host says of the model.
        families: Where to look; by default all that the package knows.

    Returns:
        What the model could be besides `family_of_host`'s, for a sentence that says what was assumed; empty where the
        model or its name tells.
    """
    found = family_of_host(facts, families)
    told = [family_of_host(replace(facts, guidance=scale), families) for scale in (1.0, 4.0)]
    return tuple(family for family in told if family is not None and family is not found)
