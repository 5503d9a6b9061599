"""What a picture must remember so that it can be made again: one JSON text under one PNG key.

Every number of the run is in the plan's string; the record adds the words, the seed, the model, the upscaler and the
arithmetic (dtype, device, threads, library versions) on which equality to the last bit depends.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

from mrflow_sched._runtime.errors import MrFlowError

KEY = "mrflow"
"""PNG text key that holds the record."""

MAX_BATCH = 1024
"""Most pictures of one run; a record that claims more was not written here."""

_LIBRARIES = ("mrflow-sched", "torch", "diffusers", "transformers", "spandrel", "pillow")


@dataclass(frozen=True)
class RunRecord:
    """One picture's origin. `image` counts from 0 within a batch of `batch`; `seed` is the run's, not the picture's."""

    plan: str
    prompt: str
    negative: str | None
    seed: int
    batch: int
    image: int
    model: str
    model_fingerprint: str
    upscaler: str
    upscaler_sha256: str | None
    device: str
    dtype: str
    vae_dtype: str
    threads: int
    versions: Mapping[str, str]
    unfinished: bool = False

    def to_json(self) -> str:
        """The record on one line of ASCII, keys in the order of the fields."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunRecord:
        """Inverse of `to_json`; keys of newer versions are ignored.

        Raises ValueError when the text is not a record or a value is of the wrong kind or
        out of range.
        """
        try:
            found: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MrFlowError(f"the mrflow record is not JSON ({error}); the picture's text was altered.") from error
        if not isinstance(found, dict):
            raise MrFlowError(
                f"the mrflow record is {type(found).__name__}, not an object; the picture's text was altered."
            )
        values = cast("dict[str, Any]", found)
        known = {name: values.get(name, False if name == "unfinished" else None) for name in _KINDS}
        for name, kinds in _KINDS.items():
            if not isinstance(known[name], kinds) or (kinds is int and isinstance(known[name], bool)):
                raise MrFlowError(
                    f"the mrflow record has {name} = {known[name]!r:.80}; the picture's text was altered."
                )
        record = cls(**known)
        if not 0 <= record.image < record.batch <= MAX_BATCH:
            raise MrFlowError(
                f"the mrflow record has image = {record.image} in a batch of {record.batch}; "
                "the picture's text was altered."
            )
        return record


_NONE = type(None)
_KINDS: Mapping[str, Any] = {
    "plan": str,
    "prompt": str,
    "negative": (str, _NONE),
    "seed": int,
    "batch": int,
    "image": int,
    "model": str,
    "model_fingerprint": str,
    "upscaler": str,
    "upscaler_sha256": (str, _NONE),
    "device": str,
    "dtype": str,
    "vae_dtype": str,
    "threads": int,
    "versions": dict,
    "unfinished": bool,
}


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries whose arithmetic makes a picture; "absent" where one is not installed."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
