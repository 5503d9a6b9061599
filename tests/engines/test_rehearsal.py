"""Pipelines of classes that nobody knows: what a rehearsal sees, what is drawn by it, what is refused."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import tiny_pipelines
import torch
from torch import Tensor

from mrflow_sched import MrFlow
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.layouts import find_layout
from mrflow_sched.engines.diffusers.layouts.arrangement import Arrangement, find_map
from mrflow_sched.engines.diffusers.layouts.base import parameter_names
from mrflow_sched.engines.diffusers.layouts.generic import GenericLayout
from mrflow_sched.engines.diffusers.view import shell_of


@functools.cache
def tiny(name: str) -> Any:
    """One pipeline of each name for all tests: none of them may change it."""
    return tiny_pipelines.make(name)


def disguised(name: str, **members: Any) -> Any:
    """A tiny pipeline of a class without a known name among its bases, with some members of its own."""
    pipe = copy.copy(tiny(name))
    known: Any = type(pipe)
    kept = {key: value for key, value in vars(known).items() if key not in ("__dict__", "__weakref__")}
    pipe.__class__ = type("MysteryPipeline", known.__bases__, {**kept, **members})
    pipe.vae = copy.copy(pipe.vae)  # what was seen is kept by VAE
    return pipe


DISGUISED = (
    *("flux1-dev", "flux1-schnell", "qwen-image", "z-image", "z-image-turbo", "chroma", "sd3", "lumina2"),
    *("auraflow", "hunyuan-image-distilled", "ovis-image", "prx"),
)


@pytest.mark.parametrize("name", DISGUISED)
def test_a_disguised_pipeline_draws_what_the_known_one_draws(name: str) -> None:
    asked: dict[str, Any] = {
        "preset": "3+1",
        "sigma": 0.12,
        "solver": "euler",
        "seed": 5,
        "output_type": "pt",
        "keep_stages": True,
    }
    known, mystery = MrFlow(tiny(name)), MrFlow(disguised(name))
    assert isinstance(find_layout(mystery.pipe), GenericLayout)
    assert (mystery.family.name, mystery.family.title, mystery.experimental) == ("flow", "Mystery", True)
    asked |= dict.fromkeys(("width", "height"), 4 * known.family.grid)
    if "max_sequence_length" in find_layout(known.pipe).call_names:
        asked["max_sequence_length"] = 64
    guided = known.family.guidance_kind == "cfg"
    negative: dict[str, Any] = {"negative_prompt": "a dog"} if guided else {}
    wanted = known("a cat", **asked, **negative, guidance_scale=known.family.guidance)
    asked["guidance_scale"] = 0.0 if name == "z-image-turbo" else known.family.guidance
    made = mystery("a cat", **asked, **negative)
    assert [stage.sigmas for stage in made.plan.stages] == [stage.sigmas for stage in wanted.plan.stages]
    assert [each.name for each in made.stages] == [each.name for each in wanted.stages]
    for ours, theirs in zip(made.stages, wanted.stages, strict=True):
        assert (ours.image - theirs.image).abs().max() < 1e-4
    assert (made.images - wanted.images).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["flux2-dev", "flux2-klein-base"])
def test_a_state_that_the_call_does_not_take_is_given_by_prepare_latents(name: str) -> None:
    pipe = disguised(name)
    mystery = MrFlow(pipe)
    layout = find_layout(pipe)
    assert layout.gives_state
    first = mystery("a cat", width=64, height=64, preset="2+1", seed=1, output_type="pt").images
    again = mystery("a cat", width=64, height=64, preset="2+1", seed=1, output_type="pt").images
    other = mystery("a cat", width=64, height=64, preset="2+1", seed=2, output_type="pt").images
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    latents = torch.randn(1, *layout.latent_shape(64, 64))
    known = find_layout(tiny(name))
    assert (layout.decode(latents) - known.decode(known.unpack(layout.pack(latents), 64, 64))).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "weight", "off", "positive_first"),
    [("z-image", 0.0, 0.0, True), ("sd3", -1.0, 1.0, False), ("qwen-image", -1.0, 1.0, False)],
)
def test_how_a_pipeline_guides_is_measured(name: str, weight: float, off: float, positive_first: bool) -> None:
    layout = find_layout(disguised(name))
    assert isinstance(layout, GenericLayout)
    assert layout.seen is not None
    guiding = layout.seen.guiding
    assert (guiding.cfg, guiding.weight, guiding.off) == (True, weight, off)
    assert guiding.positive_first == positive_first


def _in_two_calls(self: Any, **named: Any) -> Any:
    """SD3's call with a network that runs the halves of a doubled batch one by one: the negative one comes first."""
    network = self.transformer

    def halves(hidden_states: Tensor, return_dict: bool = True, **more: Any) -> Any:
        if len(hidden_states) == 1:
            return network(hidden_states=hidden_states, return_dict=return_dict, **more)
        pairs = {name: value.chunk(2) if isinstance(value, Tensor) else (value, value) for name, value in more.items()}
        made = [
            network(hidden_states=part, return_dict=False, **{name: pair[row] for name, pair in pairs.items()})[0]
            for row, part in enumerate(hidden_states.chunk(2))
        ]
        return (torch.cat(made),)

    object.__setattr__(self, "transformer", shell_of(network, halves))
    return type(tiny("sd3")).__call__(self, **named)


