"""What is needed to make an image again: one JSON text under one PNG key.

Every number of the run is in the plan's string; the record adds the prompts, the seed, the model, the upscaler and the
arithmetic (dtype of every part, device, threads, library versions) on which equality to the last bit depends.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any, cast

from mrflow_sched._runtime.errors import MrFlowError, first_line

KEY = "mrflow"
"""PNG text key that holds the record."""

MAX_BATCH = 1024
"""Most images of one run; a record that claims more was not written here."""

MAX_SEED = 2**64 - 1
"""The largest seed that a torch generator takes."""

MAX_THREADS = 4096
"""Most threads that a record may ask for."""

MAX_ENTRIES = 256
"""Most entries of a record's tables."""

_LIBRARIES = ("mrflow-sched", "torch", "diffusers", "transformers", "spandrel", "pillow")


@dataclass(frozen=True)
class RunRecord:
    """How one image was made.

    Attributes:
        plan: The plan as `StagedPlan.to_string` writes it.
        prompt: What was asked for.
        negative: The negative prompt; None where there was none.
        seed: The run's seed, not the image's, from 0 to 2^64 - 1.
        batch: Number of images of the run, 1 to `MAX_BATCH`.
        image: Which of them this is, counted from 0.
        model: Name or folder of the model.
        model_fingerprint: Hash that tells two versions of the model apart.
        upscaler: Name of the upscaler.
        upscaler_sha256: Hash of its file; None where it has none.
        device: The torch device.
        dtype: Dtype of the network, for readers of older versions; `dtypes` has it too.
        vae_dtype: Dtype of the VAE, for readers of older versions.
        threads: CPU threads of torch, 1 to `MAX_THREADS`.
        versions: Library -> version, see `library_versions`.
        unfinished: A later stage is missing, because memory ran out or the run was cancelled.
        dtypes: Dtype name of every part of the run that has weights ("transformer", "vae", "upscaler", ...).
    """

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
    dtypes: Mapping[str, str] = field(default_factory=dict[str, str])

    def to_json(self) -> str:
        """The record as JSON.

        Returns:
            One line of ASCII, keys in the order of the fields.
        """
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunRecord:
        """Read what `to_json` wrote.

        Args:
            text: JSON of this version, of a newer one (its unknown keys are ignored) or of an older one, which may lack
                `unfinished` and `dtypes`.

        Returns:
            The record, each value of its kind and within its limits.

        Raises:
            MrFlowError: The text is not a record, or a value is of the wrong kind or out of range.
        """
        try:
            found: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MrFlowError(
                f"the mrflow record is not JSON ({first_line(error)}); the image's text was altered."
            ) from error
        if not isinstance(found, dict):
            raise MrFlowError(
                f"the mrflow record is {type(found).__name__}, not an object; the image's text was altered."
            )
        values = {**_OLD, **cast("dict[str, Any]", found)}
        known = {name: values.get(name) for name in _KINDS}
        wrong = next((name for name, fits in _KINDS.items() if not fits(known[name])), None)
        if wrong is not None:
            raise MrFlowError(f"the mrflow record has {wrong} = {known[wrong]!a:.80}; the image's text was altered.")
        record = cls(**cast("dict[str, Any]", known))
        if record.image >= record.batch:
            raise MrFlowError(
                f"the mrflow record has image = {record.image} in a batch of {record.batch}; "
                "the image's text was altered."
            )
        return record

    def part_dtypes(self) -> dict[str, str]:
        """The dtype to load each part of the model in.

        Returns:
            Part -> dtype name, without the upscaler; "default" stands for parts that are not named.
        """
        if self.dtypes:
            return {part: dtype for part, dtype in self.dtypes.items() if part != "upscaler"}
        return {"default": self.dtype, "vae": self.vae_dtype}

    def dtype_of(self, part: str) -> str | None:
        """The dtype that a part ran in.

        A record of an older version says it of the VAE, and of the network, whose dtype all other parts of the model
        shared; it says nothing of the upscaler.

        Args:
            part: A part of the model ("transformer", "vae", ...) or "upscaler".

        Returns:
            The dtype's name, or None where the record does not say.
        """
        if self.dtypes or part == "upscaler":
            return self.dtypes.get(part)
        return self.vae_dtype if part == "vae" else self.dtype


def _is_text(value: object) -> bool:
    """Whether `value` is text that can be written as UTF-8; JSON may hold half of a surrogate pair, which cannot."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_text_or_none(value: object) -> bool:
    return value is None or _is_text(value)


def _is_whole(low: int, high: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and low <= value <= high  # a bool is no number here


def _is_table(value: object) -> bool:
    """Whether `value` maps a reasonable number of words to words."""
    if not isinstance(value, dict):
        return False
    table = cast("dict[object, object]", value)
    return len(table) <= MAX_ENTRIES and all(_is_text(each) for pair in table.items() for each in pair)


# What an older version did not write.
_OLD: Mapping[str, Any] = MappingProxyType({"unfinished": False, "dtypes": {}})
_KINDS: Mapping[str, Callable[[object], bool]] = MappingProxyType(
    {
        "plan": _is_text,
        "prompt": _is_text,
        "negative": _is_text_or_none,
        "seed": _is_whole(0, MAX_SEED),
        "batch": _is_whole(1, MAX_BATCH),
        "image": _is_whole(0, MAX_BATCH - 1),
        "model": _is_text,
        "model_fingerprint": _is_text,
        "upscaler": _is_text,
        "upscaler_sha256": _is_text_or_none,
        "device": _is_text,
        "dtype": _is_text,
        "vae_dtype": _is_text,
        "threads": _is_whole(1, MAX_THREADS),
        "versions": _is_table,
        "unfinished": lambda value: isinstance(value, bool),
        "dtypes": _is_table,
    }
)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries whose arithmetic makes an image.

    Returns:
        Name -> version, "absent" for a library that is not installed.
    """
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
