"""What the user chose: one frozen `Controls`, from the page, the API or an image's metadata.

The order of the fields is the order of the API's positional arguments: new ones are only added at the end.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, cast

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.plan.families import FAMILIES, PURPOSES, TIERS
from mrflow_sched.plan.families.base import steps_in

__all__ = ["AUTOMATIC", "CHOICES", "FIELDS", "LABELS", "LIMITS", "Controls"]

AUTOMATIC = "automatic"
"""The preset, the upscaler or the solver that suits the loaded model."""

_LONGEST_NAME = 300


def _preset_names() -> tuple[str, ...]:
    """Return `AUTOMATIC`, the tiers, those for a kind of image, then each family's own, most steps first.

    Those that need a few-step LoRA are left out: the host puts LoRAs on, by the prompt.
    """
    every = [preset for family in FAMILIES.values() for preset in family.presets]
    known = {preset.name: preset for preset in every if not preset.few_step}
    stepped = [name for name in known if steps_in(name)]
    named = [name for name in known if name not in (*stepped, *PURPOSES)]
    return (AUTOMATIC, *TIERS, *PURPOSES, *sorted(stepped, key=lambda name: -known[name].low_steps), *named)


CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "preset": _preset_names(),
        "shift": ("resolution-aware", "host"),
        "solver": ("host sampler", "multistep", AUTOMATIC),
        "refine_cfg": ("same", "off", "value"),
        "refine_seed": ("seed + 1", "host"),
        "colour_guard": ("off", "auto"),
    }
)
"""Allowed values of a field, default first. `preset` also takes any other "N+M" within the step limits."""

LIMITS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "factor": (1.25, 4.0, 0.05),
        "low_steps": (0, 150, 1),
        "refine_steps": (0, 20, 1),
        "sigma": (0.0, 0.9, 0.01),
        "refine_cfg_value": (1.0, 30.0, 0.5),
    }
)
"""Least value, largest value and slider step of each number. 0 steps and sigma 0 mean: from the preset."""

MIN_SIGMA = 0.02
"""The least sigma that can be set; 0 stands for the preset's."""

LABELS: Mapping[str, str] = MappingProxyType(
    {
        "enabled": "MrFlow",
        "preset": "MrFlow preset",
        "factor": "Low-resolution factor",
        "low_steps": "Low steps",
        "refine_steps": "Refine steps",
        "sigma": "Refine sigma",
        "shift": "Stage 1 shift",
        "solver": "Stage 1 solver",
        "upscaler": "SR model",
        "refine_cfg": "Refine CFG",
        "refine_cfg_value": "Refine CFG value",
        "refine_seed": "Refine seed",
        "colour_guard": "Colour guard",
        "save_stages": "Save stage images",
        "draft": "Draft",
        "keep_composition": "Keep composition",
    }
)
"""English label of each control: a key of ui-config.json and of the translations, so none is ever changed."""


