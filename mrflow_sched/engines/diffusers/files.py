"""The files of a model folder, judged before a library sees them: nothing of them runs, and they cost what they weigh.

A folder comes from anywhere. What its small files say decides which classes are built and how large, so they are
checked first, without importing a model library: names, code, settings that would fetch or run something, and
numbers that no model has.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from mrflow_sched._runtime.errors import MrFlowError, first_line, shown

if TYPE_CHECKING:
    from typing import TypeGuard

__all__ = [
    "DIFFUSERS_STEM",
    "OWN_SCHEDULER",
    "TRANSFORMERS_STEM",
    "Weights",
    "check_files",
    "check_part",
    "folder_fingerprint",
    "missing_files",
    "part_names",
    "read_index",
    "read_object",
    "refuse",
    "tensor_shapes",
    "variant_of",
    "weights_of",
]

_ADVICE = "give a local diffusers folder, the one that holds model_index.json"
_PRINTED = ("transformer", "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
"""Parts that a fingerprint takes first, in this order; the others follow by name, without the scheduler."""

_LARGEST_JSON = 16 * 2**20
_LARGEST_TEXT = 256 * 2**20
"""Bytes of a settings file, and of a vocabulary: several times what any published model has."""

DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
"""How both libraries name weight files."""

_VARIANTS = ("fp16", "bf16")
"""Marks of weight files that repositories hold beside the plain ones, or instead of them."""

OWN_SCHEDULER = ("mrflow_sched.engines.diffusers.scheduler", "MrFlowScheduler")
"""Library and class of the one part of this package that a folder may name, as diffusers writes them down."""

_CODE = (".py", ".pyc", ".pyw", ".pyd", ".so", ".dll", ".dylib")
_TABLES = ("tokenizer.json", "vocab.json")
"""Vocabularies, which their own readers check: large, and without settings."""

_REFUSED: Mapping[str, str] = {
    "auto_map": "names Python code to run",
    "custom_pipeline": "names Python code to run",
    "custom_pipelines": "names Python code to run",
    "use_pretrained_backbone": "asks for weights from elsewhere",
    "transformers_weights": "names weights under another name",
}
"""Settings that make a library run or fetch what is not in the folder, when they are set."""

_LARGEST_NUMBER = 2**24
_MOST_TRAINING_STEPS = 100_000
_LONGEST_LIST = 4096
_COUNTS = ("layers", "blocks", "depth", "heads", "channels", "size", "dim", "hidden", "length", "steps", "embeddings")
"""Endings of settings that count something, and so are not negative."""


# --------------------------------------------------------------------------------------------------------------- index


def read_index(folder: Path) -> dict[str, Any]:
    """A folder's model_index.json.

    Args:
        folder: The folder that holds it.

    Returns:
        Its entries: parts as [library, class], and options of the pipeline.

    Raises:
        MrFlowError: It is missing, unreadable or names no pipeline.
    """
    if not folder.is_dir():
        hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(folder)) is not None
        download = f"download it first (hf download {folder} --local-dir DIR), or " if hub else ""
        raise MrFlowError(f"model is {_named(folder)}, which is not a folder; {download}{_ADVICE}.")
    file = folder / "model_index.json"
    if not file.is_file():
        raise MrFlowError(f"model is {_named(folder)}, which has no model_index.json; {_ADVICE}.")
    entries = read_object(folder, file)
    if not isinstance(entries.get("_class_name"), str):
        raise MrFlowError(f"model is {_named(folder)}, whose model_index.json names no pipeline; {_ADVICE}.")
    return entries


def part_names(index: Mapping[str, Any]) -> list[str]:
    """The parts of a pipeline: entries [library, class].

    Args:
        index: From `read_index`.

    Returns:
        Their names; [null, null], which stands for a part that was left out, is not among them.
    """
    return [name for name, value in index.items() if _is_part(name, value)]


def _is_part(name: str, value: Any) -> bool:
    pair = cast("list[Any]", value) if isinstance(value, list) else []
    return not name.startswith("_") and len(pair) == 2 and all(isinstance(each, str) for each in pair)


def missing_files(folder: Path, models: Mapping[str, str]) -> list[str]:
    """What a folder's parts need and it lacks: folders, configurations, weight files.

    Args:
        folder: The folder that holds model_index.json.
        models: The parts by name: the stem of the weight files of those that have weights, "" for the others.

    Returns:
        Paths relative to the folder; empty where it is complete.

    Raises:
        MrFlowError: A list of shards that cannot be read or names a file outside the part.
    """
    missing = [name for name in models if not (folder / name).is_dir()]
    weighty = {name: stem for name, stem in models.items() if stem and name not in missing}
    missing += [f"{name}/config.json" for name in weighty if not (folder / name / "config.json").is_file()]
    for name, stem in weighty.items():
        files = _weight_files(folder, folder / name, stem)
        missing += [f"{name}/{file.name}" for file in files if not file.is_file()]
    return missing


# --------------------------------------------------------------------------------------------------------------- files


def check_files(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse a folder that would make a library run code, fetch something, or work without end.

    Args:
        folder: The folder that holds model_index.json.
        index: From `read_index`.

    Raises:
        MrFlowError: The first thing that is wrong.
    """
    names = part_names(index)
    for name, value in index.items():
        if not name.startswith("_") and isinstance(value, list) and value not in ([None, None],):
            _check_entry(folder, name, cast("list[Any]", value), names)
    _check_settings(folder, "model_index.json", {name: index[name] for name in index if name not in names})
    for file in _files(folder):
        _check_code(folder, file)
    for name in names:
        check_part(folder, name)


