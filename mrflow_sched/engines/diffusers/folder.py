"""Local diffusers folders: their contents, loading them part by part, their fingerprint.

Only safetensors are read and nothing is downloaded. Every part is of a class that diffusers or transformers has: no
Python of a folder is run, whatever its model_index.json names. A weight that a file lacks is an error, never a guess.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from mrflow_sched._runtime.device import has_bfloat16, resolve_device
from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched.engines.diffusers.layouts import Layout, find_layout

__all__ = ["folder_fingerprint", "load_pipeline", "missing_files", "prepare_imports", "read_layout", "resolve_dtype"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ADVICE = "give a local diffusers folder, the one that holds model_index.json"
_PRINTED = ("transformer", "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
"""Parts that a fingerprint takes first, in this order; the others follow by name, without the scheduler."""
_FAMILY = "_mrflow_family"


# ------------------------------------------------------------------------------------------------------------- loading


def load_pipeline(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | Mapping[str, str] = "auto",
    offload: bool = False,
) -> Any:
    """The diffusers pipeline in a local folder, on its device.

    Args:
        path: The folder that holds model_index.json.
        device: "auto" (CUDA if available), or as torch spells it.
        dtype: Of all parts; "auto" is bfloat16 where the hardware multiplies it, else float32, and float32 for the VAE
            on a CPU; or a dtype for each part by name, with "default" (else "auto") for the others.
        offload: Keep each part on the CPU until it is used (on a GPU only).

    Returns:
        The pipeline, of the class that the folder names.

    Raises:
        MrFlowError: A folder that is missing, incomplete, damaged or of no pipeline of this diffusers.
    """
    prepare_imports()
    folder = Path(path)
    index = read_index(folder)
    missing = missing_files(folder, index)
    if missing:
        raise MrFlowError(
            f"model is {str(folder)!r}, which lacks {', '.join(missing)}; download it whole and try again."
        )
    where = resolve_device(device)
    dtypes = {name: _dtype_of_part(name, dtype, where) for name, value in index.items() if _is_part(name, value)}

    def load(name: str, kind: Any) -> Any:
        return _load_part(folder, name, kind, dtypes[name])

    with quiet_loading():
        pipe = _assembled(folder, index, load)
    vae = getattr(pipe, "vae", None)
    if vae is not None and all(weight.ndim < 5 for weight in vae.parameters()):  # 5: convolutions of a video VAE
        vae.to(memory_format=torch.channels_last)  # convolutions of images are about twice as fast so on a CPU
    if offload and where.type != "cpu":
        pipe.enable_model_cpu_offload(device=where)
        return pipe
    return pipe.to(where)


def read_layout(path: str | Path, family: str | None = None) -> Layout:
    """The layout of the pipeline in a local folder, read from its configurations alone; no weights are loaded.

    So a plan can be made, and a folder checked, before gigabytes are read. Text encoders are left out, so the layout
    can answer questions but not sample.

    Args:
        path: The folder that holds model_index.json.
        family: Name of its family; None: read from the folder or its networks.

    Returns:
        The layout, around a pipeline whose networks have no memory.

    Raises:
        MrFlowError: A folder that holds no supported pipeline.
    """
    prepare_imports()
    folder = Path(path)
    index = read_index(folder)

    def build(name: str, kind: Any) -> Any:
        if not hasattr(kind, "load_config"):  # a part of transformers: a text encoder, a tokenizer
            return None
        config = kind.load_config(folder / name, local_files_only=True)
        with torch.device("meta" if _is_model(kind) else "cpu"):
            return kind.from_config(config)

    try:
        pipe = _assembled(folder, index, build)
    except MrFlowError:
        raise
    except Exception as error:  # whatever building a network from a damaged configuration may raise
        raise MrFlowError(
            f"model is {str(folder)!r}, whose configuration cannot be read ({first_line(error)}); "
            "download it again, or update diffusers."
        ) from error
    return find_layout(pipe, family)


def _assembled(folder: Path, index: Mapping[str, Any], part: Callable[[str, Any], Any]) -> Any:
    """A pipeline of the folder's class, built from what `part(name, class)` returns for each part that it takes."""
    kind = _pipeline_class(folder, index)
    known = inspect.signature(kind.__init__).parameters
    parts: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_") or name not in known:  # a newer diffusers may have written the folder
            continue
        parts[name] = part(name, _part_class(folder, name, value)) if _is_part(name, value) else value
        if value == [None, None]:
            parts[name] = None
    try:
        pipe = kind(**parts)
    except TypeError as error:
        raise MrFlowError(
            f"model is {str(folder)!r}, whose parts do not make a {kind.__name__} ({first_line(error)}); download it "
            "again."
        ) from error
    # What the pipeline's own loader writes down: where it came from, and the family that its maker names.
    pipe.register_to_config(_name_or_path=str(folder))
    if _FAMILY in index:
        pipe.register_to_config(**{_FAMILY: str(index[_FAMILY])})
    return pipe


