"""Modular pipelines: run in stages by their own blocks, which draw what they draw by themselves."""

from __future__ import annotations

import copy
import functools
from importlib import import_module
from typing import Any

import pytest
import tiny_pipelines
import torch
from tiny_pipelines import TWICE
from torch import Tensor

from mrflow_sched import MrFlow
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine

diffusers = tiny_pipelines.diffusers()
if not hasattr(diffusers, "ModularPipeline"):
    pytest.skip("the installed diffusers has no modular pipelines", allow_module_level=True)

FLOWS = [name for name in tiny_pipelines.MODULAR if name not in ("sdxl-modular", "qwen-image-2.1-turbo-modular")]
GUIDED = ("flux2-klein-base-modular", "flux3-klein-base", "anima", "z-image-modular")
SIZE: dict[str, Any] = {"width": 64, "height": 64}
STEPS: dict[str, Any] = {"low_steps": 2, "refine_steps": 1, "sigma": 0.12, "solver": "euler", "output_type": "pt"}


@functools.cache
def tiny(name: str) -> Any:
    """One pipeline of each name for all tests: none of them may change it."""
    return tiny_pipelines.make(name)


def network_of(pipe: Any) -> Any:
    return pipe.unet if getattr(pipe, "transformer", None) is None else pipe.transformer


class Heard:
    """What a network is given: the first state, and the time of every call."""

    def __init__(self, pipe: Any) -> None:
        self.state: Tensor | None = None
        self.times: list[float] = []
        self._hook = network_of(pipe).register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, values: Any, named: dict[str, Any]) -> None:
        state: Any = named.get("hidden_states", named.get("sample", named.get("x", values[0] if values else None)))
        time = named.get("timestep", named.get("t", values[1] if len(values) > 1 else None))
        if self.state is None:
            self.state = torch.stack(list(state))  # a tensor, or a list of one for each image
        self.times.append(float(torch.as_tensor(time).flatten()[0]))

    def end(self) -> None:
        self._hook.remove()


def natively(pipe: Any, state: Tensor, side: int, **inputs: Any) -> Tensor:
    """The pipeline's own picture of the state that its network saw first."""
    modular = import_module("diffusers.modular_pipelines.modular_pipeline")
    words = import_module("diffusers.modular_pipelines.modular_pipeline_utils")

    class Begin(modular.ModularPipelineBlocks):
        description = "begins the loop at a state"
        inputs = (words.InputParam("latents", required=True),)
        intermediate_outputs = (words.OutputParam("latents"),)

        def __call__(self, components: Any, values: Any) -> Any:
            block = self.get_block_state(values)
            block.latents = state[: len(block.latents)].reshape(block.latents.shape)
            self.set_block_state(values, block)
            return components, values

    row: dict[str, Any] = {}
    for name, block in pipe.blocks.get_execution_blocks(prompt=True).sub_blocks.items():
        if isinstance(block, modular.LoopSequentialPipelineBlocks):
            row["begin"] = Begin()
        row[name.replace(".", "_")] = block
    runner = copy.copy(pipe)
    runner._blocks = modular.SequentialPipelineBlocks.from_blocks_dict(row)
    asked = {"width": side, "height": side, "num_inference_steps": 2, "output_type": "pt", "output": "images"}
    return torch.as_tensor(runner(**asked, generator=torch.Generator().manual_seed(0), **inputs))


