"""The seams: methods, capabilities, guidance by step, callbacks, and what stands between a loop and its network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny_pipelines
import torch
from pipeline_tools import listening, network_of, snapshot
from tiny_pipelines import TWICE
from torch import Tensor

from mrflow_sched import MrFlow, make_plan, sample_staged
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.analytic import GaussianFieldEngine
from mrflow_sched.engines.diffusers.layouts.find import find_layout
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.engines.diffusers.scheduler import MrFlowScheduler
from mrflow_sched.engines.diffusers.seam import NetworkSeam
from mrflow_sched.methods import GuidanceInterval, Plain, StageRun, Tiled, TiledEngine, method_of
from mrflow_sched.sampling.engine import Capabilities, capabilities_of
from mrflow_sched.sampling.method import run_progress
from mrflow_sched.sampling.network import NetworkCall, Next

SIZE: dict[str, Any] = {"width": 64, "height": 64, "seed": 3, "output_type": "pt"}


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# --------------------------------------------------------------------------------------------------------- capabilities


class Wrapper:
    """An engine around another that hands on what it does not know, as wrappers are written."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.called = engine, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def denoise(self, x: Tensor, sigma: Tensor, text: Any, *, guidance: float) -> Tensor:
        self.called += 1
        return self._engine.denoise(x, sigma, text, guidance=guidance)


class Child(PipelineEngine):
    called = 0

    def denoise(self, x: Tensor, sigma: Tensor, text: Any, **more: Any) -> Tensor:
        self.called += 1
        return super().denoise(x, sigma, text, **more)


@pytest.mark.parametrize("kind", [Wrapper, Child])
def test_an_engine_with_a_denoise_of_its_own_is_asked_for_every_step(kind: Any) -> None:
    pipe = tiny_pipelines.make("sd3")
    engine = PipelineEngine(pipe)
    own: Any = Wrapper(engine) if kind is Wrapper else Child(pipe)
    plan = make_plan(engine.family, 64, 64, low_steps=4, solver="euler", seed=3)
    images = sample_staged(own, plan, "a cat").images
    assert own.called == plan.stages[0].steps + plan.stages[1].steps == 5
    assert not capabilities_of(own).whole_stages
    assert difference(images, sample_staged(engine, plan, "a cat").images) < 1e-4


def test_capabilities_are_what_the_engines_own_class_says() -> None:
    engine = PipelineEngine(tiny_pipelines.make("flux1-dev"))
    assert capabilities_of(Wrapper(engine)) == Capabilities()
    assert capabilities_of(GaussianFieldEngine()) == Capabilities(gradients=True)
    tiled = TiledEngine(engine, 64)
    assert capabilities_of(tiled) == Capabilities(tiles=True, places=True, gradients=True, lora_scale=True)


# -------------------------------------------------------------------------------------------------------------- methods


def test_a_plan_names_its_method() -> None:
    assert method_of(make_plan("sd35", 1024, 1024)) == Plain()
    assert method_of(make_plan("sd35", 1024, 1024, guidance_interval=(0.2, 0.8))) == GuidanceInterval(Plain())
    both = make_plan("sd35", 2048, 2048, guidance_interval=(0.2, 0.8), tile=512)
    assert method_of(both) == Tiled(GuidanceInterval(Plain()))


def test_a_method_in_a_file_of_its_own_is_run(tmp_path: Any) -> None:
    """The example of docs/library.md: a method that keeps the stages' starts, built around another one."""
    source = '''
from dataclasses import dataclass, field
from mrflow_sched.sampling.method import Plain

@dataclass(frozen=True)
class Brighter(Plain):
    """The published method, with every handoff made a little brighter."""

    by: float = 0.1
    seen: list[str] = field(default_factory=list)

    def handoff(self, run, images):
        self.seen.append(f"{run.index}: {run.stage.width}")
        return super().handoff(run, (images + self.by).clamp(0, 1))
'''
    file = tmp_path / "brighter.py"
    file.write_text(source)
    space: dict[str, Any] = {}
    exec(compile(source, str(file), "exec"), space)
    engine = GaussianFieldEngine()
    plan = make_plan(engine.family, 64, 64, low_steps=2, seed=3)
    method = space["Brighter"]()
    plain = sample_staged(engine, plan, "").images
    changed = sample_staged(engine, plan, "", method=method).images
    assert method.seen == ["1: 64"]
    assert 0.02 < float((changed - plain).mean()) < 0.1
    assert torch.equal(sample_staged(engine, plan, "", method=Plain()).images, plain)


