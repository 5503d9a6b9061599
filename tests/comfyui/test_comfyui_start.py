"""A ComfyUI with this checkout as a node pack starts, lists every node, and serves what the page asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .client import Client, check_sentence
from .conftest import write_older
from .graphs import Graph, doubled, plan_in, staged
from .process import INSTALLATION, REASON, REPOSITORY, Refused, Server

if INSTALLATION is None:
    pytest.skip(REASON, allow_module_level=True)

# Ids, and what stands in their sockets and widgets: people's workflows hold them.
NODES = {
    "MrFlowSampler": "model positive negative vae upscale_model low_sigmas width height batch_size seed preset sigma "
    "cfg family factor stages low_steps refine_steps refine_cfg solver shift noise",
    "MrFlowPlan": "model low_sigmas image width height seed preset cfg family factor stages low_steps solver shift "
    "noise",
    "MrFlowEmptyLatent": "plan model batch_size",
    "MrFlowNoise": "plan stage",
    "MrFlowSigmas": "plan model stage sigma steps curve",
    "MrFlowSolver": "plan solver",
    "MrFlowGuider": "plan model positive negative stage cfg",
    "MrFlowDecode": "plan samples vae stage",
    "MrFlowHandoff": "plan image vae upscale_model said stage index",
    "MrFlowPick": "image index count",
    "MrFlowGather": "image text",
    "MrFlowPlanInfo": "plan said sigma refine_steps refine_cfg index",
    "MrFlowRefine": "model positive negative vae image upscale_model width height seed preset sigma cfg family "
    "factor refine_steps",
    "MrFlowDraft": "model positive negative vae low_sigmas width height batch_size seed preset cfg family factor "
    "stages low_steps solver shift noise",
    "MrFlowFinish": "model positive negative vae upscale_model plan drafts index count sigma refine_steps refine_cfg",
    "MrFlowDemoModel": "",
}
OUTPUTS = {
    "MrFlowSampler": ["IMAGE", "IMAGE", "STRING"],
    "MrFlowPlan": ["MRFLOW_PLAN", "INT", "INT", "INT", "INT", "STRING"],
    "MrFlowEmptyLatent": ["LATENT"],
    "MrFlowNoise": ["NOISE"],
    "MrFlowSigmas": ["SIGMAS"],
    "MrFlowSolver": ["SAMPLER"],
    "MrFlowGuider": ["GUIDER"],
    "MrFlowDecode": ["IMAGE"],
    "MrFlowHandoff": ["LATENT", "IMAGE", "STRING"],
    "MrFlowPick": ["IMAGE"],
    "MrFlowGather": ["IMAGE", "STRING"],
    "MrFlowPlanInfo": ["STRING"],
    "MrFlowRefine": ["IMAGE", "STRING"],
    "MrFlowDraft": ["IMAGE", "MRFLOW_PLAN", "STRING"],
    "MrFlowFinish": ["IMAGE", "STRING"],
    "MrFlowDemoModel": ["MODEL", "CLIP", "VAE", "UPSCALE_MODEL"],
}
ADVANCED = ["family", "factor", "stages", "low_steps", "refine_steps", "refine_cfg", "solver", "shift", "noise"]


def inputs_of(node: Any) -> dict[str, Any]:
    """All inputs of a node by name."""
    return {**node["input"].get("required", {}), **node["input"].get("optional", {})}


def complaints(server: Server) -> list[str]:
    """Lines of the log that name the pack and are more than its place in the list of import times."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", server.start_log).splitlines()
    about = [line for line in lines if re.search(rf"mrflow|/{re.escape(server.folder)}\b", line, re.IGNORECASE)]
    harmless = re.compile(
        r"^(\[INFO\])?\s+[\d.]+ seconds: |Setting (base|output|input|user|temp) directory|Adding extra"
    )
    return [line for line in about if not harmless.search(line)]


# ------------------------------------------------------------------------------------------------------------ the start


