"""The user's language: which packs get our words, and that every sentence of ours is in each language."""

from __future__ import annotations

import ast
import functools
import json
import re
import sys
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from doubles import Flux, Sd3Model, Wan, WebUI, engine
from test_controls import BAD
from test_drafts import REFUSED, as_file, draft_file, run_of
from test_infotext import model
from test_package_files import LANGUAGES

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.webui import ui, words
from mrflow_sched.apps.webui.controls import CHOICES, FIELDS, Controls
from mrflow_sched.apps.webui.expected import Expected, expect, phrase
from mrflow_sched.apps.webui.hires import hires_note
from mrflow_sched.apps.webui.host import probe_model
from mrflow_sched.apps.webui.job import say
from mrflow_sched.apps.webui.recipe import make_recipe
from mrflow_sched.plan.families import FAMILIES

WEBUI = Path(words.__file__).parent

# ------------------------------------------------------------------------------------------------------------- packs

PACKS = {
    "zh-Hans": [
        *("zh-Hans (Stable)", "zh-Hans (Testing) [vladmandic]", "zh_CN", "zh-CN", "zh", "sd_zh_CN", "简体中文"),
        *("chinese-all-0831", "chinese-english-0831", "Chinese-All", "simplified chinese"),
    ],
    "zh-Hant": ["zh-Hant (Stable)", "zh_TW", "zh-HK", "繁體中文", "traditional-chinese", "chinese_traditional"],
    "ja": ["ja_JP", "ja", "Japanese", "日本語"],
    "ko": ["ko_KR", "ko-KR", "Korean", "한국어"],
    "de": ["de_DE", "de", "Deutsch", "German", "de-AT"],
    "es": ["es_ES", "es-419", "Español", "spanish"],
    "fr": ["fr_FR", "fr-CA", "Français", "french"],
    None: [
        "None",
        "",
        "ca_ES",
        "it_IT",
        "pt_BR",
        "ru_RU",
        "english",
        "en_US",
        "br_FR",
        "nds_DE",
        "test",
        "freedom",
        "desk",
    ],
}


@pytest.mark.parametrize(("name", "tag"), [(name, tag) for tag, names in PACKS.items() for name in names])
def test_a_packs_name_tells_its_language(name: str, tag: str | None) -> None:
    assert words.language_of(name) == tag


def test_our_words_come_with_every_pack_of_the_language_and_yield_to_the_packs_own() -> None:
    packs: dict[str, Any] = {
        "zh-Hans (Stable)": ["/zh.json"],
        "ja_JP": ["/ja.json", "/more.json"],
        "it_IT": ["/it.json"],
    }
    for _ in range(2):  # the page may be reloaded without the host listing its packs again
        words.add_languages(packs)
    assert list(packs) == ["zh-Hans (Stable)", "ja_JP", "it_IT"]  # the menu has no language of ours
    assert packs["zh-Hans (Stable)"] == [str(words.FOLDER / "zh-Hans.json"), "/zh.json"]
    assert packs["ja_JP"] == [str(words.FOLDER / "ja.json"), "/ja.json", "/more.json"]
    assert packs["it_IT"] == ["/it.json"]


def test_a_pack_that_is_one_path_stays_as_it_is() -> None:
    packs = {"de_DE": "/de.json"}
    words.add_languages(packs)
    assert packs == {"de_DE": "/de.json"}


def test_the_hook_finds_the_hosts_packs_and_does_nothing_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    words.register()
    module: Any = ModuleType("modules.localization")
    monkeypatch.setitem(sys.modules, "modules", ModuleType("modules"))
    monkeypatch.setitem(sys.modules, "modules.localization", module)
    words.register()
    module.localizations = {"ko_KR": ["/ko.json"]}
    words.register()
    assert module.localizations == {"ko_KR": [str(words.FOLDER / "ko.json"), "/ko.json"]}


# --------------------------------------------------------------------------------------------- every sentence there is

# Strings of three words and more that the user never sees on the page or under the image.
NEVER_SHOWN = {
    "Use same choices",
    "Hires negative prompt",
    "bool | int | float | str",
    # keys of the metadata: refusals quote them
    "Distilled CFG Scale",
    "Seed resize from",
    "Seed resize from-1",
    "Seed resize from-2",
    "Variation seed strength",
    # why a file has no entry in the list of upscalers: logged
    "it is x{}, and x2 and x4 are listed",
    "its name is that of {}",
}
# The API's schema and the metadata are English everywhere.
ENGLISH_FILES = {"api.py", "infotext.py", "words.py"}


