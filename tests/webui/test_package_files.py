"""What the WebUI reads beside the code: translations, metadata, style, the page helper and the install check."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mrflow_sched.apps.webui import settings, ui, words
from mrflow_sched.apps.webui.axes import AXES, axis_label
from mrflow_sched.apps.webui.controls import CHOICES, LABELS

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("zh-Hans", "zh-Hant", "ja", "de", "fr", "ko", "es")
# The product's name, and step counts, are the same in every language.
UNTRANSLATED = re.compile(r"MrFlow|[0-9]+\+[0-9]+")


def page_texts() -> set[str]:
    """Every text of the accordion, the settings page and the plot's menu, as it stands in the page."""
    infos = {f"({text})" for text in settings.INFO.values()}
    choices = {choice for choices in CHOICES.values() for choice in choices}
    labels = {*LABELS.values(), ui.ADVANCED, ui.DROP, ui.FINISH_CHOSEN, ui.FINISH_FILES, *settings.LABELS.values()}
    texts = {*labels, *ui.INFO.values(), *choices, *infos}
    texts |= {*settings.WHEN_REFUSED, *(axis_label(name) for name, _ in AXES)}
    return {text for text in texts if not UNTRANSLATED.fullmatch(text)}


def translations(language: str) -> dict[str, str]:
    return json.loads((words.FOLDER / f"{language}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_cover_the_page_and_otherwise_the_same_sentences(language: str) -> None:
    assert page_texts() <= set(translations(language))
    assert set(translations(language)) == set(translations(LANGUAGES[0]))


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_are_texts_of_their_own(language: str) -> None:
    for english, text in translations(language).items():
        assert text.strip() == text
        assert text
        # One word, or a term of the field, may be the same; a whole sentence may not.
        assert text != english or len(english) < 10, english
        for number in re.findall(r"\d+[.+]\d+", english):
            assert number in text, (english, text)
        if english.startswith("("):
            assert text.startswith("(")
            assert text.endswith(")")


def test_every_language_file_is_known() -> None:
    assert {path.stem for path in words.FOLDER.iterdir()} == set(LANGUAGES)


def test_metadata_holds_under_any_name_of_the_folder() -> None:
    """Hosts take the folder's name for the extension's, and print an error for sections of callbacks of another."""
    config = configparser.ConfigParser()
    config.read(ROOT / "metadata.ini", encoding="utf-8")
    assert not [section for section in config.sections() if section.startswith("callbacks/")]
    assert "sd_forge_controlnet" in config["scripts/mrflow.py"]["Before"]
    assert all((ROOT / section).is_file() for section in config.sections() if section.startswith("scripts/"))


def test_the_host_finds_no_language_of_ours_beside_its_packs() -> None:
    assert not (ROOT / "localizations").exists()


def test_style_touches_only_our_elements_and_the_themes_colours() -> None:
    text = re.sub(r"/\*.*?\*/", "", (ROOT / "style.css").read_text(encoding="utf-8"), flags=re.DOTALL)
    for selectors, rules in re.findall(r"([^{}]+)\{([^}]*)\}", text):
        for selector in selectors.split(","):
            assert "mrflow" in selector, selector
        assert not re.search(r"#[0-9a-fA-F]{3,8}\b|\b(?:rgb|hsl)a?\(|:\s*(?:white|black|red|gr[ae]y)\b", rules), rules


@pytest.mark.parametrize(("file", "name"), [("mrflow.js", "mrflow"), ("mrflow_drafts.js", "mrflowDrafts")])
def test_a_page_helper_is_one_object(file: str, name: str) -> None:
    text = (ROOT / "javascript" / file).read_text(encoding="utf-8")
    outer = [line for line in text.splitlines() if line and not line.startswith((" ", "//", "}"))]
    assert outer == [f"const {name} = {{", f"onUiLoaded({name}.start);"]


def test_the_page_helper_of_the_line_asks_only_for_our_elements() -> None:
    text = (ROOT / "javascript" / "mrflow.js").read_text(encoding="utf-8")
    assert "querySelector(`#script_mrflow_${name}`)" in text
    asked = set(re.findall(r'element\("(\w+)"\)', text))
    source = (ROOT / "mrflow_sched" / "apps" / "webui" / "ui.py").read_text(encoding="utf-8")
    assert asked
    assert all(f'elem_id("{name}")' in source for name in asked)


@pytest.mark.skipif(
    shutil.which("node") is None, reason="node is not installed: the page helper's syntax is not parsed"
)
@pytest.mark.parametrize("file", ["mrflow.js", "mrflow_drafts.js"])
def test_the_page_helper_parses(file: str) -> None:
    subprocess.run(["node", "--check", str(ROOT / "javascript" / file)], check=True)


def run_install(*options: str, script: Path = ROOT / "install.py", **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("COMFYUI_", "PYTHONPATH"))}
    done = subprocess.run(
        [sys.executable, *options, str(script)],
        capture_output=True,
        text=True,
        check=True,
        env={**inherited, **environment},
    )
    assert done.stderr == ""
    return done.stdout


def test_install_says_one_sentence_and_imports_nothing_heavy() -> None:
    assert run_install() == "MrFlow is ready: everything it needs came with the WebUI, and nothing was installed.\n"
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "install.py")], capture_output=True, text=True, check=True
    ).stderr
    names = {line.rsplit("|", 1)[-1].strip() for line in loaded.splitlines()}
    assert not names & {"torch", "numpy", "PIL", "spandrel", "safetensors", "pip", "launch", "mrflow_sched"}


def test_install_names_what_is_missing(tmp_path: Path) -> None:
    # Isolated and without site-packages nothing but the standard library is there.
    said = run_install("-I", "-S")
    assert said.startswith("MrFlow needs packages that this WebUI lacks: torch, numpy, PIL, safetensors, spandrel; ")
    assert said.count("\n") == 1


def test_install_notices_a_half_copied_folder(tmp_path: Path) -> None:
    copy = Path(shutil.copy(ROOT / "install.py", tmp_path / "install.py"))
    assert "not complete" in run_install(script=copy)


def in_custom_nodes(folder: Path) -> Path:
    """install.py with a package beside it that ComfyUI would find complete."""
    pack = folder / "custom_nodes" / "any name"
    (pack / "mrflow_sched" / "apps" / "comfy").mkdir(parents=True)
    (pack / "mrflow_sched" / "apps" / "comfy" / "__init__.py").touch()
    return Path(shutil.copy(ROOT / "install.py", pack))


def test_install_knows_that_it_stands_in_comfyui(tmp_path: Path) -> None:
    script, ready = in_custom_nodes(tmp_path), "everything it needs came with ComfyUI, and nothing was installed."
    assert run_install(script=script) == f"MrFlow is ready: {ready}\n"
    # A folder that custom_nodes only links to is told by what the manager sets.
    assert ready in run_install(COMFYUI_PATH=str(tmp_path))
    said = run_install("-I", "-S", script=script)
    assert said.startswith("MrFlow needs packages that this ComfyUI lacks: torch, ")
    assert said.endswith("; update ComfyUI, or install them there.\n")
    (script.parent / "mrflow_sched" / "apps" / "comfy" / "__init__.py").unlink()
    assert run_install(script=script).endswith(" remove its folder and install it again with the manager.\n")


def test_install_reads_on_a_python_that_is_too_old() -> None:
    source = (ROOT / "install.py").read_text(encoding="utf-8")
    compile(source, "install.py", "exec", flags=0, dont_inherit=True)
    assert not re.search(r"\bf\"|:=|-> |\bmatch\b", source)
    assert "run_pip" not in source
    assert "subprocess" not in source
