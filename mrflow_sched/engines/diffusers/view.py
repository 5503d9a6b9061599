"""A stage's own copy of a pipeline."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from mrflow_sched.engines.diffusers.compiled import NetworkCompiler
from mrflow_sched.upscaling.lanczos import resize_lanczos

# A fast tokenizer keeps truncation and padding of the call at work in itself: two threads must not be in it at once.
TOKENIZER_LOCK = threading.RLock()

HINT = "control_image"
"""The ControlNet hint: the one argument that is made anew for every stage."""


# -------------------------------------------------------------------------------------------------------------- helpers


def view_of(pipe: Any, **parts: Any) -> Any:
    """A shallow copy of `pipe` with other `parts`: same modules, attributes of its own.

    Set past the pipeline's own `__setattr__`, which would rewrite the configuration that `from_config` reads.
    """
    view = copy.copy(pipe)
    for name, part in parts.items():
        object.__setattr__(view, name, part)
    return view


def compile_network(view: Any, name: str, compiler: NetworkCompiler) -> None:
    """Let `view` run the compiled twin of its network `name`, until it frees offloaded modules: hooks are the owner's
    module's, and freeing makes them anew on what it finds."""
    own, free = getattr(view, name), view.maybe_free_model_hooks

    def free_own() -> None:
        object.__setattr__(view, name, own)
        free()

    object.__setattr__(view, name, compiler(own))
    object.__setattr__(view, "maybe_free_model_hooks", free_own)


def one_at_a_time(encode_prompt: Any) -> Any:
    """`encode_prompt` behind the lock of tokenizers, for pipelines that are given their prompts as text."""

    @functools.wraps(encode_prompt)
    def locked(*values: Any, **named: Any) -> Any:
        with TOKENIZER_LOCK:
            return encode_prompt(*values, **named)

    return locked


def interrupted(pipe: Any) -> bool:
    return bool(getattr(pipe, "_interrupt", False))


def own_dicts(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with dicts copied: pipelines add keys to those that they are given."""
    return {
        name: dict(cast("Mapping[str, Any]", value)) if isinstance(value, dict) else value
        for name, value in arguments.items()
    }


def hint_for_stage(hint: Any, width: int, height: int, rows: range, batch: int) -> Any:
    """The ControlNet hint for a stage of this size and these images; pipelines resize pictures, but not tensors."""
    made = hint(width, height) if callable(hint) else hint
    if isinstance(made, Tensor):
        pictures = made if made.ndim == 4 else made[None]
        if pictures.shape[-2:] != (height, width):
            pictures = resize_lanczos(pictures, width, height).to(made.dtype)
        return pictures[rows.start : rows.stop] if len(pictures) == batch and len(rows) < batch else pictures
    return made
