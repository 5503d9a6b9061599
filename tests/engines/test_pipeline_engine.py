"""Any diffusers pipeline as an engine: what its network is really called with, and what its owner finds afterwards."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from pipeline_tools import Heard, listening, network_of, snapshot
from torch import Tensor

from bench.tiny import by_betas, language_models, other_times, special
from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.folder import load_pipeline
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.engines.diffusers.view import copy_containers
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import StagedResult, sample_staged
from mrflow_sched.sampling.engine import Capabilities, Engine, capabilities_of
from mrflow_sched.sampling.noise import add_noise, draw_noise, sigma_to_ve
from mrflow_sched.sampling.progress import Progress

# The others have conventions of their own: test_other_times, test_language_models, test_special_layouts.
_ELSEWHERE = {name for group in (by_betas, language_models, other_times, special) for name in group.PIPELINES}
NAMES = [name for name in tiny_pipelines.available() if name not in _ELSEWHERE]
SIGMA = 0.12


def engine_of(name: str, **changes: Any) -> PipelineEngine:
    return PipelineEngine(tiny_pipelines.make(name), **changes)


def plan_of(engine: Engine, **changes: Any) -> StagedPlan:
    side = 4 * engine.family.grid
    numbers: dict[str, Any] = {"low_steps": 2, "sigma": SIGMA, "seed": 3, **changes}
    return make_plan(engine.family, side, side, **numbers)


def run(engine: Engine, plan: StagedPlan | None = None, prompt: Any = "a cat", **changes: Any) -> StagedResult:
    return sample_staged(engine, plan or plan_of(engine), prompt, **changes)


# --------------------------------------------------------------------------------------------- what the network is told

# The timestep that a family's network reads at flow sigma s, by its pipeline's source. Those not named read s itself.
_TIMES: dict[str, Callable[[float], float]] = {
    "sd3": lambda s: 1000 * s,
    "sana": lambda s: 1000 * s,
    "z-image": lambda s: 1 - s,
    "z-image-turbo": lambda s: 1 - s,
    "lumina2": lambda s: 1 - s,
    "lumina-next": lambda s: 1 - s,
    "hidream": lambda s: 1000 * s,
    "hidream-dev": lambda s: 1000 * s,
    "hunyuan-image": lambda s: 1000 * s,
    "hunyuan-image-distilled": lambda s: 1000 * s,
    "kandinsky5": lambda s: 1000 * s,
    "bria": lambda s: 1000 * s,
    "bria-fibo": lambda s: 1000 * s,
    "z-image-omni": lambda s: 1 - s,
}


def _training_step(ve: float) -> float:
    """The step of 1000 whose scaled-linear betas have noised an image to `ve`, between two where it lies there."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    table = ((1 - kept) / kept).sqrt().log()
    above = int((table < torch.tensor(ve).log()).sum())
    low, high = table[above - 1], table[above]
    return float(above - 1 + (torch.tensor(ve).log() - low) / (high - low))


def _refine_calls(name: str, heard: Heard, engine: PipelineEngine, plan: StagedPlan) -> tuple[Tensor, list[float]]:
    """State of the first image, and timesteps, of the network's calls at the final size."""
    width, height = plan.width, plan.height
    size = engine.layout.pack(torch.zeros(1, *engine.latent_shape(width, height))).numel()
    large = [index for index, state in enumerate(heard.states) if state[0].numel() >= size]
    return heard.states[large[0]][:1], [float(heard.timesteps[index][0]) for index in large]


@pytest.mark.parametrize("name", NAMES)
def test_the_refine_stage_sees_exactly_the_plans_sigma(name: str) -> None:
    engine = engine_of(name)
    plan = plan_of(engine)
    with listening(engine.pipe) as heard:
        result = run(engine, plan, keep_stages=True)
    upscaled = next(stage.image for stage in result.stages if stage.name == "stage 2 upscaled")
    shape = engine.latent_shape(plan.width, plan.height)
    prediction = engine.family.prediction
    wanted = add_noise(engine.encode(upscaled), draw_noise(shape, [4]), SIGMA, prediction)
    state, times = _refine_calls(name, heard, engine, plan)
    if prediction == "flow":
        time = _TIMES.get(name, lambda s: s)(SIGMA)
    else:
        wanted = wanted / (sigma_to_ve(SIGMA) ** 2 + 1) ** 0.5  # what such networks read is scaled to unit variance
        time = _training_step(sigma_to_ve(SIGMA))
    packed = engine.layout.call_latents(wanted) if name == "flux2" else engine.layout.pack(wanted)
    torch.testing.assert_close(state.reshape(packed.shape).float(), packed, rtol=0, atol=2e-5)
    assert times == pytest.approx([time] * len(times), abs=2e-4 * max(time, 1))
    assert len(times) == (1 if engine.family.guidance_kind != "cfg" or len(heard.states[-1]) > 1 else 2)