def _is_part(name: str, value: Any) -> bool:
    """Whether an entry of model_index.json names a part: [library, class]; [null, null] stands for one left out."""
    pair = cast("list[Any]", value) if isinstance(value, list) else []
    return not name.startswith("_") and len(pair) == 2 and all(isinstance(each, str) for each in pair)


def _pipeline_class(folder: Path, index: Mapping[str, Any]) -> Any:
    import diffusers

    library, name = cast("Any", diffusers), str(index["_class_name"])
    kind = getattr(library, name, None) if name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, library.DiffusionPipeline)):
        raise MrFlowError(
            f"model is {str(folder)!r}, made for {name:.60}, which diffusers {library.__version__} does not have; "
            "update diffusers, or give another folder."
        )
    return kind


def _part_class(folder: Path, name: str, value: Sequence[Any]) -> Any:
    """The class of a part: one that diffusers or transformers has, or a pipeline of diffusers brings."""
    import diffusers
    import transformers

    origin, kind = (str(each) for each in value)
    libraries: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    home = libraries.get(origin) or getattr(libraries["diffusers"].pipelines, origin, None)
    found = getattr(home, kind, None) if kind.isidentifier() and home is not None else None
    if not isinstance(found, type):
        raise MrFlowError(
            f"model is {str(folder)!r}, whose {name:.60} is of {origin:.60}.{kind:.60}, which neither diffusers nor "
            "transformers has; update them, or give another folder."
        )
    return found


def _load_part(folder: Path, name: str, kind: Any, dtype: torch.dtype) -> Any:
    """One part from its folder; models in `dtype`, ready to run, with every weight that they need."""
    more: dict[str, Any] = {}
    if _is_model(kind):
        library = _library_of(kind)
        more = {"use_safetensors": True, "output_loading_info": True, _dtype_argument(library): dtype}
    try:
        loaded = kind.from_pretrained(folder / name, local_files_only=True, **more)
    except Exception as error:  # whatever a reader of a damaged file may raise: several libraries are involved
        raise MrFlowError(
            f"model is {str(folder)!r}, whose {name} cannot be read ({first_line(error)}); download it again."
        ) from error
    if not more:
        return loaded
    model, report = loaded
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise MrFlowError(f"model is {str(folder)!r}, whose {name} lacks {len(lacking)} weights, first {lacking[0]!r}.")
    return model.eval().requires_grad_(False)


def _is_model(kind: Any) -> bool:
    """Whether a part's class has weights."""
    return issubclass(kind, torch.nn.Module)


def _library_of(kind: type) -> Any:
    import diffusers
    import transformers

    return transformers if issubclass(kind, transformers.PreTrainedModel) else diffusers


