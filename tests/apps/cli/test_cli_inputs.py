"""Prompts from a file, images and LoRAs that a run starts from, formats; in the record, and with --from."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import SMALL, change_engines, pixels
from PIL import Image

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.cli.inputs import LoraChoice, read_prompts, syntax_notes
from mrflow_sched.apps.cli.main import main
from mrflow_sched.apps.cli.options import PlanChoices
from mrflow_sched.images.files import read_text
from mrflow_sched.images.record import RunRecord

DEVICE = ("--dtype", "float32", "--device", "cpu")


def record_of(path: str | Path) -> RunRecord:
    return RunRecord.from_json(read_text(path)["mrflow"])


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """An image of 24x16 with a ramp in it."""
    values = np.linspace(0, 255, 24 * 16 * 3).reshape(16, 24, 3).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "start.png")
    return tmp_path / "start.png"


# --- an image ----------------------------------------------------------------------------------


def test_an_image_is_upscaled_and_its_run_repeats_with_that_file_alone(
    mrflow: Any, tmp_path: Path, start: Path
) -> None:
    words = ("a star", "--image", str(start), *DEVICE, "--refine-steps", "1", "--sigma", "0.1")
    code, out, err = mrflow("generate", *words, "--out", str(tmp_path / "o"))
    assert code == 0
    assert "Stage 1 at" not in err
    path = out.strip()
    assert pixels(path).shape == (32, 48, 3)  # twice its size
    kept = mrflow("generate", *words[:7], "--refine-steps", "0", "--out", str(tmp_path / "kept"))[1].strip()
    small = np.asarray(Image.fromarray(pixels(kept)).resize((24, 16), Image.Resampling.BOX), dtype=float)
    assert np.abs(small - pixels(start)).mean() < 2
    assert not np.array_equal(pixels(kept), pixels(path))
    record = record_of(path)
    assert (record.start, record.strength) == ("start.png", None)

    code, _, err = mrflow("generate", "--from", path, "--out", str(tmp_path / "p"))
    assert code == 2
    assert "was made from the image 'start.png'; give that file with --image" in err
    Image.new("RGB", (24, 16)).save(tmp_path / "other.png")
    code, _, err = mrflow("generate", "--from", path, "--image", str(tmp_path / "other.png"))
    assert code == 2
    assert f"'start.png' (SHA-256 {record.start_sha256[:12]}...), not 'other.png'" in err  # type: ignore[index]
    code, out, _ = mrflow("generate", "--from", path, "--image", str(start), "--out", str(tmp_path / "again"))
    assert code == 0
    assert np.array_equal(pixels(path), pixels(out.strip()))
    assert record_of(out.strip()) == record


def test_a_transparent_image_stays_transparent(mrflow: Any, tmp_path: Path) -> None:
    values = np.zeros((16, 24, 4), np.uint8)
    values[:, :12] = (200, 40, 40, 255)  # opaque on the left; black that nobody sees on the right
    Image.fromarray(values).save(tmp_path / "cut.png")
    words = ("a star", "--image", str(tmp_path / "cut.png"), "--refine-steps", "0", *DEVICE)
    code, out, err = mrflow("generate", *words, "--out", str(tmp_path / "o"))
    assert (code, "transparency" in err) == (0, False)
    made = np.asarray(Image.open(out.strip())).astype(int)
    assert made.shape == (32, 48, 4)
    assert made[:, :22, 3].min() > 240
    assert made[:, 26:, 3].max() < 16
    assert made[:, 26:, 0].min() > 100  # no black behind the edge
    again = mrflow("generate", "--from", out.strip(), "--image", words[2], "--out", str(tmp_path / "again"))[1].strip()
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(out.strip())))
    code, out, err = mrflow("generate", *words, "--format", "jpg", "--out", str(tmp_path / "j"))
    assert (code, Image.open(out.strip()).mode) == (0, "RGB")
    assert ".jpg holds no transparency" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--refine-steps", "2", "--sigma", "0.1"), "Steps: 2, "),
        (("--strength", "0.4", "--low-steps", "3"), "Steps: 3, "),
    ],
)
def test_the_parameters_text_says_what_was_done_with_an_image(
    mrflow: Any, tmp_path: Path, start: Path, options: tuple[str, ...], said: str
) -> None:
    out = mrflow("generate", "a star", "--image", str(start), *options, *DEVICE, "--out", str(tmp_path / "o"))[1]
    line = read_text(out.strip())["parameters"].splitlines()[-1]
    assert line.startswith(said)
    assert f"Denoising strength: {options[1] if options[0] == '--strength' else options[3]}" in line
    assert "Source image: start.png" in line
    assert ("Refine steps" in line) == (options[0] == "--strength")


def test_strength_starts_stage_1_from_the_image_at_its_own_size(mrflow: Any, tmp_path: Path, start: Path) -> None:
    words = ("a star", "--image", str(start), "--strength", "0.4", "--low-steps", "3", *DEVICE)
    code, out, _ = mrflow("generate", *words, "--out", str(tmp_path / "o"))
    assert code == 0
    path = out.strip()
    assert pixels(path).shape == (16, 24, 3)
    assert record_of(path).strength == 0.4
    code, out, _ = mrflow("generate", "--from", path, "--image", str(start), "--out", str(tmp_path / "again"))
    assert code == 0
    assert np.array_equal(pixels(path), pixels(out.strip()))
    native = (*words[:5], "--native", "--steps", "3", "--size", "32x32", *DEVICE)
    code, out, _ = mrflow("generate", *native, "--out", str(tmp_path / "n"))
    assert code == 0
    assert pixels(out.strip()).shape == (32, 32, 3)


def test_the_size_from_an_image_follows_the_factors(start: Path) -> None:
    from mrflow_sched.apps.cli.inputs import read_start

    image = read_start(start, None)
    for options, size in (({}, (48, 32)), ({"factors": (2.0, 2.0)}, (96, 64)), ({"stages": 3}, (96, 64))):
        plan = PlanChoices(None, options, None).make_plan("demo", image)  # type: ignore[arg-type]
        assert (plan.width, plan.height) == size
    assert PlanChoices((64, 64), {}, None).make_plan("demo", image).width == 64
    # However large the result, no size is chosen for a stage that the image replaces; one that starts from it has one.
    assert len(PlanChoices((1024, 1024), {}, None).make_plan("demo", image).stages) == 2
    assert len(PlanChoices((1024, 1024), {}, None).make_plan("demo", read_start(start, 0.5)).stages) == 3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--strength", "0.5"), "give --image FILE too"),
        (("--image", "START", "--strength", "1.5"), "above 0 and at most 1"),
        (("--image", "START", "--strength", "nan"), "not a number"),
        (("--image", "START", "--native"), "give --strength too"),
        (("--image", "nothing.png"), "there is no image file 'nothing.png'"),
    ],
)
def test_an_image_that_cannot_be_used_is_one_sentence(
    mrflow: Any, start: Path, words: tuple[str, ...], sentence: str
) -> None:
    words = tuple(str(start) if word == "START" else word for word in words)
    code, out, err = mrflow("generate", "a star", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert sentence in err


# --- prompts -----------------------------------------------------------------------------------


def test_an_image_too_thin_for_the_grid_is_refused_unless_a_size_was_chosen(mrflow: Any, tmp_path: Path) -> None:
    Image.new("RGB", (64, 3)).save(tmp_path / "thin.png")
    words = ("a star", "--preset", "2+1", "--image", str(tmp_path / "thin.png"), "--out", str(tmp_path / "o"))
    code, _, err = mrflow("generate", *words)
    assert (code, err.count("\n")) == (2, 1)
    assert "thin.png' of 64x3 pixels, too thin: on the model's grid it would be 128x8, with 25% of it cropped" in err
    assert mrflow("generate", *words, "--size", "128x8")[0] == 0


def test_a_file_of_prompts_loads_the_model_once(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    change_engines(monkeypatch, loaded.append)
    (tmp_path / "list.txt").write_bytes("\ufeffa red star\r\n\r\n# a note\n  a blue star \nünï ☃\n".encode())
    words = ("--prompts", str(tmp_path / "list.txt"), *SMALL, "--seed", "4", "--out", str(tmp_path / "o"))
    code, out, _ = mrflow("generate", *words, "--batch", "2", "--json")
    assert code == 0
    assert len(loaded) == 1
    found = json.loads(out)["details"]
    assert [(each["prompt"], each["seed"]) for each in found] == [
        (prompt, seed) for prompt in ("a red star", "a blue star", "ünï ☃") for seed in (4, 5)
    ]
    assert [Path(each["path"]).name for each in found][:3] == ["mrflow-4.png", "mrflow-5.png", "mrflow-4-2.png"]
    assert [record_of(each["path"]).prompt for each in found] == [each["prompt"] for each in found]
    single = mrflow("generate", "a blue star", *SMALL, "--seed", "4", "--batch", "2", "--out", str(tmp_path / "s"))[1]
    assert np.array_equal(pixels(single.splitlines()[0]), pixels(found[2]["path"]))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"a star\n\nb\xff\xfe\n", "line 3 of"),
        ("a star".encode("utf-16"), "line 1 of"),
        (b"a star\na\x00b", "line 2 of"),
        (b"# only\n\n", "holds no prompt"),
        (b"", "holds no prompt"),
        (b"a" * (16 * 2**20 + 1), "larger than 16 MiB"),
    ],
)
def test_a_bad_file_of_prompts_is_one_sentence(tmp_path: Path, data: bytes, sentence: str) -> None:
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(MrFlowError, match=sentence):
        read_prompts(tmp_path / "list.txt")
    with pytest.raises(MrFlowError, match="cannot be read"):
        read_prompts(tmp_path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a file without end")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("plan", "--family", "demo", "--calibration"), "--calibration is '/dev/zero', which is larger than 16 MiB"),
        (("plan", "--family", "demo", "--timings"), "--timings is '/dev/zero', which is larger than 16 MiB"),
        (("generate", "--prompts"), "--prompts is '/dev/zero', which is larger than 16 MiB"),
        (("generate", "a star", "--image"), "'/dev/zero' is a pipe or a device"),
        (("generate", "--from"), "'/dev/zero' is a pipe or a device"),
        (("generate", "a star", "--upscaler"), "--upscaler is '/dev/zero', which is not a file"),
        (("generate", "a star", "--lora"), "give a .safetensors file"),
        (("calibrate", "--images"), "'/dev/zero' is a pipe or a device"),
    ],
)
def test_no_option_reads_a_file_without_end(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], sentence: str
) -> None:
    assert main([*words, "/dev/zero"]) == 2
    assert sentence in capsys.readouterr().err


def test_prompts_come_from_standard_input_too(tiny_folder: Path, tmp_path: Path) -> None:
    words = ["generate", *SMALL, "--prompts", "-", "--model", str(tiny_folder), "--out", str(tmp_path / "o"), "--json"]
    command = [sys.executable, "-m", "mrflow_sched", *words]
    found = subprocess.run(command, input="a star\n# not this\na moon ☾\n".encode(), capture_output=True, check=False)
    assert [each["prompt"] for each in json.loads(found.stdout)["details"]] == ["a star", "a moon ☾"]
    found = subprocess.run(command, input=b"", capture_output=True, check=False)
    assert (found.returncode, "holds no prompt" in found.stderr.decode()) == (2, True)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a star <lora:foo:0.8>, sharp", "<lora:foo:0.8>"),
        ("a (blue star:1.3) over hills", "(blue star:1.3)"),
        ("((red:2))", "(red:2)"),
        ("a star BREAK a moon", "BREAK"),
        ("a banner of 2:1 (16:9) and a clock (at 10:30), <b>bold</b>, (small), a BREAKFAST", None),
        ("(" * 100_000 + ":" * 100_000, None),
    ],
)
def test_the_syntax_of_webuis_is_told_once(text: str, found: str | None) -> None:
    notes = syntax_notes("plain", None, text, text)
    assert len(notes) == (0 if found is None else 1)
    assert all(note.startswith(repr(found)) and "--lora FILE:SCALE" in note for note in notes)


def test_the_syntax_of_webuis_is_a_note_of_the_run(mrflow: Any, tmp_path: Path) -> None:
    _, out, err = mrflow("generate", "a (red:1.3) star", *SMALL, "--out", str(tmp_path), "--json")
    [note] = [note for note in json.loads(out)["notes"] if "WebUIs" in note]
    assert err.count(note) == 1
    assert "WebUIs" not in mrflow("generate", "--from", json.loads(out)["images"][0], "--out", str(tmp_path))[2]


def test_later_stages_may_have_words_of_their_own_and_repeat(mrflow: Any, tmp_path: Path) -> None:
    words = ("a red star", *SMALL, "--out", str(tmp_path))
    plain = mrflow("generate", *words)[1].strip()
    code, out, _ = mrflow("generate", *words, "--refine-prompt", "a blue circle over hills")
    assert code == 0
    own = out.strip()
    assert not np.array_equal(pixels(plain), pixels(own))
    assert record_of(own).refine_prompt == "a blue circle over hills"
    code, out, _ = mrflow("generate", "--from", own, "--out", str(tmp_path / "again"))
    assert code == 0
    assert np.array_equal(pixels(own), pixels(out.strip()))
    code, _, err = mrflow("generate", "a star", "--native", "--refine-negative", "blur")
    assert code == 2
    assert "has no meaning" in err


def test_prompts_and_a_prompt_do_not_go_together(mrflow: Any, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a star")
    code, _, err = mrflow("generate", "a star", "--prompts", str(tmp_path / "list.txt"))
    assert code == 2
    assert "leave one out" in err


# --- LoRA --------------------------------------------------------------------------------------


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA for the attention of the tiny folder's network."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(3)
    weights = {
        f"transformer.single_transformer_blocks.0.attn.{name}.{side}.weight": torch.randn(shape, generator=generator)
        for name in ("to_q", "to_k", "to_v")
        for side, shape in (("lora_A", (2, 16)), ("lora_B", (16, 2)))
    }
    save_file(weights, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def test_a_lora_changes_the_picture_by_its_scale_and_is_recorded(mrflow: Any, tmp_path: Path, lora: Path) -> None:
    pytest.importorskip("peft")

    def run(*words: str, out: str) -> Any:
        code, printed, err = mrflow("generate", *words, *DEVICE, "--out", str(tmp_path / out))
        assert code == 0, err
        return printed.strip()

    prompt = ("a star", "--size", "32x32", "--low-steps", "3")
    plain, full = run(*prompt, out="plain"), run(*prompt, "--lora", str(lora), out="full")
    off, half = run(*prompt, "--lora", f"{lora}:0", out="off"), run(*prompt, "--lora", f"{lora}:0.5", out="half")
    assert np.array_equal(pixels(plain), pixels(off))
    assert not np.array_equal(pixels(plain), pixels(full))
    assert not np.array_equal(pixels(half), pixels(full))
    [recorded] = record_of(half).loras
    assert (recorded.file, recorded.scale) == ("style.safetensors", 0.5)
    code, _, err = mrflow("generate", "--from", half, "--out", str(tmp_path / "again"))
    assert code == 2
    assert "give that file with --lora" in err
    code, _, err = mrflow("generate", "--from", plain, "--lora", str(lora), "--out", str(tmp_path / "again"))
    assert code == 2
    assert "made without the LoRA 'style.safetensors'" in err
    code, _, err = mrflow("generate", "--from", half, "--lora", f"{lora}:1", "--out", str(tmp_path / "again"))
    assert code == 2
    assert "the LoRA 'style.safetensors' at the scale 0.5, not 1; leave the scale out" in err
    code, out, _ = mrflow("generate", "--from", half, "--lora", f"{lora}:0.5", "--out", str(tmp_path / "again"))
    assert code == 0
    assert np.array_equal(pixels(half), pixels(out.strip()))


def test_a_lora_that_does_not_fit_is_one_sentence(
    mrflow: Any, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    from safetensors.torch import save_file

    save_file({"foo.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "foreign.safetensors")
    wide = {f"transformer.single_transformer_blocks.0.attn.to_q.lora_{side}.weight": torch.zeros(9, 9) for side in "AB"}
    save_file(wide, tmp_path / "wide.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    for name in ("foreign", "wide", "broken"):
        words = ("--lora", str(tmp_path / f"{name}.safetensors"), "--out", str(tmp_path / "o"))
        code, out, err = mrflow("generate", "a star", *SMALL, *words)
        assert (code, out, "Traceback" in err) == (2, "", False)
        assert "give a LoRA made for it" in err
    monkeypatch.setattr("mrflow_sched.apps.cli.load.find_spec", lambda _name: None)
    code, _, err = mrflow("generate", "a star", *SMALL, "--lora", str(lora), "--out", str(tmp_path / "o"))
    assert code == 2
    assert "--lora needs the package peft" in err
    assert not (tmp_path / "o").exists()


def test_libraries_say_nothing_of_a_lora_that_loads_and_all_of_one_that_fits_in_part(
    mrflow: Any, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    pytest.importorskip("peft")
    from safetensors.torch import load_file, save_file

    said = io.StringIO()
    monkeypatch.setattr(logging.getLogger("diffusers"), "handlers", [logging.StreamHandler(said)])
    weights = load_file(lora)
    save_file({name: weight / 2 for name, weight in weights.items()}, tmp_path / "second.safetensors")
    odd = {"transformer.single_transformer_blocks.0.attn.to_x.lora_A.weight": torch.zeros(2, 16)}
    save_file({**weights, **odd}, tmp_path / "part.safetensors")
    words = ("a star", "--size", "32x32", "--low-steps", "1", *DEVICE, "--out", str(tmp_path / "o"))
    code, _, err = mrflow("generate", *words, "--lora", f"{lora}:100", "--lora", str(tmp_path / "second.safetensors"))
    assert code == 0, err
    assert "--lora has the scale 100, far from the 1 it was trained for" in err
    assert said.getvalue() == ""
    assert not [each for each in recwarn if "peft_config" in str(each.message)]
    mrflow("generate", *words, "--lora", str(tmp_path / "part.safetensors"))
    assert "unexpected keys" in said.getvalue()
    assert "to_x" in said.getvalue()


def test_a_lora_with_nan_is_named_before_the_run(mrflow: Any, tmp_path: Path, lora: Path) -> None:
    pytest.importorskip("peft")
    from safetensors.torch import load_file, save_file

    weights = load_file(lora)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    words = ("--lora", str(tmp_path / "nan.safetensors"), "--out", str(tmp_path / "o"))
    code, _, err = mrflow("generate", "a star", *SMALL, *words)
    assert (code, err.count("\n")) == (2, 1)
    assert "nan.safetensors', whose weight '" in err
    assert "holds NaN or infinity" in err


def test_the_value_of_lora_is_a_file_and_a_scale(lora: Path) -> None:
    assert LoraChoice.from_text(str(lora)) == LoraChoice(lora, 1.0)
    assert LoraChoice.from_text(f"{lora}:-0.5") == LoraChoice(lora, -0.5)
    for text in (f"{lora}:nan", f"{lora}:1e9", f"{lora}:", "x.pt", "x.safetensors", f"{lora.parent}:1"):
        with pytest.raises(MrFlowError, match="--lora"):
            LoraChoice.from_text(text)


# --- formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("JPEG", "JPEG"), ("webp", "WEBP")])
def test_other_formats_keep_the_record(mrflow: Any, tmp_path: Path, name: str, kind: str) -> None:
    code, out, _ = mrflow("generate", "a star ☃", *SMALL, "--format", name, "--out", str(tmp_path))
    assert code == 0
    path = Path(out.strip())
    assert path.name == f"mrflow-0.{'jpg' if name == 'JPEG' else name}"
    with Image.open(path) as image:
        assert (image.format, image.size) == (kind, (32, 32))
    code, out, _ = mrflow("generate", "--from", str(path), "--out", str(tmp_path / "again"))
    assert code == 0
    record = record_of(out.strip())
    assert record.prompt == "a star ☃"
    assert record == record_of(path)