def check_part(folder: Path, name: str) -> None:
    """Refuse a part that would make a library run code, fetch something, or work without end.

    Args:
        folder: The model's.
        name: Of the part, a folder in it.

    Raises:
        MrFlowError: The first thing that is wrong.
    """
    for file in _files(folder / name):
        _check_file(folder, file)


def _check_entry(folder: Path, name: str, value: list[Any], names: list[str]) -> None:
    """Refuse an entry of model_index.json whose name or library is not a plain known one."""
    if not _is_part(name, value):
        if all(not isinstance(each, str) for each in value):  # an option of the pipeline that is a list of numbers
            return
        refuse(folder, f"whose model_index.json has {_quoted(name)} as {_quoted(value)}, not as [library, class]")
    library, kind = (str(each) for each in value)
    if not name.isidentifier() or len(name) > 100:
        refuse(folder, f"whose model_index.json names a part {_quoted(name)}, which is not a name of one")
    known = (
        library in ("diffusers", "transformers") or (library, kind) == OWN_SCHEDULER or library in _pipeline_modules()
    )
    if not known or library in names or not kind.isidentifier():
        refuse(
            folder,
            f"whose {shown(name, 60)} is of {shown(library, 60)}.{shown(kind, 60)}, which neither diffusers nor "
            "transformers has; update them, or give another folder",
        )


def _pipeline_modules() -> frozenset[str]:
    """Names of the modules of pipelines in the installed diffusers, read from its folders without importing it."""
    spec = find_spec("diffusers")
    homes = [] if spec is None else [Path(place) / "pipelines" for place in spec.submodule_search_locations or ()]
    return frozenset(path.parent.name for home in homes for path in home.glob("*/__init__.py"))


def _check_file(folder: Path, file: Path) -> None:
    """Refuse a file of a part that is code, is no plain file, or has settings that no model has."""
    if not file.is_file():
        refuse(folder, f"whose {_within(folder, file)} is not a plain file; download it again")
    name, suffix = file.name, file.suffix.lower()
    _check_code(folder, file)
    if name == "adapter_config.json":
        refuse(folder, f"holds an adapter ({_within(folder, file)}), which is no part of a model; remove it first")
    if suffix != ".safetensors" and suffix in (".json", ".txt", ".model") and file.stat().st_size > _LARGEST_TEXT:
        refuse(folder, f"whose {_within(folder, file)} has {file.stat().st_size:,} bytes, more than any model's")
    if suffix == ".json" and name not in _TABLES and not name.endswith(".index.json"):
        _check_settings(folder, _within(folder, file), read_object(folder, file))


def _check_code(folder: Path, file: Path) -> None:
    if file.suffix.lower() in _CODE:
        refuse(folder, f"holds code ({_within(folder, file)}), which is never run; remove it first")


def _files(place: Path) -> list[Path]:
    """What lies in a folder, by name; folders are left out."""
    if not place.is_dir():
        return []
    return sorted(path for path in place.iterdir() if not path.is_dir())


# ---------------------------------------------------------------------------------------------------------------- JSON


