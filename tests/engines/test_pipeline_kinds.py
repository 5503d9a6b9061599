"""Which pipelines are taken: their samplers, noise levels, subclasses, and what their refusals say."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny_pipelines
import torch

from mrflow_sched import MrFlow
from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.layouts import find_layout
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.sampling.noise import draw_noise


@functools.cache
def tiny(name: str) -> Any:
    """One pipeline of each name for all tests: none of them may change it."""
    return tiny_pipelines.make(name)


def with_scheduler(name: str, kind: str, **config: Any) -> Any:
    pipe = copy.copy(tiny(name))
    pipe.scheduler = getattr(tiny_pipelines.diffusers(), kind)(**config)
    return pipe


BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    ("name", "kind", "config", "noted"),
    [
        ("sd15", "LCMScheduler", BETAS, False),
        ("sdxl", "TCDScheduler", BETAS, False),
        ("sdxl", "EulerAncestralDiscreteScheduler", BETAS, True),
        ("sdxl", "DPMSolverMultistepScheduler", {**BETAS, "algorithm_type": "sde-dpmsolver++"}, True),
        ("sdxl", "DPMSolverMultistepScheduler", BETAS, False),
        ("sd15", "DDIMScheduler", BETAS, False),
        ("sd3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, False),
        ("sd3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}, False),
        ("sd3", "FlowMatchLCMScheduler", {"shift": 3.0}, False),
    ],
)
def test_a_sampler_of_another_kind_is_told_of(name: str, kind: str, config: dict[str, Any], noted: bool) -> None:
    if not hasattr(tiny_pipelines.diffusers(), kind):
        pytest.skip(f"the installed diffusers has no {kind}")
    try:
        pipe = with_scheduler(name, kind, **config)
    except TypeError:
        pytest.skip(f"the installed {kind} lacks an option of {sorted(config)}")
    engine = PipelineEngine(pipe)
    assert engine.encode_text(["a cat"]).notes == engine.notes
    assert [kind in note for note in engine.notes if "adds noise at every step" in note] == [True] * noted


@pytest.mark.parametrize(
    ("name", "kind", "config", "eta", "asked"),
    [
        ("sdxl", "EulerDiscreteScheduler", {**BETAS, "timestep_spacing": "leading"}, None, None),  # as SDXL comes
        ("sdxl", "EulerDiscreteScheduler", {**BETAS, "timestep_spacing": "trailing"}, 1.0, None),
        ("sd15", "DDIMScheduler", {**BETAS, "timestep_spacing": "trailing"}, 0.0, None),
        ("sd15", "DDIMScheduler", {**BETAS, "timestep_spacing": "trailing"}, 0.5, "noise at every step (eta=0.5)"),
        ("sdxl", "EDMEulerScheduler", {}, None, None),
        ("sd3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, None, None),
        *(
            ("sdxl", "DPMSolverMultistepScheduler", {**BETAS, "timestep_spacing": "trailing", option: True}, None, word)
            for option, word in (
                ("use_karras_sigmas", "Karras sigmas"),
                ("use_exponential_sigmas", "exponential sigmas"),
                ("use_beta_sigmas", "Beta sigmas"),
                ("use_lu_lambdas", "Lu's lambdas"),
            )
        ),
    ],
)
def test_a_schedule_that_no_plan_follows_is_told_of(
    name: str, kind: str, config: dict[str, Any], eta: float | None, asked: str | None
) -> None:
    if "use_beta_sigmas" in config:
        pytest.importorskip("scipy")
    engine = PipelineEngine(with_scheduler(name, kind, **config), arguments={} if eta is None else {"eta": eta})
    said = [] if asked is None else [f"The pipeline asks for {asked}; plans have the model's own schedule"]
    assert [note.split(" and add no noise")[0] for note in engine.notes] == said


def test_our_own_scheduler_has_no_sampler_to_be_told_of() -> None:
    from mrflow_sched.engines.diffusers.scheduler import MrFlowScheduler

    pipe = copy.copy(tiny("sdxl"))
    theirs = tiny_pipelines.diffusers().DPMSolverMultistepScheduler(**BETAS, algorithm_type="sde-dpmsolver++")
    with pytest.warns(UserWarning, match="MrFlowScheduler adds none"):
        pipe.scheduler = MrFlowScheduler.from_config(theirs.config, timestep_spacing="trailing")
    assert PipelineEngine(pipe).notes == ()


@pytest.mark.parametrize(
    ("kind", "config", "sentence"),
    [
        ("EDMEulerScheduler", {"sigma_data": 1e-9}, "sigma_data must be a number from 0.0001"),
        ("ScoreSdeVeScheduler", {}, "ScoreSdeVeScheduler, whose noise levels no plan can follow"),
        ("DDIMScheduler", {**BETAS, "beta_end": 7.0}, "beta_end must be a number from"),
        ("DDIMScheduler", {**BETAS, "trained_betas": [0.01] * 999 + [2.0]}, "trained_betas must be a number from"),
        ("DDIMScheduler", {**BETAS, "num_train_timesteps": 20_000}, "num_train_timesteps must be a whole number from"),
    ],
)
def test_impossible_noise_levels_are_refused_at_once(kind: str, config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MrFlowError) as caught:
        find_layout(with_scheduler("sdxl", kind, **config))
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 300


def test_zero_terminal_snr_starts_at_the_last_training_step() -> None:
    pipe = with_scheduler(
        "sdxl", "EulerDiscreteScheduler", **BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    layout = find_layout(pipe)
    assert (layout.family.prediction, layout.family.shift.kind) == ("v", "zero-snr")


def test_a_subclass_that_passes_everything_on_is_read_through() -> None:
    kind: Any = type(tiny("flux1-dev"))

    class Mine(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

        def encode_prompt(self, *args: Any, **others: Any) -> Any:
            return super().encode_prompt(*args, **others)

    pipe = copy.copy(tiny("flux1-dev"))
    pipe.__class__ = Mine
    mine, plain = find_layout(pipe), find_layout(tiny("flux1-dev"))
    assert mine.call_names == plain.call_names
    assert not {"args", "kwargs", "self"} & mine.call_names
    ours, theirs = mine.encode_text(["a cat"]), plain.encode_text(["a cat"])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_inpainting_by_a_control_mask_starts_from_an_image() -> None:
    kind: Any = type(tiny("sd3"))

    class Masked(kind):
        def __call__(self, prompt: Any = None, control_mask: Any = None, **kwargs: Any) -> Any:
            raise NotImplementedError

    pipe = copy.copy(tiny("sd3"))
    pipe.__class__ = Masked
    with pytest.raises(MrFlowError, match="Masked, which starts from an image"):
        find_layout(pipe)


def test_a_missing_part_is_asked_for_only_where_there_is_one() -> None:
    pipe = copy.copy(tiny("sd3"))
    pipe.vae = None
    with pytest.raises(MrFlowError, match="without vae; load it with all of its components"):
        find_layout(pipe)

    class Pixels:
        components: ClassVar[dict[str, Any]] = {}
        scheduler = transformer = object()

        def __call__(self, prompt: str) -> None: ...

    with pytest.raises(MrFlowError, match="without vae; pipelines of its kind cannot be run in stages"):
        find_layout(Pixels())


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("scheduler", "shift", "\x1b[31mred"),
        ("scheduler", "shift", 0.0),
        ("scheduler", "base_shift", float("nan")),
        ("scheduler", "base_image_seq_len", 10**400),
        ("scheduler", "num_train_timesteps", -1),
        ("scheduler", "shift_terminal", True),
        ("vae", "scaling_factor", "nan"),
        ("vae", "shift_factor", [0.1]),
        ("vae", "latents_mean", "0.1"),
        ("vae", "latents_std", [1.0]),
    ],
)
def test_numbers_that_no_model_has_get_one_sentence(part: str, name: str, value: Any) -> None:
    pipe = copy.copy(tiny("flux1-dev"))
    altered = copy.deepcopy(getattr(pipe, part))
    altered.register_to_config(**{name: value})
    object.__setattr__(pipe, part, altered)
    with pytest.raises(MrFlowError) as caught:
        find_layout(pipe)
    assert f"pipe.{part}.config.{name} must" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_base_shift_of_none_is_the_default() -> None:
    pipe = tiny_pipelines.make("flux1-dev")
    images = [_image(pipe)]
    pipe.scheduler.register_to_config(base_shift=None, max_shift=None)
    images.append(_image(pipe))
    assert torch.equal(*images)


def test_a_tokenizer_without_a_length_is_named(tmp_path: Path) -> None:
    tiny("flux1-dev").save_pretrained(tmp_path)
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 10**30}))
    engine = PipelineEngine.from_folder(tmp_path, device="cpu", dtype="float32")
    with pytest.raises(MrFlowError, match=r"model_max_length in the model's tokenizer_config\.json"):
        engine.encode_text(["a cat"])


@pytest.mark.parametrize(
    ("name", "missing"),
    [("flux1-dev", ["text_encoder"]), ("flux1-dev", ["tokenizer_2"]), ("sdxl", ["text_encoder", "text_encoder_2"])],
)
def test_components_that_a_prompt_needs_are_named(name: str, missing: list[str]) -> None:
    pipe = tiny_pipelines.make(name)
    for part in missing:
        setattr(pipe, part, None)
    with pytest.raises(MrFlowError, match=f"has no {missing[-1]}|and no {missing[-1]}"):
        PipelineEngine(pipe).encode_text(["a cat"])


@pytest.mark.parametrize("value", [None, [1, 2]])
def test_a_text_encoder_whose_configuration_is_wrong_is_named(tmp_path: Path, value: Any) -> None:
    tiny("flux1-dev").save_pretrained(tmp_path)
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": value}))
    with pytest.raises(MrFlowError, match="text_encoder") as caught:
        PipelineEngine.from_folder(tmp_path, device="cpu", dtype="float32").encode_text(["a cat"])
    assert caught.value.__cause__ is not None
    assert len(str(caught.value)) < 450


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (
            AttributeError("'bool' object has no attribute 'int'"),
            "(AttributeError: 'bool' object has no attribute 'int')",
        ),
        (KeyError("\x1b[31mred"), "(KeyError: '\\x1b[31mred')"),
        (AssertionError(), "(AssertionError); look at the configurations of "),
        (IndexError("x" * 5000), "x..."),
    ],
)
def test_what_a_tokenizer_raises_is_one_sentence(raised: Exception, sentence: str) -> None:
    engine = PipelineEngine(_reading(raised))
    with pytest.raises(MrFlowError) as caught:
        engine.encode_text(["a cat"])
    said = str(caught.value)
    assert said.startswith("FluxPipeline could not read the prompt (")
    assert sentence in said
    assert caught.value.__cause__ is raised
    assert "\x1b" not in said
    assert len(said) < 450


@pytest.mark.parametrize(
    "raised", [MemoryError("full"), RuntimeError("CUDA error"), Cancelled(), KeyboardInterrupt(), MrFlowError("no.")]
)
def test_what_is_not_about_the_prompt_passes_through(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as caught:
        PipelineEngine(_reading(raised)).encode_text(["a cat"])
    assert caught.value is raised


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_sequence_length": "x"}, "look at what was given as max_sequence_length."),
        ({"max_sequence_length": -1}, "look at what was given as max_sequence_length."),
        ({"prompt_2": 3, "true_cfg_scale": 1.0}, "look at what was given as prompt_2."),
        ({"joint_attention_kwargs": "x"}, "look at what was given as joint_attention_kwargs."),
    ],
)
def test_arguments_about_text_are_what_to_look_at(arguments: dict[str, Any], named: str) -> None:
    engine = PipelineEngine(tiny("flux1-dev"), arguments=arguments)
    with pytest.raises(MrFlowError, match="could not read the prompt") as caught:
        engine.encode_text(["a cat"])
    assert str(caught.value).endswith(named)


def test_half_a_character_is_the_prompts_own_fault() -> None:
    with pytest.raises(MrFlowError, match="the prompt holds half a character"):
        PipelineEngine(tiny("flux1-dev")).encode_text(["a \ud800 cat"])


def test_a_pipeline_that_refuses_its_arguments_is_quoted() -> None:
    pipe = tiny("sdxl")
    engine = PipelineEngine(pipe, arguments={"original_size": 3})
    noise, text = draw_noise(engine.latent_shape(64, 64), [1]), engine.encode_text(["a cat"])
    with pytest.raises(MrFlowError) as caught:
        engine.sample_stage("euler", noise, (1.0, 0.0), text, guidance=1.0)
    assert "StableDiffusionXLPipeline could not begin a stage (TypeError: " in str(caught.value)
    assert str(caught.value).endswith("; look at what was given as original_size.")
    assert isinstance(caught.value.__cause__, TypeError)


def test_errors_of_the_network_and_of_callbacks_stay_what_they_are() -> None:
    mine = TypeError("mine")

    def fail(*_: Any, **__: Any) -> Any:
        raise mine

    def stage(pipe: Any, arguments: dict[str, Any], **more: Any) -> None:
        engine = PipelineEngine(pipe, arguments=arguments)
        noise, text = draw_noise(engine.latent_shape(64, 64), [1]), engine.encode_text(["a cat"])
        engine.sample_stage("euler", noise, (1.0, 0.5, 0.0), text, guidance=1.0, **more)

    hooked = tiny_pipelines.make("sd3")
    hooked.transformer.register_forward_pre_hook(fail)
    given: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (hooked, {}, {}),
        (tiny("sd3"), {"callback_on_step_end": fail}, {}),
        (tiny("sd3"), {}, {"callback": fail}),
        (tiny("sd3"), {}, {"around": fail}),
    ]
    for pipe, arguments, more in given:
        with pytest.raises(TypeError) as caught:
            stage(pipe, arguments, **more)
        assert caught.value is mine


@pytest.mark.parametrize(
    ("name", "part", "own"),
    [
        ("StableDiffusionXLControlNetPipeline", "controlnet", "sdxl"),
        ("StableDiffusionAdapterPipeline", "adapter", "sd15"),
    ],
)
def test_a_controlled_pipeline_without_its_control_is_refused(name: str, part: str, own: str) -> None:
    kind = getattr(tiny_pipelines.diffusers(), name)
    names = inspect.signature(kind.__init__).parameters
    pipe = kind(**{key: value for key, value in tiny(own).components.items() if key in names}, **{part: None})
    with pytest.raises(MrFlowError, match=f"pipe is {name} without {part}; load it with one"):
        find_layout(pipe)


def _reading(raised: BaseException) -> Any:
    """A pipeline whose `encode_prompt` raises."""
    pipe = copy.copy(tiny("flux1-dev"))

    def encode_prompt(prompt: Any = None, max_sequence_length: int = 512) -> Any:
        raise raised

    object.__setattr__(pipe, "encode_prompt", encode_prompt)
    return pipe


def test_a_network_that_its_configuration_does_not_run_is_named() -> None:
    pipe = tiny_pipelines.make("flux1-dev")
    pipe.transformer.pos_embed.axes_dim = None
    with pytest.raises(MrFlowError, match=r"FluxTransformer2DModel could not be run \(TypeError: .* config\.json"):
        _image(pipe)


def _image(pipe: Any) -> torch.Tensor:
    engine = PipelineEngine(pipe)
    noise = draw_noise(engine.latent_shape(64, 64), [1])
    return engine.sample_stage("euler", noise, (1.0, 0.5, 0.0), engine.encode_text(["a cat"]), guidance=3.5)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "hidream"])
def test_a_call_that_takes_anything_and_no_image_edits_nothing(name: str) -> None:
    from mrflow_sched.engines.diffusers.layouts.pictures import image_is_optional

    assert not image_is_optional(type(tiny(name)))
    assert MrFlow(tiny(name)).pipe is tiny(name)
