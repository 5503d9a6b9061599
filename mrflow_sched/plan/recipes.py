"""Schedules as short texts, such as "native 12 mu=0.63", that make the same sigmas again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import cast

from mrflow_sched._runtime.errors import MrFlowError, quoted, shown
from mrflow_sched.plan.betas import TrainingBetas, betas_sigmas
from mrflow_sched.plan.checks import MAX_STEPS
from mrflow_sched.plan.schedule import (
    Sigmas,
    beta_sigmas,
    edm_sigmas,
    logit_normal_sigmas,
    low_beta_sigmas,
    native_sigmas,
    refine_sigmas,
    scaled_linear_sigmas,
    validate_sigmas,
)
from mrflow_sched.plan.trigflow import trigflow_sigmas

__all__ = ["explicit_recipe", "read_number", "recipe_of_betas", "recipe_of_steps", "sigmas_from_recipe"]

_MOST_NUMBERS = 7


def sigmas_from_recipe(recipe: str) -> Sigmas:
    """Make the schedule that a recipe describes: a kind, then words. Numbers are written in full precision.

    ==========================================  ===============================================
    "native 12 mu=0.63 [terminal= min= ...]"    `native_sigmas`, with its arguments beta, roots, ahead, whole, up
    "beta 12 mu=0.0"                            `beta_sigmas` with 0.6 and 0.6
    "low-beta 18 alpha=1.4 beta=0.425"          `low_beta_sigmas`
    "logit-normal 48 mu=0.0 std=1.5"            `logit_normal_sigmas`
    "scaled-linear 30", "zero-snr 30"           `scaled_linear_sigmas`
    "betas 30 first=0.0001 last=0.02 power=1"   `betas_sigmas`; power 2: betas whose roots are evenly spaced
    "betas 30 cosine=1"                         the same, of cosine betas; both with [count= zero=1 scale=]
    "edm 25 max=160.0 min=0.004 [rho=]"         `edm_sigmas`
    "trigflow 2 [middle=1.3]"                   `trigflow_sigmas`
    "linear 1 start=0.12", "shifted ..."        `refine_sigmas`
    "list 1.0 0.5 0.0"                          these very values
    "none"                                      the empty schedule: a stage without steps
    ==========================================  ===============================================

    Args:
        recipe: One of these forms.

    Returns:
        The schedule, of at most 1000 steps.

    Raises:
        MrFlowError: `recipe` is none of these.
    """
    if not isinstance(cast("object", recipe), str):
        raise MrFlowError(f"recipe must be text such as 'native 12 mu=0.63', got {quoted(recipe)}.")
    return _made(recipe)


@lru_cache(maxsize=64)
def _made(recipe: str) -> Sigmas:
    # Recipes come from image metadata, which anyone can write: a hostile one must not fill memory.
    kind, *words = recipe.split(" ", MAX_STEPS + 2)
    if kind == "list":
        if len(words) > MAX_STEPS + 1:
            raise MrFlowError(f"recipe {quoted(recipe)} holds more than {MAX_STEPS} steps.")
        return validate_sigmas([read_number(word) for word in words])
    if kind == "none":
        if words:
            raise MrFlowError(f"recipe 'none' takes no values, got {quoted(recipe)}.")
        return ()
    if not words or not re.fullmatch(r"[0-9]+", words[0]):
        raise MrFlowError(f"recipe {quoted(recipe)} lacks its number of steps; see sigmas_from_recipe for the forms.")
    steps, numbers = int(words[0][:9]), _numbers(words[1 : _MOST_NUMBERS + 2])
    if steps > MAX_STEPS:
        raise MrFlowError(f"recipe {quoted(recipe)} asks for more than {MAX_STEPS} steps.")
    try:
        made = _from_numbers(kind, steps, numbers)
    except KeyError as error:
        raise MrFlowError(
            f"recipe {quoted(recipe)} lacks {error.args[0]}; see sigmas_from_recipe for the forms."
        ) from error
    if numbers:
        raise MrFlowError(
            f"recipe {quoted(recipe)} has a number that {kind} schedules do not take: {quoted(next(iter(numbers)))}."
        )
    return made


def _from_numbers(kind: str, steps: int, numbers: dict[str, float]) -> Sigmas:
    """The schedule of `kind`; takes the numbers that it uses out of `numbers`."""
    if kind == "native":
        mu, whole = numbers.pop("mu"), numbers.pop("whole", None)
        words = {"terminal": "terminal", "min": "sigma_min", "beta": "beta", "roots": "roots", "ahead": "ahead"}
        given = {name: numbers.pop(word) for word, name in words.items() if word in numbers}
        up = numbers.pop("up", 0.0) != 0.0
        return native_sigmas(steps, mu=mu, whole=None if whole is None else _whole(whole), up=up, **given)
    if kind == "beta":
        return beta_sigmas(steps, mu=numbers.pop("mu"))
    if kind == "low-beta":
        return low_beta_sigmas(steps, alpha=numbers.pop("alpha"), beta=numbers.pop("beta"))
    if kind == "logit-normal":
        return logit_normal_sigmas(steps, mu=numbers.pop("mu"), std=numbers.pop("std"))
    if kind in ("scaled-linear", "zero-snr"):
        return scaled_linear_sigmas(steps, zero_snr=kind == "zero-snr")
    if kind == "betas":
        return betas_sigmas(steps, _betas(numbers))
    if kind == "trigflow":
        return trigflow_sigmas(steps, numbers.pop("middle", None))
    if kind == "edm":
        ends = {"largest": numbers.pop("max"), "smallest": numbers.pop("min")}
        return edm_sigmas(steps, **ends, rho=numbers.pop("rho", None))
    if kind in ("linear", "shifted"):
        return refine_sigmas(numbers.pop("start"), steps, kind)
    raise MrFlowError(
        "recipe must begin with native, beta, low-beta, logit-normal, scaled-linear, zero-snr, betas, edm, trigflow, "
        f"linear, shifted, list or none: {quoted(kind)}."
    )


def recipe_of_betas(steps: int, betas: TrainingBetas) -> str:
    """The recipe of `betas_sigmas`.

    Args:
        steps: 1 to 1000.
        betas: Of the model's training; a list of its own is spelled out as sigmas.

    Returns:
        The recipe.
    """
    if betas.spacing == "own":
        return explicit_recipe(betas_sigmas(steps, betas))
    plain = TrainingBetas()
    words = ["betas", str(steps)]
    if betas.spacing == "cosine":
        words.append("cosine=1")
    else:
        words += [f"first={betas.first!r}", f"last={betas.last!r}", f"power={1 if betas.spacing == 'linear' else 2}"]
    words += [f"count={betas.count}"] if betas.count != plain.count else []
    words += ["zero=1"] if betas.zero_snr else []
    words += [f"scale={betas.snr_scale!r}"] if betas.snr_scale != plain.snr_scale else []
    return " ".join(words)


def _betas(numbers: dict[str, float]) -> TrainingBetas:
    """The betas that a recipe names; takes their numbers out of `numbers`."""
    count = _whole(numbers.pop("count", 1000.0))
    zero_snr, snr_scale = numbers.pop("zero", 0.0) != 0.0, numbers.pop("scale", 1.0)
    if numbers.pop("cosine", 0.0):
        return TrainingBetas(count=count, spacing="cosine", zero_snr=zero_snr, snr_scale=snr_scale)
    power, first, last = numbers.pop("power"), numbers.pop("first"), numbers.pop("last")
    if power not in (1.0, 2.0):
        raise MrFlowError(f"power must be 1 or 2, got {power!r}.")
    spacing = "linear" if power == 1.0 else "scaled-linear"
    return TrainingBetas(count, first, last, spacing, zero_snr=zero_snr, snr_scale=snr_scale)


def _whole(number: float) -> int:
    if number != int(number):
        raise MrFlowError(f"count and whole must be whole numbers, got {number!r}.")
    return int(number)


def recipe_of_steps(recipe: str, steps: int) -> str:
    """The schedule of a recipe with another number of steps; its shift stays.

    Args:
        recipe: A recipe of stage 1. Values that are spelled out are interpolated linearly, by the number of the step.
        steps: 1 to 1000.

    Returns:
        The other recipe.
    """
    kind, *words = recipe.split(" ")
    if kind == "trigflow" and steps != 2:
        return f"trigflow {steps}"  # the angle in the middle is for two steps
    if kind != "list":
        return " ".join([kind, str(steps), *words[1:]])
    sigmas = sigmas_from_recipe(recipe)
    marks = [(len(sigmas) - 1) * each / steps for each in range(steps + 1)]
    return explicit_recipe([_between(sigmas, mark) for mark in marks])


def _between(sigmas: Sigmas, mark: float) -> float:
    """A schedule at a whole or broken number of steps."""
    below = min(int(mark), len(sigmas) - 2)
    return sigmas[below] + (mark - below) * (sigmas[below + 1] - sigmas[below])


def read_number(text: str) -> float:
    """A number as plans write it.

    Args:
        text: Decimal digits, with a point and an exponent where needed, no longer than a float can be.

    Returns:
        The number.

    Raises:
        MrFlowError: `text` is anything else.
    """
    if not re.fullmatch(r"-?[0-9]{1,20}(\.[0-9]{1,20})?(e[+-]?[0-9]{1,3})?", text):
        raise MrFlowError(f"{quoted(text)} is not a number")
    return float(text)


def _numbers(words: Sequence[str]) -> dict[str, float]:
    pairs = [word.partition("=") for word in words]
    found = {name: read_number(value) for name, _, value in pairs}
    if len(found) < len(pairs) or len(pairs) > _MOST_NUMBERS:
        raise MrFlowError(
            f"the recipe has a number twice, or too many: {shown(', '.join(name for name, *_ in pairs))}."
        )
    return found


def explicit_recipe(sigmas: Sequence[float]) -> str:
    """The recipe that spells out every value.

    Args:
        sigmas: A schedule, or no values.

    Returns:
        "list 1.0 0.5 0.0", say, or "none" for no values.
    """
    return " ".join(["list", *(repr(float(sigma)) for sigma in sigmas)]) if sigmas else "none"