def test_a_loop_that_calls_the_negative_branch_first_is_guided_right() -> None:
    pipe = disguised("sd3", __call__=_with_signature(_in_two_calls))
    assert find_layout(pipe).negative_call_first
    asked: dict[str, Any] = {"preset": "4+1", "solver": "euler", "seed": 5, "output_type": "pt", "refine_guidance": 1.0}
    asked |= {"width": 64, "height": 64, "guidance_interval": (0.3, 0.9), "max_sequence_length": 64}
    known = MrFlow(tiny("sd3"))("a cat", negative_prompt="a dog", guidance_scale=4.0, **asked)
    made = MrFlow(pipe)("a cat", negative_prompt="a dog", guidance_scale=4.0, **asked)
    assert (made.images - known.images).abs().max() < 1e-3


def test_the_numbers_of_an_unknown_flow_are_its_own() -> None:
    pipe = disguised("qwen-image")
    family = find_layout(pipe).family
    assert (family.grid, family.vae_factor, family.patch, family.latent_channels) == (16, 8, 2, 16)
    assert (family.guidance_kind, family.native_steps) == ("cfg", 50)
    assert family.linear_cost > 0
    assert family.sources["shift"] == "seen in a rehearsal"
    named = find_layout(pipe, family="flux1-dev").family
    assert (named.name, named.shift.max_shift) == ("flux1-dev", 0.9)


def test_a_rehearsal_happens_once_and_leaves_the_pipeline_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, calls = disguised("sd3"), []
    encode = pipe.encode_prompt
    object.__setattr__(pipe, "encode_prompt", lambda *values, **named: calls.append(1) or encode(*values, **named))
    before = dict(pipe.__dict__)
    weights = [weight.clone() for weight in pipe.transformer.parameters()]
    find_layout(pipe)
    seen = len(calls)
    assert seen > 0
    find_layout(pipe)
    find_layout(copy.copy(pipe))
    assert len(calls) == seen
    assert pipe.__dict__ == before
    assert all(torch.equal(*pair) for pair in zip(weights, pipe.transformer.parameters(), strict=True))
    find_layout(disguised("sd3"))  # another VAE is another pipeline


def test_a_pipeline_offloaded_layer_by_layer_is_rehearsed_too() -> None:
    accelerate = pytest.importorskip("accelerate")
    asked: dict[str, Any] = {"width": 64, "height": 64, "preset": "2+1", "seed": 1, "output_type": "pt"}
    wanted = MrFlow(disguised("qwen-image"))("a cat", **asked).images
    known = tiny_pipelines.make("qwen-image")
    pipe = disguised("qwen-image")
    pipe.transformer, pipe.vae, pipe.text_encoder = known.transformer, known.vae, known.text_encoder
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        accelerate.cpu_offload(part, execution_device="cpu")
    assert pipe.transformer.proj_out.weight.is_meta
    assert torch.equal(MrFlow(pipe)("a cat", **asked).images, wanted)


