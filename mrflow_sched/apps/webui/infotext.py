"""Our keys in an image's metadata ("PNG info"): written from controls and recipe, read back into the same controls.

    MrFlow: automatic 12+1 x2 v1, MrFlow steps: 12+1, MrFlow sigma: 0.12, MrFlow size: 512x512, ...

`MrFlow` holds the preset that ran ("automatic" before it where it was chosen for the model), the size factor, what the
user set instead of the preset's numbers (`low=8`, `refine=2`, `sigma=0.15`), and the version of these rules. The other
keys hold a choice that is not the default, or tell a reader what ran.

    MrFlow: refused (MrFlow cannot be used with the refiner ...)      made without MrFlow; pastes as off
    MrFlow draft: 1a2b3c4d                                            stage 1 only, with the checksum of its pixels
    MrFlow enlarged: 512x512 to 1024x1024 with RealESRGAN ...         an image, enlarged by the upscale button
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mrflow_sched
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.webui.controls import AUTOMATIC, CHOICES, FIELDS, Controls
from mrflow_sched.apps.webui.recipe import Recipe
from mrflow_sched.plan.families.base import steps_in

__all__ = [
    "DRAFT",
    "ENLARGED",
    "KEY",
    "NOISE",
    "PREFIX",
    "STOPPED",
    "enlarged",
    "field_value",
    "joined",
    "ran",
    "read",
    "refused",
    "write",
]

KEY = "MrFlow"
PREFIX = "MrFlow "
DRAFT = "MrFlow draft"
"""Key of an image that is stage 1 only: the CRC-32 of its colours, and "RGBA" where it has transparency."""
STOPPED = "MrFlow stopped"
"""Key of an image whose job was interrupted or skipped: the pass that did not end."""
ENLARGED = "MrFlow enlarged"
"""Key of an image that the gallery's upscale button enlarged. The other keys are those of the image before it."""
NOISE = "MrFlow noise"
"""Key of an image whose stage 1 started from the shrunk noise of the final size: "nested"."""
VERSION = "v1"

_CHOICE_KEYS = {
    "shift": "MrFlow shift",
    "solver": "MrFlow solver",
    "refine_seed": "MrFlow refine seed",
    "colour_guard": "MrFlow colour guard",
}
_OVERRIDES = {"low": "low_steps", "refine": "refine_steps", "sigma": "sigma"}
_PICKED = re.compile(rf"{AUTOMATIC} \((.*)\)", re.DOTALL)
_REFUSED = "refused ("


def write(controls: Controls, recipe: Recipe) -> dict[str, str]:
    """Write all our keys for an image; `read` gives the controls back exactly.

    Args:
        controls: What the user chose.
        recipe: What ran.

    Returns:
        Values by key, in the order in which they are shown.
    """
    # The preset asked for, also where the model's family has none of that name.
    asked = f"{AUTOMATIC} {recipe.preset}" if controls.preset == AUTOMATIC else controls.preset
    words = [asked, f"x{_number(controls.factor)}"]
    for word, name in _OVERRIDES.items():
        if getattr(controls, name):
            words.append(f"{word}={_number(getattr(controls, name))}")
    if recipe.experimental:
        words.append("experimental")
    automatic = controls.upscaler == AUTOMATIC
    keys = {
        KEY: " ".join([*words, VERSION]),
        "MrFlow steps": f"{recipe.low_steps}+{recipe.refine_steps}",
        "MrFlow sigma": _number(recipe.sigma),
        "MrFlow size": f"{recipe.low_width}x{recipe.low_height}",
        "MrFlow upscaler": f"{AUTOMATIC} ({recipe.upscaler})" if automatic else controls.upscaler,
    }
    for name, key in _CHOICE_KEYS.items():
        if getattr(controls, name) != getattr(Controls, name):
            keys[key] = getattr(controls, name)
    if controls.refine_cfg != Controls.refine_cfg or controls.refine_cfg_value != Controls.refine_cfg_value:
        keys["MrFlow refine CFG"] = f"{controls.refine_cfg} {_number(controls.refine_cfg_value)}"
    if controls.keep_composition:
        keys[NOISE] = "nested"
    if controls.save_stages:
        keys["MrFlow save stages"] = "on"
    keys["MrFlow version"] = mrflow_sched.__version__
    return keys


def refused(sentence: str) -> str:
    """Write the value of the main key for an image that was made without MrFlow, though it was asked for.

    Args:
        sentence: Why.

    Returns:
        A value that `read` takes as off.
    """
    return f"{_REFUSED}{sentence.rstrip('.')})"


def enlarged(controls: Controls, recipe: Recipe, before: str | None = None) -> str:
    """Write the value of `ENLARGED`.

    Args:
        controls: What the user chose.
        recipe: What ran; its low size is that of the image that was enlarged.
        before: The value that this image carried already.

    Returns:
        What was done to the image, in words; what was done before stands first.
    """
    done = (
        f"{recipe.low_width}x{recipe.low_height} to {recipe.width}x{recipe.height} with {recipe.upscaler}, "
        f"{recipe.refine_steps} at sigma {_number(recipe.sigma)}, refine seed {controls.refine_seed}"
    )
    return f"{before}; {done}" if before else done