@pytest.mark.parametrize("name", FLOWS)
def test_stage_1_is_the_pipeline_s_own_picture(name: str) -> None:
    pipe = tiny(name)
    heard = Heard(pipe)
    result = MrFlow(pipe, upscaler=TWICE)("a red star", seed=3, keep_stages=True, **SIZE, **STEPS)
    heard.end()
    alone = Heard(pipe)
    assert heard.state is not None
    theirs = natively(pipe, heard.state, 32, prompt="a red star")
    alone.end()
    first = next(stage.image for stage in result.stages if stage.image.shape[-1] == 32)
    torch.testing.assert_close(first, theirs, rtol=0, atol=1e-5)
    assert float(theirs.std()) > 0
    each = len(alone.times) // 2
    assert heard.times[: 2 * each] == pytest.approx(alone.times, rel=1e-5)
    told = sum(heard.times[-each:]) / each
    assert told == pytest.approx({1000.0: 120.0, 0.0: 0.88}.get(alone.times[0], 0.12), rel=1e-5)
    again = MrFlow(pipe, upscaler=TWICE)("a red star", seed=3, **SIZE, **STEPS)
    assert torch.equal(again.images, result.images)


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_is_the_guider_s(name: str) -> None:
    pipe = tiny(name)
    config = dict(pipe.guider.config)
    for scale, calls in ((1.0, 3), (2.5, 6)):
        heard = Heard(pipe)
        result = MrFlow(pipe, upscaler=TWICE)(
            "a red star", seed=3, guidance_scale=scale, keep_stages=True, **SIZE, **STEPS
        )
        heard.end()
        assert len(heard.times) == calls == result.plan.forwards
        assert heard.state is not None
        changed = copy.copy(pipe)
        changed.guider = pipe.guider.new(guidance_scale=scale, enabled=scale > 1.0)
        theirs = natively(changed, heard.state, 32, prompt="a red star")
        first = next(stage.image for stage in result.stages if stage.image.shape[-1] == 32)
        torch.testing.assert_close(first, theirs, rtol=0, atol=1e-5)
    assert dict(pipe.guider.config) == config
    negative = MrFlow(pipe, upscaler=TWICE)(
        "a red star", seed=3, guidance_scale=2.5, negative_prompt="rain", **SIZE, **STEPS
    )
    assert not torch.equal(negative.images, result.images)


@pytest.mark.parametrize("name", ["flux3-klein-base", "anima", "z-image-modular"])
def test_a_batch_is_its_images(name: str) -> None:
    """FLUX 3's prompts are read one by one: the second is longer than a window of 80 tokens."""
    pipe = tiny(name)
    prompts = ["a red star", "hills " * 20, "hills " * 20]
    seen: list[tuple[int, int]] = []
    both = MrFlow(pipe, upscaler=TWICE)(
        prompts, seed=3, callback=lambda now: seen.append((now.stage, now.step)), **SIZE, **STEPS
    )
    for row, prompt in enumerate(prompts):
        one = MrFlow(pipe, upscaler=TWICE)(prompt, seed=3 + row, **SIZE, **STEPS)
        torch.testing.assert_close(both.images[row : row + 1], one.images, rtol=0, atol=1e-4)
    assert seen


def test_a_classic_pipeline_with_the_same_parts_makes_the_same_pictures() -> None:
    modular = tiny("sdxl-modular")
    parts = {name: part for name, part in modular.components.items() if name not in ("guider", "controlnet")}
    known = diffusers.StableDiffusionXLPipeline.__init__.__code__.co_varnames
    classic = diffusers.StableDiffusionXLPipeline(**{name: part for name, part in parts.items() if name in known})
    asked = {"seed": 3, "guidance_scale": 5.0, "negative_prompt": "rain", **SIZE, **STEPS}
    torch.testing.assert_close(
        MrFlow(modular, upscaler=TWICE)("a red star", **asked).images,
        MrFlow(classic, upscaler=TWICE)("a red star", **asked).images,
        rtol=0,
        atol=1e-5,
    )


def test_a_pipeline_with_sigmas_of_its_own_walks_them() -> None:
    pipe = tiny("qwen-image-2.1-turbo-modular")
    heard = Heard(pipe)
    result = MrFlow(pipe, upscaler=TWICE)("a red star", seed=3, solver="euler", output_type="pt", **SIZE)
    heard.end()
    alone = Heard(pipe)
    pipe(prompt="a red star", **SIZE, generator=torch.Generator().manual_seed(0))
    alone.end()
    assert result.plan.family == "qwen-image-2.1-turbo"
    assert heard.times[:-1] == pytest.approx(alone.times, rel=1e-5)
    assert heard.times[-1] == pytest.approx(0.12)