@pytest.mark.parametrize("name", NAMES)
def test_stage_1_starts_from_the_seeds_noise_and_walks_the_plans_list(name: str) -> None:
    engine = engine_of(name)
    plan = plan_of(engine, low_steps=3)
    seen: list[float] = []

    def note(state: dict[str, Any]) -> None:
        seen.append(float(state["sigma"]))
        assert state["x"].shape == state["denoised"].shape == (1, *shape)
        assert state["x"].dtype == torch.float32

    stage = plan.stages[0]
    shape = engine.latent_shape(stage.width, stage.height)
    noise = draw_noise(shape, [3])
    text = engine.encode_text(["a cat"])
    sigmas = stage.sigmas if engine.family.prediction == "flow" else (14.0, 3.0, 1.0, 0.0)
    final = engine.sample_stage(stage.solver, noise, sigmas, text, guidance=stage.guidance, callback=note)
    assert seen == pytest.approx(list(engine.layout.stage_sigmas(sigmas)[:-1]), abs=1e-6)
    assert final.shape == (1, *shape)
    assert final.dtype == torch.float32
    assert not torch.equal(final, noise)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_pipeline_changes(name: str) -> None:
    pipe = tiny_pipelines.make(name)
    run(PipelineEngine(pipe))  # networks may make tables at their first call, as they do for the pipeline itself
    before = snapshot(pipe)
    result = run(PipelineEngine(pipe))
    assert snapshot(pipe) == before
    assert result.forwards == result.plan.forwards
    assert bool(result.images.isfinite().all())
    assert float(result.images.std()) > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_what_its_images_are_alone(name: str) -> None:
    pipe = tiny_pipelines.make(name)
    both = run(PipelineEngine(pipe), prompt=["a cat", "blue"], seeds=[3, 9])
    for number, (prompt, seed) in enumerate((("a cat", 3), ("blue", 9))):
        alone = run(PipelineEngine(pipe), prompt=prompt, seeds=[seed])
        torch.testing.assert_close(alone.images[0], both.images[number], rtol=0, atol=1e-3)
    assert float((both.images[0] - both.images[1]).abs().max()) > 0.05


# ------------------------------------------------------------------------------------- against the pipeline by itself

# What the model card of each has in its call besides prompt and size; diffusers' default for the length is 512.
_CARDS: dict[str, dict[str, Any]] = {"flux1-dev": {}, "flux1-schnell": {"max_sequence_length": 256}}


