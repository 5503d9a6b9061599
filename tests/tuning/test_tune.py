"""A LoRA is tuned by a reward on the embedded model: in small, but whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mrflow_sched import MrFlowError, demo, load_upscaler, make_plan, sample_staged
from mrflow_sched.demo.captions import random_captions
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.methods.reward import Surrogate
from mrflow_sched.tuning import LORA, Tuned, TuneSettings, tune
from mrflow_sched.tuning.adapter import Adapter
from mrflow_sched.tuning.sampled import Batch, Teacher
from mrflow_sched.tuning.settings import BackwardPath, View

pytest.importorskip("peft")

# Of one kind, so that two updates on the first move what is read on the others.
PROMPTS = (
    "a red star over green hills under a blue sky",
    "a blue circle over green hills under a pink sky",
    "an orange ring over blue waves under a blue sky",
    "a green heart over yellow dunes under a pink sky",
)
HELD_OUT = ("a red circle over green hills under a pink sky", "a blue star over yellow dunes under a blue sky")
SMALL = TuneSettings(updates=2, batch=2, rank=2, rate=3e-3, check_every=1)


@pytest.fixture(scope="module")
def engine() -> PipelineEngine:
    return demo.load_engine(device="cpu", dtype="float32")


def planned(engine: PipelineEngine, **options: Any) -> Any:
    asked: dict[str, Any] = {"low_steps": 2, "seed": 9, **options}
    return make_plan(engine.family, 256, 256, **asked)


def run(engine: PipelineEngine, folder: Path, settings: TuneSettings = SMALL, **named: Any) -> Tuned:
    given = {"plan": planned(engine), "reward": "saturation", "guard": "judge", **named}
    return tune(engine, PROMPTS, HELD_OUT, folder=folder, settings=settings, **given)


def test_a_run_that_goes_on_is_the_run_that_was_not_cut(engine: PipelineEngine, tmp_path: Path) -> None:
    before = {name: each.clone() for name, each in engine.network.state_dict().items()}
    wanted = {name: each.requires_grad for name, each in engine.network.named_parameters()}
    told: list[str] = []
    whole = run(engine, tmp_path / "whole", tell=told.append)
    after = engine.network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], each) for name, each in before.items())
    assert {name: each.requires_grad for name, each in engine.network.named_parameters()} == wanted
    assert (whole.update, whole.updates, whole.stopped) == (2, 2, "")
    assert len(told) == len(whole.checks) == 3
    # A rate this high moves the reward at once.
    assert sum(whole.checks[-1].rewards) > sum(whole.checks[0].rewards)
    assert [check.update for check in whole.full] == [0, 2]
    page = whole.report.read_text(encoding="utf-8")
    assert all(part in page for part in ("saturation", "judge", "samples/before-01.png", "samples/update-0002-01.png"))
    assert (tmp_path / "whole" / "samples" / "update-0002-02.png").is_file()

    cut = run(engine, tmp_path / "cut", replace(SMALL, updates=1))
    assert cut.updates == 1
    gone_on = run(engine, tmp_path / "cut")
    assert gone_on.updates == 2
    assert (tmp_path / "cut" / LORA).read_bytes() == (tmp_path / "whole" / LORA).read_bytes()
    assert gone_on.checks[-1].rewards == whole.checks[-1].rewards


def test_the_file_is_a_lora_that_diffusers_loads(engine: PipelineEngine, tmp_path: Path) -> None:
    found = run(engine, tmp_path, replace(SMALL, updates=1))
    assert found.file is not None
    fresh = demo.load_engine(device="cpu", dtype="float32")
    plan = planned(engine)

    def sampled() -> Tensor:
        return sample_staged(fresh, plan, list(HELD_OUT), until=1).images

    plain = sampled()
    fresh.pipe.load_lora_weights(str(found.file.parent), weight_name=found.file.name)
    rewards = (tuned := sampled()).amax(1).sub(tuned.amin(1)).flatten(1).mean(1)
    assert not torch.equal(tuned, plain)
    assert rewards.tolist() == pytest.approx(list(found.checks[-1].rewards), abs=2e-3)  # the file is float16
    fresh.pipe.unload_lora_weights()
    assert torch.equal(sampled(), plain)


def test_a_fresh_lora_changes_no_bit(engine: PipelineEngine) -> None:
    plan = planned(engine)
    plain = sample_staged(engine, plan, PROMPTS[0], until=1).images
    adapter = Adapter(engine, 4, seed=1)
    try:
        assert torch.equal(sample_staged(engine, plan, PROMPTS[0], until=1).images, plain)
        weights = {name: each + 0.05 for name, each in adapter.weights().items()}
        with adapter.holding(weights):
            assert not torch.equal(sample_staged(engine, plan, PROMPTS[0], until=1).images, plain)
            with adapter.off():
                assert torch.equal(sample_staged(engine, plan, PROMPTS[0], until=1).images, plain)
    finally:
        adapter.remove()


def test_tuning_stops_where_the_guard_falls_and_keeps_what_was_good(engine: PipelineEngine, tmp_path: Path) -> None:
    looks = iter([[0.5, 0.6], [0.5, 0.6], [0.2, 0.3], *[[0.5, 0.6]] * 4])

    def guard(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([0.5] if len(images) == 1 else next(looks))  # tried on a single grey image first

    found = run(engine, tmp_path, replace(SMALL, updates=5), guard=guard)
    assert (found.stopped, found.updates, found.update) == ("guard", 2, 1)
    assert found.file is not None
    assert "fell" in found.report.read_text(encoding="utf-8")
    again = run(engine, tmp_path, replace(SMALL, updates=5), guard=guard)
    assert again.updates == 2  # it stays stopped


def test_a_cancelled_run_is_kept_and_goes_on(engine: PipelineEngine, tmp_path: Path) -> None:
    answers, rarely = iter([False, True]), replace(SMALL, check_every=2)
    found = run(engine, tmp_path / "cut", rarely, cancel=lambda: next(answers))
    assert (found.stopped, found.updates, found.file) == ("cancelled", 1, None)
    assert "Stopped on request" in found.report.read_text(encoding="utf-8")
    gone_on, whole = run(engine, tmp_path / "cut", rarely), run(engine, tmp_path / "whole", rarely)
    assert gone_on.updates == 2
    last = [replace(each.checks[-1], seconds=0.0) for each in (gone_on, whole)]
    assert last[0] == last[1]


def test_checkpointing_changes_nothing_and_ends_with_the_run(engine: PipelineEngine, tmp_path: Path) -> None:
    plain = run(engine, tmp_path / "plain", replace(SMALL, updates=1))
    less = run(engine, tmp_path / "less", replace(SMALL, updates=1, checkpointing=True))
    assert less.checks[-1].rewards == pytest.approx(plain.checks[-1].rewards, abs=1e-5)
    network: Any = engine.network
    assert not network.is_gradient_checkpointing


def test_the_command_offers_what_the_settings_take() -> None:
    from mrflow_sched.apps.cli import tune as command

    assert set(command._PATHS) == set(get_args(BackwardPath))
    assert set(command._VIEWS) == set(get_args(View))


def test_memory_that_runs_out_makes_parts_and_then_leaps(
    engine: PipelineEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[int, str]] = []
    own = Teacher.loss

    def loss(self: Teacher, batch: Batch, surrogate: Surrogate) -> Any:
        tried.append((len(batch.seeds), surrogate.path))
        if len(batch.seeds) > 1 or surrogate.path == "full":
            raise MemoryError
        return own(self, batch, surrogate)

    monkeypatch.setattr(Teacher, "loss", loss)
    told: list[str] = []
    assert run(engine, tmp_path / "auto", replace(SMALL, updates=1), tell=told.append).updates == 1
    assert tried == [(2, "full"), (1, "full"), (1, "leap"), (1, "leap")]
    assert sum("Memory ran out" in line for line in told) == 2
    with pytest.raises(MemoryError, match="--checkpointing"):
        run(engine, tmp_path / "full", replace(SMALL, updates=1, backward="full"))


@pytest.mark.parametrize("through", ["none", "up", "vjp"])
def test_the_reward_of_the_final_image_reaches_the_lora(engine: PipelineEngine, through: Any) -> None:
    adapter = Adapter(engine, 2, seed=1)
    upscaler = load_upscaler(demo.upscaler_path(), dtype="float32")
    try:
        from mrflow_sched.measure.scores import get_score

        teacher = Teacher(engine, planned(engine), get_score("saturation"), upscaler, through, None)
        loss, rewards = teacher.loss(Batch(PROMPTS[:1], (5,), 0), Surrogate("full"))
        parts: Any = torch.autograd.grad(loss, adapter.parameters, allow_unused=True)
        assert float(sum(part.abs().sum() for part in parts if part is not None)) > 0
        final = sample_staged(engine, planned(engine, solver="euler"), PROMPTS[0], upscaler=upscaler, seeds=[5]).images
        plain = float((final.amax(1) - final.amin(1)).mean())
        assert float(rewards) == pytest.approx(plain, abs=1e-4)  # what is rewarded is the image that the plan makes
    finally:
        adapter.remove()


def blind(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.detach().mean((1, 2, 3))


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"guard": "saturation"}, "guard is 'saturation', as the reward is"),
        ({"reward": blind}, "reward 'blind' has no gradient in the image"),
        ({"reward": "beauty"}, "score is 'beauty', which is unknown"),
        ({"plan": {"renoise": 1.0}}, "plan has renoise in stage 1"),
        ({"plan": {"precision": "int8"}}, "plan has precision int8 in stage 1"),
        (
            {"settings": replace(SMALL, through="up"), "plan": {"stages": 3}},
            "through is 'up', which needs a plan of two",
        ),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_is_made(
    engine: PipelineEngine, tmp_path: Path, named: dict[str, Any], said: str
) -> None:
    if "plan" in named:
        size = (512, 512) if "stages" in named["plan"] else (256, 256)
        named = {**named, "plan": make_plan(engine.family, *size, low_steps=2, **named["plan"])}
    with pytest.raises(MrFlowError, match=said):
        run(engine, tmp_path / "new", **named)
    assert not (tmp_path / "new").exists()


def test_lists_of_prompts_that_do_not_do_are_refused(engine: PipelineEngine, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"plan": planned(engine), "reward": "saturation", "guard": "judge", "folder": tmp_path}
    with pytest.raises(MrFlowError, match="trained on too"):
        tune(engine, PROMPTS, PROMPTS[:2], **asked)
    with pytest.raises(MrFlowError, match="4 prompts to train on and 1 held out"):
        tune(engine, PROMPTS, HELD_OUT[:1], **asked)


def test_the_state_of_another_run_is_refused_and_kept(engine: PipelineEngine, tmp_path: Path) -> None:
    run(engine, tmp_path, replace(SMALL, updates=1))
    kept = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(MrFlowError, match="tuning run of another settings"):
        run(engine, tmp_path, replace(SMALL, rate=0.5))
    with pytest.raises(MrFlowError, match="another guard"):
        run(engine, tmp_path, SMALL, guard="contrast")
    assert (tmp_path / "state.pt").read_bytes() == kept
    (tmp_path / "state.pt").write_bytes(kept[: len(kept) // 2])
    with pytest.raises(MrFlowError, match="cannot be read"):
        run(engine, tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"updates": 0},
        {"rate": 0.0},
        {"rate": float("nan")},
        {"rank": 2.5},
        {"backward": "all"},
        {"through": "down"},
        {"guard_drop": -1},
        {"checkpointing": "yes"},
        {"through": "up", "backward": "clean"},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MrFlowError, match=next(iter(wrong))):
        TuneSettings(**wrong)


# ------------------------------------------------------------------------------------------------------ command line


def mrflow(*words: str, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "mrflow_sched", "tune", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--reward is missing"),
        (("--reward", "judge"), "--guard is missing: every reward can be deceived"),
        (("--reward", "judge", "--guard", "contrast", "--rate", "7"), "--rate must be a number"),
        (("--reward", "judge", "--guard", "contrast", "--held-out", "x"), "give both files"),
        (("--reward", "judge", "--guard", "contrast", "--model", "x"), "--prompts is missing"),
    ],
)
def test_the_command_refuses_in_one_sentence(words: Sequence[str], said: str) -> None:
    done = mrflow(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_two_processes_tune_together(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(random_captions(8, seed=4)), encoding="utf-8")
    words = ["--reward", "saturation", "--guard", "judge", "--prompts", str(prompts), "--dtype", "float32", "--json"]
    words += ["--updates", "1", "--low-steps", "1", "--batch", "2", "--rank", "2", "--device", "cpu"]
    alone = mrflow(*words, "--out", str(tmp_path / "one"))
    assert alone.returncode == 0, alone.stderr
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = mrflow(*words, "--out", str(tmp_path / "two"), launcher=launcher)
    assert both.returncode == 0, both.stderr
    one, two = (json.loads((tmp_path / name / "tune.json").read_text()) for name in ("one", "two"))
    assert two["checks"][-1]["rewards"] == pytest.approx(one["checks"][-1]["rewards"], abs=1e-4)
    assert one["update"] == two["update"] == 1


def test_a_launcher_that_starts_one_process_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mrflow_sched.tuning.processes import joined

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes, note = joined()
    assert processes.count == 1
    assert note is not None
    assert "torchrun --nproc-per-node 2" in note
