"""bench/speed: true-size networks are what they are called, and the cost model's numbers are theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.speed.__main__ as command
from bench.speed import count, networks, outside
from mrflow_sched import demo, get_family
from mrflow_sched.plan import cost

FAMILIES = ("flux1-dev", "qwen-image", "z-image", "sd35", "sdxl")


def needs(name: str) -> None:
    """Skip where the installed diffusers is older than the family."""
    recipe = networks.RECIPES[name]
    for kind in (recipe.network, recipe.vae, recipe.pipeline):
        if not hasattr(networks.diffusers, kind):
            pytest.skip(f"the installed diffusers has no {kind}")


def test_a_count_is_that_of_a_layer_done_by_hand() -> None:
    """A linear layer of 64 to 256 on 10 rows: 2 x 10 x 64 x 256 FLOP, its result alive in 16 bits."""
    found = count.count(lambda: torch.nn.Linear(64, 256), lambda m: m(torch.zeros(10, 64)))
    assert found.flop == 2 * 10 * 64 * 256
    assert found.weights == 2 * (64 * 256 + 256)
    assert found.peak == 2 * 10 * 256 + 2 * 10 * 64

    def attend(_model: Any) -> None:
        q = torch.zeros(1, 4, 100, 32)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)

    assert count.count(torch.nn.Identity, attend).flop == 4 * 4 * 100 * 100 * 32


def test_what_is_gone_is_not_counted() -> None:
    def three_in_turn(_model: Any) -> None:
        for _ in range(3):
            torch.zeros(1000)

    assert count.count(torch.nn.Identity, three_in_turn).peak == 2000


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cost_model_has_the_numbers_of_the_real_classes(name: str) -> None:
    """Within 2 % (the U-Net, which is no polynomial in its tokens: 8 %), at two sizes."""
    needs(name)
    family, network = get_family(name), get_family(name).network_cost
    assert network is not None
    within = 0.08 if name == "sdxl" else 0.02
    for side in (1024, 2048):
        tokens = (side // family.grid) ** 2
        found = count.forward(name, side, side)
        assert family.forward_cost(tokens) == pytest.approx(found.flop, rel=within)
        assert network.weights == pytest.approx(found.weights / 2, rel=0.01)
        assert network.alive * (tokens + family.text_tokens) == pytest.approx(found.peak, rel=0.08)


def test_the_cost_model_has_the_numbers_of_the_embedded_model() -> None:
    import diffusers

    family, network, vae = get_family("demo"), get_family("demo").network_cost, get_family("demo").vae_cost
    assert network is not None
    assert vae is not None

    def built(part: str) -> Any:
        kind: Any = getattr(diffusers, {"transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL"}[part])
        return kind.from_config(kind.load_config(demo.weights_path() / part))

    for side in (128, 256):
        tokens = (side // 8) ** 2
        forward = count.flux_forward(tokens, family.text_tokens)
        found = count.count(lambda: built("transformer"), forward)
        assert family.forward_cost(tokens) == pytest.approx(found.flop, rel=0.02)
        assert network.alive * (tokens + family.text_tokens) == pytest.approx(found.peak, rel=0.08)
        assert network.weights == pytest.approx(found.weights / 2, rel=0.02)
        decode = count.count(lambda: built("vae"), lambda m: m.decode(torch.zeros(1, 16, side // 4, side // 4)))  # noqa: B023
        encode = count.count(lambda: built("vae"), lambda m: m.encode(torch.zeros(1, 3, side, side)))  # noqa: B023
        assert vae.decode.flop(side * side) == pytest.approx(decode.flop, rel=0.01)
        assert vae.encode.flop(side * side) == pytest.approx(encode.flop, rel=0.01)


@pytest.mark.parametrize("name", ["flux1-dev", "qwen-image"])
def test_the_cost_model_has_the_numbers_of_the_real_vaes(name: str) -> None:
    needs(name)
    vae = get_family(name).vae_cost
    assert vae is not None
    for side in (512, 1024):
        pixels = side * side
        decode, encode = count.decode(name, side, side), count.encode(name, side, side)
        assert (vae.decode.flop(pixels), vae.encode.flop(pixels)) == (
            pytest.approx(decode.flop, rel=0.01),
            pytest.approx(encode.flop, rel=0.01),
        )
        assert (vae.decode.alive * pixels, vae.encode.alive * pixels) == (
            pytest.approx(decode.peak, rel=0.01),
            pytest.approx(encode.peak, rel=0.01),
        )


def test_the_upscaler_costs_what_it_is_said_to() -> None:
    found = count.upscale(256, 256)
    assert cost.UPSCALER_FLOP["x2"] * 256**2 == pytest.approx(found.flop, rel=0.01)
    assert pytest.approx(found.peak, rel=0.01) == cost._UPSCALER_ALIVE * 512**2
    assert pytest.approx(found.weights, rel=0.01) == cost._UPSCALER_WEIGHTS["x2"] * 2


# --------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("name", FAMILIES)
def test_small_networks_run_every_way_without_text_encoders(name: str) -> None:
    needs(name)
    made = command.Bench.of(name, torch.device("cpu"), small=True, repeats=1)
    found = command.compare_ways(made, name, 128, 2, ["2+1"], counted=False)["ways"]
    assert found["native"]["forwards"] == 2 * (found["2+1"]["forwards"] // 3)
    assert set(found["2+1"]["parts"]) >= {"stage 1 sample", "stage 1 decode", "upscale", "encode", "stage 2 sample"}
    assert found["2+1"]["speedup"] == pytest.approx(found["native"]["seconds"] / found["2+1"]["seconds"])
    assert sum(found["2+1"]["parts"].values()) <= found["2+1"]["seconds"]


def test_the_command_writes_numbers_a_table_and_a_plot(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    words = ["--demo", "--size", "128", "--native-steps", "2", "--presets", "2+1", "12+1", "--repeats", "1"]
    command.main([*words, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "speed-demo.json").read_text())
    ways = record["families"]["demo"]["ways"]
    assert list(ways) == ["native", "2+1", "12+1", "reference 12+1"]
    assert ways["reference 12+1"]["limit"] == ways["12+1"]["limit"]
    assert isinstance(ways["12+1"]["predicted off by"], float)  # the clock's word, which no test judges
    assert ways["2+1"]["limit"] < ways["2+1"]["network limit"]
    assert (tmp_path / "speed-demo.png").stat().st_size > 1000
    assert "| native 2 |" in (tmp_path / "speed-demo.md").read_text()
    words = [
        "--demo",
        "--scale",
        "--sides",
        "128",
        "256",
        "--tile",
        "128",
        "--batches",
        "1",
        "--repeats",
        "1",
        "--size",
        "64",
    ]
    command.main([*words, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "scale-demo.json").read_text())["families"]["demo"]["sizes"]
    assert [(row["side"], row["tile"]) for row in rows] == [(128, 0), (256, 0), (256, 128)]
    assert (tmp_path / "scale-demo.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["demo", "flux1-dev"])
def test_every_part_outside_the_network_is_measured_as_it_is_done_and_otherwise(tmp_path: Path, name: str) -> None:
    words = ["--outside", "--size", "128", "--repeats", "1", "--out", str(tmp_path)]
    command.main([*words, *(["--demo"] if name == "demo" else ["--small", "--families", name])])
    stem = "outside-demo" if name == "demo" else "outside-small"
    rows = json.loads((tmp_path / f"{stem}.json").read_text())["families"][name]["outside"]
    parts = [row["part"] for row in rows if row["used"]]
    assert len(parts) == len(set(parts))
    assert {"text", "upscale", "encode", "noise", "decode", "save"} <= set(parts)
    assert all(row["seconds"] > 0 for row in rows)
    assert "| decode | channels last |" in (tmp_path / f"{stem}.md").read_text()


def test_the_reference_is_the_official_procedure_on_the_same_networks() -> None:
    """Euler, a drawn posterior, and the same upscaler in rounded tiles; the other ways keep their own."""
    made, seen = command.Bench.demo(1), dict[str, Any]()
    run = made._run

    def note(plan: Any, upscaler: Any = None) -> Any:
        seen[f"{plan.posterior} {plan.stages[0].solver}"] = upscaler
        return run(plan, upscaler)

    made._run = note
    found = command.compare_ways(made, "demo", 128, 1, ["12+1"])["ways"]
    assert found["reference 12+1"]["forwards"] == found["12+1"]["forwards"] == 13
    assert seen["mode multistep"] is None
    assert seen["sample euler"].rounded
    assert seen["sample euler"].upscaler is made.upscaler
    assert "predicted" not in found["reference 12+1"]


def test_compiled_networks_are_told_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    asked: list[str] = []

    def keep(function: Any, mode: str) -> Any:
        asked.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", keep)
    words = ["--demo", "--size", "64", "--native-steps", "4", "--presets", "12+1", "--repeats", "1"]
    command.main([*words, "--compile", "reduce-overhead", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "speed-demo-reduce-overhead.json").read_text())
    assert record["compile"] == "reduce-overhead"
    assert set(asked) == {"reduce-overhead"}
    assert "networks compiled (reduce-overhead)" in (tmp_path / "speed-demo-reduce-overhead.md").read_text()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_text_encoder_is_timed_beside_the_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = outside.encoders(name, torch.device("cpu"), torch.float32, 1, small=True)
    said = capsys.readouterr().err
    wanted = [encoder.title for encoder in networks.RECIPES[name].encoders]
    assert [title for title in wanted if title in found or title in said] == wanted
    assert all(seconds > 0 for seconds in found.values())
    assert found or "not timed" in said


@pytest.mark.parametrize(
    ("title", "billions"), [("T5-XXL", 4.76), ("CLIP-L", 0.123), ("CLIP-G", 0.69), ("Qwen3-4B", 4.0)]
)
def test_text_encoders_have_their_true_sizes(title: str, billions: float) -> None:
    every = [encoder for recipe in networks.RECIPES.values() for encoder in recipe.encoders]
    encoder = next(one for one in every if one.title == title)
    try:
        model = networks.make_encoder(encoder, torch.device("meta"), torch.float32)
    except AttributeError:
        pytest.skip("the installed transformers does not know it")
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(billions * 1e9, rel=0.02)


def test_true_sizes_without_a_gpu_get_one_sentence(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        command.main(["--device", "cpu"])
    assert "need a GPU; add --small or --demo" in capsys.readouterr().err


def test_limits_are_printed_without_a_run(capsys: Any) -> None:
    command.main(["--limits", "--presets", "12+1"])
    printed = capsys.readouterr().out
    assert "| flux1-dev | 1024x1024 | 3729 | 11.19, 10.58 |" in printed
    large = next(line for line in printed.splitlines() if line.startswith("| flux1-dev") and "1024x1024" not in line)
    whole, tiled, small = (float(cell) for cell in large.split("|")[2:5])
    assert whole > 24 > tiled > small  # the card that 4096x4096 is to fit on