def read(params: Mapping[str, Any]) -> Controls:
    """Read the controls from an image's metadata.

    Whatever is missing, unknown to this version or out of range counts as the default, so old or edited text can still
    be read.

    Args:
        params: The keys as a host parses them; values shaped "512x512" may come split into keys with "-1" and "-2".

    Returns:
        The controls; all defaults, with MrFlow off, where our main key is missing or says that MrFlow was refused.
    """
    main = _get(params, KEY)
    if main is None or main.startswith(_REFUSED):
        return Controls()
    found: dict[str, Any] = {"enabled": True, **_from_main(main)}
    for name, key in _CHOICE_KEYS.items():
        found[name] = _get(params, key)
    upscaler = _get(params, "MrFlow upscaler")
    if upscaler is not None and not _PICKED.fullmatch(upscaler):
        found["upscaler"] = upscaler
    kind, _, value = (_get(params, "MrFlow refine CFG") or "").partition(" ")
    found.update(refine_cfg=kind or None, refine_cfg_value=_to_number(value))
    found["keep_composition"] = _get(params, NOISE) == "nested"
    found["save_stages"] = _get(params, "MrFlow save stages") == "on"
    found["draft"] = _get(params, DRAFT) is not None
    return Controls(**{name: value for name, value in found.items() if _usable(name, value)})


def joined(params: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, str]:
    """Return all our keys of an image's metadata as they were written.

    Args:
        params: As in `read`.
        names: Other keys that are wanted too.

    Returns:
        Values by key, in order; sizes are whole again, and what is missing is left out.
    """
    found: dict[str, str] = {}
    for key in params:
        name = key.removesuffix("-1") if f"{key.removesuffix('-1')}-2" in params else key
        value = _get(params, name)
        ours = name == KEY or (name.startswith(PREFIX) and not name.endswith("-2"))
        if value is not None and (ours or name in names):
            found[name] = value
    return found


def ran(params: Mapping[str, Any]) -> Controls:
    """Read the controls from an image's metadata, with the numbers and the upscaler that really ran.

    What "automatic" and a preset stand for may have changed since: other files are installed, presets were improved.

    Args:
        params: As in `read`.

    Returns:
        The controls that `read` gives, with every number set.
    """
    found: dict[str, Any] = {}
    upscaler = _PICKED.fullmatch(_get(params, "MrFlow upscaler") or "")
    if upscaler is not None:
        found["upscaler"] = upscaler[1]
    steps = steps_in(_get(params, "MrFlow steps") or "")
    if len(steps) == 2:
        found["low_steps"], found["refine_steps"] = steps
    found["sigma"] = _to_number(_get(params, "MrFlow sigma") or "")
    controls = read(params)
    usable = {name: value for name, value in found.items() if value is not None and _usable(name, value)}
    return replace(controls, **usable)


def field_value(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """Return the function that fills a control when metadata is pasted into the page.

    Args:
        name: A field of `Controls`.

    Returns:
        A function from the metadata's keys to the control's value.

    Raises:
        MrFlowError: There is no such field.
    """
    if name not in FIELDS:
        raise MrFlowError(f"name must be one of {', '.join(FIELDS)}, got {name!r}.")
    return lambda params: getattr(read(params), name)


# ------------------------------------------------------------------------------------------------------------- helpers


def _from_main(text: str) -> dict[str, Any]:
    """Read the controls in the main key's value; words that this version does not know are ignored."""
    words = text.split()
    found: dict[str, Any] = {}
    if words and words[0] == AUTOMATIC:
        found["preset"] = words.pop(0)
        if words and not words[0].startswith("x"):
            words.pop(0)  # what was chosen
    elif words and (words[0] in CHOICES["preset"] or steps_in(words[0])):
        found["preset"] = words.pop(0)
    for word in words:
        name, _, value = word.partition("=")
        if name in _OVERRIDES and value:
            found[_OVERRIDES[name]] = _to_number(value)
        elif word.startswith("x") and "factor" not in found:
            found["factor"] = _to_number(word[1:])
    return found


def _get(params: Mapping[str, Any], key: str) -> str | None:
    value = params.get(key)
    if value is None and f"{key}-1" in params and f"{key}-2" in params:
        value = f"{params[f'{key}-1']}x{params[f'{key}-2']}"
    return None if value is None else str(value).strip()


def _usable(name: str, value: Any) -> bool:
    try:
        Controls(**{name: value})
    except MrFlowError:
        return False
    return True


def _to_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _number(value: float) -> str:
    """Write the shortest text that is read back as the same number, without a needless ".0"."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
