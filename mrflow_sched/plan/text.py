"""A plan as one line of text and as JSON, and back, exactly.

The line (`mrflow2`) is `name=value` between semicolons, then one part for each stage and a checksum:

    mrflow2;family=flux1-dev;preset=12+1;size=1024x1024;seed=0;...;stage size=512x512 ... sigmas=native 12 mu=0.63;#...

`sigmas` comes last in a stage and holds a recipe (`recipes`). Fields at their default may be left out. Lines of the
first version (`mrflow1`), whose values stand in a fixed order, are read as well. What is read comes from image
metadata, which anyone can write: every number is checked against a limit.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.plan.checks import MAX_STAGES
from mrflow_sched.plan.recipes import read_number, sigmas_from_recipe
from mrflow_sched.plan.token_shares import read_shares, write_shares

if TYPE_CHECKING:
    from mrflow_sched.plan.stages import Stage, StagedPlan

FORMAT, FIRST_FORMAT = "mrflow2", "mrflow1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
PLAN_NUMBERS = ("seed", "seed_rule", "posterior", "native_steps", "native_forwards", "text_tokens", "attention")
Fields = dict[str, Any]

_LONGEST = 200_000  # eight stages of a thousand explicit sigmas each
_EVERYWHERE = (0.0, 1.0)


# ------------------------------------------------------------------------------------------------------------- writing


def plan_to_string(plan: StagedPlan) -> str:
    """A plan as one line.

    Args:
        plan: The plan; its notes are left out.

    Returns:
        The line, checksum included.
    """
    values = {
        "family": plan.family,
        "preset": plan.preset,
        "size": f"{plan.requested_width}x{plan.requested_height}",
        **{name: _written(getattr(plan, name)) for name in PLAN_NUMBERS},
    }
    if plan.tile:
        values["tile"] = str(plan.tile)
    if plan.tile_positions != "own":
        values["tile_positions"] = plan.tile_positions
    if plan.noise != "own":
        values["noise"] = plan.noise
    if plan.upscaler_kind != "network":
        values["upscaler_kind"] = plan.upscaler_kind
    if plan.context:
        values["context"] = repr(plan.context)
    head = [f"{name}={value}" for name, value in values.items()]
    text = ";".join([FORMAT, *head, *(_stage_to_string(stage) for stage in plan.stages)])
    return f"{text};#{checksum(text, plan.stages)}"


def _stage_to_string(stage: Stage) -> str:
    values = {
        "size": f"{stage.width}x{stage.height}",
        "tokens": str(stage.tokens),
        "solver": stage.solver,
        "guidance": _written(stage.guidance),
        "forwards": str(stage.forwards),
    }
    if stage.guidance_interval != _EVERYWHERE:
        values["guidance_interval"] = "/".join(map(repr, stage.guidance_interval))
    if stage.shares:
        values["shares"] = write_shares(stage.shares)
    if stage.precision != "own":
        values["precision"] = stage.precision
    if stage.renoise:
        values["renoise"] = repr(stage.renoise)
    if stage.few_step:
        values["few_step"] = "yes"
    if stage.mu != _recipe_mu(stage.recipe):
        values["mu"] = "none" if stage.mu is None else repr(float(stage.mu))
    return " ".join(["stage", *(f"{name}={value}" for name, value in values.items()), f"sigmas={stage.recipe}"])


def _written(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _recipe_mu(recipe: str) -> float | None:
    """The mu that a recipe carries."""
    found = next((word for word in recipe.split(" ") if word.startswith("mu=")), None)
    return None if found is None else read_number(found[3:])


# ------------------------------------------------------------------------------------------------------------- reading


def read_plan(body: str) -> tuple[Fields, list[Fields]]:
    """Read the fields of a plan from its line.

    Args:
        body: The line without its checksum.

    Returns:
        The fields of the plan, and those of each stage, by the names of the dataclasses.

    Raises:
        MrFlowError: The line is of a newer version, or not a plan; the sentence stands within another one.
    """
    if len(body) > _LONGEST:
        raise MrFlowError(f"it has {len(body)} characters, and the longest plan has {_LONGEST}")
    version, *parts = body.split(";")
    if version == FORMAT:
        return _read_second(parts)
    if version == FIRST_FORMAT:
        return _read_first(parts)
    if re.fullmatch(r"mrflow[0-9]+", version):
        raise MrFlowError(f"it is of version {version!r}, which this mrflow_sched does not know; update mrflow_sched")
    raise MrFlowError(f"it begins with {quoted(version)}, not {FORMAT!r}")


def _read_second(parts: Sequence[str]) -> tuple[Fields, list[Fields]]:
    plan = _pairs([part for part in parts if not part.startswith("stage ")], _PLAN_FIELDS)
    plan["requested_width"], plan["requested_height"] = plan.pop("size")
    return plan, [_read_stage(part) for part in _few([part for part in parts if part.startswith("stage ")])]


def _few(stages: Sequence[str]) -> Sequence[str]:
    """The texts of the stages, before any schedule is worked out."""
    if len(stages) > MAX_STAGES:
        raise MrFlowError(f"it has {len(stages)} stages, and a plan has at most {MAX_STAGES}")
    return stages


def _read_stage(text: str) -> Fields:
    head, mark, recipe = text.partition(" sigmas=")
    if not mark:
        raise MrFlowError(f"stage {quoted(text)} lacks sigmas")
    stage = _pairs(head.split(" ")[1:], _STAGE_FIELDS)
    stage["width"], stage["height"] = stage.pop("size")
    mu = stage["mu"] if "mu" in stage else _recipe_mu(recipe)
    return {**stage, "mu": mu, "sigmas": sigmas_from_recipe(recipe), "recipe": recipe}


def _pairs(words: Sequence[str], known: Mapping[str, Callable[[str], Any]]) -> Fields:
    """The value of each name=value, read by the reader of its name."""
    found: Fields = {}
    for word in words:
        name, mark, value = word.partition("=")
        if not mark or name in found:
            raise MrFlowError(f"{quoted(word)} is not of the form name=value, or repeats a name")
        if name not in known:
            raise MrFlowError(f"field {quoted(name)} is unknown, perhaps of a newer mrflow_sched; update it")
        found[name] = known[name](value)
    lacking = [name for name in known if name not in found and name not in _OPTIONAL]
    if lacking:
        raise MrFlowError(f"it lacks {lacking[0]}")
    return found


def _parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "1024x768"."""
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if match is None:
        raise MrFlowError(f"{quoted(text)} is not a size such as 1024x1024")
    return int(match[1]), int(match[2])


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise MrFlowError(f"{quoted(text)} is not a whole number")
    return int(text)


