"""Single-file checkpoints: a .safetensors with the whole model, or its network alone, as most hosts keep them.

diffusers converts the weights (`from_single_file`). What the file lacks, the pipeline's class and configurations first
of all, comes from a diffusers folder of the same model on this machine; nothing is downloaded.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch

from mrflow_sched._runtime.errors import MrFlowError, first_line, shown
from mrflow_sched.engines.diffusers.checkpoint import Checkpoint, named, read_checkpoint
from mrflow_sched.engines.diffusers.files import (
    check_files,
    missing_files,
    part_names,
    read_index,
    refuse,
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

__all__ = ["as_trained", "check_single_file", "config_folder", "held_parts", "is_single_file", "load_single_file"]

_OPTIONAL = ("safety_checker",)
"""Parts that a pipeline does without; single files never hold them."""

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
        MrFlowError: The file does not exist, is no checkpoint of a model, or there is no such folder.
    """
    if not file.is_file():
        raise MrFlowError(f"model is {named(file)}, which does not exist; give a diffusers folder or a .safetensors.")
    if file.suffix != ".safetensors":
        renamed = "rename it so" if file.suffix.lower() == ".safetensors" else "convert it with the host that made it"
        raise MrFlowError(
            f"model is {named(file)}, whose name does not end in .safetensors; {renamed}, or give a diffusers folder."
        )
    checkpoint = read_checkpoint(file)
    places = [file.with_suffix(""), file.parent] if config is None else [Path(config)]
    found = next((place for place in places if (place / "model_index.json").is_file()), None)
    if found is None and config is not None:
        raise MrFlowError(
            f"config is {named(Path(config))}, which has no model_index.json; give a diffusers folder of the model "
            f"that the file was made from{_download(checkpoint)}."
        )
    if found is None:
        kind = "" if checkpoint.kind is None else f" of {checkpoint.kind.title}"
        raise MrFlowError(
            f"model is {named(file)}, a single file{kind}, which lacks the settings of its pipeline; give them with "
            "config (--model-config DIR): a diffusers folder of the model that it was made from"
            f"{_download(checkpoint)}."
        )
    return found


def _download(checkpoint: Checkpoint, *, whole: bool = False) -> str:
    """The line that gets a folder for a checkpoint: without weights where the file holds all of them."""
    if checkpoint.kind is None or not checkpoint.kind.repository:
        return ""
    small = ' --include "*.[jt]*"' if checkpoint.whole and not whole else ""
    return f" (for example: hf download {checkpoint.kind.repository}{small} --local-dir DIR)"


def check_single_file(file: Path, config: str | Path | None) -> dict[str, Any]:
    """Look through a checkpoint file and its configuration as far as that is possible without reading weights.

    Args:
        file: The checkpoint.
        config: As in `config_folder`.

    Returns:
        The entries of the configuration's model_index.json.

    Raises:
        MrFlowError: As in `config_folder`; the file is of another model, or cannot fill the networks that are
            described.
    """
    folder = config_folder(file, config)
    index = read_index(folder)
    check_files(folder, index)
    pipeline = pipeline_class(folder, index)
    checkpoint = read_checkpoint(file)
    if checkpoint.kind is not None and not re.match(checkpoint.kind.pipelines, pipeline.__name__):
        raise MrFlowError(
            f"model is {named(file)}, a file of {checkpoint.kind.title}, while {named(folder)} describes a "
            f"{pipeline.__name__}; give the config of the model that it was made from{_download(checkpoint)}."
        )
    if not hasattr(pipeline, "from_single_file"):
        raise MrFlowError(
            f"model is {named(file)}, and diffusers reads no single files for {pipeline.__name__}; give the diffusers "
            "folder of the model."
        )
    if find_spec("accelerate") is None:  # without it, diffusers fills what a file lacks with random numbers
        raise MrFlowError(f"model is {named(file)}, a single file, which needs the package accelerate; install it.")
    with quiet_loading():
        for name in part_names(index):
            kind = part_class(folder, name, index[name])
            if name in _OPTIONAL:
                continue
            if not (folder / name).is_dir():
                refuse(folder, f"lacks {name}; give a folder with the settings of all parts")
            if is_model(kind):
                _check_part(checkpoint, folder, name, kind)
    return index


