"""Loading a diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch

from mrflow_sched._runtime.device import resolve_device
from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched.engines.diffusers.flux import (
    dtype_word,
    prepare_imports,
    quiet_loading,
    resolve_dtype,
)
from mrflow_sched.engines.diffusers.layouts import Layout, find_layout
from mrflow_sched.engines.diffusers.layouts.base import takes


def load_pipeline(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    offload: bool = False,
) -> Any:
    """The diffusers pipeline in a local folder, on its device; nothing is downloaded and only safetensors are read.

    `dtype="auto"` is bfloat16 where the hardware multiplies it, else float32. With `offload`, each module waits on the
    CPU and visits the device only while it works. Raises ValueError, in one sentence, for a folder that is missing,
    incomplete, damaged or of no pipeline.
    """
    prepare_imports()
    import diffusers
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    folder = Path(path)
    if not (folder / "model_index.json").is_file():
        raise MrFlowError(
            f"model is {str(folder)!r}, which has no model_index.json; give a local diffusers folder, as "
            "save_pretrained writes it."
        )
    where = resolve_device(device)
    loader: Any = DiffusionPipeline
    try:
        with quiet_loading():
            told = {dtype_word(diffusers): resolve_dtype(dtype, where)}
            pipe = loader.from_pretrained(folder, **told, local_files_only=True, use_safetensors=True)
    except Exception as error:  # whatever a reader of a damaged file may raise: several libraries are involved
        raise MrFlowError(
            f"model is {str(folder)!r}, which cannot be loaded ({first_line(error)}); download it again whole."
        ) from error
    vae = getattr(pipe, "vae", None)
    if vae is not None and all(weight.ndim < 5 for weight in vae.parameters()):  # 5: convolutions of a video VAE
        vae.to(memory_format=torch.channels_last)  # convolutions of pictures are faster so
    if offload and where.type != "cpu":
        pipe.enable_model_cpu_offload(device=where)
        return pipe
    return pipe.to(where)


def read_layout(path: str | Path, family: str | None = None) -> Layout:
    """The layout of the pipeline in a local folder, from its configurations alone: networks are built without memory.

    So a plan can be made, and a folder judged, before gigabytes are read. Text encoders are left out, so the layout is
    for questions and not for sampling. Raises ValueError, one sentence, for a folder that is of no such pipeline.
    """
    prepare_imports()
    import diffusers

    folder, library = Path(path), cast("Any", diffusers)
    try:
        index = cast("dict[str, Any]", json.loads((folder / "model_index.json").read_text(encoding="utf-8")))
        kind = getattr(library, str(index["_class_name"]))
        known, parts = takes(kind.__init__), dict[str, Any]()
        for name, value in index.items():
            if name.startswith("_") or name not in known:  # known: a newer diffusers may have written the folder
                continue
            parts[name] = value
            if isinstance(value, list):
                origin, made_by = cast("list[Any]", value)
                parts[name] = (
                    _without_memory(getattr(library, made_by), folder / name) if origin == "diffusers" else None
                )
        pipe = kind(**parts)
    except Exception as error:  # whatever building a network from a damaged configuration may raise
        raise MrFlowError(
            f"model is {str(folder)!r}, whose configuration cannot be read ({first_line(error)}); give a local "
            "diffusers folder that this version of diffusers knows."
        ) from error
    return find_layout(pipe, family)


def _without_memory(kind: Any, folder: Path) -> Any:
    cls: Any = kind
    config = cls.load_config(folder, local_files_only=True)
    network = issubclass(kind, torch.nn.Module)
    with torch.device("meta" if network else "cpu"):
        return cls.from_config(config)
