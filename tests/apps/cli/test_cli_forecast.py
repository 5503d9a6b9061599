"""A run that cannot fit into memory is refused before anything is loaded, and goes on with --force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch

from mrflow_sched._runtime import memory
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.cli.forecast import check_memory
from mrflow_sched.apps.cli.options import ModelChoices
from mrflow_sched.plan.card import CUT, SPARE
from mrflow_sched.plan.cost import peak_memory
from mrflow_sched.plan.make import make_plan

SMALL = ("--size", "64x64", "--preset", "1+1", "--upscaler", "lanczos")


def no_loading(*_: Any, **__: Any) -> None:
    raise AssertionError("something was loaded")


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "a star", "--size", "1024x1024"),
        ("generate", "a star", "--batch", "1024"),
        ("compare", "a star", "--size", "1024x1024"),
        ("calibrate", "--size", "1024x1024"),
    ],
)
def test_a_run_that_cannot_fit_is_refused_before_loading(
    words: tuple[str, ...], mrflow: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1e8)
    for name in ("generate.load", "compare.load", "calibrate.load_engine"):
        monkeypatch.setattr(f"mrflow_sched.apps.cli.{name}", no_loading)
    code, out, err = mrflow(*words, "--out", str(tmp_path / "new"), model=None)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "of memory for " in err
    assert "0.1 GB are free on cpu; choose a smaller size or batch, or add --force" in err
    assert not (tmp_path / "new").exists()


def test_force_goes_on(mrflow: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1)
    run = ("generate", "a star", *SMALL, "--out", str(tmp_path))
    assert mrflow(*run)[0] == 2
    assert list(tmp_path.iterdir()) == []
    assert mrflow(*run, "--force")[0] == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_the_embedded_model_runs_on_a_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 256 * 2**20)
    check_memory(ModelChoices(device="cpu", dtype="float32"), "demo", make_plan("demo", 256, 256))


def test_a_gpu_may_work_in_tiles_and_a_device_may_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan("flux1-dev", 2048, 2048)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 30e9)
    monkeypatch.setattr("mrflow_sched._runtime.device.has_bfloat16", lambda _: True)
    with pytest.raises(
        MrFlowError, match=r"the run needs about 30.5 GB of memory for 1 image of 2048x2048, in stage 2 decode"
    ):
        check_memory(ModelChoices(device="cpu"), "flux1-dev", plan)
    monkeypatch.setattr("mrflow_sched._runtime.device.resolve_device", torch.device)
    check_memory(ModelChoices(device="cuda"), "flux1-dev", plan)
    monkeypatch.setattr(memory, "free_bytes", lambda _: None)
    check_memory(ModelChoices(device="mps"), "flux1-dev", plan)


def test_what_is_free_heeds_the_limits_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu, own, groups = torch.device("cpu"), tmp_path / "own", tmp_path / "groups"
    monkeypatch.setattr(memory, "OWN_CGROUPS", own)
    monkeypatch.setattr(memory, "CGROUPS", groups)
    plain = memory.free_bytes(cpu)
    assert plain is not None
    assert plain > 10**7
    inner = groups / "box" / "job"
    inner.mkdir(parents=True)
    own.write_text("0::/box/job\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("900\n")
    (inner.parent / "memory.max").write_text("5000\n")
    (inner.parent / "memory.current").write_text("4000\n")
    (inner.parent / "memory.stat").write_text("anon 1\ninactive_file 300\n")
    assert memory.free_bytes(cpu) == 1300
    own.write_text("4:memory:/box\n0::/\n")
    first = groups / "memory" / "box"
    first.mkdir(parents=True)
    (first / "memory.limit_in_bytes").write_text("700\n")
    (first / "memory.usage_in_bytes").write_text("800\n")
    (first / "memory.stat").write_text("total_inactive_file 0\n")
    assert memory.free_bytes(cpu) == 0
    own.write_bytes(b"\xff\n")
    assert abs((memory.free_bytes(cpu) or 0) - plain) < plain
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7, 9))
    assert memory.free_bytes(torch.device("cuda")) == 7
    assert memory.free_bytes(torch.device("mps")) is None


def test_a_folder_needs_what_its_own_network_weighs(
    mrflow: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A small network of FLUX.1's class is not FLUX.1-dev, whose weights alone are 24 GB."""
    tiny_pipelines.make("flux1-dev").save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(memory, "free_bytes", lambda _: 4 * 10**9)
    run = ("generate", "a cat", *SMALL, "--out", str(tmp_path / "out"))
    assert mrflow(*run, model=str(tmp_path / "tiny"))[0] == 0


def test_memory_cuts_a_run_to_fit_and_refuses_one_that_cannot(
    mrflow: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mrflow_sched.apps.cli import generate

    seen: list[ModelChoices] = []
    loaded = generate.load

    def note(model: ModelChoices, *rest: Any) -> Any:
        seen.append(model)
        return loaded(model, *rest)

    monkeypatch.setattr(generate, "load", note)
    run = ("generate", "a star", "--preset", "1+1", "--out", str(tmp_path), "--dtype", "bfloat16")
    plan = make_plan("demo", 576, 512, "1+1")
    cut = peak_memory(plan, upscaler_tile=CUT)
    assert cut is not None
    card = str(cut.total * SPARE / 2**30)
    code, _, err = mrflow(*run, "--size", "576x512", "--memory", card, model=None)
    assert code == 0
    assert "GB all parts stay on it; upscaler in tiles of 512: about 0.1 GiB in upscale." in err
    assert [(model.offload, model.vae_tile, model.upscaler_tile) for model in seen] == [(None, None, CUT // 4)]
    code, _, err = mrflow(*run, "--size", "1024x1024", "--memory", "0.05", model=None)
    assert (code, err.count("\n")) == (2, 1)
    assert "does not fit on a card of 0.05 GB" in err
    assert "or add --force" in err
    for bad in ("0", "0.01"):
        for words in (run, ("plan", "--family", "flux1-dev", "--size", "1024x1024")):
            code, _, err = mrflow(*words, "--memory", bad, model=None)
            assert (code, err.count("\n")) == (2, 1)
            assert "--memory must be a number from 0.05 to " in err
    code, _, err = mrflow(*run, "--memory", "8", "--offload", "layers", model=None)
    assert code == 2
    assert "--memory chooses what is offloaded" in err


def test_a_vae_in_tiles_takes_tiles_of_the_side_that_was_counted() -> None:
    from mrflow_sched.apps.cli.load import load_engine
    from mrflow_sched.engines.diffusers.vae_tiles import tile_vae

    vae = load_engine(ModelChoices(device="cpu", vae_tile=64), "float32").pipe.vae
    assert vae.use_tiling
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (64, 16)  # the embedded model's VAE has factor 4
    assert tile_vae(vae, 512)
    assert vae.tile_sample_min_size == 64  # smaller tiles are kept
    assert not tile_vae(object(), 512)
