"""Local models: diffusers folders, loaded part by part, and single files.

Only safetensors are read and nothing is downloaded. Every part is of a class that diffusers or transformers has: no
Python of a folder is run, whatever its model_index.json names.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import torch

from mrflow_sched._runtime.device import has_bfloat16, resolve_device
from mrflow_sched._runtime.errors import MrFlowError, first_line, quoted, shown
from mrflow_sched.engines.diffusers.checkpoint import read_checkpoint
from mrflow_sched.engines.diffusers.files import (
    check_files,
    folder_fingerprint,
    missing_files,
    part_names,
    read_index,
    refuse,
    weights_of,
)
from mrflow_sched.engines.diffusers.layouts import Layout, find_layout
from mrflow_sched.engines.diffusers.layouts.find import check_from_text
from mrflow_sched.engines.diffusers.parts import (
    check_size,
    is_model,
    load_part,
    part_class,
    pipeline_class,
    quiet_loading,
    skeleton,
    stem_of,
)
from mrflow_sched.engines.diffusers.quiet import leaving_out
from mrflow_sched.engines.diffusers.single_file import (
    as_trained,
    check_single_file,
    config_folder,
    held_parts,
    is_single_file,
    load_single_file,
)
from mrflow_sched.plan.cost import Offload

__all__ = ["check_model", "load_pipeline", "model_fingerprint", "read_layout", "resolve_dtype"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FAMILY = "_mrflow_family"


# ------------------------------------------------------------------------------------------------------------- loading


def load_pipeline(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | Mapping[str, str] = "auto",
    offload: bool | Offload = False,
    config: str | Path | None = None,
) -> Any:
    """The diffusers pipeline in a local folder or file, on its device.

    Args:
        path: The folder that holds model_index.json, or a single-file checkpoint (.safetensors).
        device: "auto" (CUDA if available), or as torch spells it.
        dtype: Of all parts; "auto" is bfloat16 where the hardware multiplies it, else float32, and float32 for the VAE
            on a CPU; or a dtype for each part by name, with "default" (else "auto") for the others.
        offload: On a GPU only: "model" or True keeps each part on the CPU until it is used, "layers" each layer, which
            takes the least memory and is slow.
        config: For a single file: the diffusers folder that describes it, as in `config_folder`.

    Returns:
        The pipeline, of the class that the folder names.

    Raises:
        MrFlowError: A folder that is missing, incomplete, damaged or of no pipeline of this diffusers.
    """
    model, where, waits = _path_of(path, "path"), resolve_device(device), checked_offload(offload)
    if config is not None and model.is_dir():
        raise MrFlowError(f"config={quoted(config)} is for a single file; leave it out for a folder.")
    config = None if config is None else _path_of(config, "config")
    index = check_model(model, config)
    if isinstance(dtype, Mapping):
        for name in set(dtype) - {"default", *part_names(index)}:
            raise MrFlowError(
                f"dtype names {quoted(name)}, which is no part of this model; its parts are "
                f"{', '.join(map(shown, part_names(index)))}, and 'default' stands for the others."
            )
    dtypes = {name: _dtype_of_part(name, dtype, where) for name in part_names(index)}
    if is_single_file(model):
        pipe = load_single_file(model, config, dtypes)
    else:
        with quiet_loading():
            pipe = _assembled(model, index, lambda name, kind: load_part(model, name, kind, dtypes[name]))
    if _FAMILY in index:  # the family that its maker names
        pipe.register_to_config(**{_FAMILY: str(index[_FAMILY])})
    vae = getattr(pipe, "vae", None)
    if vae is not None and all(weight.ndim < 5 for weight in vae.parameters()):  # 5: convolutions of a video VAE
        vae.to(memory_format=torch.channels_last)  # convolutions of images are about twice as fast so on a CPU
    if waits is not None and where.type != "cpu":
        move = pipe.enable_model_cpu_offload if waits == "model" else pipe.enable_sequential_cpu_offload
        move(device=where)
        return pipe
    with leaving_out("cannot run with `cpu` device"):  # float16, which runs there, or fails with an error
        return pipe.to(where)


def checked_offload(offload: object) -> Offload | None:
    """What waits on the CPU.

    Args:
        offload: True, False, None, "model" or "layers".

    Returns:
        "model", "layers", or None for nothing.

    Raises:
        MrFlowError: It is anything else.
    """
    if offload is None or isinstance(offload, bool):
        return "model" if offload else None
    for name in get_args(Offload):
        if offload == name:
            return name
    raise MrFlowError(f"offload must be True, False, 'model' or 'layers', got {quoted(offload)}.")


def check_model(path: Path, config: str | Path | None = None) -> dict[str, Any]:
    """Look through a model as far as that is possible without reading its weights.

    Args:
        path: The folder that holds model_index.json, or a single-file checkpoint.
        config: For a single file: as in `config_folder`.

    Returns:
        The entries of its model_index.json.

    Raises:
        MrFlowError: It is missing, incomplete or damaged, would run code, or its weight files cannot fill its networks.
    """
    if is_single_file(path):
        return check_single_file(path, config)
    return _check_folder(path)


def _check_folder(folder: Path) -> dict[str, Any]:
    index = read_index(folder)
    check_files(folder, index)
    pipeline_class(folder, index)
    kinds = {name: part_class(folder, name, index[name]) for name in part_names(index)}
    stems = {name: stem_of(kind) if is_model(kind) else "" for name, kind in kinds.items()}
    missing = missing_files(folder, stems)
    if missing:
        refuse(folder, f"lacks {', '.join(shown(each) for each in missing[:20])}; download it whole and try again")
    with quiet_loading():
        for name, kind in kinds.items():
            if is_model(kind):
                held = weights_of(folder, name, stems[name])
                check_size(folder, name, skeleton(folder, name, kind, held), held)
    return index


def read_layout(path: str | Path, family: str | None = None, *, config: str | Path | None = None) -> Layout:
    """The layout of the pipeline in a local folder, read from its configurations alone; no weights are loaded.

    So a plan can be made, and a folder checked, before gigabytes are read. Text encoders are left out, so the layout
    can answer questions but not sample.

    Args:
        path: The folder that holds model_index.json, or a single-file checkpoint.
        family: Name of its family; None: read from the folder or its networks.
        config: For a single file: as in `config_folder`.

    Returns:
        The layout, around a pipeline whose networks have no memory.

    Raises:
        MrFlowError: A folder that holds no supported pipeline, or would run code.
    """
    alone = is_single_file(Path(path))
    folder = config_folder(Path(path), config) if alone else Path(path)
    index = read_index(folder)
    check_files(folder, index)
    check_from_text(pipeline_class(folder, index))

    def build(name: str, kind: Any, tokenizers: bool = False) -> Any:
        if not hasattr(kind, "load_config"):  # a part of transformers: a text encoder, a tokenizer
            return load_part(folder, name, kind, None) if tokenizers and not is_model(kind) else None
        if is_model(kind):
            return skeleton(folder, name, kind, None)
        part = load_part(folder, name, kind, None)
        return as_trained(part, read_checkpoint(Path(path))) if alone and name == "scheduler" else part

    try:
        pipe = _assembled(folder, index, build)
    except MrFlowError:  # some constructors ask their tokenizer or processor, which takes long to read
        pipe = _assembled(folder, index, functools.partial(build, tokenizers=True))
    return find_layout(pipe, family or (str(index[_FAMILY]) if _FAMILY in index else None))


def model_fingerprint(path: str | Path, config: str | Path | None = None) -> str:
    """A fingerprint of all weights and settings that a model is loaded from, as `folder_fingerprint` makes it.

    Args:
        path: The folder that holds model_index.json, or a single-file checkpoint.
        config: For a single file: as in `config_folder`.

    Returns:
        16 hexadecimal digits.

    Raises:
        MrFlowError: There is no such model.
    """
    model = Path(path)
    if not is_single_file(model):
        return folder_fingerprint(model)
    folder = config_folder(model, config)
    prints = folder_fingerprint(model) + folder_fingerprint(folder, held_parts(model, folder))
    return hashlib.sha256(prints.encode()).hexdigest()[:16]


def _assembled(folder: Path, index: Mapping[str, Any], part: Callable[[str, Any], Any]) -> Any:
    """A pipeline of the folder's class, built from what `part(name, class)` returns for each part that it takes."""
    kind = pipeline_class(folder, index)
    known, named = inspect.signature(kind.__init__).parameters, part_names(index)
    parts: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_") or name not in known:  # a newer diffusers may have written the folder
            continue
        parts[name] = part(name, part_class(folder, name, value)) if name in named else value
        if value == [None, None]:
            parts[name] = None
    try:
        pipe = kind(**parts)
    except Exception as error:  # constructors read whatever they like of their parts' configurations
        advice = "install what it names" if isinstance(error, ImportError) else "download it again"
        refuse(folder, f"whose parts do not make a {kind.__name__} ({first_line(error)}); {advice}", cause=error)
    pipe.register_to_config(_name_or_path=str(folder))  # as the pipeline's own loader writes down
    return pipe


def _path_of(given: object, name: str) -> Path:
    if not isinstance(given, (str, os.PathLike)):
        kind = "None" if given is None else type(given).__name__
        raise MrFlowError(f"{name} is {kind}; give the path of a local diffusers folder or checkpoint.")
    return Path(cast("str | os.PathLike[str]", given))


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
    if not isinstance(cast("object", dtype), str) or dtype not in _DTYPES:
        raise MrFlowError(f"dtype is {quoted(dtype)}; use auto, {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]


def _dtype_of_part(name: str, dtype: str | torch.dtype | Mapping[str, str], device: torch.device) -> torch.dtype:
    asked = dtype.get(name, dtype.get("default", "auto")) if isinstance(dtype, Mapping) else dtype
    if asked == "auto" and name == "vae" and device.type == "cpu":
        return torch.float32  # half precision gains nothing there, and costs accuracy
    return resolve_dtype(asked, device)