def _yes(text: str) -> bool:
    if text != "yes":
        raise MrFlowError(f"{quoted(text)} is not yes")
    return True


def _mu(text: str) -> float | None:
    return None if text == "none" else read_number(text)


def _interval(text: str) -> tuple[float, float]:
    low, _, high = text.partition("/")
    return read_number(low), read_number(high)


_OPTIONAL = (
    *("tile", "tile_positions", "noise", "upscaler_kind", "context", "seed_rule", "posterior"),
    *("mu", "guidance_interval", "shares", "precision", "renoise", "few_step"),
)
_PLAN_FIELDS: Mapping[str, Callable[[str], Any]] = MappingProxyType(
    {
        "family": str,
        "preset": str,
        "size": _parse_size,
        "seed": _whole,
        "seed_rule": str,
        "posterior": str,
        "native_steps": _whole,
        "native_forwards": _whole,
        "text_tokens": _whole,
        "attention": read_number,
        "tile": _whole,
        "tile_positions": str,
        "noise": str,
        "upscaler_kind": str,
        "context": read_number,
    }
)
_STAGE_FIELDS: Mapping[str, Callable[[str], Any]] = MappingProxyType(
    {
        "size": _parse_size,
        "tokens": _whole,
        "solver": str,
        "guidance": read_number,
        "forwards": _whole,
        "guidance_interval": _interval,
        "shares": read_shares,
        "precision": str,
        "renoise": read_number,
        "few_step": _yes,
        "mu": _mu,
    }
)


# ---------------------------------------------------------------------------------------------------- the first version


