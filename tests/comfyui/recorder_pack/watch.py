"""Nodes that look: what a model and its network are called with, and what a value is."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import comfy.patcher_extension  # pyright: ignore
import numpy as np
import torch
from comfy_api.latest import io  # pyright: ignore

from .lines import write, write_network

Wrappers: Any = comfy.patcher_extension.WrappersMP  # pyright: ignore
CATEGORY = "tests/recorder"


class RecorderWatch(io.ComfyNode):
    """Writes a line for every call of the model and of its network; `seconds` slows each down."""

    @classmethod
    def define_schema(cls) -> Any:
        inputs = [io.Model.Input("model"), io.Float.Input("seconds", default=0.0)]
        return io.Schema(node_id="RecorderWatch", category=CATEGORY, inputs=inputs, outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, model: Any, seconds: float) -> Any:
        watched = model.clone()

        def of_model(executor: Any, x: Any, t: Any, *more: Any, **named: Any) -> Any:
            write("model", sigma=[float(value) for value in t], shape=list(x.shape), std=float(x.std()))
            time.sleep(seconds)
            return executor(x, t, *more, **named)

        def of_network(executor: Any, x: Any, t: Any, *more: Any, **named: Any) -> Any:
            write_network(x, t)
            return executor(x, t, *more, **named)

        watched.add_wrapper_with_key(Wrappers.APPLY_MODEL, "recorder", of_model)
        watched.add_wrapper_with_key(Wrappers.DIFFUSION_MODEL, "recorder", of_network)
        return io.NodeOutput(watched)


class RecorderSave(io.ComfyNode):
    """Saves a tensor, a latent or a text under a name."""

    @classmethod
    def define_schema(cls) -> Any:
        inputs = [io.AnyType.Input("value"), io.String.Input("name")]
        return io.Schema(node_id="RecorderSave", category=CATEGORY, inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, value: Any, name: str) -> Any:
        target = Path(os.environ["MRFLOW_RECORDER_SAVED"]) / name
        value = value["samples"] if isinstance(value, dict) else value
        if isinstance(value, torch.Tensor):
            np.save(target.with_suffix(".npy"), value.detach().float().cpu().numpy())
        else:
            target.with_suffix(".txt").write_text(str(value), encoding="utf-8")
        return io.NodeOutput(ui={"saved": [name]})


class RecorderWhere(io.ComfyNode):
    """The file of a module that this process has loaded, or nothing."""

    @classmethod
    def define_schema(cls) -> Any:
        inputs = [io.String.Input("module")]
        return io.Schema(node_id="RecorderWhere", category=CATEGORY, inputs=inputs, outputs=[io.String.Output()])

    @classmethod
    def execute(cls, module: str) -> Any:
        return io.NodeOutput(str(getattr(sys.modules.get(module), "__file__", "")))


class RecorderPatch(io.ComfyNode):
    """Adds to one weight of the model, as a LoRA does."""

    @classmethod
    def define_schema(cls) -> Any:
        inputs = [io.Model.Input("model"), io.Float.Input("strength", default=1.0)]
        return io.Schema(node_id="RecorderPatch", category=CATEGORY, inputs=inputs, outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, model: Any, strength: float) -> Any:
        patched = model.clone()
        weights = {name: value for name, value in model.model_state_dict().items() if value.ndim == 2}
        name = sorted(weights)[0]
        generator = torch.Generator().manual_seed(0)
        added = torch.randn(weights[name].shape, generator=generator) * weights[name].float().std()
        patched.add_patches({name: (added,)}, strength)
        return io.NodeOutput(patched)