def _other_times(self: Any, **named: Any) -> Any:
    """SD3's call with a network that is told the number of the step."""
    counted = itertools.count()
    network = self.transformer
    forward = network.forward
    network.forward = lambda *values, **more: forward(
        *values, **{**more, "timestep": torch.tensor([next(counted) % 2])}
    )
    try:
        return type(tiny("sd3")).__call__(self, **named)
    finally:
        network.forward = forward


def _half_size(self: Any, **named: Any) -> Any:
    return type(tiny("sd3")).__call__(self, **{**named, "width": named["width"] // 2, "latents": None})


def _broken(self: Any, **named: Any) -> Any:
    raise KeyError("\x1b[31mred")


def _with_signature(call: Any) -> Any:
    return functools.update_wrapper(call, type(tiny("sd3")).__call__)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (_other_times, "whose network is told times that do not follow"),
        (_half_size, "which made latents of 12x16 for 192x128 pixels"),
        (_broken, r"trying it out failed \(KeyError: '\\x1b\[31mred'\); see whether it runs by itself"),
    ],
)
def test_what_no_stage_can_follow_gets_one_true_sentence(call: Any, sentence: str) -> None:
    pipe = disguised("sd3", __call__=_with_signature(call))
    with pytest.raises(MrFlowError, match=sentence) as caught:
        MrFlow(pipe)
    said = str(caught.value)
    assert said.startswith("pipe is MysteryPipeline, ")
    assert "\x1b" not in said
    assert len(said) < 400


def test_an_unknown_class_that_samples_no_flow_is_refused() -> None:
    pipe = disguised("sd3")
    pipe.scheduler = tiny_pipelines.diffusers().DDIMScheduler()
    with pytest.raises(MrFlowError, match="MysteryPipeline with DDIMScheduler, which is not a flow scheduler"):
        MrFlow(pipe)


def test_a_subclass_with_conventions_of_its_own_is_not_taken_for_its_parent() -> None:
    kind: Any = type(tiny("flux1-dev"))

    class Doubled(kind):
        @staticmethod
        def _unpack_latents(latents: Tensor, *sizes: Any) -> Any:
            return 2.0 * kind._unpack_latents(latents, *sizes)

    class Same(kind):
        def prepare_latents(self, *values: Any, **named: Any) -> Any:
            return super().prepare_latents(*values, **named)

    layouts = {}
    for own in (Doubled, Same):
        pipe = copy.copy(tiny("flux1-dev"))
        pipe.__class__ = own
        pipe.vae = copy.copy(pipe.vae)
        layouts[own] = find_layout(pipe)
    known = find_layout(tiny("flux1-dev"))
    assert type(layouts[Same]) is type(known)
    assert isinstance(layouts[Doubled], GenericLayout)
    latents = torch.randn(1, *known.latent_shape(64, 64))
    assert (layouts[Doubled].decode(latents) - known.decode(latents)).abs().max() > 0.01


def test_another_scheduler_or_scale_of_the_vae_is_seen_anew() -> None:
    pipe = disguised("flux1-dev")
    before = find_layout(pipe)
    kind = tiny_pipelines.diffusers().FlowMatchEulerDiscreteScheduler
    pipe.scheduler = kind.from_config(pipe.scheduler.config, max_shift=0.8)
    assert find_layout(pipe).family.shift.max_shift == 0.8
    pipe.vae.register_to_config(scaling_factor=0.5)
    latents = torch.randn(1, *before.latent_shape(64, 64))
    assert (find_layout(pipe).decode(latents) - before.decode(latents)).abs().max() > 0.001


def _louder(self: Any, *values: Any, **named: Any) -> Any:
    return 2.0 * type(tiny("sd3")).prepare_latents(self, *values, **named)


def _clamped(self: Any, **named: Any) -> Any:
    """SD3's call with a scheduler whose states are clamped after each step."""
    step = self.scheduler.step

    def clamped(output: Tensor, time: Any, sample: Tensor, **more: Any) -> Any:
        made = step(output, time, sample, **more)
        return (made[0].clamp(-0.5, 0.5), *made[1:])

    self.scheduler.step = clamped
    try:
        return type(tiny("sd3")).__call__(self, **named)
    finally:
        del self.scheduler.step