def test_the_pipeline_is_as_it_was() -> None:
    pipe = tiny("flux1-dev-modular")
    before = dict(vars(pipe))
    asked: dict[str, Any] = {
        "prompt": "a star",
        "num_inference_steps": 2,
        "output": "images",
        "output_type": "pt",
        **SIZE,
    }
    own = pipe(**asked, generator=torch.Generator().manual_seed(1))
    MrFlow(pipe, upscaler=TWICE)("a red star", seed=3, **SIZE, **STEPS)
    assert vars(pipe) == before
    assert torch.equal(own, pipe(**asked, generator=torch.Generator().manual_seed(1)))


def test_embeddings_take_the_place_of_prompts() -> None:
    pipe = tiny("flux1-dev-modular")
    text = PipelineEngine(pipe).encode_text(["a red star"]).arguments
    made = MrFlow(pipe, upscaler=TWICE)(seed=3, **text, **SIZE, **STEPS)
    assert torch.equal(made.images, MrFlow(pipe, upscaler=TWICE)("a red star", seed=3, **SIZE, **STEPS).images)


def test_a_run_that_is_stopped_says_nothing_else(caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    made = MrFlow(tiny("flux1-dev-modular"), upscaler=TWICE)("a red star", seed=3, cancel=lambda: True, **SIZE, **STEPS)
    assert made.cancelled
    assert "Error in block" not in capsys.readouterr().err


def refused(pipe: Any, *values: Any, **named: Any) -> str:
    with pytest.raises(MrFlowError) as error:
        MrFlow(pipe, upscaler=TWICE)(*values, **named)
    return str(error.value)


def test_refusals() -> None:
    assert "FluxModularPipeline without vae and transformer and scheduler; load" in refused(
        diffusers.FluxModularPipeline()
    )
    assert "whose blocks need image; stages begin" in refused(
        _loaded("QwenImageEditModularPipeline", "qwen-image-modular")
    )
    flux = tiny("flux1-dev-modular")
    assert "callback_on_step_end is given" in refused(flux, "a", callback_on_step_end=lambda *values: {})
    assert "control_image" in refused(flux, "a", control_image=torch.zeros(3, 64, 64))
    assert "must be a finite number" in refused(flux, "a", num_images_per_prompt=1, max_sequence_length="many")
    without = copy.copy(tiny("flux3-klein-base"))
    without._blocks = diffusers.Flux3AutoBlocks()
    without._component_specs = {each.name: each for each in without._blocks.expected_components}
    without.prompt_upsampler = without.prompt_upsampler_processor = None
    assert "has no prompt_upsampler" in refused(without, "a", **SIZE)


def _loaded(kind: str, like: str) -> Any:
    pipe = getattr(diffusers, kind)()
    known = tiny(like).components
    pipe.update_components(**{name: part for name, part in known.items() if name in pipe.component_names})
    return pipe


def test_blocks_without_a_known_family_are_refused() -> None:
    kind = type("OtherModularPipeline", (diffusers.ModularPipeline,), {})
    known = tiny("flux1-dev-modular")
    other = kind(known.blocks)
    other.update_components(**known.components)
    assert "of no known family" in refused(other)
    blocks = known.blocks
    blocks.sub_blocks["denoise"].sub_blocks.pop("denoise")
    idle = blocks.init_pipeline()
    idle.update_components(**{name: part for name, part in known.components.items() if name in idle.component_names})
    assert "without transformer" in refused(idle) or "no loop" in refused(idle)


@pytest.mark.parametrize("name", ["qwen-image-modular", "qwen-image-2.1-modular"])
def test_prompts_of_a_batch_need_no_negative_ones(name: str) -> None:
    mrflow = MrFlow(tiny_pipelines.make(name), upscaler=TWICE)
    asked: dict[str, Any] = {"width": 192, "height": 128, "output_type": "pt", "solver": "euler", "low_steps": 2}
    both = mrflow(["a red star", "green"], seed=[3, 9], **asked).images
    alone = [mrflow(text, seed=seed, **asked).images[0] for text, seed in (("a red star", 3), ("green", 9))]
    for row in range(2):
        assert (both[row] - alone[row]).abs().max() < 1e-3