def template(node: ast.AST, constants: dict[str, str]) -> str | None:
    """A string as it stands in the source, with {} for what varies; names of constants are filled in."""
    if isinstance(node, ast.Constant):
        return re.sub(r"\{\w+\}", "{}", node.value) if isinstance(node.value, str) else None
    if not isinstance(node, ast.JoinedStr):
        return None
    parts = [
        str(part.value)
        if isinstance(part, ast.Constant)
        else constants.get(
            part.value.id if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name) else "", "{}"
        )
        for part in node.values
    ]
    return re.sub(r"(\{\})+", "{}", "".join(parts))


def templates(path: Path, within: str | None = None) -> Iterator[str]:
    """The strings of three words and more in a file that are no docstring, are not only logged and hold no pattern.

    Args:
        path: The file.
        within: Only those in calls of a function of this name.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants: dict[str, str] = {}
    skipped: set[int] = set()
    wanted: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = template(node.value, {})
            constants.update({node.targets[0].id: value} if value is not None else {})
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            skipped.update(map(id, node.values))
        elif isinstance(node, ast.Call):
            inside = set(map(id, ast.walk(node)))
            if ast.unparse(node.func).startswith("logger."):
                skipped |= inside
            if ast.unparse(node.func) == within:
                wanted |= inside
    for node in ast.walk(tree):
        found = None if id(node) in skipped or (within and id(node) not in wanted) else template(node, constants)
        if (
            found
            and " " in found
            and len(re.findall(r"[A-Za-z]{2,}", found)) > 2
            and not re.search(r"[\\<^?]\S*[)>]|\[", found)
        ):
            yield found


def said_in_the_source() -> list[str]:
    files = [path for path in sorted(WEBUI.glob("*.py")) if path.name not in ENGLISH_FILES]
    found = {text for path in files for text in templates(path)} - NEVER_SHOWN
    found |= set(templates(WEBUI.parents[1] / "upscaling" / "model.py", within="say"))
    return sorted(found)


def said_by_plans() -> Iterator[str]:
    """The lines, notes and refusals of recipes over the choices that decide what is said."""
    sizes = [
        (1024, 1024),
        (1000, 616),
        (96, 96),
        (150, 150),
        (3000, 2000),
        (216, 270),
        (64, 2048),
        (0, 8),
        (20000, 20000),
        (400000, 64),
    ]
    upscalers = [("None",), ("None", "R-ESRGAN 4x+"), ("None", "2x-Tiny (MrFlow)")]
    choices: list[dict[str, Any]] = [
        *({"preset": preset} for preset in CHOICES["preset"]),
        *({"solver": solver} for solver in CHOICES["solver"]),
        *({"factor": factor} for factor in (1.25, 3.35, 4.0)),
        {"low_steps": 150, "refine_steps": 20},
        {"sigma": 0.6, "refine_cfg": "off"},
        {"refine_cfg": "value", "refine_cfg_value": 30.0},
        {"upscaler": "Gone"},
        {"draft": True},
        {"keep_composition": True},
    ]
    for family, size, chosen in product(sorted(set(FAMILIES) - {"demo"}), sizes, choices):
        info = model(family)
        for names in upscalers if size == sizes[0] else upscalers[2:]:
            try:
                controls = Controls(True, **chosen)
                made = make_recipe(controls, info, *size, upscalers=names)
            except MrFlowError as error:
                yield str(error)
                continue
            expected = expect(made, info, controls)
            assert expected is not None
            yield from (made.line if controls.draft else f"{made.line} · {phrase(expected)}", *made.notes)
    for expected in (Expected(3.0, 20), Expected(1.0, 8), Expected(1.0, 8, (1536, 1536))):
        yield phrase(expected)


def said_of_pages() -> Iterator[str]:
    """What is refused of the page's other fields, or of a request for a plan."""
    for bad in ({"width": 0.5}, {"steps": 0}, {"cfg_scale": -1}, {"hr_scale": 0}, {"hr_resize_x": -1}):
        try:
            ui.preview(Controls(True), {"width": 1024, "height": 1024, "enable_hr": True, **bad})
        except MrFlowError as error:
            yield str(error)


def said_of_arguments() -> Iterator[str]:
    for values in [*([bad] for bad, _ in BAD), [True] * 20, 3]:
        try:
            Controls.from_args(values)  # pyright: ignore[reportArgumentType]
        except MrFlowError as error:
            yield str(error)
            yield f"MrFlow is off for this job: {error}"


def shape(sentence: str) -> str:
    return re.sub(r"\d[\d.,+x×%]*", "0", sentence)


@functools.cache
def provoked() -> list[str]:
    """One of each kind of sentence, as it is said."""
    sentences = [*said_by_plans(), *said_of_pages(), *said_of_arguments(), *said_of_models(), *said_by_jobs()]
    sentences += said_of_drafts()
    return list({shape(sentence): sentence for sentence in sentences}.values())