def _read_first(parts: Sequence[str]) -> tuple[Fields, list[Fields]]:
    """mrflow1;family;preset;WxH;seed N RULE;POSTERIOR[ tile N];native N N;cost N X;stage;..."""
    if len(parts) < 7:
        raise MrFlowError(f"it has {len(parts)} parts, and a plan of version {FIRST_FORMAT!r} has at least 8")
    family, preset, size, seed, posterior, native, cost, *texts = parts
    _parse_size(size)  # what was asked for; images of this version had the size of the last stage all the same
    stages = [_read_first_stage(text) for text in _few(texts)]
    seed_value, seed_rule = _split_words(seed, "seed")
    native_steps, native_forwards = _split_words(native, "native")
    text_tokens, attention = _split_words(cost, "cost")
    posterior, _, tile = posterior.partition(" tile ")
    plan = {
        "family": family,
        "preset": preset,
        "requested_width": stages[-1]["width"] if stages else 0,
        "requested_height": stages[-1]["height"] if stages else 0,
        "seed": _whole(seed_value),
        "seed_rule": seed_rule,
        "posterior": posterior,
        "native_steps": _whole(native_steps),
        "native_forwards": _whole(native_forwards),
        "text_tokens": _whole(text_tokens),
        "attention": read_number(attention),
        "tile": _whole(tile or "0"),
    }
    return plan, stages


def _read_first_stage(text: str) -> Fields:
    """Read WxH Nt SOLVER gG[@LOW-HIGH] fN [@mu=X] RECIPE."""
    size, tokens, solver, guidance, forwards, *rest = text.split(" ")
    if not rest or not (tokens.endswith("t") and guidance.startswith("g") and forwards.startswith("f")):
        raise MrFlowError(f"stage {quoted(text)} is not written as '512x512 1024t euler g3.5 f12 recipe'")
    width, height = _parse_size(size)
    mu = next((word.partition("mu=")[2] for word in rest if word.startswith(("mu=", "@mu="))), None)
    recipe = " ".join(word for word in rest if not word.startswith("@"))
    scale, _, interval = guidance[1:].partition("@")
    low, *high = re.split(r"(?<![e])-", interval, maxsplit=1)
    return {
        "width": width,
        "height": height,
        "tokens": _whole(tokens[:-1]),
        "mu": None if mu is None else read_number(mu),
        "sigmas": sigmas_from_recipe(recipe),
        "solver": solver,
        "guidance": read_number(scale),
        "forwards": _whole(forwards[1:]),
        "recipe": recipe,
        "guidance_interval": (read_number(low), read_number(high[0])) if high else _EVERYWHERE,
    }


def _split_words(text: str, label: str) -> list[str]:
    first, *words = text.split(" ")
    if first != label or len(words) != 2:
        raise MrFlowError(f"{quoted(text)} should be '{label}' and 2 values")
    return words


# ---------------------------------------------------------------------------------------------------------------- JSON


def stage_to_dict(stage: Stage) -> Fields:
    """A stage as lists, numbers and strings.

    Args:
        stage: The stage.

    Returns:
        Its fields by name, also under the names that older versions read.
    """
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
        "shares": list(stage.shares),
        "precision": stage.precision,
        "renoise": stage.renoise,
        "few_step": stage.few_step,
        "guided": list(stage.guidance_interval),  # its name up to version 0.1
    }


def stage_from_dict(data: Mapping[str, Any]) -> Fields:
    """The fields of a stage from what `stage_to_dict` returned, in this or an older version.

    Args:
        data: A stage of a plan's JSON.

    Returns:
        The fields that make a `Stage`.
    """
    names = ("width", "height", "tokens", "mu", "solver", "guidance", "forwards", "recipe")
    low, high = data.get("guidance_interval", data.get("guided", _EVERYWHERE))
    kept = {"guidance_interval": (low, high), "shares": tuple(data.get("shares", ()))}
    kept |= {"precision": data.get("precision", "own"), "renoise": data.get("renoise", 0.0)}
    kept["few_step"] = data.get("few_step", False)
    return {"sigmas": tuple(data["sigmas"]), **kept, **{name: data[name] for name in names}}


def checksum(text: str, stages: Sequence[Stage]) -> str:
    """A checksum over a plan's line and the sigmas that it stands for.

    Args:
        text: The line without its checksum.
        stages: The stages that were made from it.

    Returns:
        Eight hexadecimal digits; sigmas enter at a precision on which all math libraries agree.
    """
    lists = ";".join(" ".join(f"{sigma:.6f}" for sigma in stage.sigmas) for stage in stages)
    return f"{zlib.crc32(f'{text};{lists}'.encode()):08x}"