# --------------------------------------------------------------------------------------------------------------- dtype


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A torch dtype by its name.

    Args:
        dtype: "float32", "bfloat16", "float16", a torch dtype, or "auto": bfloat16 where the hardware multiplies it
            (`has_bfloat16`), else float32.
        device: Where it will be used; decides "auto".

    Returns:
        The dtype.

    Raises:
        MrFlowError: An unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    if dtype not in _DTYPES:
        raise MrFlowError(f"dtype is {dtype!r}; use auto, {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]


def _dtype_of_part(name: str, dtype: str | torch.dtype | Mapping[str, str], device: torch.device) -> torch.dtype:
    asked = dtype.get(name, dtype.get("default", "auto")) if isinstance(dtype, Mapping) else dtype
    if asked == "auto" and name == "vae" and device.type == "cpu":
        return torch.float32  # half precision gains nothing there, and costs accuracy
    return resolve_dtype(asked, device)


def _dtype_argument(library: Any) -> str:
    """The argument that gives a loader of diffusers or transformers the dtype; newer ones warn about the old name."""
    renamed = {"diffusers": (0, 42), "transformers": (4, 56)}[library.__name__]
    return "dtype" if tuple(int(part) for part in library.__version__.split(".")[:2]) >= renamed else "torch_dtype"


# --------------------------------------------------------------------------------------------------------------- files


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
        raise MrFlowError(f"model is {str(folder)!r}, which is not a folder; {_ADVICE}.")
    try:
        index: Any = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MrFlowError(f"model is {str(folder)!r}, which has no model_index.json; {_ADVICE}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise MrFlowError(f"model is {str(folder)!r}, whose model_index.json cannot be read; {_ADVICE}.") from error
    entries = cast("dict[str, Any]", index) if isinstance(index, dict) else {}
    if not isinstance(entries.get("_class_name"), str):
        raise MrFlowError(f"model is {str(folder)!r}, whose model_index.json names no pipeline; {_ADVICE}.")
    return entries


def missing_files(folder: Path, index: Mapping[str, Any]) -> list[str]:
    """What a folder's parts need and it lacks: folders, configurations, weight files.

    Args:
        folder: The folder that holds model_index.json.
        index: Its entries, from `read_index`.

    Returns:
        Paths relative to the folder; empty where it is complete.

    Raises:
        MrFlowError: A part is of a class that neither diffusers nor transformers has.
    """
    prepare_imports()
    parts = [name for name, value in index.items() if _is_part(name, value)]
    missing = [name for name in parts if not (folder / name).is_dir()]
    kinds = {name: _part_class(folder, name, index[name]) for name in parts if name not in missing}
    models = [name for name, kind in kinds.items() if _is_model(kind)]
    missing += [f"{name}/config.json" for name in models if not (folder / name / "config.json").is_file()]
    return missing + [file for name in models for file in _missing_weights(folder / name)]


def _missing_weights(part: Path) -> list[str]:
    """Names of the weight files that a part needs and lacks."""
    indexes = sorted(part.glob("*.safetensors.index.json"))
    if not indexes:
        return [] if any(part.glob("*.safetensors")) else [f"{part.name}/*.safetensors"]
    try:
        shards = set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values())
        return [f"{part.name}/{shard}" for shard in sorted(shards) if not (part / shard).is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"{part.name}/{indexes[0].name} in readable form"]


def folder_fingerprint(folder: str | Path) -> str:
    """A fingerprint that changes with the configuration or weights of a folder's parts, without reading gigabytes.

    Hashes every .json and .txt whole and, of each .safetensors, its size, first and last 64 KiB. Parts are the folders
    that model_index.json names; the scheduler is left out, as a plan holds its sigmas.

    Args:
        folder: The folder that holds model_index.json.

    Returns:
        16 hexadecimal digits (SHA-256, shortened).

    Raises:
        MrFlowError: model_index.json is missing, unreadable or names no pipeline.
    """
    root, digest = Path(folder), hashlib.sha256()
    there = {name for name, value in read_index(root).items() if _is_part(name, value) and name != "scheduler"}
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


# ------------------------------------------------------------------------------------------------------------- imports


def prepare_imports() -> None:
    """Make diffusers and transformers importable.

    Both import torchvision, which fails where its operators do not match torch.
    """
    from mrflow_sched._runtime import torchvision_ops

    torchvision_ops.ensure_ops()


@contextlib.contextmanager
def quiet_loading() -> Generator[None, None, None]:
    """Silence the progress bars and log messages of both libraries' loaders, and restore their settings afterwards.

    Yields:
        Nothing; the settings hold inside the `with` block.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    # The oldest diffusers we support cannot say whether its bars are on; they are unless somebody turned them off.
    before = [(each.get_verbosity(), getattr(each, "is_progress_bar_enabled", lambda: True)()) for each in loggers]
    try:
        for logger in loggers:
            logger.set_verbosity_error()
            logger.disable_progress_bar()
        yield
    finally:
        for logger, (verbosity, bars) in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
            if bars:
                logger.enable_progress_bar()
