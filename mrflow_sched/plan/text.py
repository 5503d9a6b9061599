"""A plan as one short line and as JSON, and back, exactly."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.schedule import (
    sigmas_from_recipe,
)

if TYPE_CHECKING:
    from mrflow_sched.plan.stages import Stage

FORMAT = "mrflow1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


PLAN_NUMBERS = ("seed", "seed_rule", "posterior", "native_steps", "native_forwards", "text_tokens", "attention")


# ------------------------------------------------------------------------------------------------------------- text


def stage_to_string(stage: Stage) -> str:
    head = f"{stage.width}x{stage.height} {stage.tokens}t {stage.solver} g{_guidance(stage)} f{stage.forwards}"
    # A list recipe carries no mu; where the stage has one it is written in front.
    mu = "" if stage.mu is None or f"mu={stage.mu!r}" in stage.recipe.split(" ") else f" @mu={stage.mu!r}"
    return f"{head}{mu} {stage.recipe}"


def _guidance(stage: Stage) -> str:
    low, high = stage.guidance_interval
    return repr(stage.guidance) if (low, high) == (0.0, 1.0) else f"{stage.guidance!r}@{low!r}-{high!r}"


def stage_from_string(text: str) -> dict[str, Any]:
    size, tokens, solver, guidance, forwards, *rest = text.split(" ")
    if not rest or not (tokens.endswith("t") and guidance.startswith("g") and forwards.startswith("f")):
        raise MrFlowError(f"stage {text!r} is not written as '512x512 1024t euler g3.5 f12 recipe'")
    width, height = parse_size(size)
    mu = next((word.partition("mu=")[2] for word in rest if word.startswith(("mu=", "@mu="))), None)
    recipe = " ".join(word for word in rest if not word.startswith("@"))
    scale, _, interval = guidance[1:].partition("@")
    low, _, high = interval.partition("-")
    return {
        "width": width,
        "height": height,
        "tokens": int(tokens[:-1]),
        "mu": None if mu is None else float(mu),
        "sigmas": sigmas_from_recipe(recipe),
        "solver": solver,
        "guidance": float(scale),
        "forwards": int(forwards[1:]),
        "recipe": recipe,
        "guidance_interval": (float(low), float(high)) if interval else (0.0, 1.0),
    }


def stage_to_dict(stage: Stage) -> dict[str, Any]:
    return {
        "width": stage.width,
        "height": stage.height,
        "tokens": stage.tokens,
        "mu": stage.mu,
        "sigmas": list(stage.sigmas),
        "forwards": stage.forwards,
        "solver": stage.solver,
        "guidance": stage.guidance,
        "recipe": stage.recipe,
        "guidance_interval": list(stage.guidance_interval),
        "guided": list(stage.guidance_interval),  # its name up to version 0.1
    }


def stage_from_dict(data: Mapping[str, Any]) -> dict[str, Any]:
    names = ("width", "height", "tokens", "mu", "solver", "guidance", "forwards", "recipe")
    low, high = data.get("guidance_interval", data.get("guided", (0.0, 1.0)))
    return {"sigmas": tuple(data["sigmas"]), "guidance_interval": (low, high), **{name: data[name] for name in names}}


def checksum(text: str, stages: Sequence[Stage]) -> str:
    """Eight hex digits over the line and the lists it stands for, at a precision no math library disagrees on."""
    lists = ";".join(" ".join(f"{sigma:.6f}" for sigma in stage.sigmas) for stage in stages)
    return f"{zlib.crc32(f'{text};{lists}'.encode()):08x}"


def parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if match is None:
        raise MrFlowError(f"{text!r} is not a size such as 1024x1024")
    return int(match[1]), int(match[2])


def split_words(text: str, label: str, count: int) -> list[str]:
    first, *words = text.split(" ")
    if first != label or len(words) != count:
        raise MrFlowError(f"{text!r} should be '{label}' and {count} values")
    return words


def shorten(text: object) -> str:
    shown = str(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
