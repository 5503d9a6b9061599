"""`mrflow draft` and `mrflow finish`: what is picked is what the whole run makes, to the last bit."""

from __future__ import annotations

import json
import signal
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from cli_tools import SMALL, pixels, watch_network
from PIL import Image, PngImagePlugin

from mrflow_sched.apps.cli.drafting import Pick
from mrflow_sched.images.drafts import CHUNK, read_draft
from mrflow_sched.images.files import read_text
from mrflow_sched.images.record import KEY, SHEET, RunRecord

PROMPT = "a red circle"
FORWARDS = 3  # of stage 1 in SMALL


@pytest.fixture(scope="module")
def drafted(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three drafts of one prompt and their sheet."""
    from mrflow_sched.apps.cli.main import main

    folder = tmp_path_factory.mktemp("drafts")
    words = [*SMALL, "--seed", "5", "--batch", "3", "--out", str(folder), "--model", str(tiny_folder)]
    assert main(["draft", PROMPT, *words]) == 0
    return folder


@pytest.fixture
def folder(drafted: Path, tmp_path: Path) -> Path:
    """A private copy of them."""
    import shutil

    return Path(shutil.copytree(drafted, tmp_path / "drafts"))


def whole(mrflow: Any, out: Path, seed: int) -> bytes:
    """The bytes of the file that the whole run makes."""
    code, found, _ = mrflow("generate", PROMPT, *SMALL, "--seed", str(seed), "--out", str(out))
    assert code == 0
    return Path(found.strip()).read_bytes()


def rewritten(path: Path, change: Any = None, *, keep_text: bool = True) -> None:
    """Save a draft as an image editor does: its texts stay, its own chunk is gone."""
    with Image.open(path) as image:
        image.load()
        texts = dict(image.info)
    if change is not None:
        image = change(image)
    info = PngImagePlugin.PngInfo()
    for name, value in texts.items():
        if keep_text and isinstance(value, str):
            info.add_text(str(name), value)
    image.save(path, pnginfo=info)


def test_a_pick_of_the_sheet_is_the_whole_run(mrflow: Any, drafted: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in drafted.glob("*.png")) == [
        "draft-5.png",
        "draft-6.png",
        "draft-7.png",
        "drafts.png",
    ]
    code, out, err = mrflow("finish", f"{drafted / 'drafts.png'}#3,1", "--out", str(tmp_path / "finished"))
    assert code == 0
    assert "stage 1" not in err
    seventh, fifth = (Path(line) for line in out.splitlines())
    assert seventh.read_bytes() == whole(mrflow, tmp_path / "whole", 7)
    assert fifth.read_bytes() == whole(mrflow, tmp_path / "whole", 5)


def test_a_drafts_file_can_be_finished_and_repeated(mrflow: Any, drafted: Path, tmp_path: Path) -> None:
    path = str(drafted / "draft-6.png")
    _, out, err = mrflow("finish", path, "--out", str(tmp_path / "finished"))
    assert "stage 1" not in err
    expected = whole(mrflow, tmp_path / "whole", 6)
    assert Path(out.strip()).read_bytes() == expected
    _, out, err = mrflow("generate", "--from", path, "--out", str(tmp_path / "again"))
    assert "now completed" in err
    assert Path(out.strip()).read_bytes() == expected
    assert RunRecord.from_json(read_text(out.strip())[KEY]).draft is None


def test_finishing_leaves_stage_1_out(
    mrflow: Any, drafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    watch_network(monkeypatch, calls.append)
    mrflow("finish", str(drafted / "draft-5.png"), "--out", str(tmp_path))
    assert len(calls) == 1
    found = read_draft(drafted / "draft-5.png")
    assert found.latents is not None
    assert (found.latents.shape, found.changed) == ((16, 4, 4), False)


def test_latents_that_an_editor_dropped_are_made_again(mrflow: Any, folder: Path, tmp_path: Path) -> None:
    rewritten(folder / "draft-7.png")
    code, out, err = mrflow("finish", f"{folder / 'drafts.png'}#3", "--out", str(tmp_path / "finished"))
    assert code == 0
    assert "holds no latents that can be used, so stage 1 runs again" in err
    assert Path(out.strip()).read_bytes() == whole(mrflow, tmp_path / "whole", 7)


def test_damaged_latents_are_made_again(mrflow: Any, folder: Path, tmp_path: Path) -> None:
    path = folder / "draft-7.png"
    data = bytearray(path.read_bytes())
    place = data.index(CHUNK) + 40
    data[place] ^= 0xFF
    path.write_bytes(data)
    code, out, err = mrflow("finish", str(path), "--out", str(tmp_path / "finished"))
    assert code == 0
    assert "stage 1 runs again" in err
    assert Path(out.strip()).read_bytes() == whole(mrflow, tmp_path / "whole", 7)


def test_a_chunk_of_foreign_bytes_is_no_draft_of_latents(folder: Path) -> None:
    path = folder / "draft-7.png"
    rewritten(path)
    body = b"not safetensors"
    chunk = struct.pack(">I", len(body)) + CHUNK + body + struct.pack(">I", zlib.crc32(CHUNK + body))
    data = path.read_bytes()
    path.write_bytes(data[:-12] + chunk + data[-12:])
    assert read_draft(path).latents is None


def test_changed_pixels_are_finished_and_told(mrflow: Any, folder: Path, tmp_path: Path) -> None:
    rewritten(folder / "draft-7.png", lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    code, out, err = mrflow("finish", str(folder / "draft-7.png"), "--out", str(tmp_path / "finished"))
    assert code == 0
    assert "near, not equal to the whole run" in err
    whole(mrflow, tmp_path / "whole", 7)
    assert (pixels(out.strip()) != pixels(tmp_path / "whole" / "mrflow-7.png")).any()


def test_a_bare_picture_is_refused_with_the_way_to_use_it(mrflow: Any, folder: Path) -> None:
    rewritten(folder / "draft-7.png", keep_text=False)
    code, _, err = mrflow("finish", str(folder / "draft-7.png"))
    assert code == 2
    assert "near, not equal: mrflow generate PROMPT --image FILE" in err


def test_a_draft_that_is_gone_is_made_again_from_the_sheet(mrflow: Any, folder: Path, tmp_path: Path) -> None:
    (folder / "draft-6.png").unlink()
    code, out, err = mrflow("finish", f"{folder / 'drafts.png'}#2", "--out", str(tmp_path / "finished"))
    assert code == 0
    assert "is not beside the sheet, so stage 1 runs again" in err
    assert Path(out.strip()).read_bytes() == whole(mrflow, tmp_path / "whole", 6)


def test_two_sheets_of_one_folder_are_both_heard(mrflow: Any, folder: Path, tmp_path: Path) -> None:
    (folder / "draft-6.png").unlink()
    mrflow("draft", "a blue star", *SMALL, "--seed", "6", "--batch", "1", "--out", str(folder))
    picks = (f"{folder / 'drafts.png'}#2", f"{folder / 'drafts-2.png'}#1", str(folder / "draft-6.png"))
    code, out, _ = mrflow("finish", *picks, "--out", str(tmp_path / "finished"), "--json")
    assert code == 0
    assert [each["prompt"] for each in json.loads(out)["details"]] == [PROMPT, "a blue star"]


def test_a_sheet_never_finishes_another_draft(mrflow: Any, folder: Path, tmp_path: Path) -> None:
    """A later draft took the name of one that was removed."""
    (folder / "draft-6.png").unlink()
    mrflow("draft", "a blue star", *SMALL, "--seed", "6", "--batch", "1", "--out", str(folder))
    assert (folder / "draft-6.png").exists()
    code, out, err = mrflow("finish", f"{folder / 'drafts.png'}#2", "--out", str(tmp_path / "finished"))
    assert code == 0
    assert "is another draft than the sheet shows, so stage 1 runs again" in err
    assert Path(out.strip()).read_bytes() == whole(mrflow, tmp_path / "whole", 6)


@pytest.mark.parametrize(
    "latents", [torch.full((16, 4, 4), torch.nan), torch.zeros(16, 4, 5), torch.zeros(16, 4, 4)], ids=str
)
def test_latents_that_no_stage_leaves_are_made_again(
    mrflow: Any, folder: Path, tmp_path: Path, latents: torch.Tensor
) -> None:
    path = folder / "draft-7.png"
    rewritten(path)
    body = safetensors.torch.save({"latents": latents})
    chunk = struct.pack(">I", len(body)) + CHUNK + body + struct.pack(">I", zlib.crc32(CHUNK + body))
    data = path.read_bytes()
    path.write_bytes(data[:-12] + chunk + data[-12:])
    code, out, err = mrflow("finish", str(path), "--out", str(tmp_path / "finished"))
    assert code == 0
    assert "holds no latents that can be used" in err
    assert Path(out.strip()).read_bytes() == whole(mrflow, tmp_path / "whole", 7)


def test_a_finish_that_stops_at_once_keeps_the_drafts_image(
    mrflow: Any, drafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mrflow_sched.engines.diffusers.pipeline import PipelineEngine

    usual = PipelineEngine.encode_text

    def encode_text(*given: Any, **named: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return usual(*given, **named)

    monkeypatch.setattr(PipelineEngine, "encode_text", encode_text)
    code, out, _ = mrflow("finish", str(drafted / "draft-5.png"), "--out", str(tmp_path), "--json")
    assert code == 143
    (path,) = json.loads(out)["images"]
    assert (pixels(path) == pixels(drafted / "draft-5.png")).all()


def test_cheap_drafts_are_told_to_be_for_ranking(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    with monkeypatch.context() as patch:
        watch_network(patch, calls.append)
        code, _, err = mrflow("draft", PROMPT, *SMALL, "--batch", "2", "--draft-steps", "1", "--out", str(tmp_path))
    assert (code, len(calls)) == (0, 2)
    assert "Drafts of 1 steps are for ranking alone" in err
    assert read_draft(tmp_path / "draft-1.png").latents is None
    code, out, err = mrflow("finish", f"{tmp_path / 'drafts.png'}#2", "--out", str(tmp_path / "finished"))
    assert code == 0
    assert "was sampled in 1 steps, for ranking alone" in err
    assert Path(out.strip()).read_bytes() == whole(mrflow, tmp_path / "whole", 1)


def test_scores_order_the_drafts_and_the_best_are_finished(mrflow: Any, tmp_path: Path) -> None:
    words = ("--batch", "4", "--score", "saturation", "--score", "contrast", "--keep", "3", "--json")
    code, out, err = mrflow("draft", PROMPT, *SMALL, *words, "--out", str(tmp_path))
    assert code == 0
    found = json.loads(out)
    assert [each["number"] for each in found["drafts"]] == [1, 2, 3, 4]
    ranks = [{name: sorted(row["scores"][name] for row in found["drafts"]) for name in ("saturation", "contrast")}][0]
    places = [sum(ranks[name].index(row["scores"][name]) for name in ranks) for row in found["drafts"]]
    assert places == sorted(places, reverse=True)
    assert [each["seed"] for each in found["finished"]["details"]] == [row["seed"] for row in found["drafts"][:3]]
    for each in found["finished"]["details"]:
        assert Path(each["path"]).read_bytes() == whole(mrflow, tmp_path / "whole", each["seed"])
    assert {report["score"] for report in found["reports"]} == {"saturation", "contrast"}
    assert [report["finished"] for report in found["reports"]] == [False, False, True, True]
    assert "saturation" in err


def test_every_prompt_of_a_file_has_its_drafts(mrflow: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n", encoding="utf-8")
    code, out, _ = mrflow(
        *("draft", "--prompts", str(tmp_path / "prompts.txt"), *SMALL, "--batch", "2", "--out", str(tmp_path), "--json")
    )
    assert code == 0
    rows = json.loads(out)["drafts"]
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        (prompt, seed) for prompt in ("a red circle", "a blue star") for seed in (0, 1)
    ]
    code, out, _ = mrflow("finish", f"{tmp_path / 'drafts.png'}#3-4", "--out", str(tmp_path / "f"), "--json")
    assert [(row["prompt"], row["seed"]) for row in json.loads(out)["details"]] == [
        ("a blue star", 0),
        ("a blue star", 1),
    ]


def test_ctrl_c_keeps_the_drafts_that_are_there(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(count: int) -> None:
        if count == 2 * FORWARDS + 1:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            watch_network(patch, press)
            code, out, _ = mrflow("draft", PROMPT, *SMALL, "--batch", "5", "--out", str(tmp_path), "--json")
    finally:
        signal.signal(signal.SIGINT, before)
    found = json.loads(out)
    assert code == 130
    assert [row["seed"] for row in found["drafts"]] == [0, 1]
    assert (found["cancelled"], found["error"]) == (True, "Stopped; what was finished is saved.")
    code, _, _ = mrflow("finish", f"{found['sheet']}#2", "--out", str(tmp_path / "f"))
    assert code == 0


REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("draft",), "the prompt is missing"),
    (("draft", "a", "--prompts", "b"), "a prompt beside it has no meaning"),
    (("draft", "a", "--keep", "2"), "nothing says which those are; give --score too"),
    (("draft", "a", "--score", "contrast", "--batch", "2", "--keep", "3"), "more than the 2 drafts"),
    (("draft", "a", "--score", "beauty"), "beauty"),
    (("draft", "a cat in the rain", "--score", "judge"), "reads only what the embedded model draws"),
    (("draft", "a", "--draft-steps", "0"), "--draft-steps"),
    (("draft", "a", "--low-steps", "3", "--draft-steps", "4"), "at most the 3 of the plan's stage 1, got 4"),
    (("draft", "a", "--native"), "--native is for native sampling, which has no first stage to draft"),
    (("draft", "a", "--steps", "3"), "--steps is for native sampling"),
    (("finish", "none.png"), "there is no image file 'none.png'"),
    (("finish", "none.png#2"), "there is no image file 'none.png'"),
    (("finish", "none.png#x"), "should end in numbers of drafts"),
    (("finish", "none.png#3-1"), "should end in numbers of drafts"),
    (("finish", "none.png#1-999999"), "should end in numbers of drafts"),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSED, ids=lambda value: " ".join(value)[:40])
def test_what_does_not_go_together_is_refused(
    mrflow: Any, tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    code, _, err = mrflow(*words, "--out", str(tmp_path / "out"))
    assert code == 2
    assert sentence in err
    assert not (tmp_path / "out").exists()


def test_finish_refuses_what_is_not_its_own(mrflow: Any, folder: Path, tmp_path: Path) -> None:
    sheet = str(folder / "drafts.png")
    for words, sentence in (
        ((sheet,), "shows 3 drafts; say which"),
        ((f"{sheet}#4",), "has drafts 1 to 3, and no 4"),
        ((f"{folder / 'draft-5.png'}#1",), "is no contact sheet of drafts"),
    ):
        code, _, err = mrflow("finish", *words)
        assert (code, sentence in err) == (2, True), err
    code, _, err = mrflow("finish", f"{sheet}#1", model=None)
    assert code == 2
    assert "name it with --model DIR" in err
    _, out, _ = mrflow("generate", PROMPT, *SMALL, "--out", str(tmp_path / "whole"))
    code, _, err = mrflow("finish", out.strip())
    assert code == 2
    assert "is no draft: its record is that of a whole run" in err


@pytest.mark.parametrize(
    "listed",
    ["{}", "[]", "[1]", '[{"file": "../draft-5.png", "record": {}}]', '[{"file": "", "record": {}}]', "[" * 9000, "x"],
    ids=lambda text: text[:20],
)
def test_an_altered_sheet_is_one_sentence(mrflow: Any, folder: Path, listed: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text(SHEET, listed)
    Image.new("RGB", (8, 8)).save(folder / "drafts.png", pnginfo=info)
    code, _, err = mrflow("finish", f"{folder / 'drafts.png'}#1")
    assert code == 2
    assert "list of drafts that was altered" in err
    assert len(err.splitlines()) == 1


def test_numbers_of_a_pick() -> None:
    assert Pick.from_text("a.png#1,4-6,4").numbers == (1, 4, 5, 6)
    assert Pick.from_text("a#b.png#02") == Pick(Path("a#b.png"), (2,))


def test_a_name_with_a_number_sign_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "take#2").write_bytes(b"")
    assert Pick.from_text(str(tmp_path / "take#2")) == Pick(tmp_path / "take#2")


def test_another_upscaler_is_used_where_it_is_named(mrflow: Any, folder: Path, tmp_path: Path) -> None:
    from mrflow_sched import demo

    own = str(demo.upscaler_path())
    code, out, err = mrflow("finish", str(folder / "draft-5.png"), "--upscaler", own, "--out", str(tmp_path / "f"))
    assert code == 0
    assert "was made with the upscaler" in err
    assert "as you asked. Its refining stays as it was planned for that one; a new draft with --upscaler has" in err
    kept = ("--upscaler-kind", "interpolation")
    _, other, _ = mrflow(
        "generate", PROMPT, *SMALL, "--seed", "5", "--upscaler", own, *kept, "--out", str(tmp_path / "w")
    )
    assert (pixels(out.strip()) == pixels(other.strip())).all()
