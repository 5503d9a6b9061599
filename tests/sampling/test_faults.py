"""Faults put into every part of a run: whose they are said to be, and what becomes of the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mrflow_sched.engines.analytic import GaussianFieldEngine
from mrflow_sched.methods import Plain
from mrflow_sched.plan.make import make_native_plan, make_plan
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import Fault, StagedResult, sample_staged
from mrflow_sched.sampling.engine import Capabilities
from mrflow_sched.sampling.progress import Progress
from mrflow_sched.sampling.solvers import get_solver

ENGINE = GaussianFieldEngine()
Change = Callable[[Any], Any]
NAN, INF = float("nan"), float("inf")


class Doubler:
    """A pixel upscaler of scale 2 by repetition."""

    name, scale = "doubler", 2

    def __call__(self, images: Tensor) -> Tensor:
        return images.repeat_interleave(2, -1).repeat_interleave(2, -2)


class Broken:
    """The analytic engine, one of whose parts changes what it returns at its nth call."""

    def __init__(self, part: str, call: int, change: Change) -> None:
        self.family, self.device, self.latent_shape = ENGINE.family, ENGINE.device, ENGINE.latent_shape
        self.part, self.call, self.change = part, call, change
        self.calls: dict[str, int] = dict.fromkeys(("text", "denoise", "encode", "decode"), 0)

    def _made(self, part: str, answer: Any) -> Any:
        self.calls[part] += 1
        return self.change(answer) if (part, self.call) == (self.part, self.calls[part]) else answer

    def encode_text(self, prompts: Any, negatives: Any = None) -> Any:
        return self._made("text", ENGINE.encode_text(prompts, negatives))

    def denoise(self, x: Tensor, sigma: Tensor, text: Any, *, guidance: float) -> Any:
        return self._made("denoise", ENGINE.denoise(x, sigma, text, guidance=guidance))

    def encode(self, images: Tensor, *, posterior: str = "mode", seeds: Any = None) -> Any:
        return self._made("encode", ENGINE.encode(images, posterior=posterior, seeds=seeds))

    def decode(self, latents: Tensor) -> Any:
        return self._made("decode", ENGINE.decode(latents))


class OwnLoop(Broken):
    """The same with a loop of its own."""

    capabilities = Capabilities(whole_stages=True)

    def sample_stage(self, solver: str, latents: Tensor, sigmas: Any, text: Any, *, callback: Any, **more: Any) -> Any:
        def model(x: Tensor, sigma: Tensor) -> Tensor:
            return self.denoise(x, sigma, text, guidance=more["guidance"])

        return get_solver(solver)(model, latents, sigmas, callback=callback)


def plan_of(side: int = 32, **changes: Any) -> StagedPlan:
    settings: dict[str, Any] = {"low_steps": 4, "refine_steps": 2, "sigma": 0.3, "seed": 11, "solver": "euler"}
    return make_plan(ENGINE.family, side, side, **(settings | changes))


def run(engine: Any = ENGINE, plan: StagedPlan | None = None, **changes: Any) -> StagedResult:
    settings: dict[str, Any] = {"batch": 3, "upscaler": Doubler(), "keep_stages": True, **changes}
    return sample_staged(engine, plan or plan_of(), "", **settings)


def spoil(value: float, *rows: int) -> Change:
    """Put `value` into one place of some rows."""

    def change(answer: Tensor) -> Tensor:
        answer = answer.clone()
        answer[list(rows), 0, 0, 0] = value
        return answer

    return change


def spoil_all(value: float) -> Change:
    return lambda answer: torch.full_like(answer, value)


# ------------------------------------------------------------------------------------------------------ whose it is


# part, at which call, the fault that is to be told, the side of what is kept
PLACES = [
    ("denoise", 1, Fault("network", 1, 1), None),
    ("denoise", 3, Fault("network", 1, 3), None),
    ("denoise", 4, Fault("network", 1, 4), None),
    ("decode", 1, Fault("decode", 1), None),
    ("encode", 1, Fault("encode", 2), "upscaled"),
    ("denoise", 5, Fault("network", 2, 1), "upscaled"),
    ("denoise", 6, Fault("network", 2, 2), "upscaled"),
    ("decode", 2, Fault("decode", 2), "upscaled"),
]


# A decoder's values are colours: they are finite or not, but not too large.
CASES = [
    (place, value) for place in PLACES for value in (NAN, INF, -INF, 1e30) if (place[0], value) != ("decode", 1e30)
]


@pytest.mark.parametrize("loop", [Broken, OwnLoop])
@pytest.mark.parametrize(("place", "value"), CASES)
def test_one_image_that_goes_wrong_has_an_owner_and_the_others_are_finished(
    place: tuple[str, int, Fault, str | None], value: float, loop: Any
) -> None:
    part, call, fault, kept = place
    good, found = run(), run(loop(part, call, spoil(value, 1)))
    assert found.faults == (None, fault, None)
    assert found.unfinished
    assert not found.cancelled
    assert found.latents is None
    for row in (0, 2):
        torch.testing.assert_close(found.images[row], good.images[row], rtol=0, atol=1e-5)
    if kept is None:
        assert bool(found.images[1].isnan().all())
        assert all(bool(stage.image[1].isnan().all()) for stage in found.stages)
    else:
        upscaled = next(stage.image for stage in good.stages if stage.name == "stage 2 upscaled")
        assert torch.equal(found.images[1], upscaled[1])
    [sentence] = [each for each in found.warnings if "returned NaN" in each]
    assert sentence.startswith("Image 2: the ")
    assert ("there is no image" in sentence) == (kept is None)
    assert f"stage {fault.stage}" in sentence
    assert {"network": "network", "decode": "decoder", "encode": "encoder"}[fault.part] in sentence
    assert (f"step {fault.step} of" in sentence) == (fault.step is not None)


@pytest.mark.parametrize(("part", "call", "fault", "kept"), PLACES)
def test_where_every_image_goes_wrong_nothing_more_is_run(part: str, call: int, fault: Fault, kept: str | None) -> None:
    engine = Broken(part, call, spoil_all(NAN))
    found = run(engine)
    assert found.faults == (fault,) * 3
    assert found.unfinished
    assert engine.calls["decode"] == {("denoise", 5): 1, ("denoise", 6): 1}.get((part, call), engine.calls["decode"])
    if kept is None:
        assert found.images.shape == (3, 3, 16, 16)
        assert bool(found.images.isnan().all())
        assert engine.calls["encode"] == 0
    else:
        assert found.images.shape == (3, 3, 32, 32)
        assert bool(found.images.isfinite().all())
    if part == "encode":
        assert engine.calls["denoise"] == 4


def test_an_image_that_fell_back_goes_on_in_the_stage_after() -> None:
    plan = plan_of(64, stages=3)
    found = run(Broken("denoise", 6, spoil(NAN, 0)), plan)
    good = run(plan=plan)
    assert found.faults == (Fault("network", 2, 2), None, None)
    second = next(stage.image for stage in found.stages if stage.name == "stage 2")
    upscaled = next(stage.image for stage in good.stages if stage.name == "stage 2 upscaled")
    assert torch.equal(second[0], upscaled[0])
    assert found.images.shape == (3, 3, 64, 64)
    assert bool(found.images.isfinite().all())
    torch.testing.assert_close(found.images[1:], good.images[1:], rtol=0, atol=1e-5)


def test_only_the_first_fault_of_an_image_is_its_fault() -> None:
    class Both(Broken):
        def _made(self, part: str, answer: Any) -> Any:
            return spoil(NAN, 0)(answer) if part in ("denoise", "decode") else answer

    assert run(Both("", 0, lambda x: x)).faults == (Fault("network", 1, 1), None, None)


def test_text_that_is_not_finite_is_the_text_encoders_fault() -> None:
    def change(text: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return spoil(NAN, 2)(text[0]), text[1]

    found = run(Broken("text", 1, change))
    assert found.faults == (None, None, Fault("text", 1))
    assert "Image 3: the text encoder returned" in found.warnings[0]
    # Minus infinity is a mask; what the network makes of it is the network's.
    masked = run(Broken("text", 1, lambda text: (spoil(-INF, 0)(text[0]), text[1])))
    assert masked.faults == (Fault("network", 1, 1), None, None)


def test_the_second_evaluation_of_a_step_belongs_to_it() -> None:
    found = run(Broken("denoise", 4, spoil(NAN, 0)), plan_of(solver="heun"))
    assert found.faults == (Fault("network", 1, 2), None, None)


def test_a_native_run_and_a_run_from_an_image_name_the_owner_too() -> None:
    native = make_native_plan(ENGINE.family, 16, 16, steps=3, seed=1)
    found = run(Broken("denoise", 2, spoil(NAN, 1)), native, batch=2)
    assert (found.faults, found.unfinished) == ((None, Fault("network", 1, 2)), True)
    picture = torch.full((3, 16, 16), 0.4)
    found = run(Broken("denoise", 1, spoil_all(NAN)), image=picture, batch=1)
    assert found.faults == (Fault("network", 2, 1),)
    assert bool((found.images == 0.4).all())
    found = run(Broken("encode", 1, spoil_all(NAN)), image=picture, start_sigma=0.5, batch=1)
    assert found.faults == (Fault("encode", 1),)
    assert bool(found.images.isnan().all())


def test_a_stopped_run_names_the_owner_of_what_it_shows() -> None:
    def stop(event: Progress) -> None:
        asked.append(event.step == 3)

    asked: list[bool] = []
    found = run(Broken("denoise", 2, spoil(NAN, 0)), callback=stop, cancel=lambda: asked[-1], batch=2)
    assert found.cancelled
    assert found.faults == (Fault("network", 1, 2), None)
    assert found.images.isnan().flatten(1).all(1).tolist() == [True, False]


def test_a_whole_run_has_no_faults() -> None:
    found = run()
    assert found.faults == (None, None, None)
    assert not found.unfinished
    assert found.latents is not None


def test_images_that_no_handoff_upscaled_are_the_upscalers_fault() -> None:
    class Bare(Plain):
        def handoff(self, run: Any, images: Tensor) -> Tensor | None:
            made = spoil(NAN, 1)(Doubler()(images))
            run.hooks.keep("stage 2 upscaled", made)
            return ENGINE.encode(made)

    found = run(method=Bare())
    assert found.faults == (None, Fault("upscale", 2), None)
    assert "Image 2: the upscaler returned NaN" in found.warnings[0]
    assert bool(found.images.isfinite().all())


# ------------------------------------------------------------------------------------------------- what is no answer


WRONG: dict[str, tuple[Change, type[Exception], str]] = {
    "None": (lambda _: None, TypeError, "it returned None"),
    "list": (lambda answer: [answer], TypeError, "it returned list"),
    "complex": (lambda answer: answer.to(torch.complex64), TypeError, "values of torch.complex64"),
    "bytes": (lambda answer: answer.to(torch.uint8), TypeError, "values of torch.uint8"),
    "shape": (lambda answer: answer[..., :-1], RuntimeError, r"it returned \(3, "),
    "rows": (lambda answer: answer[:1], RuntimeError, r"it returned \(1, "),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("part", ["denoise", "encode", "decode", "sample_stage"])
def test_an_answer_that_is_none_is_the_engines_fault_and_not_memory(part: str, wrong: str) -> None:
    change, kind, sentence = WRONG[wrong]

    class Whole(OwnLoop):
        def sample_stage(self, *values: Any, **more: Any) -> Any:
            return change(super().sample_stage(*values, **more))

    engine = Whole("", 0, change) if part == "sample_stage" else Broken(part, 1, change)
    with pytest.raises(kind, match=f"{type(engine).__name__}.{part} must return a float tensor .*{sentence}"):
        run(engine)


@pytest.mark.parametrize("name", ["start", "stage", "handoff"])
def test_a_method_that_returns_nothing_is_told_so(name: str) -> None:
    class Empty(Plain):
        pass

    answers: dict[str, Any] = {"start": None, "stage": None, "handoff": torch.zeros(1)}
    setattr(Empty, name, lambda *_: answers[name])
    with pytest.raises((TypeError, RuntimeError), match=f"Empty.{name} must return a float tensor"):
        run(method=Empty())


def test_doubles_are_taken_as_floats() -> None:
    double: Change = lambda answer: answer.double()  # noqa: E731
    for part, call in (("denoise", 1), ("encode", 1), ("decode", 2)):
        torch.testing.assert_close(run(Broken(part, call, double)).images, run().images, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- whose memory


WORDS = [
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("HIP out of memory. Tried to allocate 1 GiB"),
    OSError(12, "Cannot allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", WORDS, ids=lambda error: str(error)[:30])
@pytest.mark.parametrize(("part", "call"), [("encode", 1), ("denoise", 5), ("decode", 2)])
def test_memory_that_runs_out_keeps_the_best_image(part: str, call: int, error: Exception) -> None:
    class Full(Broken):
        def _made(self, part: str, answer: Any) -> Any:
            self.calls[part] += 1
            if part == self.part and self.calls[part] >= self.call:
                raise error
            return answer

    found = run(Full(part, call, lambda x: x), batch=1)
    assert found.unfinished
    assert found.images.shape == (1, 3, 32, 32)
    assert found.faults == (None,)
    assert sum("Memory ran out in" in warning for warning in found.warnings) == 1


@pytest.mark.parametrize("at", range(1, 15))
@pytest.mark.parametrize(
    "error", [MemoryError("mine"), RuntimeError("cannot allocate memory for my own thing"), OSError(12, "mine")]
)
def test_memory_that_runs_out_in_a_callers_function_is_the_callers(at: int, error: Exception) -> None:
    own, count = type(error)(*error.args), 0

    def fail(*_: Any) -> bool:
        nonlocal count
        count += 1
        if count == at:
            raise own
        return False

    with pytest.raises(type(error)) as caught:
        run(callback=fail)
    assert caught.value is own
    own, count = type(error)(*error.args), 0
    with pytest.raises(type(error)) as caught:
        run(OwnLoop("", 0, lambda x: x), cancel=fail)
    assert caught.value is own


# ------------------------------------------------------------------------------------------------------- callbacks


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep", "careful", "dpmpp_2m"])
@pytest.mark.parametrize("loop", [Broken, OwnLoop])
def test_a_callback_that_writes_into_the_estimate_changes_nothing(loop: Any, solver: str) -> None:
    plan, seen = plan_of(solver=solver), 0

    def scribble(event: Progress) -> None:
        nonlocal seen
        if event.denoised is not None:
            before = event.denoised.clone()
            event.denoised.zero_()
            assert torch.equal(event.denoised, before)
            seen += 1

    found = run(loop("", 0, lambda x: x), plan, callback=scribble)
    assert torch.equal(found.images, run(loop("", 0, lambda x: x), plan).images)
    assert seen == 6
