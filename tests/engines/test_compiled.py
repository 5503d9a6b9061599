"""torch.compile for the first stage: which forwards go through it, and what happens where it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tiny_pipelines
import torch
from pipeline_tools import network_of, snapshot
from torch import Tensor

from mrflow_sched import MrFlow
from mrflow_sched.apps.pipeline import MrFlowOutput
from mrflow_sched.engines.diffusers import compiled

Function = Callable[..., Any]


def run(mrflow: MrFlow, prompt: Any = "a cat", **more: Any) -> MrFlowOutput:
    numbers: dict[str, Any] = {"width": 64, "height": 64, "low_steps": 4, "refine_steps": 1, "seed": 3}
    return mrflow(prompt, **{**numbers, **more}, output_type="pt")


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """torch.compile without a C++ compiler: it traces, and runs the graph as it is. Gives the shapes traced for."""
    compile_, traced = torch.compile, list[tuple[int, ...]]()

    def backend(graph: Any, inputs: list[Any]) -> Any:
        traced.append(next(tuple(one.shape) for one in inputs if isinstance(one, Tensor) and one.ndim > 1))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, mode: compile_(function, backend=backend))  # pyright: ignore[reportUnknownLambdaType]
    return traced


def made(monkeypatch: pytest.MonkeyPatch, work: Callable[[Function, str], Function]) -> None:
    """Let `work` be torch.compile."""
    monkeypatch.setattr(torch, "compile", lambda function, mode: work(function, mode))  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]


@pytest.mark.parametrize("name", ["flux1-dev", "sd3", "sdxl"])
def test_the_picture_is_the_same_and_only_stage_1_is_compiled(name: str, real: list[tuple[int, ...]]) -> None:
    if name not in tiny_pipelines.available():
        pytest.skip(f"the installed diffusers has no pipeline for {name}")
    pipe = tiny_pipelines.make(name)
    plain = run(MrFlow(pipe))
    before = snapshot(pipe)
    mrflow = MrFlow(pipe, compile_mode="default")
    compiled = run(mrflow)
    assert compiled.warnings == plain.warnings
    torch.testing.assert_close(compiled.images, plain.images, rtol=0, atol=1e-4)
    assert snapshot(pipe) == before
    first = len(real)
    assert first > 0
    run(mrflow, seed=4, sigma=0.3)
    assert len(real) == first  # nothing is compiled anew for other numbers of the same size
    run(mrflow, low_steps=3, width=128)
    assert len(real) == first  # too few steps to pay, of a size that would have to be compiled


def test_the_refine_stage_never_meets_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []

    def count(function: Function, _mode: str) -> Function:
        def forward(*values: Any, **named: Any) -> Any:
            widths.append(int(named["hidden_states"].shape[1]))
            return function(*values, **named)

        return forward

    made(monkeypatch, count)
    run(MrFlow(tiny_pipelines.make("flux1-dev"), compile_mode="max-autotune"))
    assert len(widths) == 4
    assert len(set(widths)) == 1


def test_results_outlive_the_memory_that_cuda_graphs_write_to_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed graph writes every result to the same place; with two forwards a step the first would be lost."""

    def graphed(function: Function, _mode: str) -> Function:
        buffers: dict[torch.Size, Tensor] = {}

        def forward(*values: Any, **named: Any) -> Any:
            result = function(*values, **named)[0]
            return (buffers.setdefault(result.shape, torch.empty_like(result)).copy_(result),)

        return forward

    name = "qwen-image" if "qwen-image" in tiny_pipelines.available() else "sd3"  # Qwen: two calls a step
    pipe = tiny_pipelines.make(name)
    plain = run(MrFlow(pipe), negative_prompt="blue")
    made(monkeypatch, graphed)
    fast = run(MrFlow(pipe, compile_mode="reduce-overhead"), negative_prompt="blue")
    assert torch.equal(fast.images, plain.images)


def test_where_compiling_fails_the_run_goes_on_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_function: Function, _mode: str) -> Function:
        def forward(*_values: Any, **_named: Any) -> Any:
            raise RuntimeError("Compiler: cl is not found.\nmany more lines")

        return forward

    pipe = tiny_pipelines.make("flux1-dev")
    plain = run(MrFlow(pipe))
    made(monkeypatch, broken)
    mrflow = MrFlow(pipe, compile_mode="default")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="mrflow_sched")
        first, second = run(mrflow), run(mrflow)
    sentence = "torch.compile could not compile FluxTransformer2DModel (Compiler: cl is not found): it runs uncompiled."
    assert [record.getMessage() for record in caplog.records if "compile" in record.getMessage()] == [sentence]
    assert sentence in first.warnings
    assert torch.equal(first.images, plain.images)
    assert torch.equal(second.images, plain.images)


def test_errors_of_the_network_are_not_taken_for_the_compilers(real: list[tuple[int, ...]]) -> None:
    pipe = tiny_pipelines.make("flux1-dev")
    mrflow = MrFlow(pipe, compile_mode="default")
    hook = network_of(pipe).register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(mrflow)
    hook.remove()
    assert run(mrflow).images.isfinite().all()
    assert real


def test_memory_that_runs_out_is_no_reason_to_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_function: Function, _mode: str) -> Function:
        def forward(*_values: Any, **_named: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return forward

    made(monkeypatch, full)
    with pytest.raises(MemoryError):
        run(MrFlow(tiny_pipelines.make("flux1-dev"), compile_mode="default"))


def test_offloading_switched_on_later_is_in_force(real: list[tuple[int, ...]]) -> None:
    pytest.importorskip("accelerate")
    pipe = tiny_pipelines.make("flux1-dev")
    mrflow = MrFlow(pipe, compile_mode="default")
    plain = run(mrflow)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        torch.testing.assert_close(run(mrflow).images, plain.images, rtol=0, atol=1e-4)
        hooked = [hook.model for hook in pipe._all_hooks]
        assert any(model is pipe.transformer for model in hooked)  # and not the twin, which refining does without
        assert all(hook.hook is hook.model._hf_hook for hook in pipe._all_hooks)
    assert real


def test_another_network_gets_a_twin_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Function] = []
    made(monkeypatch, lambda function, _mode: seen.append(function) or function)
    compiler = compiled.NetworkCompiler("default")
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert compiler(one) is compiler(one)
    assert len(seen) == 1
    twin, x = compiler(other), torch.ones(1, 2)
    assert torch.equal(twin(x), other(x))
    assert twin is not other
    assert "forward" not in vars(other)


def test_an_unknown_mode_gets_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"compile_mode must be None or one of default, .*, got 'fast'"):
        MrFlow(tiny_pipelines.make("flux1-dev"), compile_mode="fast")
