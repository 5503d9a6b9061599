"""Makes `import torchvision` work beside a torch that its compiled operators were not built for.

torchvision registers shape rules for its operators while it is imported. Where its compiled library does not load (a
CUDA wheel beside a CPU torch, say), the operators do not exist and the import fails with "operator torchvision::nms
does not exist". spandrel, diffusers and transformers import torchvision but call none of those operators, so naming
them is enough: an operator that is called all the same still fails, with torch's own sentence.
"""

from __future__ import annotations

import importlib
import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

__all__ = ["ensure_ops"]

_MISSING = re.compile(r"operator torchvision::(\w+) does not exist")
_REGISTERED = re.compile(r"register_fake\(\s*[\"']torchvision::(\w+)[\"']")
_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
# Both are what torchvision 0.15 to 0.28 asks for. Any other name gets a schema that takes and returns anything.
_SCHEMAS = {"nms": _NMS, "qnms": _NMS}


def ensure_ops() -> tuple[str, ...]:
    """Import torchvision, defining the operators that it lacks.

    Nothing is defined where torchvision imports by itself, is imported already, or is not installed. Any other failure
    to import it is left to whoever needs it. Safe to call any number of times.

    Returns:
        Names of the operators that had to be defined, usually none.
    """
    if "torchvision" in sys.modules:
        return ()
    missing = _import_and_see()
    if missing is None:
        return ()
    # All at once: a shape rule that was registered by a half-finished import cannot be registered a second time.
    names = sorted({missing, *_SCHEMAS, *_registered_names()})
    defined = tuple(name for name in names if not hasattr(torch.ops.torchvision, name))
    for name in defined:
        _library().define(name + _SCHEMAS.get(name, "(...) -> ..."))  # pyright: ignore[reportUnknownMemberType]
    _import_and_see()
    return defined


@cache
def _library() -> torch.library.Library:
    """Holds the definitions, for as long as it lives. A fragment leaves the namespace free for the real library."""
    return torch.library.Library("torchvision", "FRAGMENT")


def _import_and_see() -> str | None:
    """Try to import torchvision; the name of the operator it failed for, or None."""
    before = set(sys.modules)
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        # Modules left from a half-finished import would hide the next attempt's own error.
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "torchvision":
                del sys.modules[name]
        found = _MISSING.search(str(error)) if isinstance(error, RuntimeError) else None
        return found.group(1) if found else None
    return None


def _registered_names() -> set[str]:
    """Operators that the installed torchvision registers shape rules for, read from its source without running it."""
    spec = find_spec("torchvision")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    sources = [Path(folder) / "_meta_registrations.py" for folder in folders]
    return {name for source in sources if source.is_file() for name in _REGISTERED.findall(source.read_text("utf-8"))}
