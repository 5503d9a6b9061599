"""Workflows as the page saves them, turned into what it queues."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .graphs import is_widget

NEVER, BYPASSED = 2, 4
NOTES = ("Note", "MarkdownNote")


def to_api(workflow: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The API form of a saved workflow, as the page makes it.

    Args:
        workflow: What the page saved.
        info: What `/object_info` says.

    Returns:
        Nodes by id.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    made: dict[str, dict[str, Any]] = {}
    for node in workflow["nodes"]:
        assert node.get("mode", 0) not in (NEVER, BYPASSED), f"node {node['id']} is muted or bypassed"
        if node["type"] in NOTES:
            continue
        assert node["type"] in info, f"{node['type']} is no node of this ComfyUI"
        linked = {slot["name"]: links[slot["link"]] for slot in node.get("inputs", ()) if slot.get("link") is not None}
        made[str(node["id"])] = {"class_type": node["type"], "inputs": {**_widgets(node, info), **linked}}
    return made


def _widgets(node: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a node's widgets by name; some widgets are followed by one of the page's own."""
    definitions = info[node["type"]]["input"]
    held = {**definitions.get("required", {}), **definitions.get("optional", {})}
    values = list(node.get("widgets_values", ()))
    found: dict[str, Any] = {}
    for name, definition in held.items():
        if not is_widget(definition):
            continue
        assert values, f"{node['type']} has no value for {name}"
        found[name] = values.pop(0)
        options = definition[1] if len(definition) > 1 else {}
        if options.get("control_after_generate"):
            assert values.pop(0) in ("fixed", "increment", "decrement", "randomize"), name
        if options.get("image_upload"):
            values = values[1:] if values[:1] == ["image"] else values
    assert values == [], f"{node['type']} has values for no widget: {values}"
    return found


def read(path: Path) -> Any:
    """A saved workflow."""
    return json.loads(path.read_text("utf-8"))
