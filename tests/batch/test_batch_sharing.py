"""`mrflow batch --context-parallel`: workers of several processes that share every forward."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from batch_makers import SharingMaker, WordMaker
from test_batch_command import SMALL, table
from test_batch_schedule import Notes, unit

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.cli.batch_worker import Making, ModelMaker, Task
from mrflow_sched.apps.cli.options import ModelChoices
from mrflow_sched.batch.patience import Patience
from mrflow_sched.batch.pool import ProcessPool
from mrflow_sched.batch.schedule import run_units
from mrflow_sched.batch.sharing import ContextParallel, groups_for, share_of
from mrflow_sched.engines.diffusers import context_parallel
from mrflow_sched.engines.diffusers.context_parallel import enable_context_parallel, sharing_refusal
from mrflow_sched.plan.make import make_plan

PAIR = ContextParallel(ulysses=2)


def has_gloo() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_gloo_available()


# ------------------------------------------------------------------------------------------------------- processes


@pytest.fixture
def pool() -> Iterator[ProcessPool]:
    if not has_gloo():
        pytest.skip("this torch was built without gloo")
    made = ProcessPool(WordMaker(), ("cpu",) * 4, 1, parts=2)
    yield made
    made.close()
    assert made.pids() == ()


def test_two_processes_are_one_worker_and_end_together(pool: ProcessPool, tmp_path: Path) -> None:
    assert pool.places == 2
    notes = Notes()
    # Of each pair one process finds the mark missing, and dies or hangs; the other answers, and is ended with it.
    words = ["a", f"once die {tmp_path / 'one'}", "refuse", "b", f"once sleep {tmp_path / 'two'}"]
    run_units([unit(word) for word in words], pool, notes.outlet(), Patience(8.0))
    assert sorted(name for name, _, _ in notes.done) == sorted(set(words) - {"refuse"})
    assert all(value == (name, "cpu") for name, value, _ in notes.done)
    assert notes.aside == [("refuse", "no such thing", 1)]
    assert len(pool.pids()) == 4


def test_memory_that_runs_out_in_one_process_ends_its_worker(tmp_path: Path, pool: ProcessPool) -> None:
    notes = Notes()
    run_units([unit(f"once memory {tmp_path / 'mark'}"), unit("a")], pool, notes.outlet(), Patience(60.0))
    assert sorted(tries for _, _, tries in notes.done) == [1, 2]


def test_two_processes_make_the_image_of_one(tmp_path: Path) -> None:
    import numpy
    import torch
    from PIL import Image

    diffusers: Any = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "ContextParallelConfig") or not hasattr(torch, "accelerator") or not has_gloo():
        pytest.skip("this diffusers or torch has no context parallelism")
    plan = make_plan("demo", 64, 64, low_steps=3, refine_steps=1).to_string()
    plans = {"one": plan, "two": make_plan("demo", 96, 64, low_steps=2, refine_steps=1, seed=8).to_string()}
    plans["odd"] = make_plan("demo", 40, 40, native=True, steps=2).to_string()  # 25 tokens
    tasks = {name: Task("image", plan, "a red circle", None, None, None, (), 1, (0,)) for name, plan in plans.items()}
    model = ModelChoices(device="cpu", dtype="float32")
    pool = ProcessPool(SharingMaker(ModelMaker(model, plan, ".png", shared=PAIR)), ("cpu", "cpu"), 1, parts=2)
    notes = Notes()
    notes.task = lambda unit: tasks[unit.items[0].prompt]  # type: ignore[method-assign, assignment]
    try:
        run_units([unit(name) for name in ("odd", "one", "two")], pool, notes.outlet(), Patience(240.0))
    finally:
        pool.close()
    ((name, reason, tries),) = notes.aside
    assert (name, tries) == ("odd", 1)
    assert "cannot be cut into as many equal parts" in reason
    assert sorted(name for name, _, _ in notes.done) == ["one", "two"]
    alone: Any = ModelMaker(model, plan, ".png")(None, None)
    for name, value, _ in notes.done:
        (ours,), (theirs,) = value, alone(tasks[name], lambda: False)
        both = [numpy.asarray(Image.open(io.BytesIO(made.data or b"")), dtype=int) for made in (ours, theirs)]
        assert abs(both[0] - both[1]).max() <= 1  # sums of attention are split otherwise
        assert both[0].std() > 10


# ------------------------------------------------------------------------------------------------------- refusals


class Network:
    """A network that diffusers can share, or not."""

    def __init__(self, error: Exception | None = None) -> None:
        self._cp_plan = {"": {}}
        self.error = error
        self.config: Any = None

    def enable_parallelism(self, *, config: Any) -> None:
        if self.error is not None:
            raise self.error
        self.config = config


def test_the_configuration_is_passed_through(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    monkeypatch.setattr(diffusers, "ContextParallelConfig", SimpleNamespace, raising=False)
    network = Network()
    enable_context_parallel(network, 2, 3)
    assert vars(network.config) == {"ulysses_degree": 2, "ring_degree": 3}


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (SimpleNamespace(), "does not know how to share the network SimpleNamespace"),
        (Network(ZeroDivisionError()), "shares forwards between accelerators only, and torch .* counts none here"),
        (Network(ValueError("backend 'native' does not")), r"cannot share the network Network \(backend 'native' does"),
    ],
)
def test_a_network_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch, network: Any, sentence: str) -> None:
    import diffusers

    monkeypatch.setattr(diffusers, "ContextParallelConfig", SimpleNamespace, raising=False)
    with pytest.raises(MrFlowError, match=f"--context-parallel: diffusers .* {sentence}"):
        enable_context_parallel(network, 2, 1)


def test_tokens_that_cannot_be_cut_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sharing_refusal(AssertionError("another")) is None
    assert sharing_refusal(ValueError("divisible")) is None

    def uneven(*_: Any) -> Any:
        raise AssertionError("Tensor size along dimension to be sharded must be divisible by mesh size")

    making: Any = object.__new__(Making)
    monkeypatch.setattr(Making, "_done", uneven)
    making._shared = PAIR
    with pytest.raises(MrFlowError, match="cannot be cut into as many equal parts; choose another size or fewer parts"):
        making(None, lambda: False)
    making._shared = None
    with pytest.raises(AssertionError):
        making(None, lambda: False)


def test_devices_are_shared_out_and_seen_by_their_worker_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    found = {"auto": "cuda", "cuda": "cuda", "cuda:1": "cuda:1", "mps": "mps"}
    monkeypatch.setattr("mrflow_sched._runtime.device.resolve_device", lambda name: torch.device(found[name]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    devices = groups_for("auto", 2, PAIR)
    assert devices == ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    share = share_of(1, "store", devices[2:], {})
    assert (share.rank, share.parts, share.device, share.visible) == (1, 2, "cuda:1", "2,3")
    assert share_of(0, "store", devices[2:], {"CUDA_VISIBLE_DEVICES": "7, 5,3,1"}).visible == "3,1"
    assert share_of(1, "store", ("cpu", "cpu"), {"CUDA_VISIBLE_DEVICES": "7"}).visible is None
    for words, sentence in (
        (("cuda", 3, PAIR), "takes 2 devices for each of 3 workers, and this machine has 4"),
        (
            ("cuda", 1, ContextParallel(2, 4)),
            "--context-parallel ulysses=2,ring=4 takes 8 devices, and this machine has 4",
        ),
        (("cuda:1", 1, PAIR), "--device cuda:1 is one device"),
        (("mps", 1, PAIR), "is for CUDA devices, and --device mps is mps"),
    ):
        with pytest.raises(MrFlowError, match=sentence):
            groups_for(*words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("ulysses=2", "--ray", "local"), "is for the devices of this machine; leave out it or --ray"),
        (("ulysses=2", "--offload", "model"), "needs the network on its device"),
        (("2",), "'2' is not ulysses=N or ring=N"),
        (("ulysses=2,ulysses=2",), "is not ulysses=N or ring=N"),
        (("ring=none",), "'none' is not a whole number"),
        (("ulysses=1",), "'ulysses=1' shares nothing"),
    ],
)
def test_what_does_not_go_together_is_refused(
    mrflow: Any, tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    path = table(tmp_path, [{"prompt": "a star"}])
    code, _, err = mrflow("batch", path, "--out", str(tmp_path / "out"), "--context-parallel", *words)
    assert (code, sentence in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_an_old_diffusers_is_told(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    monkeypatch.delattr(diffusers, "ContextParallelConfig", raising=False)
    monkeypatch.setattr(context_parallel, "hasattr", lambda *_: False, raising=False)
    path = table(tmp_path, [{"prompt": "a star"}])
    code, _, err = mrflow("batch", path, *SMALL, "--out", str(tmp_path / "out"), "--context-parallel", "ulysses=2")
    assert (code, f"and this is {diffusers.__version__}; update diffusers" in err) == (2, True), err


def test_a_machine_that_cannot_is_told_once(mrflow: Any, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available() or not has_gloo():
        pytest.skip("is about the CPU")
    path, out = table(tmp_path, [{"prompt": "a star", "batch": 2}]), tmp_path / "out"
    code, _, err = mrflow("batch", path, *SMALL, "--out", str(out), "--context-parallel", "ulysses=2", model=None)
    if code:  # diffusers that counts the CPU as a device makes the images
        assert (code, err.count("--context-parallel")) == (2, 1), err
    assert len(list(out.glob("*.png"))) == (0 if code else 2)
