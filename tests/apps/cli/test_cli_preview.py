"""`mrflow preview`, on the tiny random folder of conftest.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import RECORD, change_engines, pixels

from mrflow_sched.apps.cli.stopping import current
from mrflow_sched.images.files import read_text
from mrflow_sched.images.parameters import read_parameters
from mrflow_sched.images.record import RunRecord
from mrflow_sched.measure import preview_kinds
from mrflow_sched.plan.stages import StagedPlan

SMALL = ("--size", "32x32", "--steps", "8", "--dtype", "float32", "--device", "cpu")
FEW = ("--preview-steps", "3")


def test_a_preview_leads_to_the_native_picture_of_its_seed(mrflow: Any, tmp_path: Path) -> None:
    words = ("a red star", *SMALL, *FEW, "--seed", "5", "--batch", "2", "--out", str(tmp_path / "o"))
    code, out, err = mrflow("preview", *words, "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found) == {"previews", "of", "kind", "plan", "lost", "notes"}
    assert (found["of"], found["kind"], found["lost"]) == ("native", "few", [])
    assert err.count("previews of the native images") == 1
    assert "not of the staged ones" in err
    names = [Path(each["path"]).name for each in found["previews"]]
    assert names == ["mrflow-5-preview-few.png", "mrflow-6-preview-few.png"]
    assert [(each["seed"], each["prompt"], each["cost"]) for each in found["previews"]] == [
        (5, "a red star", 3.0),
        (6, "a red star", 3.0),
    ]
    second = found["previews"][1]["path"]
    assert pixels(second).shape == (16, 16, 3)
    texts = read_text(second)
    record = RunRecord.from_json(texts["mrflow"])
    plan = StagedPlan.from_string(record.plan)
    assert (record.preview, record.seed, record.batch, record.image) == ("few, 3 steps", 6, 1, 0)
    assert [(stage.width, stage.steps, stage.solver) for stage in plan.stages] == [(32, 8, "euler")]
    values = read_parameters(texts["parameters"]).values
    assert (values["Preview"], values["Seed"], values["Size"]) == ("few, 3 steps", "6", "32x32")

    code, out, err = mrflow("generate", "--from", second, "--out", str(tmp_path / "full"))
    assert code == 0
    assert "is a preview (few, 3 steps); its native run is now made in full" in err
    assert "may differ" not in err
    made = RunRecord.from_json(read_text(out.strip())["mrflow"])
    assert (made.preview, made.plan) == (None, record.plan)
    words = ("a red star", *SMALL, "--native", "--seed", "6", "--out", str(tmp_path / "native"))
    code, native, _ = mrflow("generate", *words)
    assert code == 0
    assert np.array_equal(pixels(out.strip()), pixels(native.strip()))


def test_previews_of_prompts_are_the_same_alone(mrflow: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\na blue star\n")
    common = (*SMALL, "--kind", "nested")
    many = ("--prompts", str(prompts), "--batch", "2", "--out", str(tmp_path / "many"))
    code, out, err = mrflow("preview", *common, *many)
    assert code == 0
    assert len(out.splitlines()) == 4
    assert "chain" not in err
    code, alone, _ = mrflow("preview", "a blue star", *common, "--seed", "1", "--out", str(tmp_path / "alone"))
    assert code == 0
    assert np.array_equal(pixels(out.splitlines()[3]), pixels(alone.strip()))


@pytest.mark.parametrize("kind", ["chain-pixels", "chain-average", "chain-polyphase"])
def test_a_chain_that_was_never_checked_says_so(
    mrflow: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview_kinds, "MEASURED", {})
    code, out, err = mrflow("preview", "a red star", *SMALL, "--kind", kind, "--out", str(tmp_path))
    assert code == 0
    assert f"{kind} was never checked on" in err
    assert "mrflow preview --check" in err
    assert RunRecord.from_json(read_text(out.strip())["mrflow"]).preview == kind


def test_a_chain_that_was_checked_says_what_came_of_it(mrflow: Any, tmp_path: Path) -> None:
    for kind, told in (("chain-pixels", False), ("chain-polyphase", True)):
        _, _, err = mrflow("preview", "a red star", *SMALL, "--kind", kind, "--out", str(tmp_path))
        assert "never checked" not in err
        assert (f"{kind} does not keep its word on demo" in err) is told


def test_check_prints_every_kind(mrflow: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\na blue star\n")
    words = ("--check", "--prompts", str(prompts), *SMALL, "--steps", "4", "--preview-steps", "2")
    code, out, _ = mrflow("preview", *words, "--json")
    assert code == 0
    found = json.loads(out)
    assert [row["kind"] for row in found["kinds"]] == [
        *("few", "nested", "chain-pixels", "chain-average", "chain-polyphase"),
    ]
    assert all(row["refusal"] is None and 0 <= row["own_seed"] <= 1 for row in found["kinds"])
    assert [row["keeps_its_word"] is None for row in found["kinds"]] == [True, True, False, False, False]
    assert (found["prompts"], found["kinds"][0]["cost"]) == (2, 2.0)
    code, out, _ = mrflow("preview", *words)
    assert code == 0
    assert "2 prompts x 2 seeds" in out.splitlines()[0]
    assert "other seed" in out
    assert out.count("needs no D") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "the prompt is missing"),
        (("a star", "--prompts", "p.txt"), "a prompt beside it has no meaning"),
        (("a star", "--check"), "so a prompt has no meaning"),
        (("--check", "--kind", "few"), "so --kind has no meaning"),
        (("--check", "--batch", "3"), "so --batch has no meaning"),
        (("--check",), "so --out has no meaning"),
        (("a star", "--kind", "nested", "--preview-steps", "4"), "--preview-steps are those of the kind few"),
        (("a star", "--upscaler", "lanczos"), "a native run has no upscaler, so --upscaler has no meaning"),
        (("a star", "--preview-steps", "8", *SMALL), "--preview-steps is 8, and the run itself takes 8"),
        (("a star", "--low-steps", "3"), "unrecognized arguments: --low-steps"),
        (("a star", "--kind", "chain"), "invalid choice"),
        (("a star", "--kind", "chain-pixels", "--solver", "heun", *SMALL), "the chain takes Euler steps"),
        (("a star", "--seed", str(2**63 - 1), "--batch", "2", *SMALL), "seed"),
    ],
)
def test_what_has_no_meaning_is_refused(mrflow: Any, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    code, out, err = mrflow("preview", *words, "--out", str(tmp_path / "o"))
    assert code == 2
    assert said in err
    assert out == ""
    assert not (tmp_path / "o").exists()


def test_what_was_saved_before_a_stop_is_kept(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def stop_in_the_second(engine: Any) -> None:
        usual = engine.encode_text

        def encode_text(*given: Any, **named: Any) -> Any:
            runs.append(1)
            if len(runs) == 2:
                current().number = 2
            return usual(*given, **named)

        engine.encode_text = encode_text

    change_engines(monkeypatch, stop_in_the_second)
    words = ("a red star", *SMALL, *FEW, "--batch", "3", "--out", str(tmp_path), "--json")
    code, out, err = mrflow("preview", *words)
    assert code == 130
    assert [Path(each["path"]).name for each in json.loads(out)["previews"]] == ["mrflow-0-preview-few.png"]
    assert "Stopped." in err


def test_a_record_keeps_its_marker_and_older_ones_have_none() -> None:
    from dataclasses import replace

    marked = replace(RECORD, preview="few, 6 steps")
    assert RunRecord.from_json(marked.to_json()) == marked
    older = json.loads(marked.to_json())
    del older["preview"]
    assert RunRecord.from_json(json.dumps(older)).preview is None