def test_gradients_are_recorded_for_methods_that_want_them() -> None:
    pipe = tiny_pipelines.make("flux1-dev")
    engine = PipelineEngine(pipe)
    plan = make_plan(engine.family, 64, 64, low_steps=2, seed=3)
    weight = next(weight for name, weight in pipe.transformer.named_parameters() if "to_q" in name)
    weight.requires_grad_(True)
    assert not sample_staged(engine, plan, "a cat").latents.requires_grad  # type: ignore[union-attr]
    result = sample_staged(engine, plan, "a cat", method=Plain(gradients=True))
    assert result.latents is not None
    result.latents.square().mean().backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().sum()) > 0


# --------------------------------------------------------------------------------------------------------- run_progress


def test_progress_counts_steps_of_stage_1() -> None:
    first = (1.0, 0.75, 0.5, 0.25, 0.0)
    assert run_progress(first, first) == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert run_progress(first, (0.125, 0.0)) == (0.875, 1.0)
    assert run_progress(first, (0.5, 0.125, 0.0)) == (0.5, 0.875, 1.0)
    assert run_progress(first, ()) == ()


# ------------------------------------------------------------------------------- guidance by step, inside the own loop


def test_with_an_interval_callbacks_count_as_documented() -> None:
    pipe = tiny_pipelines.make("sd3")

    def heard(**more: Any) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []

        def note(given: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.append((step, given.num_timesteps))
            return tensors

        MrFlow(pipe, upscaler=TWICE)("a cat", low_steps=4, callback_on_step_end=note, **SIZE, **more)
        return seen

    assert heard() == heard(guidance_interval=(0.3, 0.9)) == [(0, 4), (1, 4), (2, 4), (3, 4), (0, 1)]


def test_with_an_interval_stage_1_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def spy(function: Any, mode: str) -> Any:
        def run(*values: Any, **named: Any) -> Any:
            compiled.append(len(named["hidden_states"]))
            return function(*values, **named)

        return run

    monkeypatch.setattr(torch, "compile", spy)
    pipe = tiny_pipelines.make("sd3")
    numbers: dict[str, Any] = {"low_steps": 6, "solver": "euler", "guidance_interval": (0.3, 0.9)}
    plan = MrFlow(pipe, upscaler=TWICE).plan(64, 64, low_steps=6, solver="euler")
    inside = [0.3 <= sigma <= 0.9 for sigma in plan.stages[0].sigmas[:-1]]
    assert any(inside)
    assert not all(inside)
    MrFlow(pipe, compile_mode="default", upscaler=TWICE)("a cat", **numbers, **SIZE)
    assert compiled == [2 if each else 1 for each in inside]


@pytest.mark.parametrize("name", ["sd3", "sdxl", "z-image", "qwen-image", "flux2-klein-base", "hidream", "lumina-next"])
def test_a_step_outside_the_interval_is_one_without_guidance(name: str) -> None:
    """Against the network asked step by step: a wrapper makes the sampler do so."""
    engine = PipelineEngine(tiny_pipelines.make(name))
    side = 4 * engine.family.grid
    plan = make_plan(engine.family, side, side, low_steps=4, seed=3, solver="heun", guidance_interval=(0.3, 0.8))
    assert not plan.stages[0].always_guided
    whole = sample_staged(engine, plan, "a cat", negative_prompt="blue")
    steps = sample_staged(Wrapper(engine), plan, "a cat", negative_prompt="blue")  # type: ignore[arg-type]
    assert difference(whole.images, steps.images) < 1e-3
    assert whole.forwards == plan.forwards
    free = make_plan(engine.family, side, side, low_steps=4, seed=3, solver="heun")
    assert difference(whole.images, sample_staged(engine, free, "a cat", negative_prompt="blue").images) > 1e-3


def test_any_scale_can_be_asked_for_at_any_step() -> None:
    engine = PipelineEngine(tiny_pipelines.make("sd3"))
    plan = make_plan(engine.family, 64, 64, low_steps=4, seed=3, solver="euler")

    @dataclass(frozen=True)
    class Falling(Plain):
        def stage(self, run: StageRun, latents: Tensor) -> Tensor:
            return run.sample(latents, guidance=lambda sigma: 1.0 + 6.0 * sigma)

    whole = sample_staged(engine, plan, "a cat", method=Falling()).images
    steps = sample_staged(Wrapper(engine), plan, "a cat", method=Falling()).images  # type: ignore[arg-type]
    assert difference(whole, steps) < 1e-3


# ------------------------------------------------------------------------------------------------------ FLUX's true CFG


def test_true_cfg_is_counted_and_reached_by_refine_guidance_and_interval() -> None:
    pipe = tiny_pipelines.make("flux1-dev")
    if "true_cfg_scale" not in MrFlow(pipe, upscaler=TWICE)._layout.call_names:  # pyright: ignore[reportPrivateUsage]
        pytest.skip("this FluxPipeline has no true CFG")
    run = MrFlow(pipe, upscaler=TWICE)
    asked: dict[str, Any] = {"negative_prompt": "blue", "true_cfg_scale": 3.0, "low_steps": 4, "solver": "euler"}

    def made(**more: Any) -> tuple[Any, int]:
        with listening(pipe) as heard:
            result = run("a cat", **asked, **SIZE, **more)
        return result, len(heard.states)

    both, calls = made()
    assert both.plan.forwards == calls == 10
    once, calls = made(refine_guidance=1.0)
    assert once.plan.forwards == calls == 9
    sigmas = both.plan.stages[0].sigmas
    inside = sum(0.3 <= sigma <= 0.9 for sigma in sigmas[:-1])
    part, calls = made(guidance_interval=(0.3, 0.9))
    assert part.plan.forwards == calls == 4 + inside + 2
    plain = run("a cat", low_steps=4, solver="euler", **SIZE)
    assert plain.plan.forwards == 5
    assert difference(both.images, plain.images) > 1e-3
    # The embedded scale stays the pipeline's, in every stage.
    with listening(pipe) as heard:
        run("a cat", **asked, **SIZE, guidance_scale=2.0)
    assert {float(each["guidance"][0]) for each in heard.arguments} == {2.0}


# ------------------------------------------------------------------------------------------------- ControlNet's windows


def _scales(pipe: Any, **more: Any) -> list[float]:
    """The ControlNet's conditioning scale at every evaluation of a run with six steps and one."""
    scales: list[float] = []

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scales.append(float(kwargs["conditioning_scale"] if "conditioning_scale" in kwargs else args[4]))

    handle = pipe.controlnet.register_forward_pre_hook(note, with_kwargs=True)
    hint = torch.rand((1, 3, 128, 128), generator=torch.Generator().manual_seed(2))
    try:
        asked: dict[str, Any] = {**SIZE, "width": 128, "height": 128, "low_steps": 6, "solver": "euler", **more}
        MrFlow(pipe, upscaler=TWICE)("a cat", control_image=hint, **asked)
    finally:
        handle.remove()
    return scales


def _controlled() -> Any:
    pipe = tiny_pipelines.make("sd15")
    library = tiny_pipelines.diffusers()
    net = library.ControlNetModel.from_unet(pipe.unet).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for weight in net.parameters():
            torch.nn.init.normal_(weight, std=0.1)
    made = library.StableDiffusionControlNetPipeline(**pipe.components, controlnet=net)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("interval", [{}, {"guidance_interval": (0.3, 0.9)}], ids=["throughout", "by interval"])
@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1, 1]),
        ({"control_guidance_end": 0.5}, [1, 1, 1, 0, 0, 0, 0]),
        ({"control_guidance_start": 0.1}, [0, 1, 1, 1, 1, 1, 1]),
        ({"control_guidance_start": 0.5, "control_guidance_end": 0.9}, [0, 0, 0, 1, 1, 0, 0]),
        ({"control_guidance_start": 0.96}, [0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_a_controlnets_window_counts_over_the_whole_run(
    window: dict[str, float], expected: list[int], interval: dict[str, Any]
) -> None:
    assert _scales(_controlled(), **window, **interval) == expected


def test_a_controlnets_window_in_two_evaluations_a_step() -> None:
    assert _scales(_controlled(), control_guidance_end=0.5, solver="heun") == [1] * 6 + [0] * 6


def test_a_controlled_pipeline_without_its_hint_is_one_sentence() -> None:
    pipe, hint = _controlled(), torch.randn(1, 3, 64, 64)
    asked: list[dict[str, Any]] = [{"image": hint}, {}]
    for given in asked:
        with pytest.raises(MrFlowError, match="control_image is missing"):
            MrFlow(pipe, upscaler=TWICE)("a cat", **SIZE, **given)


# ------------------------------------------------------------------------------------------------------------ callbacks


@pytest.mark.parametrize("name", ["flux1-dev", "flux2-klein", "sd3"])
@pytest.mark.parametrize("in_place", [False, True], ids=["returned", "in place"])
def test_what_a_callback_makes_of_the_last_steps_latents_counts(name: str, in_place: bool) -> None:
    pipe = tiny_pipelines.make(name)
    engine = PipelineEngine(pipe)
    side = 4 * engine.family.grid
    where = -1

    def move(given: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if where == given.num_timesteps == step + 1:
            if in_place:
                tensors["latents"].add_(0.5)
            else:
                tensors["latents"] = tensors["latents"] + 0.5
        return tensors

    def made() -> Tensor:
        asked: dict[str, Any] = {**SIZE, "width": side, "height": side, "low_steps": 3, "solver": "euler"}
        return MrFlow(pipe, upscaler=TWICE)("a cat", callback_on_step_end=move, **asked).images

    plain = made()
    where = 3  # the last step of stage 1
    assert difference(made(), plain) > 1e-3
    where = 1  # the refine stage's only step
    assert difference(made(), plain) > 1e-3
    where = -1
    assert difference(made(), plain) == 0.0


# ------------------------------------------------------------------------------------- what reads the owner's pipeline


@pytest.mark.parametrize("kind", ["PyramidAttentionBroadcastConfig", "FasterCacheConfig"])
def test_caches_that_read_the_owners_pipeline_work(kind: str) -> None:
    library = tiny_pipelines.diffusers()
    config = getattr(library, kind, None)
    if config is None:
        pytest.skip(f"this diffusers has no {kind}")
    pipe = tiny_pipelines.make("flux1-dev")
    read: list[float] = []

    def current() -> Any:
        read.append(float(pipe.current_timestep))
        return pipe.current_timestep

    blocks = ["transformer_blocks", "single_transformer_blocks"]
    more: dict[str, Any] = {"spatial_attention_block_identifiers": blocks, "current_timestep_callback": current}
    if kind == "FasterCacheConfig":
        more |= {"is_guidance_distilled": True, "attention_weight_callback": lambda _: 0.5}
        more |= {"spatial_attention_timestep_skip_range": (-1, 901), "unconditional_batch_skip_range": 2}
    else:
        more |= {"spatial_attention_timestep_skip_range": (100, 950)}
    plain = MrFlow(pipe, upscaler=TWICE)("a cat", low_steps=8, **SIZE)
    pipe.transformer.enable_cache(config(spatial_attention_block_skip_range=2, **more))
    pipe.transformer.disable_cache()  # which leaves registries of hooks, empty, on the network
    before = snapshot(pipe)
    pipe.transformer.enable_cache(config(spatial_attention_block_skip_range=2, **more))
    cached = MrFlow(pipe, upscaler=TWICE)("a cat", low_steps=8, **SIZE).images
    pipe.transformer.disable_cache()
    assert difference(cached, plain.images) > 1e-5
    levels = [1000 * sigma for stage in plain.plan.stages for sigma in stage.sigmas[:-1]]
    if kind == "FasterCacheConfig":  # which cannot start within its range: the refine stage is computed whole
        levels.pop()
    assert all(any(abs(each - level) < 0.01 for level in levels) for each in read)
    assert len({round(each, 2) for each in read}) == len(levels)
    assert snapshot(pipe) == before
    assert difference(MrFlow(pipe, upscaler=TWICE)("a cat", low_steps=8, **SIZE).images, plain.images) == 0.0


def test_the_owner_shows_what_the_call_has_set_and_forgets_it_again() -> None:
    pipe = tiny_pipelines.make("sd3")
    seen: list[tuple[bool, float]] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda *_: seen.append((hasattr(pipe, "_guidance_scale"), getattr(pipe, "_guidance_scale", 0.0)))
    )
    engine = PipelineEngine(pipe)
    sample_staged(engine, make_plan(engine.family, 64, 64, low_steps=1), "a cat")
    # transformers hooks its encoders at their first call.
    seen.clear()
    before = snapshot(pipe)
    run = sample_staged(engine, make_plan(engine.family, 64, 64, low_steps=2, guidance=4.0), "a cat")
    assert seen == [(True, 4.0)] * run.plan.stages[0].steps + [(True, 4.0)]
    assert snapshot(pipe) == before
    with pytest.raises(ZeroDivisionError):
        MrFlow(pipe, upscaler=TWICE)("a cat", callback_on_step_end=lambda *_: 1 / 0, **SIZE)
    assert snapshot(pipe) == before
    handle.remove()


# ------------------------------------------------------------------------------------------------------- None, and text


def test_an_explicit_none_is_an_argument() -> None:
    pipe = tiny_pipelines.make("sana")
    if "complex_human_instruction" not in MrFlow(pipe, upscaler=TWICE)._layout.call_names:  # pyright: ignore[reportPrivateUsage]
        pytest.skip("this Sana has no instruction")
    asked: dict[str, Any] = {**SIZE, "width": 128, "height": 128, "low_steps": 2, "max_sequence_length": 300}
    with_it = MrFlow(pipe, upscaler=TWICE)("a cat", **asked).images
    without = MrFlow(pipe, upscaler=TWICE)("a cat", complex_human_instruction=None, **asked).images
    assert difference(with_it, without) > 1e-4


@pytest.mark.parametrize(("name", "tokens"), [("flux1-schnell", 256), ("flux1-dev", 512)])
def test_text_is_as_long_as_the_family_says(name: str, tokens: int) -> None:
    pipe = tiny_pipelines.make(name)
    pipe.tokenizer_2.model_max_length = 512  # as in the released folders
    engine = PipelineEngine(pipe)
    assert engine.family.text_tokens == tokens
    assert engine.encode_text(["a cat"]).arguments["prompt_embeds"].shape[1] == tokens
    own = PipelineEngine(pipe, arguments={"max_sequence_length": 64})
    assert own.encode_text(["a cat"]).arguments["prompt_embeds"].shape[1] == 64


# ----------------------------------------------------------------------------------------------------- the network seam


@dataclass(frozen=True)
class Around(Plain):
    """The published method with `work` between loop and network."""

    work: Any = None

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        return run.sample(latents, around=self.work)


@dataclass
class Recorder:
    calls: list[NetworkCall] = field(default_factory=list[NetworkCall])
    outputs: list[Tensor] = field(default_factory=list[Tensor])

    def __call__(self, call: NetworkCall, run: Next) -> Tensor:
        self.calls.append(call)
        self.outputs.append(run(call))
        return self.outputs[-1]


@pytest.mark.parametrize("name", tiny_pipelines.available())
def test_a_method_sees_every_call_and_changes_nothing_by_looking(name: str) -> None:
    engine = PipelineEngine(tiny_pipelines.make(name))
    side = 4 * engine.family.grid
    own = engine.family.shift.lists  # of a distilled model
    steps = len(own[0]) - 1 if own else 2
    plan = make_plan(engine.family, side, side, low_steps=steps, seed=3, solver="euler", renoise=0)
    plain = sample_staged(engine, plan, "a cat")
    recorder = Recorder()
    seen = sample_staged(engine, plan, "a cat", method=Around(work=recorder))
    assert torch.equal(seen.images, plain.images)
    assert seen.forwards == plain.forwards == plan.forwards
    calls = [call for call in recorder.calls if call.branch != "negative"]
    assert [call.step for call in calls] == [*range(plan.stages[0].steps), 0]
    if engine.family.prediction == "flow":
        sigmas = [*engine.layout.stage_sigmas(plan.stages[0].sigmas)[:-1], plan.stages[1].sigmas[0]]
        assert [call.sigma for call in calls] == pytest.approx(sigmas)
    guided = {call.branch for call in recorder.calls}
    if engine.family.guidance_kind == "cfg" and plan.stages[0].guidance != 1.0:
        assert guided in ({"both"}, {"positive", "negative"})
    else:
        assert guided == {"only"}


def test_the_noisy_latents_are_known_by_name_wherever_a_loop_puts_them() -> None:
    pipe = tiny_pipelines.make("flux1-dev")
    seen: list[NetworkCall] = []
    noisy, text = torch.zeros(2, 4, 4), torch.zeros(1, 8, 16)

    def note(call: NetworkCall, _: Next) -> Tensor:
        seen.append(call)
        return call.latents

    scheduler = MrFlowScheduler.for_stage(pipe.scheduler.config, (1.0, 0.5), "euler")
    seam = NetworkSeam(scheduler=scheduler, batch=2, guided=True, layout=find_layout(pipe), arounds=[note])
    assert seam.before(pipe.transformer)(encoder_hidden_states=text, hidden_states=noisy, return_dict=False)[0] is noisy
    assert seen[0].branch == "positive"
    assert seen[0].latents_name == "hidden_states"


def test_a_recorded_call_is_run_again_with_gradients() -> None:
    pipe = tiny_pipelines.make("sd3")
    engine = PipelineEngine(pipe)
    recorder = Recorder()
    plan = make_plan(engine.family, 64, 64, low_steps=2, seed=3)
    sample_staged(engine, plan, "a cat", method=Around(work=recorder))
    call, output = recorder.calls[0], recorder.outputs[0]
    assert call.branch == "both"
    again = call.run()
    torch.testing.assert_close(again, output)
    assert not again.requires_grad
    latents = call.latents.clone().requires_grad_(True)
    changed = call.replace(hidden_states=latents).run()
    changed.square().sum().backward()
    assert latents.grad is not None
    assert float(latents.grad.abs().sum()) > 0
    alone = call.positive()
    assert alone.branch == "positive"
    torch.testing.assert_close(alone.run(), output[1:], rtol=0, atol=1e-5)
    with pytest.raises(MrFlowError, match="is no input of this call"):
        call.replace(hidden=latents)


def test_a_method_changes_what_the_network_reads_or_leaves_it_out() -> None:
    engine = PipelineEngine(tiny_pipelines.make("flux1-dev"))
    plan = make_plan(engine.family, 64, 64, low_steps=3, seed=3, solver="euler")
    plain = sample_staged(engine, plan, "a cat")

    def late(call: NetworkCall, run: Next) -> Tensor:
        return run(call.replace(timestep=call.inputs["timestep"] * 0.5))

    assert difference(sample_staged(engine, plan, "a cat", method=Around(work=late)).images, plain.images) > 1e-3
    kept: list[Tensor] = []

    def cached(call: NetworkCall, run: Next) -> Tensor:
        if call.step == 0:
            kept[:] = [run(call)]
        return kept[0]

    result = sample_staged(engine, plan, "a cat", method=Around(work=cached))
    assert result.forwards == 2  # one in each stage
    assert bool(result.images.isfinite().all())


@pytest.mark.parametrize("name", ["flux1-dev", "flux2-klein"])
def test_a_subset_of_tokens_goes_with_its_own_positions(name: str) -> None:
    """A network of one token at a time sees the same as all, where attention is taken out of the question: each subset
    is compared with the call that is made of those tokens by hand."""
    engine = PipelineEngine(tiny_pipelines.make(name))
    assert engine.capabilities.token_subsets
    recorder = Recorder()
    side = 4 * engine.family.grid
    plan = make_plan(engine.family, side, side, low_steps=2, seed=3)
    sample_staged(engine, plan, "a cat", method=Around(work=recorder))
    call = recorder.calls[-1]
    count = call.latents.shape[1]
    every = torch.arange(count)
    torch.testing.assert_close(call.subset(every).run(), recorder.outputs[-1], rtol=0, atol=1e-5)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    shuffled = call.subset(order)
    # Positions travel with their tokens: another order gives the same tokens in that order.
    torch.testing.assert_close(shuffled.run(), recorder.outputs[-1][:, order], rtol=0, atol=1e-4)
    half = call.subset(every[::2])
    assert half.latents.shape[1] == len(every[::2]) == half.inputs["img_ids"].shape[-2]
    assert half.run().shape[1] == len(every[::2])


def test_what_cannot_be_cut_down_says_so() -> None:
    engine = PipelineEngine(tiny_pipelines.make("sd3"))
    assert not engine.capabilities.token_subsets

    def half(call: NetworkCall, run: Next) -> Tensor:
        return run(call.subset(torch.arange(2)))

    plan = make_plan(engine.family, 64, 64, low_steps=2)
    with pytest.raises(MrFlowError, match="makes its positions from the size"):
        sample_staged(engine, plan, "a cat", method=Around(work=half))
    exact = GaussianFieldEngine()
    plan = make_plan(exact.family, 64, 64)
    with pytest.raises(MrFlowError, match="has no seam"):
        sample_staged(exact, plan, "", method=Around(work=half))


def test_denoise_keeps_a_graph_where_a_weight_wants_one() -> None:
    pipe = tiny_pipelines.make("sd3")
    engine = PipelineEngine(pipe)
    text = engine.encode_text(["a cat"])
    x, sigma = torch.randn((1, *engine.latent_shape(64, 64))), torch.tensor([0.5])
    assert not engine.denoise(x, sigma, text, guidance=4.0).requires_grad
    weight = next(iter(network_of(pipe).parameters()))
    weight.requires_grad_(True)
    made = engine.denoise(x, sigma, text, guidance=4.0)
    assert made.requires_grad
    with torch.no_grad():
        assert not engine.denoise(x, sigma, text, guidance=4.0).requires_grad
    assert difference(made.detach(), engine.denoise(x, sigma, text, guidance=4.0).detach()) == 0.0


def test_memory_that_runs_out_meets_the_seam_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipelines.make("flux1-dev")
    engine = PipelineEngine(pipe)
    plan = make_plan(engine.family, 64, 64, low_steps=2, seed=3)
    whole = sample_staged(engine, plan, ["a cat", "blue"])
    inner = pipe.transformer.forward

    def limited(*args: Any, **kwargs: Any) -> Any:
        if len(kwargs["hidden_states"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return inner(*args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", limited)
    recorder = Recorder()
    parts = sample_staged(engine, plan, ["a cat", "blue"], method=Around(work=recorder))
    assert difference(parts.images, whole.images) < 1e-4
    assert [call.batch for call in recorder.calls if call.batch == 1] != []
    assert parts.forwards >= whole.forwards