def said_of_models() -> Iterator[str]:
    for loaded in (
        Flux("flux1-kontext-dev"),
        Wan("a-video"),
        engine("StableDiffusionXLRefiner")("xl-refiner"),
        engine("PiD")("pid"),
        OldForge(),
    ):
        refusal = probe_model(SimpleNamespace(sd_model=loaded, cfg_scale=1.0)).refusal
        assert refusal is not None
        yield refusal
    yield str(probe_model(SimpleNamespace()).refusal)


class OldForge(Sd3Model):
    """Forge before it knew flow models: it adds noise to all as to variance-exploding ones."""

    forge_objects = SimpleNamespace()


def said_by_jobs() -> Iterator[str]:
    """What finished and refused jobs say under the image."""
    for model_, job, chosen in (
        (Flux(), {}, {}),
        (Flux(), {"sampler_name": "DDIM"}, {"refine_cfg": "off", "solver": "automatic"}),
        (Flux(), {"sampler_name": "DPM adaptive", "scheduler": "Turbo", "enable_hr": True}, {"shift": "host"}),
        (Flux(), {"refiner_checkpoint": "sdxl-refiner"}, {}),
        (Flux("flux1-kontext-dev"), {}, {}),
        (Flux(), {}, {"sigma": 7}),
    ):
        host = WebUI("forge", model_)
        p = host.job(**{"width": 384, "height": 256, **job})
        host.generate(p, {"enabled": True, **chosen})
        assert p.comments
        yield from p.comments


