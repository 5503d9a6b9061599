"""The list of nodes, as ComfyUI asks for it. Importing this module needs ComfyUI."""

from __future__ import annotations

from typing import Any

from mrflow_sched.apps.comfy import demo, expanding, nodes
from mrflow_sched.apps.comfy.host import module

__all__ = ["MrFlowExtension"]


class MrFlowExtension(module("comfy_api.latest").ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[Any]:
        """The nodes.

        Returns:
            Their classes, whole runs first.
        """
        rooms = (expanding, nodes, demo)
        return [getattr(room, name) for room in rooms for name in room.__all__]