def test_nothing_is_complained_of_at_the_start(server: Server) -> None:
    assert complaints(server) == []
    assert "IMPORT FAILED" not in server.start_log


def test_every_node_is_there_and_no_other(info: Any) -> None:
    assert {name for name in info if name.startswith("MrFlow")} == set(NODES)
    assert {info[name]["category"] for name in NODES} == {"sampling/MrFlow"}
    assert all(info[name]["display_name"].startswith("MrFlow ") for name in NODES)


@pytest.mark.parametrize("name", NODES)
def test_a_nodes_sockets_are_what_workflows_hold(info: Any, name: str) -> None:
    assert set(inputs_of(info[name])) >= set(NODES[name].split())
    assert info[name]["output"] == OUTPUTS[name]


@pytest.mark.parametrize("name", NODES)
def test_a_node_and_all_its_inputs_say_what_they_are_for(info: Any, name: str) -> None:
    assert len(info[name]["description"]) > 20
    for key, definition in inputs_of(info[name]).items():
        tooltip = definition[1]["tooltip"] if len(definition) > 1 else ""
        assert len(tooltip) >= 10, key
        assert tooltip.endswith("."), key


@pytest.mark.parametrize("name", ["MrFlowSampler", "MrFlowDraft", "MrFlowPlan"])
def test_what_few_people_change_is_folded_away(info: Any, name: str) -> None:
    held = inputs_of(info[name])
    advanced = {key for key, definition in held.items() if len(definition) > 1 and definition[1].get("advanced")}
    assert advanced == set(held) & set(ADVANCED)


def test_the_seed_goes_as_far_as_plans_do_and_changes_after_a_run(info: Any) -> None:
    for name in ("MrFlowSampler", "MrFlowDraft", "MrFlowRefine", "MrFlowPlan"):
        options = inputs_of(info[name])["seed"][1]
        assert (options["min"], options["max"], options["control_after_generate"]) == (0, 2**63 - 1, True)


# ------------------------------------------------------------------------------------------------------ what is served


@pytest.mark.parametrize("name", NODES)
def test_the_pages_help_has_a_page_for_every_node(server: Server, name: str) -> None:
    text = server.read(f"/extensions/{server.folder}/docs/{name}/en.md").decode("utf-8")
    assert len(text) > 100
    for key in NODES[name].split():
        assert re.search(rf"\b{key}\b", text), key


def test_help_comes_in_chinese_too(server: Server) -> None:
    for name in NODES:
        text = server.read(f"/extensions/{server.folder}/docs/{name}/zh.md").decode("utf-8")
        assert re.search(r"[一-鿿]{4}", text), name


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_translations_name_nodes_and_inputs_that_exist(server: Server, info: Any, language: str) -> None:
    served = server.get("/i18n")[language]["nodeDefs"]
    ours = {name: words for name, words in served.items() if name.startswith("MrFlow")}
    assert set(ours) == set(NODES)
    for name, words in ours.items():
        assert words["display_name"].startswith("MrFlow "), name
        assert set(words.get("inputs", {})) - {"control_after_generate"} == set(inputs_of(info[name])), name


def test_the_example_workflows_are_listed(server: Server) -> None:
    listed = server.get("/workflow_templates")[server.folder]
    assert set(listed) == {path.stem for path in (REPOSITORY / "example_workflows").glob("*.json")}
    assert listed
    for name in listed:
        served = server.read(f"/api/workflow_templates/{server.folder}/{name}.json")
        assert json.loads(served)["nodes"], name