def said_of_drafts() -> Iterator[str]:
    """What jobs say that make drafts, finish them, or cannot."""
    _, made, result = run_of("forge", {"draft": True})
    yield from made.comments
    picture = result.pictures[0]
    text = picture.info["parameters"]
    changed, shrunk = picture.point(lambda value: value // 2), picture.resize((128, 96))
    changed.info["parameters"] = shrunk.info["parameters"] = f"{text}, Model hash: 00000000ff"
    wrong = [re.sub(f"{name}: [^,]+", f"{name}: much", text) for name in ("Seed", "CFG scale")]
    for given in (*(make() for make, _ in REFUSED.values()), as_file(changed), as_file(shrunk), *wrong):
        yield from run_of("forge", {"finish": given})[1].comments
    yield from run_of("forge", {"finish": draft_file(), "sigma": 0.3})[1].comments
    file = SimpleNamespace(name=__file__)
    yield from run_of("forge", True, *[None] * (len(FIELDS) - 1), [file])[1].comments


# English that stands in a translation, beside what is quoted or in brackets: another library's error.
QUOTED = re.compile(r"'[^']*'|[(（][^)）]*[)）]")
ENGLISH = re.compile(r"(?<!['\w])[a-z]{2,} [a-z]{2,} [a-z]{2,}")
OTHER_LETTERS = ("zh-Hans", "zh-Hant", "ja", "ko")


def halves(language: str, texts: list[str]) -> dict[str, str]:
    """Those of `texts` of which a language translates a part only."""
    said = {text: words.in_language(text, language) for text in texts}
    return {key: text for key, text in said.items() if key != text and ENGLISH.search(QUOTED.sub("", text))}


def missing(language: str, texts: list[str]) -> list[str]:
    """Those of `texts` (with {} for what varies) that a language lacks."""
    keys = json.loads((words.FOLDER / f"{language}.json").read_text(encoding="utf-8"))
    lacking: list[str] = []
    for text in texts:
        # A part of a sentence, or one whose parts are written in several places.
        bare, whole = text.strip("{} "), re.compile(".*".join(map(re.escape, text.split("{}"))))
        filled = text.replace("{}", "7")
        known = any(bare in key or whole.fullmatch(key) for key in keys)
        if not known and words.in_language(filled, language) == filled:
            lacking.append(text)
    return lacking


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_sentence_in_the_source_is_in_every_language(language: str) -> None:
    found = said_in_the_source()
    assert len(found) > 50
    assert missing(language, found) == [], f"add these to {words.FOLDER}/{language}.json"
    if language in OTHER_LETTERS:
        assert halves(language, [text.replace("{}", "7") for text in found]) == {}


def test_a_new_sentence_would_be_missed() -> None:
    new = "MrFlow has never said {} before; add it."
    assert missing("ja", [new, "MrFlow is off for this job: {}"]) == [new]


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_plans_and_refusals_really_say_is_translated_whole(language: str) -> None:
    assert len(provoked()) > 60
    english = [sentence for sentence in provoked() if words.in_language(sentence, language) == sentence]
    assert english == [], f"add these to {words.FOLDER}/{language}.json"
    if language in OTHER_LETTERS:
        assert halves(language, provoked()) == {}


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_keep_every_value(language: str) -> None:
    for key, text in json.loads((words.FOLDER / f"{language}.json").read_text(encoding="utf-8")).items():
        values = [f"<{number}>" for number in range(key.count("{}"))]
        said = text.format(*values) if values else text
        assert all(said.count(value) == 1 for value in values), (key, text)
        assert not re.search(r"\{\d*\}", said), (key, text)


# ------------------------------------------------------------------------------------------------------ what users see


def test_values_stand_where_the_language_wants_them() -> None:
    english = (
        "MrFlow would cost 1.70 times as much as 4 native steps at 512x512; use fewer low steps or a larger factor."
    )
    german = words.in_language(english, "de_DE")
    assert german.startswith("MrFlow würde 1.70-mal so viel kosten wie 4 gewöhnliche Schritte bei 512x512; ")
    assert words.in_language(english, "zh-Hans (Stable)").startswith("在 512x512 下，MrFlow 的开销将是 4 步")
    assert words.in_language(english, "None") == words.in_language(english, "it_IT") == english
    assert words.in_language("Not one of ours.", "ja_JP") == "Not one of ours."


def test_a_sentence_within_a_sentence_is_translated_too() -> None:
    said = words.in_language(
        "MrFlow is off for this job: sigma must be a number from 0.02 to 0.9, got 5; 0 uses the preset's.", "ko_KR"
    )
    refusal = "sigma: 0.02~0.9 범위의 수여야 합니다(받은 값: 5; 0이면 프리셋 값을 사용합니다)."
    assert said == f"이 작업에는 MrFlow를 사용하지 않습니다: {refusal}"


@pytest.mark.parametrize("part", [" or {0} x -> ", " · "])
def test_a_hostile_value_takes_no_time(part: str) -> None:
    value = "'" + part * 40 + "'"
    assert value in words.in_language(f"preset must be {value}, got {value}.", "fr")


SLOW = ("no faster than 8 steps at this size", "in dieser Größe nicht schneller als 8 Schritte")
PIECES = {
    "draft 512×512 ×12": "Entwurf 512×512 ×12",
    "finished later: → Lanczos ×2 → 1024×1024 ×1 @ σ 0.12": (
        "später fertiggestellt: → Lanczos ×2 → 1024×1024 ×1 @ σ 0.12"
    ),
    "experimental": "experimentell",
    "about 3.0× faster than 20 steps": "etwa 3.0-mal so schnell wie 20 Schritte",
    SLOW[0]: SLOW[1],
    f"{SLOW[0]}; pays from about 1536×1536 up": f"{SLOW[1]}; lohnt sich ab etwa 1536×1536",
}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_pieces_of_a_line_are_translated_alone_and_together(count: int) -> None:
    for chosen in combinations(PIECES, count):
        if sum("steps" in piece for piece in chosen) < 2:  # a line has one comparison
            german = " · ".join(PIECES[piece] for piece in chosen)
            assert words.in_language(" · ".join(chosen), "de") == german


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    shared: Any = ModuleType("modules.shared")
    shared.sd_upscalers = [SimpleNamespace(name="2x-Tiny (MrFlow)")]
    shared.opts = SimpleNamespace(localization="zh-Hans (Stable)", sd_model_checkpoint="z-image-turbo")
    monkeypatch.setitem(sys.modules, "modules.shared", shared)


def shown(**changes: Any) -> tuple[str, str]:
    chosen = {**Controls(enabled=True).to_dict(), **changes}
    return ui.plan_html([chosen[name] for name in FIELDS], {"width": 1024, "height": 1024})


@pytest.mark.usefixtures("chinese")
def test_the_page_speaks_the_users_language() -> None:
    line, summary = shown(solver="multistep", low_steps=2)
    for text in (line, summary):
        assert re.search(r"@ σ [\d.]+ · (?:速度约为|在此尺寸下不比) 9 步采样", text)
    assert "模型会在生成第一张图像时加载" in line
    assert "是蒸馏模型" in line
    refused, short = shown(sigma=0.01)
    assert "Sigma 必须是 0.02 到 0.9 之间的数，收到的是 0.01；0 表示采用预设值。" in refused
    assert ">Sigma 必须是 0.02 到 0.9 之间的数，收到的是 0.01</span>" in short


@pytest.mark.usefixtures("chinese")
def test_the_sentences_under_the_image_do_too() -> None:
    job = SimpleNamespace(comments={})
    say(job, hires_note(1024, 1024))
    assert list(job.comments) == ["MrFlow 会取代高分辨率修复（Hires. fix）；其目标尺寸 1024x1024 即最终尺寸。"]
