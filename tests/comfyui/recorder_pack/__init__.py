"""A node pack for the tests of the MrFlow nodes: it watches a model, saves values, breaks parts, and makes doubles."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension  # pyright: ignore

from .faults import RecorderBreakModel, RecorderBreakUpscaler, RecorderBreakVae
from .models import RecorderLevels, RecorderList, RecorderModel, RecorderPicture, RecorderUpscaler
from .watch import RecorderPatch, RecorderSave, RecorderWatch, RecorderWhere


class Recorder(ComfyExtension):
    async def get_node_list(self) -> list[Any]:
        watch = [RecorderWatch, RecorderSave, RecorderWhere, RecorderPatch]
        make = [RecorderModel, RecorderPicture, RecorderLevels, RecorderList, RecorderUpscaler]
        return [*watch, *make, RecorderBreakModel, RecorderBreakVae, RecorderBreakUpscaler]


async def comfy_entrypoint() -> Recorder:
    return Recorder()
