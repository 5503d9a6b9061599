"""Nodes that break a part: memory runs out, the user interrupts, or something fails, a given number of times."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import comfy.model_management  # pyright: ignore
import comfy.patcher_extension  # pyright: ignore
import torch
from comfy_api.latest import io  # pyright: ignore

from .lines import write
from .watch import CATEGORY

Wrappers: Any = comfy.patcher_extension.WrappersMP  # pyright: ignore
KINDS = ("memory", "interrupt", "failure")
fired: Counter[str] = Counter()
"""How often each fault has struck, by its name."""


def _strike(part: str, kind: str, name: str, times: int) -> None:
    """The fault, as often as `times` says over all prompts; then nothing any more."""
    if fired[name] >= times:
        return
    fired[name] += 1
    write("fault", part=part, kind=kind)
    if kind == "memory":
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB (a test's own).")
    if kind == "interrupt":
        comfy.model_management.interrupt_current_processing()  # pyright: ignore
        return
    raise ValueError("a test's own failure")


def _inputs() -> list[Any]:
    return [
        io.Combo.Input("kind", options=list(KINDS)),
        io.Int.Input("times", default=1, min=0, max=1000),
        io.String.Input("name"),
    ]


class RecorderBreakModel(io.ComfyNode):
    """Strikes at a call of the model, counted from 1 within its stage."""

    @classmethod
    def define_schema(cls) -> Any:
        where = [io.Combo.Input("stage", options=["low", "refine"]), io.Int.Input("call", default=1, min=1)]
        return io.Schema(
            node_id="RecorderBreakModel",
            category=CATEGORY,
            inputs=[io.Model.Input("model"), *where, *_inputs()],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, stage: str, call: int, kind: str, times: int, name: str) -> Any:
        broken = model.clone()

        def around(executor: Any, x: Any, t: Any, *more: Any, **named: Any) -> Any:
            options = named.get("transformer_options") or more[3]
            sigmas = options["sample_sigmas"]
            passed = int((sigmas > t[0] + 1e-6).sum()) + 1
            low = float(sigmas[0]) > 0.95
            if low == (stage == "low") and passed == call:
                _strike(stage, kind, name, times)
            return executor(x, t, *more, **named)

        broken.add_wrapper_with_key(Wrappers.APPLY_MODEL, "recorder_fault", around)
        return io.NodeOutput(broken)


class _Struck(torch.nn.Module):
    """A first stage whose encode or decode strikes."""

    def __init__(self, stage: Any, part: str, strike: Callable[[], None]) -> None:
        super().__init__()
        self.stage, self.part, self.strike = stage, part, strike

    def encode(self, *given: Any, **named: Any) -> Any:
        if self.part == "encode":
            self.strike()
        return self.stage.encode(*given, **named)

    def decode(self, *given: Any, **named: Any) -> Any:
        if self.part == "decode":
            self.strike()
        return self.stage.decode(*given, **named)


class RecorderBreakVae(io.ComfyNode):
    """Strikes when the VAE encodes or decodes."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="RecorderBreakVae",
            category=CATEGORY,
            inputs=[io.Vae.Input("vae"), io.Combo.Input("part", options=["encode", "decode"]), *_inputs()],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, vae: Any, part: str, kind: str, times: int, name: str) -> Any:
        broken = copy.copy(vae)
        broken.first_stage_model = _Struck(vae.first_stage_model, part, lambda: _strike(part, kind, name, times))
        return io.NodeOutput(broken)


class _StruckUpscaler:
    """An upscale model whose every call may strike; all else is the model's own."""

    def __init__(self, model: Any, strike: Callable[[], None]) -> None:
        self._model, self._strike = model, strike

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, image: Any) -> Any:
        write("upscale", shape=list(image.shape))
        self._strike()
        return self._model(image)


class RecorderBreakUpscaler(io.ComfyNode):
    """Strikes when the upscale model enlarges."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="RecorderBreakUpscaler",
            category=CATEGORY,
            inputs=[io.UpscaleModel.Input("upscale_model"), *_inputs()],
            outputs=[io.UpscaleModel.Output()],
        )

    @classmethod
    def execute(cls, upscale_model: Any, kind: str, times: int, name: str) -> Any:
        return io.NodeOutput(_StruckUpscaler(upscale_model, lambda: _strike("upscale", kind, name, times)))