_TURNED = "turns its loop's latents into those of its vae"


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"prepare_latents": _louder}, "starts from noise of deviation 2.* instead of 1"),
        (
            {"__call__": functools.update_wrapper(_clamped, type(tiny("sd3")).__call__)},
            "turns its loop's latents into those of its vae",
        ),
    ],
)
def test_loops_that_do_more_than_their_scheduler_are_refused(members: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MrFlowError, match=sentence):
        MrFlow(disguised("sd3", **members))


@pytest.mark.parametrize(("sigmas", "follows"), [((0.5, 0.3), False), ((1.0, 1.2), False), ((1.0, 0.9), True)])
def test_a_list_of_sigmas_of_its_own_is_told_of_or_refused(sigmas: tuple[float, ...], follows: bool) -> None:
    if "sigmas" not in parameter_names(type(tiny("sd3")).__call__):
        pytest.skip("the installed diffusers takes no sigmas there")

    def own(self: Any, **named: Any) -> Any:
        count = named["num_inference_steps"]
        given = {"sigmas": [sigmas[0], *(sigmas[1] / each for each in range(1, count))]}
        return type(tiny("sd3")).__call__(self, **{**named, **given})

    pipe = disguised("sd3", __call__=functools.update_wrapper(own, type(tiny("sd3")).__call__))
    if not follows:
        with pytest.raises(MrFlowError, match="whose list of sigmas does not fall from 1"):
            MrFlow(pipe)
        return
    assert any("list of sigmas of its own" in note for note in find_layout(pipe).notes)


def test_memory_that_runs_out_is_no_fault_of_the_class() -> None:
    def full(self: Any, **named: Any) -> Any:
        raise MemoryError("full")

    with pytest.raises(MemoryError, match="full"):
        MrFlow(disguised("sd3", __call__=_with_signature(full)))


# --------------------------------------------------------------------------------------------------------- arrangements

ORDERS: list[Any] = list(itertools.permutations(range(3)))
KINDS: tuple[Any, ...] = ("tokens", "first", "last")
ARRANGEMENTS = [
    Arrangement(kind, patch, order, frame)
    for kind, patch, frame in itertools.product(KINDS, (1, 2), (None, 1, 2))
    for order in (ORDERS if patch > 1 else ORDERS[:1])
    if not (kind == "tokens" and frame is not None)
]


@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=str)
def test_an_arrangement_is_found_from_values_alone(arrangement: Arrangement) -> None:
    torch.manual_seed(0)
    latents = torch.randn(1, 5, 8, 12)
    state = arrangement.pack(latents)
    assert torch.equal(arrangement.unpack(state, 8, 12), latents)
    scale, shift = torch.rand(5, 1, 1) + 0.5, torch.randn(5, 1, 1)
    found = find_map(state, latents * scale + shift)
    assert found is not None
    assert torch.equal(found.arrangement.pack(latents), state)
    assert (found.denormalise(latents) - (latents * scale + shift)).abs().max() < 1e-5
    assert (found.normalise(found.denormalise(latents)) - latents).abs().max() < 1e-5


def test_scales_may_differ_within_a_patch() -> None:
    torch.manual_seed(0)
    latents, arrangement = torch.randn(1, 3, 8, 8), Arrangement("tokens", 2)
    scale = (torch.rand(3, 2, 2) + 0.5).repeat(1, 4, 4)
    found = find_map(arrangement.pack(latents), latents * scale)
    assert found is not None
    assert (found.denormalise(latents) - latents * scale).abs().max() < 1e-5


@pytest.mark.parametrize("made", [lambda x: x.flip(-1), lambda x: x**3, torch.zeros_like])
def test_what_is_no_such_map_is_not_found(made: Any) -> None:
    torch.manual_seed(0)
    latents = torch.randn(1, 4, 6, 8)
    assert find_map(latents, made(latents)) is None
