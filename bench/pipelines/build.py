"""A tiny pipeline of a class: by its name in `bench.tiny`, else from the parts of a pipeline that is there."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from bench import tiny
from bench.tiny.parts import diffusers


class NotBuiltError(Exception):
    """No tiny pipeline of a class could be made; the message says why."""


class Missing(torch.nn.Module):
    """Stands where a part belongs that no tiny pipeline has; nothing can be run with it."""

    config = SimpleNamespace(block_out_channels=(8,) * 4, sample_size=8, latent_channels=4)
    model_config = config
    device = torch.device("cpu")
    dtype = torch.float32


def names_of(kind: str) -> list[str]:
    """The tiny pipelines of a class.

    Args:
        kind: Name of the class.

    Returns:
        Their names; none where `bench.tiny` has no pipeline of it.
    """
    return [name for name in (*tiny.NAMES, *tiny.VARIANTS) if tiny.class_name(name) == kind]


def from_parts(kind: Any) -> tuple[Any, list[str]]:
    """A pipeline of a class that `bench.tiny` does not have, from the parts of the one that is most like it.

    Args:
        kind: The class.

    Returns:
        The pipeline, and the names of its parts that no tiny pipeline has (`Missing`): it can be looked at then, and
        not run.

    Raises:
        NotBuiltError: The class does not take the parts.
    """
    wanted = {name: each for name, each in inspect.signature(kind.__init__).parameters.items() if name != "self"}
    optional = set(getattr(kind, "_optional_components", ()))
    needed = [name for name, each in wanted.items() if each.default is each.empty and name not in optional]

    def lacking(name: str) -> list[str]:
        return [part for part in needed if not _fits(_parts(name).get(part), str(wanted[part].annotation))]

    nearest = min(_alike_first(kind.__name__), key=lambda name: len(lacking(name)))
    missing = lacking(nearest)
    parts = {name: part for name, part in _parts(nearest).items() if name in wanted}
    parts |= {name: _made(str(wanted[name].annotation)) for name in missing}
    settings = {"requires_safety_checker": False} if "requires_safety_checker" in wanted else {}
    nothing = {name: None for name in wanted if name in optional and wanted[name].default is inspect.Parameter.empty}
    try:
        pipe = kind(**{**nothing, **parts, **settings})
    except Exception as error:  # whatever a class raises for parts that are not its own
        lack = f"no tiny pipeline has its {', '.join(missing)}" if missing else f"it refuses the parts of {nearest}"
        raise NotBuiltError(f"{lack} ({type(error).__name__})") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe, [name for name in missing if isinstance(parts[name], Missing)]


@functools.cache
def _parts(name: str) -> Mapping[str, Any]:
    return tiny.make(name).components


def _alike_first(kind: str) -> list[str]:
    """The tiny pipelines of the installed classes, those with the longest common beginning of names first."""

    def shared(name: str) -> int:
        pairs = zip(kind, tiny.class_name(name), strict=False)
        return next((count for count, (one, other) in enumerate(pairs) if one != other), len(kind))

    names = [name for name in (*tiny.VARIANTS, *tiny.NAMES) if hasattr(diffusers(), tiny.class_name(name))]
    return sorted(names, key=shared, reverse=True)


def _fits(part: Any, annotation: str) -> bool:
    """Whether a part is of a class that a pipeline's signature names; of tokenizers any will do."""
    if part is None:
        return False
    kinds = {base.__name__ for base in type(part).__mro__}
    named = set(re.findall(r"\w+", annotation))
    if "SchedulerMixin" in kinds:
        return bool(kinds & named) or "KarrasDiffusionSchedulers" in named
    return bool(kinds & named) or not isinstance(part, torch.nn.Module)


def _made(annotation: str) -> Any:
    """A scheduler of the class that is named, or `Missing`."""
    named = next((word for word in re.findall(r"\w+", annotation) if word.endswith("Scheduler")), None)
    return getattr(diffusers(), named)() if named and hasattr(diffusers(), named) else Missing()
