"""What images of other programs say of their making: A1111's `parameters` text and ComfyUI's graph of nodes.

Anyone can write such texts: each is cut to a size before it is parsed, links are followed for a limited way, and a
value that is out of range counts as missing.
"""

from __future__ import annotations

from collections.abc import Mapping

from mrflow_sched.images.foreign.a1111 import read_a1111
from mrflow_sched.images.foreign.comfyui import read_comfyui
from mrflow_sched.images.foreign.run import ForeignRun, NodeSettings
from mrflow_sched.images.parameters import PARAMETERS

__all__ = ["ForeignRun", "NodeSettings", "read_foreign"]

MAX_TEXT = 8_000_000
"""Characters above which a text is not looked at."""


def read_foreign(texts: Mapping[str, str]) -> ForeignRun | None:
    """How another program made an image.

    Args:
        texts: The texts of its file, as `files.read_text` gives them.

    Returns:
        What they say; None where they say nothing that is understood, or are damaged.
    """
    parameters, graph = texts.get(PARAMETERS, ""), texts.get("prompt", "")
    found = read_a1111(parameters) if parameters.strip() and len(parameters) <= MAX_TEXT else None
    if found is None and graph.lstrip().startswith("{") and len(graph) <= MAX_TEXT:
        found = read_comfyui(graph)
    return found