@dataclass(frozen=True)
class Controls:
    """All that the user can set.

    None stands for a field's default; whole numbers may come as floats such as 12.0.

    Attributes:
        enabled: Use MrFlow for the job.
        preset: "automatic" (the family's default), "fast", "balanced", "best", "text", "detail", or low + refine steps
            such as "12+1".
        factor: Final side over low side, 1.25 to 4.
        low_steps: Steps of stage 1, to 150; 0: from the preset.
        refine_steps: Steps of the refine stage, to 20; 0: from the preset.
        sigma: Flow sigma at which the refine stage starts, 0.02 to 0.9; 0: from the preset.
        shift: "resolution-aware" (the plan's own stage-1 schedule) or "host" (the host's schedule).
        solver: "host sampler", "multistep" (our second-order solver), or "automatic" (the one that suits the family).
        upscaler: "automatic", or a name of the host's list.
        refine_cfg: Guidance of the refine stage: "same" (as the first pass), "off" (1), or "value".
        refine_cfg_value: The guidance scale of "value", 1 to 30.
        refine_seed: Noise of the refine stage: "seed + 1" (of the seed after the image's), or "host".
        colour_guard: "auto" removes a shift of the mean colour that the later stages introduce, or "off".
        save_stages: Save the low-resolution image too.
        draft: Make stage 1 only: low-resolution images that can be finished later.
        keep_composition: Start stage 1 from the noise that the WebUI itself would make the final size from, shrunk.

    Raises:
        MrFlowError: A value is not allowed.
    """

    enabled: bool = False
    preset: str = AUTOMATIC
    factor: float = 2.0
    low_steps: int = 0
    refine_steps: int = 0
    sigma: float = 0.0
    shift: str = "resolution-aware"
    solver: str = "host sampler"
    upscaler: str = AUTOMATIC
    refine_cfg: str = "same"
    refine_cfg_value: float = 1.0
    refine_seed: str = "seed + 1"
    colour_guard: str = "off"
    save_stages: bool = False
    draft: bool = False
    keep_composition: bool = False

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            default = cast("bool | int | float | str", entry.default)
            checked = default if value is None else _checked(entry.name, value, type(default))
            object.__setattr__(self, entry.name, checked)

    @classmethod
    def from_args(cls, args: Sequence[Any]) -> Controls:
        """Read the controls from a script's argument list.

        Args:
            args: Values in the order of `FIELDS`, or a dict by those names. A shorter list leaves the rest at the
                defaults. A dict must come first; what follows it is ignored, because hosts fill lists up with the
                page's defaults. A dict without "enabled" switches MrFlow on: whoever sends one wants it.

        Returns:
            The controls.

        Raises:
            MrFlowError: A name is unknown, there are too many values, or a value is not allowed.
        """
        if not isinstance(cast("object", args), (list, tuple)):
            raise MrFlowError(f"args must be a list of values or one dict, got {quoted(args)}.")
        if args and isinstance(args[0], Mapping):
            given = cast("Mapping[Any, Any]", args[0])
            _check_names(given)
            values: dict[str, Any] = {"enabled": True, **given}
            return cls(**values)
        if len(args) > len(FIELDS):
            raise MrFlowError(
                f"args must hold at most {len(FIELDS)} values ({', '.join(FIELDS)}), got {len(args)}; leave the rest "
                "out."
            )
        return cls(**dict(zip(FIELDS, args, strict=False)))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON values.

        Returns:
            A dict from which `from_args([dict])` makes the same controls.
        """
        return asdict(self)


FIELDS: tuple[str, ...] = tuple(entry.name for entry in fields(Controls))
"""Names of all fields in the order of the API's positional arguments."""


# ------------------------------------------------------------------------------------------------------------- checks


def _checked(name: str, value: Any, kind: type) -> Any:
    """Check the value of field `name` and convert it to `kind`."""
    if kind is bool:
        if not isinstance(value, bool):
            raise MrFlowError(f"{name} must be true or false, got {quoted(value)}.")
        return value
    if name == "preset":
        return _checked_preset(value)
    if kind is str:
        return _checked_text(name, value)
    return _checked_number(name, value, kind)


def _checked_text(name: str, value: Any) -> str:
    choices = CHOICES.get(name)
    if choices is not None and not (isinstance(value, str) and value in choices):
        raise MrFlowError(f"{name} must be {' or '.join(map(repr, choices))}, got {quoted(value)}.")
    if not isinstance(value, str) or not value.strip() or len(value) > _LONGEST_NAME:
        raise MrFlowError(f"{name} must be {AUTOMATIC!r} or the name of an upscaler, got {quoted(value)}.")
    return value


def _checked_preset(value: Any) -> str:
    if isinstance(value, str):
        steps = steps_in("".join(value.split()))
        if not steps and value.lower() in CHOICES["preset"]:
            return value.lower()
        if len(steps) == 2:
            low, refine = steps
            if 1 <= low <= LIMITS["low_steps"][1] and 1 <= refine <= LIMITS["refine_steps"][1]:
                return f"{low}+{refine}"
    named = ", ".join(map(repr, (AUTOMATIC, *TIERS, *PURPOSES)))
    raise MrFlowError(
        f"preset must be {named}, or low + refine steps such as '12+1' (at most "
        f"{LIMITS['low_steps'][1]:g}+{LIMITS['refine_steps'][1]:g}), got {quoted(value)}."
    )


def _checked_number(name: str, value: Any, kind: type) -> int | float:
    low, high, _ = LIMITS[name]
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if usable and kind is int:
        usable = value == int(value)
    if usable and (name != "sigma" or value == 0 or value >= MIN_SIGMA):
        return int(value) if kind is int else float(value)
    wanted = "a whole number" if kind is int else "a number"
    span = f"{MIN_SIGMA:g} to {high:g}" if name == "sigma" else f"{low:g} to {high:g}"
    zero = "; 0 uses the preset's" if low == 0 else ""
    raise MrFlowError(f"{name} must be {wanted} from {span}, got {quoted(value)}{zero}.")


def _check_names(given: Mapping[Any, Any]) -> None:
    for name in given:
        if name not in FIELDS:
            near = difflib.get_close_matches(quoted(name), FIELDS, n=1)
            hint = f"did you mean {near[0]!r}? Known names are" if near else "known names are"
            raise MrFlowError(f"{quoted(name)} is not a setting of MrFlow; {hint} {', '.join(FIELDS)}.")
