"""The example workflows as files: whole graphs of nodes that exist, with a note and a picture each.

That they run and open in the page is tested on a real ComfyUI, in tests/comfyui.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_comfy_words import EXTRA, schemas  # noqa: F401  (a fixture)

FOLDER = Path(__file__).resolve().parents[3] / "example_workflows"
EXAMPLES = sorted(FOLDER.glob("*.json"))
CORE = {
    *("CLIPTextEncode", "EmptySD3LatentImage", "KSampler", "ManualSigmas", "MarkdownNote", "PreviewAny"),
    *("PreviewImage", "SamplerCustomAdvanced", "SaveImage", "VAEDecode"),
}

every_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def nodes(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text("utf-8"))["nodes"]


def test_there_is_an_example_of_every_way_to_use_the_nodes() -> None:
    assert {path.stem for path in EXAMPLES} == {
        *("mrflow_one_node", "mrflow_composable", "mrflow_draft_pick_finish", "mrflow_refine_any_picture"),
        *("mrflow_2k_in_two_hops", "mrflow_turbo_2k"),
    }
    assert {path.name for path in FOLDER.iterdir()} == {
        f"{path.stem}{end}" for path in EXAMPLES for end in (".json", ".jpg")
    }


def test_nodes_stand_in_examples(schemas: dict[str, Any]) -> None:  # noqa: F811
    shown = {node["type"] for path in EXAMPLES for node in nodes(path)}
    assert set(schemas) - shown == {"MrFlowPick", "MrFlowGather"}  # those of whole runs pick and gather by themselves


@every_example
def test_an_example_is_made_of_nodes_that_exist_as_they_are_now(path: Path, schemas: dict[str, Any]) -> None:  # noqa: F811
    kinds = {node["type"] for node in nodes(path)}
    assert {"MarkdownNote", "MrFlowDemoModel"} <= kinds <= {*CORE, *schemas}
    for node in nodes(path):
        if node["type"] not in schemas:
            continue
        schema = schemas[node["type"]]
        inputs = {each.id: each.words for each in schema.inputs}
        assert [each["name"] for each in node["outputs"]] == [each.words["display_name"] for each in schema.outputs]
        assert {each["name"] for each in node["inputs"]} <= set(inputs)
        widgets = node.get("widgets_values_named", {})
        assert [name for name in widgets if name != EXTRA] == [
            name for name, each in inputs.items() if "default" in each
        ]
        assert node.get("widgets_values", []) == list(widgets.values())  # the page restores them by their place
        for name, value in widgets.items():
            if name != EXTRA:
                allowed = inputs[name]
                assert (
                    value in allowed["options"] if "options" in allowed else allowed["min"] <= value <= allowed["max"]
                )


@every_example
def test_every_socket_that_a_node_needs_is_connected(path: Path, schemas: dict[str, Any]) -> None:  # noqa: F811
    workflow = json.loads(path.read_text("utf-8"))
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for link, start, out, end, place, _ in workflow["links"]:
        assert link in by_id[start]["outputs"][out]["links"]
        assert by_id[end]["inputs"][place]["link"] == link
    for node in workflow["nodes"]:
        needed = [
            each.id for each in getattr(schemas.get(node["type"]), "inputs", ()) if not each.words.get("optional")
        ]
        connected = {each["name"] for each in node["inputs"] if each["link"] is not None}
        assert {name for name in needed if name not in node.get("widgets_values_named", {})} <= connected, node["type"]


@every_example
def test_the_note_says_what_to_exchange_and_which_sizes_to_set(path: Path) -> None:
    [note] = [node["widgets_values"][0] for node in nodes(path) if node["type"] == "MarkdownNote"]
    for words in ("# ", "**Your own model:**", "**Sizes:**"):
        assert words in note


@every_example
def test_a_seed_stays_so_that_everyone_sees_the_same_picture(path: Path) -> None:
    seeds = [node["widgets_values_named"] for node in nodes(path) if "seed" in node.get("widgets_values_named", {})]
    assert seeds
    assert {each[EXTRA] for each in seeds} == {"fixed"}


@every_example
def test_the_picture_beside_it_is_small(path: Path) -> None:
    picture = path.with_suffix(".jpg")
    assert Image.open(picture).size == (512, 512)
    assert picture.stat().st_size < 60_000