def read_object(folder: Path, file: Path) -> dict[str, Any]:
    """The JSON object in a small file.

    Args:
        folder: The model's, for the sentence.
        file: Within it.

    Returns:
        Its entries.

    Raises:
        MrFlowError: It is too large, nested too deeply, or no JSON object.
    """
    try:
        size = file.stat().st_size
        if size > _LARGEST_JSON:
            refuse(folder, f"whose {_within(folder, file)} has {size:,} bytes, more than any model's")
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        refuse(folder, f"whose {_within(folder, file)} cannot be read (it is nested too deeply)")
    except MrFlowError:
        raise
    except (OSError, ValueError) as error:
        refuse(folder, f"whose {_within(folder, file)} cannot be read ({first_line(error)})", error)
    if not isinstance(found, dict):
        refuse(folder, f"whose {_within(folder, file)} cannot be read (it holds no JSON object)")
    return cast("dict[str, Any]", found)


def _check_settings(folder: Path, file: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings that run or fetch something, and numbers that no model has."""
    network = file.endswith(("/config.json", "/scheduler_config.json"))
    for name, value in _walk(settings):
        said = f"whose {file} has {_quoted(name)}: {_quoted(value)}"
        if name in _REFUSED and value:
            refuse(folder, f"{said}, which {_REFUSED[name]}")
        if name.endswith("attn_implementation") and isinstance(value, str) and not value.isidentifier():
            refuse(folder, f"{said}, which names code to fetch")
        if name == "model_max_length" and not (_is_number(value) and value >= 1):
            refuse(folder, f"{said}, which must be at least 1")
        entries = len(cast("list[Any]", value)) if isinstance(value, list) else 0
        if network and entries > _LONGEST_LIST:
            refuse(folder, f"{said}, which has more entries than any model's")
        if network and _is_number(number := cast("object", value)):
            wrong = _wrong_number(name, number)
            if wrong:
                refuse(folder, f"{said}, which {wrong}")


def _wrong_number(name: str, number: float) -> str:
    """What is wrong with a number in a network's or scheduler's configuration; empty where nothing is."""
    if isinstance(number, int) and number < 0 and name.endswith(_COUNTS):
        return "cannot be negative"
    if isinstance(number, int) and abs(number) > _LARGEST_NUMBER and "theta" not in name:
        return "is more than any model has"
    if name == "num_train_timesteps" and not 1 <= number <= _MOST_TRAINING_STEPS:
        return f"must lie between 1 and {_MOST_TRAINING_STEPS}"
    return ""


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every setting at any depth with its name; items of a list, too, under the name of the list."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        name, found = waiting.pop()
        if isinstance(found, dict):
            inner = cast("dict[str, Any]", found)
            waiting += list(inner.items())
            yield name, inner
        else:
            waiting += [(name, each) for each in cast("list[Any]", found)] if isinstance(found, list) else []
            yield name, found


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class Weights:
    """What the headers of a part's weight files say.

    Attributes:
        numbers: How many numbers they hold.
        tensors: In how many tensors.
    """

    numbers: int
    tensors: int


def weights_of(folder: Path, name: str, stem: str) -> Weights:
    """Read the headers of a part's weight files; no weights are read.

    Args:
        folder: The model's.
        name: Of the part.
        stem: Of the files, by the library that reads them.

    Returns:
        What they hold.

    Raises:
        MrFlowError: A file that is not safetensors, is cut, or lacks a tensor that the list of shards puts in it.
    """
    numbers, tensors = 0, 0
    placed = _placed(folder, folder / name, stem, variant_of(folder, name, stem))
    for file in _weight_files(folder, folder / name, stem):
        try:
            shapes = tensor_shapes(file)
        except Exception as error:  # safetensors has an exception of its own, and passes on those of the system
            refuse(folder, f"whose {name} cannot be read ({first_line(error)}); download it again", error)
        lacking = sorted(key for key, place in placed.items() if place == file.name and key not in shapes)
        if lacking:
            refuse(folder, f"whose {_within(folder, file)} lacks {_quoted(lacking[0])}, which its list puts there")
        numbers += sum(math.prod(shape) for shape in shapes.values())
        tensors += len(shapes)
    return Weights(numbers, tensors)


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, from its header alone.

    Args:
        file: The file.

    Returns:
        Shape by name. What a header says beyond the file's own bytes makes safetensors raise an error.
    """
    from safetensors import safe_open

    opener: Any = safe_open(file, framework="pt")
    with opener as opened:
        return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118


def variant_of(folder: Path, name: str, stem: str) -> str | None:
    """The mark of a part's weight files, where those without one are not all there.

    Args:
        folder: The model's.
        name: Of the part.
        stem: Of the files, by the library that reads them.

    Returns:
        "fp16" or "bf16", as loaders take it; None where files without a mark will do, or none are complete.

    Raises:
        MrFlowError: A list of shards that cannot be read or names a file outside the part.
    """
    for each in (None, *_VARIANTS):
        if all(file.is_file() for file in _files_of_variant(folder, folder / name, stem, each)):
            return each
    return None


def _weight_files(folder: Path, part: Path, stem: str) -> list[Path]:
    """The files that hold a part's weights: its shards where it lists them, else the one that there must be."""
    return _files_of_variant(folder, part, stem, variant_of(folder, part.name, stem))


def _files_of_variant(folder: Path, part: Path, stem: str, variant: str | None) -> list[Path]:
    single = part / f"{stem}{_mark(variant)}.safetensors"
    if stem == TRANSFORMERS_STEM and single.is_file():  # diffusers looks for the list first
        return [single]
    return [part / shard for shard in sorted(set(_placed(folder, part, stem, variant).values()))] or [single]


def _mark(variant: str | None) -> str:
    return "" if variant is None else f".{variant}"


def _placed(folder: Path, part: Path, stem: str, variant: str | None) -> dict[str, str]:
    """In which file a part's list of shards puts each tensor; empty without a list."""
    file = part / f"{stem}.safetensors.index{_mark(variant)}.json"
    if not file.is_file():
        return {}
    listed = read_object(folder, file).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        refuse(folder, f"whose {_within(folder, file)} lists no shards; download it again")
    for shard in cast("dict[str, Any]", listed).values():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and shard.isprintable()
        if not plain or "/" in shard or "\\" in shard:
            refuse(
                folder,
                f"whose {_within(folder, file)} names a shard {_quoted(shard)}; a shard is a .safetensors file beside "
                "it",
            )
    return cast("dict[str, str]", listed)


# --------------------------------------------------------------------------------------------------------- fingerprint


def folder_fingerprint(folder: str | Path, without: Collection[str] = ()) -> str:
    """A fingerprint that changes with the configuration or weights of a folder's parts, without reading gigabytes.

    Hashes every .json and .txt whole and, of each .safetensors, its size, first and last 64 KiB. Parts are the folders
    that model_index.json names; the scheduler is left out, as a plan holds its sigmas.

    Args:
        folder: The folder that holds model_index.json, or a single file.
        without: Parts of the folder that do not count.

    Returns:
        16 hexadecimal digits (SHA-256, shortened).

    Raises:
        MrFlowError: model_index.json is missing, unreadable or names no pipeline.
    """
    root, digest = Path(folder), hashlib.sha256()
    if root.is_file():
        _add_file(digest, "", root)
        return digest.hexdigest()[:16]
    there = set(part_names(read_index(root))) - {"scheduler", *without}
    for part in (*(name for name in _PRINTED if name in there), *sorted(there - set(_PRINTED))):
        for file in sorted(
            path for path in (root / part).glob("*") if path.suffix in (".json", ".txt", ".safetensors")
        ):
            _add_file(digest, part, file)
    return digest.hexdigest()[:16]


def _add_file(digest: Any, part: str, file: Path) -> None:
    size, edge = file.stat().st_size, 65536
    digest.update(f"{part}/{file.name}:{size}\n".encode())
    with file.open("rb") as stream:
        if file.suffix != ".safetensors" or size <= 2 * edge:
            digest.update(stream.read())
            return
        digest.update(stream.read(edge))
        stream.seek(-edge, 2)
        digest.update(stream.read(edge))


# ------------------------------------------------------------------------------------------------------------ sentences


def refuse(folder: Path, what: str, cause: BaseException | None = None) -> NoReturn:
    """Raise the sentence about a folder.

    Args:
        folder: The model's.
        what: "whose vae ..." or "holds ...", foreign text in it made safe.
        cause: The error that told of it.

    Raises:
        MrFlowError: Always.
    """
    joined = what if what.startswith("whose") else f"which {what}"
    raise MrFlowError(f"model is {_named(folder)}, {joined}.") from cause


def _named(folder: Path) -> str:
    return shown(repr(str(folder)), 200)


def _within(folder: Path, file: Path) -> str:
    return shown(file.relative_to(folder).as_posix(), 120)


def _quoted(value: Any) -> str:
    return shown(repr(value), 60)