# ------------------------------------------------------------------------------------------------- refused before a run


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sigma": 1.5}, "1.5"),
        ({"sigma": -0.1}, "-0.1"),
        ({"preset": "nope"}, "nope"),
        ({"width": 32}, "32"),
        ({"batch_size": 65}, "65"),
        ({"seed": 2**63}, str(2**63)),
        ({"stages": 1}, "1"),
        ({"solver": "dpm"}, "dpm"),
        ({"family": "sdxl2"}, "sdxl2"),
        ({"cfg": 1001.0}, "1001"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_widgets_wrong_value_is_refused_before_it_is_queued(
    client: Client, graph: Callable[[], Graph], wrong: dict[str, Any], said: str
) -> None:
    made = graph()
    staged(made, doubled(made), client.name(), **wrong)
    try:
        run = client.run(made.api)
    except Refused as error:
        refused = error
    else:  # older releases do not look whether a choice is one of the list
        assert run.times == []
        assert said in run.error
        check_sentence(run.error)
        return
    assert refused.status == 400
    [errors] = [node["errors"] for node in refused.said["node_errors"].values()]
    assert len(errors) == 1
    assert said in f"{errors[0]['message']} {errors[0]['details']}"
    assert next(iter(wrong)) in errors[0]["details"]


def test_a_missing_socket_is_refused_before_it_is_queued(client: Client, graph: Callable[[], Graph]) -> None:
    made = graph()
    parts = doubled(made)
    made.add("PreviewImage", images=made.add("MrFlowSampler", **{**parts.sockets, "vae": None})[0])
    with pytest.raises(Refused) as refused:
        client.queue(made.api)
    assert refused.value.status == 400
    assert "vae" in refused.value.body


# ------------------------------------------------------------------------------------------------------- another folder


def loaded_from(client: Client, made: Graph) -> Path:
    """The package that the process has, after a picture was made with it."""
    name = client.name()
    staged(made, doubled(made), name, width=64, height=64)
    made.save(made.add("RecorderWhere", module="mrflow_sched")[0], f"{name}-where")
    run = client.run(made.api).succeeded()
    assert plan_in(run.text(f"{name}-plan")).width == 64
    return Path(run.text(f"{name}-where"))


def test_an_older_release_among_the_libraries_is_not_used(
    server: Server, client: Client, graph: Callable[[], Graph]
) -> None:
    assert loaded_from(client, graph()) == server.base / "custom_nodes" / server.folder / "mrflow_sched" / "__init__.py"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A ComfyUI whose folder for the pack is "foo", with another pack that has loaded an older release before."""
    assert INSTALLATION is not None
    older, other = write_older(tmp_path_factory.mktemp("older")), tmp_path_factory.mktemp("other")
    (other / "prestartup_script.py").write_text("import mrflow_sched\n")
    (other / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    environment, packs = {"PYTHONPATH": str(older)}, {"another": other}
    base = tmp_path_factory.mktemp("elsewhere")
    running = Server(INSTALLATION, base, folder="foo", packs=packs, environment=environment)
    try:
        running.start()
        yield running
    finally:
        running.stop()


def test_the_folder_may_have_any_name_and_an_older_release_be_loaded(elsewhere: Server) -> None:
    found = elsewhere.get("/object_info")
    assert {name for name in found if name.startswith("MrFlow")} == set(NODES)
    [warning] = complaints(elsewhere)
    assert "another copy of mrflow_sched (0.0.1)" in warning
    where = loaded_from(Client(elsewhere), Graph(found))
    assert where == elsewhere.base / "custom_nodes" / "foo" / "mrflow_sched" / "__init__.py"
    assert elsewhere.read("/extensions/foo/docs/MrFlowSampler/en.md")


def test_the_pack_takes_no_names_of_other_packs(elsewhere: Server) -> None:
    """Its folder is not on the path: `tests`, `tools`, `scripts` and `bench` stay free."""
    client, made = Client(elsewhere), Graph(elsewhere.get("/object_info"))
    for name in ("tests", "tools", "scripts", "bench"):
        made.save(made.add("RecorderWhere", module=name)[0], name)
    run = client.run(made.api).succeeded()
    assert [name for name in ("tests", "tools", "scripts", "bench") if "foo" in run.text(name)] == []