def _check_part(checkpoint: Checkpoint, folder: Path, name: str, kind: Any) -> None:
    """Refuse a part whose weights neither the file nor the folder has."""
    held = checkpoint.part(name, kind)
    if held is not None:
        network = skeleton(folder, name, kind, held)
        weights = sum(each.numel() for each in network.parameters())
        stored = sum(each.numel() for each in network.state_dict().values())
        if weights > 1.2 * held.numbers + 1000 or held.numbers > 1.2 * stored + 1000:
            raise MrFlowError(
                f"model is {named(checkpoint.file)}, which holds {held.numbers:,} weights of the {name}, while "
                f"{named(folder)} describes one of {weights:,}; give the config of the model that it was made from."
            )
        return
    missing = missing_files(folder, {name: stem_of(kind)})
    if missing:
        raise MrFlowError(
            f"model is {named(checkpoint.file)}, which holds no {name}, and {named(folder)} lacks "
            f"{shown(missing[0])}; give the config of a whole diffusers folder{_download(checkpoint, whole=True)}."
        )
    own = weights_of(folder, name, stem_of(kind))
    check_size(folder, name, skeleton(folder, name, kind, own), own)


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
    index, checkpoint = read_index(folder), read_checkpoint(file)
    pipeline = pipeline_class(folder, index)
    known, held = inspect.signature(pipeline.__init__).parameters, held_parts(file, folder)
    parts: dict[str, Any] = {}
    part = ""  # that is read
    left: list[torch.dtype] = []  # of the text encoders that the pipeline's own loader takes from the file
    try:
        with quiet_loading():
            for name in (each for each in part_names(index) if each in known):
                kind = part_class(folder, name, index[name])
                if name not in held:
                    optional = name in _OPTIONAL and missing_files(folder, {name: stem_of(kind)})
                    parts[name] = None if optional else load_part(folder, name, kind, dtypes[name])
                elif hasattr(kind, "from_single_file"):
                    part = name
                    parts[name] = kind.from_single_file(
                        str(file), config=str(folder), subfolder=name, local_files_only=True, torch_dtype=dtypes[name]
                    )
                else:
                    left.append(dtypes[name])
            part = "text encoders"
            parts["scheduler"] = as_trained(parts["scheduler"], checkpoint)
            widest = max(left, key=lambda each: each.itemsize, default=torch.float32)
            pipe = pipeline.from_single_file(
                str(file), config=str(folder), local_files_only=True, torch_dtype=widest, **parts
            )
    except MrFlowError:
        raise
    except Exception as error:  # the conversions look for the keys that they know, and fail in many ways
        lacking = isinstance(error, NotImplementedError)  # what torch raises for weights that were given no values
        why = f"it lacks weights of the {part}" if lacking else first_line(error)
        raise MrFlowError(
            f"model is {named(file)}, which is not a checkpoint of {pipeline.__name__} as {named(folder)} describes it "
            f"({why}); give the config of the model that it was made from."
        ) from error
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            _finish(file, name, part, dtypes.get(name, widest))
    return pipe


def _finish(file: Path, name: str, part: Any, dtype: torch.dtype) -> None:
    """Make a network that was read from a file ready to run; refuse one that lacks a weight."""
    if hasattr(part, "tie_weights"):  # weights of transformers under two names, of which files hold one
        part.tie_weights()
    lacking = [key for key, weight in part.named_parameters() if weight.is_meta]
    if lacking:
        raise MrFlowError(
            f"model is {named(file)}, which lacks {len(lacking)} weights of the {name}, first {lacking[0]!r}."
        )
    convert(part, dtype)
    part.eval().requires_grad_(False)


def held_parts(file: Path, folder: Path) -> frozenset[str]:
    """The parts of a pipeline that come from a checkpoint rather than from the folder that describes it.

    Args:
        file: The checkpoint.
        folder: From `config_folder`.

    Returns:
        Their names.
    """
    index, checkpoint = read_index(folder), read_checkpoint(file)
    kinds = {name: part_class(folder, name, index[name]) for name in part_names(index)}
    return frozenset(name for name, kind in kinds.items() if is_model(kind) and checkpoint.part(name, kind) is not None)


def as_trained(scheduler: Any, checkpoint: Checkpoint) -> Any:
    """The scheduler of a pipeline, changed to what the author of a checkpoint says in it about its training.

    Args:
        scheduler: The one of the folder that describes the checkpoint.
        checkpoint: The file.

    Returns:
        A scheduler of the same class, or of an EDM model.

    Raises:
        MrFlowError: It is an EDM model that does not say its noise, and `scheduler` is none of such models.
    """
    if checkpoint.edm and scheduler.config.get("sigma_data") is None:
        if checkpoint.edm_ends is None:
            raise MrFlowError(
                f"model is {named(checkpoint.file)}, an EDM model such as Playground 2.5; give the config of its own "
                "diffusers folder (for example: hf download playgroundai/playground-v2.5-1024px-aesthetic)."
            )
        from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler

        low, high = checkpoint.edm_ends
        return EDMEulerScheduler(low, high, 1.0, "exponential", prediction_type="v_prediction")
    said: dict[str, Any] = {"prediction_type": "v_prediction"} if checkpoint.v_prediction else {}
    if checkpoint.zero_snr:
        said["rescale_betas_zero_snr"] = True
    return cast("Any", type(scheduler)).from_config(scheduler.config, **said) if said else scheduler
