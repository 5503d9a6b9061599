"""What people read of ComfyUI's nodes: titles, tooltips and help pages, in every language that the pack speaks."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
LANGUAGES = ("en", "zh", "ja")  # the frontend has no German
HAN = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
SYNTAX = re.compile(r"[{}@|]")  # what the frontend's translations read as more than text
EXTRA = "control_after_generate"  # the widget that the frontend adds to a seed


@pytest.fixture
def schemas(comfy: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of every node, by its id."""
    for name, base in (("comfy.latent_formats", "LatentFormat"), ("comfy.supported_models", "Flux")):
        module = ModuleType(name)
        vars(module)[base] = type(base, (), {})
        monkeypatch.setitem(sys.modules, name, module)
    from mrflow_sched.apps.comfy.extension import MrFlowExtension

    found = [node.define_schema() for node in asyncio.run(MrFlowExtension().get_node_list())]
    assert len(found) >= 14
    return {schema.node_id: schema for schema in found}


def words(language: str, name: str = "nodeDefs") -> Any:
    return json.loads((ROOT / "locales" / language / f"{name}.json").read_text("utf-8"))


def given(schema: Any) -> dict[str, Any]:
    """The words of a schema in the form of a language's file; None where a schema says nothing."""
    inputs = {each.id: {"name": each.id, "tooltip": each.words.get("tooltip")} for each in schema.inputs}
    if any(each.words.get("control_after_generate") for each in schema.inputs):
        inputs[EXTRA] = {"name": "control after generate"}
    outputs = [each.words for each in schema.outputs]
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": inputs,
        "outputs": {
            str(place): {"name": each["display_name"], "tooltip": each.get("tooltip")}
            for place, each in enumerate(outputs)
        },
    }


def test_the_pack_speaks_these_languages() -> None:
    assert {path.name for path in (ROOT / "locales").iterdir()} == set(LANGUAGES)
    for language in LANGUAGES:
        assert {path.name for path in (ROOT / "locales" / language).iterdir()} == {"main.json", "nodeDefs.json"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_input_and_output_has_a_title_and_a_tooltip_and_none_is_too_many(
    schemas: dict[str, Any], language: str
) -> None:
    told = words(language)
    assert set(told) == set(schemas)
    for name, schema in schemas.items():
        expected, found = given(schema), told[name]
        assert set(found) == set(expected), name
        for part in ("inputs", "outputs"):
            assert set(found[part]) == set(expected[part]), (name, part)
            for key, each in found[part].items():
                assert set(each) == ({"name"} if key == EXTRA else {"name", "tooltip"}), (name, key)
                assert all(each.values()), (name, key)
        assert found["display_name"]
        assert found["description"]


def test_the_english_words_are_the_schemas_own(schemas: dict[str, Any]) -> None:
    told = words("en")
    for name, schema in schemas.items():
        expected = given(schema)
        for place, each in expected["outputs"].items():
            each["tooltip"] = each["tooltip"] or told[name]["outputs"][place]["tooltip"]
        assert told[name] == expected, name


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_other_languages_are_written_in_them(language: str) -> None:
    english = words("en")
    for name, node in words(language).items():
        sentences = [node["description"]]
        sentences += [
            each["tooltip"] for part in ("inputs", "outputs") for each in node[part].values() if len(each) > 1
        ]
        for sentence in sentences:
            assert HAN.search(sentence), (name, sentence)
        assert node["display_name"].startswith("MrFlow ")
        assert node["description"] != english[name]["description"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_word_is_read_as_a_placeholder(language: str) -> None:
    def texts(value: Any) -> list[str]:
        return [value] if isinstance(value, str) else [text for each in value.values() for text in texts(each)]

    for name in ("nodeDefs", "main"):
        assert [text for text in texts(words(language, name)) if SYNTAX.search(text)] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_category_has_a_title(schemas: dict[str, Any], language: str) -> None:
    categories = {part for schema in schemas.values() for part in schema.category.split("/")}
    assert set(words(language, "main")["nodeCategories"]) == categories


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_has_a_page_that_names_all_its_inputs_and_outputs(schemas: dict[str, Any], language: str) -> None:
    folder = ROOT / "comfy_web" / "docs"
    assert {path.name for path in folder.iterdir()} == set(schemas)
    told = words(language)
    for name, schema in schemas.items():
        assert {path.name for path in (folder / name).iterdir()} == {f"{each}.md" for each in LANGUAGES}
        text = (folder / name / f"{language}.md").read_text("utf-8")
        assert text.startswith(f"# {told[name]['display_name']}\n")
        tables = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
        named = [re.findall(r"^\| [^|]*`(\w+)` \|", table, re.MULTILINE) for table in tables]
        found = [names for names in named if names]
        inputs = [each.id for each in schema.inputs]
        outputs = [each.words["display_name"] for each in schema.outputs]
        assert [sorted(names) for names in found] == [sorted(names) for names in (inputs, outputs) if names], name
        assert len(tables) == (4 if inputs else 3), name
        assert len(text) < 6000
