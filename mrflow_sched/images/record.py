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

from mrflow_sched._runtime.errors import MrFlowError, first_line, quoted
from mrflow_sched.plan.checks import MAX_STEPS

KEY = "mrflow"
"""PNG text key that holds the record."""

SHEET = "mrflow drafts"
"""PNG text key of a contact sheet: a list of drafts, each with its file and its record."""

MAX_BATCH = 1024
"""Most images of one run; a record that claims more was not written here."""

MAX_SEED = 2**64 - 1
"""The largest seed that a torch generator takes."""

MAX_THREADS = 4096
"""Most threads that a record may ask for."""

MAX_LORA_SCALE = 100.0
"""Largest scale of a LoRA, of either sign."""

MAX_ENTRIES = 256
"""Most entries of a record's tables."""

MAX_PROMPT = 1_000_000
"""Most characters of a prompt, and of a plan's line."""

MAX_WORD = 4096
"""Most characters of every other text: names, folders, hashes, versions."""

_LIBRARIES = ("mrflow-sched", "torch", "diffusers", "transformers", "spandrel", "pillow")


@dataclass(frozen=True)
class RecordedLora:
    """A LoRA that was on the model.

    Attributes:
        file: Name of its file, without folders.
        sha256: Hash of the file.
        scale: How strongly it acted.
    """

    file: str
    sha256: str
    scale: float


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
        start: Name of the image file that the run started from; None: it began with noise.
        start_sha256: Hash of that file.
        strength: The sigma at which stage 1 started from it; None: it took the place of stage 1.
        loras: The LoRAs on the model, in their order.
        refine_prompt: The prompt of the stages after the first; None: `prompt`.
        refine_negative: Their negative prompt; None: `negative`.
        draft: The image is stage 1's, and the run goes on from it: the mark of its pixels (`drafts.mark`). None: it is
            no draft.
        draft_latents: The CRC-32 of the chunk with stage 1's latents; None: the file has none.
        draft_steps: The fewer steps of a draft that is for ranking alone.
        preview: How the image was made cheaply ("few, 6 steps"), where it is a preview of the run and not its result;
            else None.
        references: Hashes of the files that an editing model looked at, in their order.
        refine_mask: Hash of the file that said where later stages refine.
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
    start: str | None = None
    start_sha256: str | None = None
    strength: float | None = None
    loras: tuple[RecordedLora, ...] = ()
    refine_prompt: str | None = None
    refine_negative: str | None = None
    draft: str | None = None
    draft_latents: str | None = None
    draft_steps: int | None = None
    preview: str | None = None
    references: tuple[str, ...] = ()
    refine_mask: str | None = None

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
                `unfinished` and what stands after it.

        Returns:
            The record, each value of its kind and within its limits.

        Raises:
            MrFlowError: The text is not a record, or a value is of the wrong kind or out of range.
        """
        if len(text) > _LONGEST:
            raise MrFlowError(
                f"the mrflow record has {len(text)} characters, more than any that was written here; the image's text "
                "was altered."
            )
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
        known: dict[str, Any] = {name: values.get(name) for name in _KINDS}
        wrong = next((name for name, fits in _KINDS.items() if not fits(known[name])), None)
        if wrong is not None:
            raise MrFlowError(f"the mrflow record has {wrong} = {quoted(known[wrong])}; the image's text was altered.")
        known["references"] = tuple(known["references"])
        known["loras"] = tuple(RecordedLora(**{name: each[name] for name in _LORA_KINDS}) for each in known["loras"])
        record = cls(**known)
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


def _is_text(most: int, *, optional: bool = False) -> Callable[[object], bool]:
    """Whether a value is text that can be written as UTF-8; JSON may hold half of a surrogate pair, which cannot."""

    def fits(value: object) -> bool:
        if not isinstance(value, str):
            return optional and value is None
        return len(value) <= most and not any("\ud800" <= letter <= "\udfff" for letter in value)

    return fits


_is_prompt = _is_text(MAX_PROMPT)
_is_word = _is_text(MAX_WORD)
_is_word_or_none = _is_text(MAX_WORD, optional=True)


def _is_whole(low: int, high: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and low <= value <= high  # a bool is no number here


def _is_table(value: object) -> bool:
    """Whether `value` maps a reasonable number of words to words."""
    if not isinstance(value, dict):
        return False
    table = cast("dict[object, object]", value)
    return len(table) <= MAX_ENTRIES and all(_is_word(each) for pair in table.items() for each in pair)


def _is_sigma_or_none(value: object) -> bool:
    return value is None or (type(value) in (int, float) and 0.0 < cast("float", value) <= 1.0)


def _is_scale(value: object) -> bool:
    return type(value) in (int, float) and abs(cast("float", value)) <= MAX_LORA_SCALE


def _are_loras(value: object) -> bool:
    """Whether `value` is a list of a reasonable number of LoRAs."""
    if not isinstance(value, list) or len(cast("list[object]", value)) > MAX_ENTRIES:
        return False
    entries = [cast("dict[str, object]", each) for each in cast("list[object]", value) if isinstance(each, dict)]
    fit = all(fits(each.get(name)) for each in entries for name, fits in _LORA_KINDS.items())
    return fit and len(entries) == len(cast("list[object]", value))


def _are_words(value: object) -> bool:
    """Whether `value` is a list of a reasonable number of words."""
    words = cast("list[object]", value) if isinstance(value, list) else None
    return words is not None and len(words) <= MAX_ENTRIES and all(_is_word(each) for each in words)


# A letter takes up to twelve characters of JSON.
_LONGEST = 12 * (5 * MAX_PROMPT + 2 * MAX_ENTRIES * MAX_WORD)
# What an older version did not write.
_OLD: Mapping[str, Any] = MappingProxyType(
    {
        **dict.fromkeys(("start", "start_sha256", "strength", "refine_prompt", "refine_negative")),
        **dict.fromkeys(("draft", "draft_latents", "draft_steps", "preview", "refine_mask")),
        "unfinished": False,
        "dtypes": {},
        "loras": [],
        "references": [],
    }
)
_LORA_KINDS: Mapping[str, Callable[[object], bool]] = MappingProxyType(
    {"file": _is_word, "sha256": _is_word, "scale": _is_scale}
)
_KINDS: Mapping[str, Callable[[object], bool]] = MappingProxyType(
    {
        "plan": _is_prompt,
        "prompt": _is_prompt,
        "negative": _is_text(MAX_PROMPT, optional=True),
        "seed": _is_whole(0, MAX_SEED),
        "batch": _is_whole(1, MAX_BATCH),
        "image": _is_whole(0, MAX_BATCH - 1),
        "model": _is_word,
        "model_fingerprint": _is_word,
        "upscaler": _is_word,
        "upscaler_sha256": _is_word_or_none,
        "device": _is_word,
        "dtype": _is_word,
        "vae_dtype": _is_word,
        "threads": _is_whole(1, MAX_THREADS),
        "versions": _is_table,
        "unfinished": lambda value: isinstance(value, bool),
        "dtypes": _is_table,
        "start": _is_word_or_none,
        "start_sha256": _is_word_or_none,
        "strength": _is_sigma_or_none,
        "loras": _are_loras,
        "refine_prompt": _is_text(MAX_PROMPT, optional=True),
        "refine_negative": _is_text(MAX_PROMPT, optional=True),
        "draft": _is_word_or_none,
        "draft_latents": _is_word_or_none,
        "draft_steps": lambda value: value is None or _is_whole(1, MAX_STEPS)(value),
        "preview": _is_word_or_none,
        "references": _are_words,
        "refine_mask": _is_word_or_none,
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