@pytest.mark.parametrize("name", list(_CARDS))
def test_a_folders_stage_1_is_what_diffusers_makes_of_it_by_default(name: str, tmp_path: Path) -> None:
    """Same start noise, diffusers' own loop and scheduler, nothing said of the text's length: that is ours to know."""
    made = tiny_pipelines.make(name)
    made.tokenizer_2.model_max_length = 512  # as in the released folders
    made.save_pretrained(tmp_path / "model")
    theirs = tiny_pipelines.diffusers().FluxPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    engine = PipelineEngine.from_folder(tmp_path / "model", device="cpu", dtype="float32")
    plan = make_plan(engine.family, 64, 64, low_steps=4, seed=3, solver="euler")
    low = plan.stages[0]
    start = engine.layout.pack(draw_noise(engine.latent_shape(low.width, low.height), [3]))

    def native(**card: Any) -> Tensor:
        asked: dict[str, Any] = {"width": low.width, "height": low.height, "num_inference_steps": 4, **card}
        return theirs("a cat", latents=start.clone(), output_type="pt", **asked).images

    assert type(theirs.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    first = run(engine, plan, keep_stages=True).stages[0]
    assert first.name == "stage 1"
    torch.testing.assert_close(first.image, native(**_CARDS[name]), rtol=0, atol=1e-4)
    # Text of another length is another image, so the comparison above sees it.
    assert float((first.image - native(max_sequence_length=128)).abs().max()) > 1e-3


# ------------------------------------------------------------------------------------------------------- one evaluation


def test_one_evaluation_is_a_stage_of_one_step() -> None:
    engine = engine_of("flux1-dev")
    text = engine.encode_text(["a cat"] * 2)
    noise = draw_noise(engine.latent_shape(64, 64), [1, 2])
    stage = engine.sample_stage("euler", noise, (0.5, 0.0), text, guidance=3.5)
    at_once = engine.denoise(noise, torch.full((2,), 0.5), text, guidance=3.5)
    torch.testing.assert_close(at_once, stage, rtol=0, atol=1e-6)
    mixed = engine.denoise(noise, torch.tensor([0.5, 0.9]), text, guidance=3.5)
    torch.testing.assert_close(mixed[0], stage[0], rtol=0, atol=1e-5)
    assert not torch.allclose(mixed[1], stage[1], atol=1e-3)


def test_half_precision_rounds_the_network_and_not_the_state() -> None:
    pipe = tiny_pipelines.make("flux1-dev").to(dtype=torch.bfloat16)
    engine = PipelineEngine(pipe)
    text = engine.encode_text(["a cat"])
    noise = draw_noise(engine.latent_shape(64, 64), [1])
    final = engine.sample_stage("euler", noise, (0.5, 1e-4), text, guidance=3.5)
    velocity = (noise - final) / (0.5 - 1e-4)
    # The way is one bfloat16 velocity long; a state kept in bfloat16 would have lost the start's lower bits.
    assert not torch.equal(final, final.bfloat16().float())
    torch.testing.assert_close(velocity, velocity.bfloat16().float(), rtol=2e-3, atol=2e-3)
    assert engine.dtype == engine.vae_dtype == torch.bfloat16


def test_it_says_what_it_can_do() -> None:
    engine = engine_of("flux1-dev")
    assert isinstance(engine, Engine)
    every = replace(Capabilities(*(True,) * 10, counts_on=True), few_step=False)
    assert engine.capabilities == capabilities_of(engine) == every
    # SD3's network makes positions from the size of its input.
    assert engine_of("sd3").capabilities == replace(every, token_subsets=False, places=False)


def test_a_pipeline_that_cannot_be_run_is_refused() -> None:
    with pytest.raises(ValueError, match="pipe is"):
        PipelineEngine(torch.nn.Linear(1, 1))


# ------------------------------------------------------------------------------------------------------------- stopping


def test_cancelling_inside_a_stage_keeps_the_estimate_and_leaves_no_trace() -> None:
    pipe = tiny_pipelines.make("sd3")
    engine = PipelineEngine(pipe)
    run(engine)
    before = snapshot(pipe)
    steps: list[int] = []

    def hear(progress: Progress) -> None:
        if progress.name == "stage 1 sample" and progress.denoised is not None:
            steps.append(progress.step)

    result = run(engine, plan_of(engine, low_steps=4), callback=hear, cancel=lambda: steps[-1:] == [2])
    assert steps == [1, 2]
    assert result.cancelled
    assert result.unfinished
    assert result.forwards == 2 * 2
    assert result.images.shape == (1, 3, 32, 32)
    assert snapshot(pipe) == before


@pytest.mark.parametrize("outside", [False, True], ids=["on what the callback is given", "on the pipeline itself"])
def test_interrupting_as_pipelines_are_interrupted(outside: bool) -> None:
    pipe = tiny_pipelines.make("flux1-dev")
    steps: list[int] = []

    def stop(given: Any, step: int, timestep: Tensor, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(step)
        if len(steps) == 2:
            (pipe if outside else given)._interrupt = True
        return kwargs

    engine = PipelineEngine(pipe, arguments={"callback_on_step_end": stop})
    result = run(engine, plan_of(engine, low_steps=6))
    assert result.cancelled
    assert steps == [0, 1]
    assert result.images.shape == (1, 3, 32, 32)
    # What is left of an earlier interrupt stops no later run, as it stops no later call of the pipeline.
    pipe._interrupt = outside
    assert not run(PipelineEngine(pipe)).cancelled


def test_a_callback_sees_and_changes_the_state_of_every_stage() -> None:
    heard: list[tuple[int, float, tuple[int, ...]]] = []
    factor = 1.0

    def scale(given: Any, step: int, timestep: Tensor, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        heard.append((step, round(float(timestep), 3), tuple(kwargs["latents"].shape)))
        return {"latents": kwargs["latents"] * factor}

    engine = engine_of("flux1-dev", arguments={"callback_on_step_end": scale})
    plan = plan_of(engine, sigma=0.2)
    plain = run(engine, plan)
    first = round(1000 * plan.stages[0].sigmas[1], 3)
    assert heard == [(0, 1000.0, (1, 4, 64)), (1, first, (1, 4, 64)), (0, 200.0, (1, 16, 64))]
    factor = 0.5
    assert float((run(engine, plan).images - plain.images).abs().max()) > 0.01


def test_what_pipelines_write_into_lists_and_dicts_does_not_reach_the_caller() -> None:
    store: list[int] = []
    given = {"joint_attention_kwargs": {"scale": 0.5, "store": store}, "prompt": ["a cat"], "clip_skip": 1}
    own = copy_containers(given)
    assert own == given
    own["joint_attention_kwargs"]["ip_hidden_states"] = None
    own["prompt"][0] = ["<|im_start|>"]
    assert given == {"joint_attention_kwargs": {"scale": 0.5, "store": []}, "prompt": ["a cat"], "clip_skip": 1}
    own["joint_attention_kwargs"]["store"].append(1)  # what a caller's own attention processor fills
    assert store == [1]


def test_a_pipeline_that_writes_into_its_prompts_runs_every_stage() -> None:
    if not hasattr(tiny_pipelines.diffusers(), "ZImageOmniPipeline"):
        pytest.skip("the installed diffusers has no ZImageOmniPipeline")
    kind = tiny_pipelines.diffusers().ZImageOmniPipeline
    parts = tiny_pipelines.make("z-image").components
    pipe = kind(**parts, siglip=None, siglip_processor=None)
    pipe.set_progress_bar_config(disable=True)
    engine = PipelineEngine(pipe)
    prompts = ["a cat"]
    result = run(engine, plan_of(engine), prompts, negative_prompt="a dog")
    assert prompts == ["a cat"]
    assert torch.isfinite(result.images).all()
    assert torch.equal(result.images, run(engine, plan_of(engine), prompts, negative_prompt="a dog").images)
    assert not torch.equal(result.images, run(engine, plan_of(engine), ["blue"], negative_prompt="a dog").images)


def test_an_argument_that_ends_the_loop_early_is_named() -> None:
    engine = engine_of("sdxl", arguments={"denoising_end": 0.5})
    with pytest.raises(MrFlowError, match=r"ended a stage after \d of 4 evaluations; .*\(denoising_end\)"):
        run(engine, plan_of(engine, low_steps=4))


def test_what_somebody_sets_on_the_pipeline_during_a_run_stays() -> None:
    """A run shows there what its call sets, and takes that back; it takes nothing else back."""
    pipe = tiny_pipelines.make("sd3")
    shown: list[float] = []

    def change(given: Any, step: int, timestep: Tensor, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        shown.append(pipe._guidance_scale)
        pipe._guidance_scale = 9.0
        return kwargs

    engine = PipelineEngine(pipe, arguments={"callback_on_step_end": change})
    text, noise = engine.encode_text(["a cat"]), draw_noise(engine.latent_shape(32, 32), [1])
    engine.sample_stage("euler", noise, (1.0, 0.5, 0.0), text, guidance=2.0)
    assert shown == [2.0, 9.0]
    assert pipe._guidance_scale == 9.0


def test_two_calls_at_once_leave_the_pipeline_as_it_was() -> None:
    """However they overlap: each ends while the other still runs, in either order."""
    pipe = tiny_pipelines.make("flux1-dev")
    engine = PipelineEngine(pipe)
    before = snapshot(pipe)
    text, noise = engine.encode_text(["a cat"]), draw_noise(engine.latent_shape(32, 32), [1])
    for first_to_end in (0, 1):
        inside, done = threading.Barrier(2), threading.Event()

        def meet(state: dict[str, Any], number: int, last: int, inside: Any = inside, done: Any = done) -> None:
            if state["i"] == 0:
                inside.wait(30)
            elif number == last:
                done.wait(30)

        def work(number: int, last: int = 1 - first_to_end, meet: Any = meet, done: Any = done) -> None:
            callback = functools.partial(meet, number=number, last=last)
            engine.sample_stage("euler", noise, (1.0, 0.5, 0.0), text, guidance=2.0, callback=callback)
            done.set()

        threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert snapshot(pipe) == before


def test_errors_of_the_network_pass_through_and_leave_everything_as_it_was() -> None:
    pipe = tiny_pipelines.make("sd3")
    engine = PipelineEngine(pipe)
    run(engine)
    before = snapshot(pipe)
    with pytest.raises(Cancelled):
        engine.sample_stage("euler", *_start(engine), guidance=2.0, callback=_raise(Cancelled()))
    with pytest.raises(ZeroDivisionError):
        engine.sample_stage("euler", *_start(engine), guidance=2.0, callback=_raise(ZeroDivisionError()))
    assert snapshot(pipe) == before


def test_a_failed_stage_frees_offloaded_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines free them at the end of their call, which a failed call does not reach."""
    pipe = tiny_pipelines.make("sd3")
    engine = PipelineEngine(pipe)
    latents, sigmas, text = _start(engine)
    freed: list[str] = []
    monkeypatch.setattr(type(pipe), "maybe_free_model_hooks", lambda _: freed.append("freed"))
    for error in (Cancelled(), MemoryError(), ZeroDivisionError()):
        freed.clear()
        with pytest.raises(type(error)):
            engine.sample_stage("euler", latents, sigmas, text, guidance=2.0, callback=_raise(error))
        assert freed, error


def test_a_pipelines_own_draws_are_not_the_runs_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pipeline draws inside its call (an encoded hint's posterior) must not repeat the noise it starts from."""
    pipe = tiny_pipelines.make("sd3")
    called, given = type(pipe).__call__, list[list[torch.Generator]]()

    @functools.wraps(called)
    def recorded(self: Any, *args: Any, **named: Any) -> Any:
        given.append(named["generator"])
        return called(self, *args, **named)

    monkeypatch.setattr(type(pipe), "__call__", recorded)
    engine = PipelineEngine(pipe, seeds=[3, 4])
    run(engine, seeds=[3, 4], batch=2)
    assert len(given) == 2  # one call a stage
    for generators in given:
        started = [each.initial_seed() for each in generators]
        assert len(set(started)) == 2
        assert not {3, 4} & set(started)


def _start(engine: PipelineEngine) -> tuple[Tensor, tuple[float, ...], Any]:
    noise = draw_noise(engine.latent_shape(32, 32), [1])
    return noise, (1.0, 0.5, 0.0), engine.encode_text(["a cat"])


def _raise(error: BaseException) -> Callable[[dict[str, Any]], object]:
    def hear(_: dict[str, Any]) -> None:
        raise error

    return hear


# --------------------------------------------------------------------------------------------------------------- memory


def _hungry(pipe: Any, monkeypatch: pytest.MonkeyPatch, part: str, most: int) -> list[int]:
    """Let the network ("denoise") or the VAE ("encode", "decode") run out of memory above `most` values in a batch's
    state; note the size of every call."""
    owner, name = (network_of(pipe), "forward") if part == "denoise" else (pipe.vae, part)
    inner, sizes = getattr(owner, name), []

    def limited(*args: Any, **kwargs: Any) -> Any:
        tensor = args[0] if args else kwargs["hidden_states"]
        sizes.append(tensor.numel())
        if tensor.numel() > most and not getattr(owner, "use_tiling", False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, limited)
    return sizes


def test_a_batch_that_does_not_fit_is_sampled_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipelines.make("flux1-dev")
    engine = PipelineEngine(pipe)
    prompts = ["a cat", "blue", "red"]
    whole = run(engine, prompt=prompts, seeds=[3, 8, 9])
    one = 16 * 64
    sizes = _hungry(pipe, monkeypatch, "denoise", most=2 * one)
    events: list[Progress] = []
    parts = run(engine, prompt=prompts, seeds=[3, 8, 9], callback=events.append)
    assert sizes[-4:] == [3 * one, one, one, one]
    torch.testing.assert_close(parts.images, whole.images, rtol=0, atol=1e-4)
    assert not parts.unfinished
    assert parts.forwards == whole.forwards
    assert all(event.denoised is None or len(event.denoised) == 3 for event in events)


def test_a_refine_stage_that_never_fits_gives_the_upscaled_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipelines.make("flux1-dev")
    engine = PipelineEngine(pipe)
    kept = run(engine, keep_stages=True)
    before = snapshot(pipe)
    with monkeypatch.context() as patch:
        _hungry(pipe, patch, "denoise", most=16 * 64 - 1)
        result = run(engine)
    assert torch.equal(result.images, kept.stages[-1].image)
    assert result.unfinished
    assert not result.cancelled
    assert any("Memory ran out in 'stage 2 sample'" in warning for warning in result.warnings)
    assert snapshot(pipe) == before


def test_stage_1_that_does_not_fit_has_no_picture_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("flux1-dev")
    _hungry(engine.pipe, monkeypatch, "denoise", most=0)
    with pytest.raises(MemoryError, match="sampling one image of 32x32"):
        run(engine)


@pytest.mark.parametrize("name", ["flux1-dev", "flux2-klein", "qwen-image"])
def test_tiles_are_the_vaes_own_and_its_setting_stays(name: str) -> None:
    engine, tiling = engine_of(name), engine_of(name)
    tiling.pipe.vae.enable_tiling()
    images = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(2))
    latents = engine.encode(images)
    engine.decode(latents)  # Qwen-Image's VAE counts its layers at its first call
    before = snapshot(engine.pipe)
    tiled = engine.in_tiles()
    assert tiled is not None
    assert tiled.in_tiles() is None
    assert tiling.in_tiles() is None
    assert torch.equal(tiled.encode(images), tiling.encode(images))
    assert torch.equal(tiled.decode(latents), tiling.decode(latents))
    assert snapshot(engine.pipe) == before


def test_memory_that_runs_out_in_the_vae_is_met_with_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from mrflow_sched.engines.diffusers.layouts import Layout

    engine = engine_of("flux1-dev")
    inner, sizes = Layout.decode, []

    def limited(self: Layout, latents: Tensor) -> Tensor:
        sizes.append((latents.shape[-1], self.pipe.vae.use_tiling))
        if latents.shape[-1] > 4 and not self.pipe.vae.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return inner(self, latents)

    monkeypatch.setattr(Layout, "decode", limited)
    result = run(engine)
    assert sizes == [(4, False), (8, False), (8, True)]
    assert any("decoding one image of 64x64" in warning and "tiles" in warning for warning in result.warnings)
    assert not result.unfinished
    assert not engine.pipe.vae.use_tiling
    engine.pipe.vae.enable_tiling()
    assert result.latents is not None
    assert torch.equal(result.images, engine.decode(result.latents))


# -------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_is_loaded_whole(tmp_path: Path) -> None:
    tiny_pipelines.make("sd3").save_pretrained(tmp_path / "model")
    engine = PipelineEngine.from_folder(tmp_path / "model", device="cpu", dtype="float32")
    assert (engine.family.name, engine.name, len(engine.fingerprint)) == ("sd3", "model", 16)
    engine.pipe.set_progress_bar_config(disable=True)
    assert float(run(engine).images.std()) > 0.01
    assert engine.pipe.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    config = tmp_path / "model" / "transformer" / "config.json"
    config.write_text(config.read_text() + " ")
    assert PipelineEngine.from_folder(tmp_path / "model", device="cpu").fingerprint != engine.fingerprint


def test_a_folder_that_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no model_index.json; give a local diffusers folder"):
        load_pipeline(tmp_path)
    tiny_pipelines.make("sd3").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="whose transformer cannot be read"):
        load_pipeline(tmp_path / "model", device="cpu")
