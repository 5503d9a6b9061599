"""Single-file checkpoints: a .safetensors with the whole model, or its network alone, as most hosts keep them.

diffusers converts the weights (`from_single_file`). What the file lacks, the pipeline's class and configurations first
of all, comes from a diffusers folder of the same model on this machine; nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mrflow_sched._runtime.errors import MrFlowError, first_line, shown
from mrflow_sched.engines.diffusers.files import (
    Weights,
    check_files,
    missing_files,
    part_names,
    read_index,
    refuse,
    tensor_shapes,
    weights_of,
)
from mrflow_sched.engines.diffusers.parts import (
    check_size,
    convert,
    is_model,
    load_part,
    part_class,
    pipeline_class,
    quiet_loading,
    skeleton,
    stem_of,
)

__all__ = ["check_single_file", "config_folder", "is_single_file", "load_single_file"]

_NETWORKS = ("transformer", "unet")
_BESIDE_THE_NETWORK = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoder")
"""How the tensors of VAE and text encoders begin in checkpoints of the original Stable Diffusion code and of hosts."""

_OTHER_FORMATS = (".ckpt", ".pt", ".pth", ".bin", ".gguf", ".sft")


def is_single_file(path: Path) -> bool:
    """Whether a model is a checkpoint file rather than a folder.

    Args:
        path: What the user gave.

    Returns:
        True for files, and for names that only a file would have.
    """
    return path.is_file() or path.suffix.lower() in (".safetensors", *_OTHER_FORMATS)


def config_folder(file: Path, config: str | Path | None) -> Path:
    """The folder whose configurations describe a checkpoint file.

    Args:
        file: The checkpoint.
        config: The folder that was asked for; None: one of the file's name beside it, else the folder it lies in.

    Returns:
        A folder with a model_index.json.

    Raises:
        MrFlowError: The file does not exist or is of another format, or there is no such folder.
    """
    if not file.is_file():
        raise MrFlowError(f"model is {_named(file)}, which does not exist; give a diffusers folder or a .safetensors.")
    if file.suffix.lower() != ".safetensors":
        raise MrFlowError(
            f"model is {_named(file)}, which is not a .safetensors file; convert it with the host that made it, or "
            "give a diffusers folder."
        )
    places = [file.with_suffix(""), file.parent] if config is None else [Path(config)]
    found = next((place for place in places if (place / "model_index.json").is_file()), None)
    if found is None and config is not None:
        raise MrFlowError(
            f"config is {_named(Path(config))}, which has no model_index.json; give a diffusers folder of the model "
            "that the file was made from."
        )
    if found is None:
        raise MrFlowError(
            f"model is {_named(file)}, a single file, which lacks the settings of its pipeline; give them with config "
            "(--model-config): a diffusers folder of the model that it was made from, of which the small files suffice "
            "where the checkpoint holds all weights."
        )
    return found


def check_single_file(file: Path, config: str | Path | None) -> dict[str, Any]:
    """Look through a checkpoint file and its configuration as far as that is possible without reading weights.

    Args:
        file: The checkpoint.
        config: As in `config_folder`.

    Returns:
        The entries of the configuration's model_index.json.

    Raises:
        MrFlowError: As in `config_folder`; the file is damaged, or cannot fill the networks that are described.
    """
    folder = config_folder(file, config)
    index = read_index(folder)
    check_files(folder, index)
    pipeline = pipeline_class(folder, index)
    if not hasattr(pipeline, "from_single_file"):
        raise MrFlowError(
            f"model is {_named(file)}, and diffusers reads no single files for {pipeline.__name__}; give the diffusers "
            "folder of the model."
        )
    try:
        shapes = tensor_shapes(file)
    except Exception as error:  # safetensors has an exception of its own, and passes on those of the system
        raise MrFlowError(
            f"model is {_named(file)}, which cannot be read ({first_line(error)}); download it again."
        ) from error
    alone = _network_alone(shapes)
    held = Weights(sum(math.prod(shape) for shape in shapes.values()), len(shapes))
    needed = 0
    with quiet_loading():
        for name in part_names(index):
            kind = part_class(folder, name, index[name])
            if not (folder / name).is_dir():
                refuse(folder, f"lacks {name}; give a folder with the settings of all parts")
            if not is_model(kind):
                continue
            missing = missing_files(folder, {name: stem_of(kind)})
            if missing and alone and name not in _NETWORKS:
                raise MrFlowError(
                    f"model is {_named(file)}, which holds the network alone, and {_named(folder)} lacks "
                    f"{shown(missing[0])}; give the config of a whole diffusers folder."
                )
            if missing or (alone and name in _NETWORKS):
                _check_pickles(folder, name)
                needed += sum(each.numel() for each in skeleton(folder, name, kind, held).parameters())
            else:
                own = weights_of(folder, name, stem_of(kind))
                check_size(folder, name, skeleton(folder, name, kind, own), own)
    if needed > 1.5 * held.numbers + 1000:
        raise MrFlowError(
            f"model is {_named(file)}, which holds {held.numbers:,} weights, while {_named(folder)} describes parts of "
            f"{needed:,} without weights of their own; give a folder that has the weights the file lacks."
        )
    return index


def load_single_file(file: Path, config: str | Path | None, dtypes: Mapping[str, torch.dtype]) -> Any:
    """The diffusers pipeline in a checkpoint file, on the CPU.

    Args:
        file: The checkpoint.
        config: As in `config_folder`.
        dtypes: Of each part that the configuration names.

    Returns:
        The pipeline, of the class that the configuration names.

    Raises:
        MrFlowError: The file is not a checkpoint of that pipeline.
    """
    folder = config_folder(file, config)
    index = read_index(folder)
    kind = pipeline_class(folder, index)
    dtype = next((dtypes[name] for name in _NETWORKS if name in dtypes), torch.float32)
    parts: dict[str, Any] = {}
    if _network_alone(tensor_shapes(file)):
        classes = {name: part_class(folder, name, index[name]) for name in part_names(index) if name not in _NETWORKS}
        with quiet_loading():
            parts = {name: load_part(folder, name, each, dtypes[name]) for name, each in classes.items()}
    try:
        with quiet_loading():
            pipe = kind.from_single_file(
                str(file), config=str(folder), local_files_only=True, torch_dtype=dtype, **parts
            )
    except Exception as error:  # the conversions look for the keys that they know, and fail in many ways
        raise MrFlowError(
            f"model is {_named(file)}, which is not a checkpoint of {kind.__name__} as {_named(folder)} describes it "
            f"({first_line(error)}); give the config of the model that it was made from."
        ) from error
    for name, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        lacking = [key for key, weight in part.named_parameters() if weight.is_meta]
        if lacking:
            raise MrFlowError(
                f"model is {_named(file)}, which lacks {len(lacking)} weights of the {name}, first {lacking[0]!r}."
            )
        convert(part, dtypes.get(name, dtype))
        part.eval().requires_grad_(False)
    return pipe


def _network_alone(names: Iterable[str]) -> bool:
    """Whether a checkpoint holds the network without VAE and text encoders, by the names of its tensors."""
    return not any(name.startswith(_BESIDE_THE_NETWORK) for name in names)


def _check_pickles(folder: Path, name: str) -> None:
    """Refuse weights that diffusers would read by unpickling them."""
    found = sorted((folder / name).glob("*.bin"))
    if found:
        refuse(
            folder, f"whose {name} has weights in {shown(found[0].name)}; keep them as .safetensors, or leave them out"
        )


def _named(path: Path) -> str:
    return shown(repr(str(path)), 200)
