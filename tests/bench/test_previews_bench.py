"""bench/previews: parts are made once, the tables say what the numbers say, and its maps are what they are called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bench.previews.__main__ as command
from bench.previews import previews, runs, warps
from mrflow_sched.methods.previews import CommutatorGuidance, Switched, euler_tail


def picture(seed: int, count: int = 4) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def near(images: Tensor, steps: int) -> Tensor:
    return (images.int() + steps).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def found() -> previews.Measured:
    """Two prompts at two seeds, whose previews are native pictures that are a little brighter."""
    native = picture(1)
    names = [name for name in previews.COSTS if name not in ("naive", "random phase", "argmax", "other seed")]
    rows = {name: near(native, 3 + index) for index, name in enumerate(names)}
    rows |= {f"phase {phase}": near(native, 10 + phase) for phase in range(4)}
    rows["argmin + guidance R"] = rows["argmin + guidance R"][[0, 2]]  # the first prompt alone
    norms = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, 9.0, 9.0, 9.0], [9.0, 1.0, 9.0, 9.0]])
    distances = {
        "argmin": 60.0,
        "argmin + guidance": 40.0,
        "pixels, switch 10": 50.0,
        "pixels + guidance, switch 10": 45.0,
    }
    kept = {f"distance: {name}": torch.full((4,), value) for name, value in distances.items()}
    return previews.Measured(["a", "b"], {**rows, **kept, "native": native, "norms": norms})


def test_rows_are_compared_with_their_own_native_picture(found: previews.Measured) -> None:
    assert float(found.scores["independent"].psnr.mean()) > 35
    assert float(found.scores["other seed"].psnr.mean()) < 12
    assert found.scores["few 6"].own.tolist() == [1.0] * 4
    assert found.scores["other seed"].own.tolist() == [0.0] * 4
    short = found.scores["argmin + guidance R"].psnr
    whole = found.scores["argmin + guidance R after"].psnr
    assert len(short) == 2
    assert float((short - whole[[0, 2]]).abs().max()) < 1  # one step of brightness apart, of the same pictures


def test_argmax_takes_each_images_phase_and_random_is_the_mean_of_four(found: previews.Measured) -> None:
    phases = [3, 0, 1, 0]
    wanted = found.phases[phases, torch.arange(4)]
    assert torch.allclose(found.scores["argmax"].psnr, wanted)
    assert torch.allclose(found.scores["random phase"].psnr, found.phases.mean(0))
    assert torch.equal(found.scores["naive"].psnr, found.phases[0])


def test_the_section_passes_and_fails_what_was_asked(found: previews.Measured) -> None:
    text = previews.written(found)
    asked = dict(re.findall(r"^\| (.+?) \| .*? \| (pass|FAIL) \|$", text, re.MULTILINE))
    assert list(asked.values()) == ["FAIL", "FAIL", "FAIL", "pass"]  # row after row is a little worse here
    assert "60.0 to 40.0, 33% less" in text
    assert "| argmin + guidance | 21.18 |" in text
    assert "NaN" not in text
    assert text.count("| other seed |") == 1


def test_intervals_hold_the_mean_and_shrink_with_more_prompts() -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = previews.interval(values)
    assert low < float(values.mean()) < high
    few = previews.interval(values[:8])
    assert high - low < few[1] - few[0]


def test_parts_are_made_once_and_again_where_they_are_missing(tmp_path: Path) -> None:
    made: list[tuple[list[str], list[int], bool]] = []

    def make(prompts: list[str], seeds: list[int], partial: bool) -> dict[str, Tensor]:
        made.append((prompts, seeds, partial))
        return {"row": torch.tensor(seeds)}

    texts = [f"prompt {number}" for number in range(10)]
    rows = runs._joined(tmp_path, texts, 2, make)
    assert [len(part[0]) for part in made] == [4, 4, 2] * 2
    assert [part[2] for part in made] == [True, True, False] * 2
    assert len(set(rows["row"].tolist())) == 20
    made.clear()
    assert torch.equal(runs._joined(tmp_path, texts, 2, make)["row"], rows["row"])
    assert made == []
    next(tmp_path.glob("*.safetensors")).unlink()
    runs._joined(tmp_path, texts, 2, make)
    assert len(made) == 1


def test_prompts_are_of_every_kind_and_more_prompts_go_on_where_fewer_end() -> None:
    eight = runs.prompts_of(8)
    assert len(set(eight)) == 8
    assert eight[:4] == runs.prompts_of(4)


def test_the_wrong_way_is_the_wrong_sign() -> None:
    """One guided step of the bad row moves away by what the right one moves near."""
    part: Any = object.__new__(runs.Part)
    part.estimate = lambda x, sigma: x - sigma.reshape(-1, 1, 1, 1) * torch.cos(x)
    state = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    switched = Switched(state, torch.ones_like(state), (0.5, 0.0))
    once = CommutatorGuidance(alpha=0.1, steps=1)
    off = euler_tail(part.estimate, switched, CommutatorGuidance(steps=0))
    right = euler_tail(part.estimate, switched, once) - off
    assert torch.allclose(part.wrong_way(switched, once) - off, -right, atol=1e-12)
    assert float(right.abs().min()) > 0


@pytest.mark.parametrize("motion", warps.MOTIONS, ids=lambda motion: motion.name)
def test_moved_noise_stays_white_and_pictures_keep_their_mean(motion: warps.Motion) -> None:
    basis = torch.eye(256, dtype=torch.float64).reshape(256, 1, 16, 16)
    white = motion.white(basis).flatten(1)
    assert torch.allclose(white @ white.T, torch.eye(256, dtype=torch.float64), atol=1e-9)
    plain = motion.moved(basis).flatten(1)
    assert torch.allclose(plain.sum(1), torch.ones(256, dtype=torch.float64))


def test_a_quarter_to_the_right_is_a_roll() -> None:
    quarter = warps.MOTIONS[0]
    x = torch.arange(32.0).expand(1, 1, 4, 32)
    assert torch.equal(quarter.moved(x), x.roll(8, -1))
    assert torch.allclose(quarter.white(x), x.roll(8, -1), atol=1e-5)


def test_the_command_runs_sections_and_writes_their_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"previews", "warps", "ranks"} <= set(command.known())
    asked: list[tuple[int, int, Path]] = []

    def section(*, prompts: int, seeds: int, folder: Path) -> str:
        asked.append((prompts, seeds, folder))
        return "the table"

    monkeypatch.setattr(warps, "section", section)
    command.main(["warps", "--folder", "kept", "--out", str(tmp_path)])
    command.main(["warps", "--prompts", "3", "--seeds", "4"])
    assert asked == [(4, 2, Path("kept")), (3, 4, Path("runs/previews"))]
    assert (tmp_path / "warps.md").read_text() == "# Moved and bent pictures\n\nthe table\n"
    assert [path.name for path in tmp_path.iterdir()] == ["warps.md"]


def test_the_command_refuses_what_it_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in ((["nothing"], "is no section"), (["--seeds", "1"], "must be 2 or more")):
        with pytest.raises(SystemExit):
            command.main(words)
        assert said in capsys.readouterr().err
