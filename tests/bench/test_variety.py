"""Open captions, few steps and the acceptance of weights: what they measure, on cases with known answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench.quality import few_steps, variety
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.scenes import Scene, Thing, left_open, random_scene
from tools.train_demo import accept

SMALL = variety.Setting((variety.OPEN[1], variety.OPEN[5], variety.OPEN[9]), 8, 0, 128)


@pytest.fixture(scope="module")
def true() -> list[torch.Tensor]:
    return variety.true_pictures(SMALL)


@pytest.fixture(scope="module")
def truth(true: list[torch.Tensor]) -> Any:
    return variety.row_of(true, SMALL, [])


def test_open_captions_leave_open_what_they_do_not_name() -> None:
    said = [caption(named) for named in variety.OPEN]
    assert (len(set(said)), said[0], said[5]) == (12, "a star", "the word FLOW")
    assert {named.category for named in variety.OPEN} == {
        *("objects", "letters", "detail", "smooth", "faces", "lines"),
    }
    assert variety.open_fields(variety.OPEN[4]) == ("colour0", "ground")
    assert variety.open_fields(variety.OPEN[9]) == ("ground", "sky", "light", "side")
    full = random_scene(np.random.default_rng(1), "objects")
    assert variety.open_fields(full) == ()


@pytest.mark.parametrize("named", variety.OPEN, ids=caption)
def test_a_true_draw_is_a_scene_that_the_caption_can_mean(named: Scene) -> None:
    rng = np.random.default_rng(2)
    scene = variety.true_draw(named, rng)
    assert variety.open_fields(scene) == ()
    assert any(left_open(scene, rng) == named for _ in range(3000))


def test_true_draws_are_as_frequent_as_in_training() -> None:
    """Plain things are left open with their colour, textured ones only every second time: 0.4 / (0.4 + 0.6 / 2)."""
    rng = np.random.default_rng(3)
    drawn = [variety.true_draw(variety.OPEN[0], rng).things[0] for _ in range(400)]
    assert sum(thing.texture == "plain" for thing in drawn) / 400 == pytest.approx(0.571, abs=0.08)
    assert len({thing.colour for thing in drawn}) == 8


def test_a_caption_without_a_scene_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variety, "_MOST_TRIES", 200)
    bare = Scene("objects", (Thing("red", "", "star"),))  # a texture is open only where the colour is
    with pytest.raises(MrFlowError, match=r"a red star.* must be one that left_open makes"):
        variety.true_draw(bare, np.random.default_rng(0))


def test_open_scenes_name_less_than_all_and_begin_alike() -> None:
    pairs = variety.open_scenes(8)
    assert variety.open_scenes(3) == pairs[:3]
    assert all(variety.open_fields(named) and not variety.open_fields(scene) for scene, named in pairs)
    assert all(scene.is_fine == (row % 2 == 1) for row, (scene, _) in enumerate(pairs))
    assert not any(scene.is_fine for scene, _ in variety.open_scenes(8, with_fine=False))


def test_entropy_counts_in_bits() -> None:
    assert variety.entropy(torch.tensor([3, 3, 3])) == 0
    assert variety.entropy(torch.arange(8)) == pytest.approx(3)


def test_known_rows_come_out_as_known(true: list[torch.Tensor], truth: Any) -> None:
    rows = {name: variety.row_of(each, SMALL, []) for name, each in variety.known_rows(SMALL, true).items()}
    passed = {name: variety.verdicts(row, truth) for name, row in rows.items()}
    assert all(variety.verdicts(truth, truth).values())
    assert all(passed["other true draws"].values())
    assert passed["one image for all seeds"] == {"std": False, "entropy": False, "confidence": True}
    assert passed["the mean image"] == {"std": False, "entropy": False, "confidence": False}


def test_named_attributes_are_read_where_the_judge_was_taught() -> None:
    pairs = [*variety.open_scenes(10), *((named, named) for named in variety.OPEN[10:])]
    scenes = [scene for scene, _ in pairs[:10]]
    hits = variety.named_hits(variety.rendered(scenes, 128), [named for _, named in pairs[:10]])
    assert (variety.share_of(hits) or 0) > 0.95
    turned = variety.named_hits(variety.rendered(scenes[::-1], 128), [named for _, named in pairs[:10]])
    assert (variety.share_of(turned) or 0) < 0.7
    assert variety.share_of([{}]) is None


def test_fine_detail_that_is_open_is_read() -> None:
    rng = np.random.default_rng(4)
    for named, fields in ((variety.OPEN[10], {"mood0", "hair0", "eyes0", "wall"}), (variety.OPEN[11], {"gap"})):
        scenes = [variety.true_draw(named, rng) for _ in range(6)]
        read = variety.probabilities(variety.rendered(scenes, 256), named)
        assert set(read) == fields
        for field, chances in read.items():
            options = variety.fine_judge.FIELDS.get(field.rstrip("0"), variety.reading.FIELDS.get(field, ()))
            shown = [vars(scene.faces[0])[field[:-1]] if field[-1] == "0" else vars(scene)[field] for scene in scenes]
            right = [options[int(row.argmax())] == value for row, value in zip(chances, shown, strict=True)]
            assert sum(right) >= 5


def test_the_tables_say_yes_and_no(truth: Any) -> None:
    worse = {**truth, "std": 0.1, "named": 0.5, "groups": {"colour": 0.5}}
    record = {"seeds": 8, "named": 2, "size": 128, "true draws": {**truth, "named": 1.0, "groups": {"colour": 1.0}}}
    text = variety.to_markdown({**record, "rows": {"worse": worse}})
    line = next(line for line in text.splitlines() if line.startswith("| worse"))
    assert ["0.100 no" in line, "50.0 % no" in line, line.endswith("| no |")] == [True] * 3
    assert "| colour | 100.0 % | 50.0 % |" in text


@pytest.fixture(scope="module")
def weights() -> variety.Weights:
    return variety.load_weights(variety.SHIPPED, dtype="float32")


def test_ways_differ_in_their_sampling_only(weights: variety.Weights) -> None:
    assert {plan.stages[0].guidance for plan in variety.plans(256, 1.0).values()} == {1.0}
    plan = variety.make_native_plan("demo", 64, 64, steps=1)
    images = variety.sampled(weights, plan, ["a red star over white snow"] * 3, range(3), batch=2)
    assert images.shape == (3, 3, 64, 64)


def test_weights_that_are_not_there_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    for main in (variety.main, few_steps.main):
        with pytest.raises(SystemExit):
            main(["--weights", missing, "--quick"])
    with pytest.raises(SystemExit):
        accept.main(["--weights", missing, "--against", "shipped", "--out", str(tmp_path / "rows.jsonl")])
    assert capsys.readouterr().err.count(missing) >= 3


def test_few_steps_are_nearer_the_more_there_are(weights: variety.Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_steps, "converged_steps", lambda size: 8)
    scenes, kinds = few_steps.prompts_of(1)
    cell = {"size": 64, "guidance": 1.0}
    rows = few_steps._of_cell(weights, scenes, kinds["full"], cell, (2, 8))
    found = {(row["solver"], row["steps"]): row for row in rows}
    assert (found["multistep", 8]["median"], found["multistep", 8]["flip"]) == (100.0, 0.0)
    assert found["euler", 2]["mean"] < found["euler", 8]["mean"] < 100
    every = [{**cell, "weights": "shipped", "captions": "full", **row} for row in rows]
    text = few_steps.to_markdown({"images": {64: 1}, "rows": every})
    assert "| shipped | multistep | 8 | 100.0 / 100.0; 0% (0%, 0%) |" in text


def test_medians_means_and_flips() -> None:
    row = {"psnr": [10.0, 30.0, 80.0], "reads": [True, False, False], "layout": [True, False, True]}
    third = pytest.approx(1 / 3)
    twice = pytest.approx(2 / 3)
    assert few_steps.summary(row) == {"median": 30.0, "mean": 40.0, "reads": third, "layout": twice, "flip": twice}


def test_weights_are_compared_scene_by_scene() -> None:
    old: list[accept.Hits] = [{"colour": [True] * 4, "letters": [True, True]}] * 5
    new: list[accept.Hits] = [{"colour": [True] * 3 + [False], "letters": [True, True]}] * 5
    found = accept.compared(new, old, accept.ALL)
    assert found is not None
    assert (found["new"], found["old"], found["difference"], found["asked"]) == (0.75, 1.0, -0.25, 20)
    assert found["interval"] == pytest.approx((-0.25, -0.25))
    assert accept.compared(new, old, "mood") is None
    letters = accept.compared(new, old, "letters")
    assert letters is not None
    assert accept._met({accept.ALL: found, "letters": letters}) == [
        "attributes at least 95%: no",
        "attributes not more than 1% below the old weights: no",
        "letters at least 95%: yes",
    ]


def test_acceptance_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def read_part(weights: Any, plan: Any, kind: str, scenes: Any, rows: Any) -> list[accept.Row]:
        made.append(len(rows))
        return [{**row, "hits": {"colour": [True]}} for row in rows]

    engine: Any = SimpleNamespace(fingerprint="1")
    monkeypatch.setattr(accept, "load_weights", lambda name: variety.Weights(name, engine, None))
    monkeypatch.setattr(accept, "_read_part", read_part)
    path = tmp_path / "folder" / "accept.jsonl"
    accept.measure(["new"], path, scenes=4, tell=lambda line: None)
    path.write_text(path.read_text() + '{"weights": "new", "se')
    rows = accept.measure(["new"], path, scenes=8, tell=lambda line: None)
    assert (sum(made), len(rows)) == (8 * 2 * 2, 8 * 2 * 2)
    again = accept.measure(["new"], path, scenes=8, tell=lambda line: None)
    assert (again, sum(made)) == (rows, 32)
    engine.fingerprint = "2"
    accept.measure(["new"], path, scenes=4, tell=lambda line: None)
    assert sum(made) == 32 + 16
