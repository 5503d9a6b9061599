"""Models of videos make one frame, as a picture: their own, from the same noise."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import tiny_pipelines
import torch
from torch import Tensor

from mrflow_sched import MrFlow
from mrflow_sched._runtime.errors import MrFlowError

diffusers = tiny_pipelines.diffusers()
STEPS: dict[str, Any] = {"low_steps": 2, "refine_steps": 1, "sigma": 0.12, "solver": "euler", "output_type": "pt"}


@functools.cache
def tiny(name: str) -> Any:
    """One pipeline of each name for all tests: none of them may change it."""
    return tiny_pipelines.make(name)


def asked_of(name: str) -> dict[str, Any]:
    """Small sides; and for HunyuanVideo a text that is long enough for its template, which is one of bytes here."""
    side = 128 if "ltx" in name else 64
    return {"width": side, "height": side, **({"max_sequence_length": 640} if name == "hunyuan-video" else {})}


class Heard:
    """What the networks are given: the first state, and for every call its time and which network it was."""

    def __init__(self, pipe: Any) -> None:
        self.state: Tensor | None = None
        self.times: list[float] = []
        self.networks: list[str] = []
        networks = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
        self._hooks = [
            network.register_forward_pre_hook(functools.partial(self._note, name), with_kwargs=True)
            for name, network in networks.items()
            if network is not None
        ]

    def _note(self, name: str, module: Any, values: Any, named: dict[str, Any]) -> None:
        if self.state is None:
            self.state = named["hidden_states"].clone()
        self.times.append(float(named["timestep"].flatten()[0]))
        self.networks.append(name)

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()


def natively(pipe: Any, state: Tensor, levels: tuple[float, ...], **asked: Any) -> Tensor:
    """The pipeline's own frame from a state, by Euler steps of diffusers' scheduler at given sigmas."""

    class Euler(diffusers.FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, count: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None) -> None:
            super().set_timesteps(sigmas=list(levels[:-1]), device=device)

    alone = copy.copy(pipe)
    alone.scheduler = Euler(shift=1.0)
    frames = alone("a red star", num_frames=1, num_inference_steps=2, latents=state, output_type="pt", **asked).frames
    assert frames.shape[1] == 1
    return frames[:, 0]


@pytest.mark.parametrize("name", tiny_pipelines.VIDEO)
def test_stage_1_is_the_pipeline_s_own_frame(name: str) -> None:
    pipe = tiny(name)
    before = {key: value for key, value in vars(pipe).items() if key != "_internal_dict"}
    mrflow, asked = MrFlow(pipe), asked_of(name)
    assert mrflow.experimental
    heard = Heard(pipe)
    result = mrflow("a red star", seed=3, keep_stages=True, **asked, **STEPS)
    heard.end()
    assert result.images.shape == (1, 3, asked["height"], asked["width"])
    low = result.plan.stages[0]
    assert heard.state is not None
    batch, given = 2 if "ltx" in name else 1, heard.state
    state = given[given.shape[0] // batch :] if batch == 2 else given
    state = state[:, : mrflow.family.latent_channels] if state.ndim == 5 else state
    alone = Heard(pipe)
    extra = {key: value for key, value in asked.items() if key not in ("width", "height")}
    guidance = {} if name == "hunyuan-video-1.5" else {"guidance_scale": mrflow.family.guidance}
    theirs = natively(pipe, state, low.sigmas, width=low.width, height=low.height, **guidance, **extra)
    alone.end()
    first = next(stage.image for stage in result.stages if stage.image.shape[-1] == low.width)
    torch.testing.assert_close(first, theirs, rtol=0, atol=1e-5)
    assert float(theirs.std()) > 0
    each = len(alone.times) // 2
    assert heard.times[: 2 * each] == pytest.approx(alone.times, rel=1e-5)
    assert heard.times[2 * each :] == pytest.approx([120.0] * each, rel=1e-5)
    again = mrflow("a red star", seed=3, **asked, **STEPS)
    assert torch.equal(again.images, result.images)
    after = {key: value for key, value in vars(pipe).items() if key != "_internal_dict"}
    assert {key: after[key] is before[key] or after[key] == before[key] for key in before} == dict.fromkeys(
        before, True
    )


def test_both_networks_of_wan_stand_behind_the_seam() -> None:
    """That of low noise runs below the boundary, and guidance for each step reaches it."""
    pipe = tiny("wan-2.2")
    heard = Heard(pipe)
    seen: list[float] = []
    made = MrFlow(pipe)(
        "a red star",
        seed=3,
        callback=lambda now: seen.append(float(now.step)),
        guidance_interval=(0.8, 1.0),
        **asked_of("wan-2.2"),
        **STEPS,
    )
    heard.end()
    assert dict.fromkeys(heard.networks) == {"transformer": None, "transformer_2": None}
    assert all((time >= 875) == (name == "transformer") for time, name in zip(heard.times, heard.networks, strict=True))
    assert len(heard.times) == made.plan.forwards < 6
    other = MrFlow(pipe)("a red star", seed=3, guidance_scale_2=1.5, **asked_of("wan-2.2"), **STEPS)
    same = MrFlow(pipe)("a red star", seed=3, **asked_of("wan-2.2"), **STEPS)
    assert not torch.equal(other.images, same.images)


@pytest.mark.parametrize("name", ["wan", "hunyuan-video-1.5", "ltx-video"])
def test_a_batch_is_its_images_and_guidance_can_be_off(name: str) -> None:
    mrflow, asked = MrFlow(tiny(name)), asked_of(name)
    both = mrflow(["a red star", "hills"], seed=3, guidance_scale=1.0, **asked, **STEPS)
    assert both.plan.forwards == 3
    for row, prompt in enumerate(("a red star", "hills")):
        one = mrflow(prompt, seed=3 + row, guidance_scale=1.0, **asked, **STEPS)
        torch.testing.assert_close(both.images[row : row + 1], one.images, rtol=0, atol=1e-4)


def test_a_decoder_is_told_how_much_noise_is_left() -> None:
    """As the pipeline's own call says it; the noise that it adds besides is MrFlow's."""
    pipe = tiny("ltx-video-told")
    heard: list[float] = []
    hook = pipe.vae.decoder.register_forward_pre_hook(lambda module, values: heard.append(float(values[1])))
    run = functools.partial(MrFlow(pipe), "a red star", seed=3, **asked_of("ltx-video-told"), **STEPS)
    made = [run().images, run(decode_timestep=0.05, decode_noise_scale=0.0).images, run(decode_timestep=0.05).images]
    hook.remove()
    assert heard == pytest.approx([0.0, 0.0, *[0.05] * 4])
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[1], made[2])
    with pytest.raises(MrFlowError, match="decode_timestep must be"):
        run(decode_timestep=7)


def test_what_makes_no_frame_from_text_is_refused() -> None:
    wan = tiny("wan")
    with pytest.raises(
        MrFlowError, match="num_frames is not accepted, as the plan decides it; use the pipeline itself"
    ):
        MrFlow(wan)("a", num_frames=81)
    parts = {name: part for name, part in wan.components.items() if name != "transformer_2"}
    with pytest.raises(MrFlowError, match="WanImageToVideoPipeline, which makes a video from pictures"):
        MrFlow(diffusers.WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None))
