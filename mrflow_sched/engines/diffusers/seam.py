"""Between a pipeline's loop and its network: where calls are inspected, changed, skipped or run again.

A stage's view of a pipeline has a *shell* in place of its network: a module with the same configuration, dtype,
parameters and adapters (`view.shell_of`), whose calls come here first. The owner's network is called as a whole, so
its own hooks (offloading, caching, whatever its owner registered) run once for every call that is really made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mrflow_sched.engines.diffusers.blame import in_a_library, told, unrun
from mrflow_sched.engines.diffusers.view import argument_names
from mrflow_sched.sampling.network import (
    Around,
    Branch,
    NetworkCall,
    Next,
    first_of,
    like_output,
    tensor_of,
)

if TYPE_CHECKING:
    from mrflow_sched.engines.diffusers.layouts import Layout
    from mrflow_sched.engines.diffusers.scheduler import MrFlowScheduler
    from mrflow_sched.sampling.engine import Guidance

__all__ = ["POSITIONS", "NetworkSeam", "guided_per_step", "moved_to"]

POSITIONS = ("img_ids", "position_ids")
"""Inputs of networks that hold the positions of tokens, (N, P) or (B, N, P): which image, row, column and more."""


class NetworkSeam:
    """Every call of the network in one stage: described as a `NetworkCall`, passed through `arounds`, counted.

    Attributes:
        forwards: Evaluations of the network per image that were made, CFG's second branch included.
        called: Whether the loop has called the network.
    """

    def __init__(
        self,
        *,
        scheduler: MrFlowScheduler,
        batch: int,
        guided: bool,
        layout: Layout,
        first_image: int = 0,
        first: Callable[[], object] | None = None,
        arounds: Sequence[Around] = (),
    ) -> None:
        """Stand before no network yet: see `before`.

        Args:
            scheduler: Knows which evaluation is next.
            batch: Images of the stage.
            guided: Whether CFG is in force.
            layout: Knows which half of a doubled batch is which, and which inputs hold image tokens.
            first_image: Number of the stage's first image in the run's batch.
            first: Called before each call.
            arounds: From the outermost to the innermost.
        """
        self._scheduler, self._batch, self._guided = scheduler, batch, guided
        self._layout, self._first, self._arounds = layout, first, tuple(arounds)
        self._first_image = first_image
        self._evaluation = (-1, 0)
        self.forwards = 0.0
        self.called = self._answered = False

    def before(self, network: torch.nn.Module) -> Callable[..., Any]:
        """Stand before a network; a pipeline may have two that share the noise levels between them.

        Args:
            network: What runs a call: the owner's module, or its compiled twin.

        Returns:
            A function in place of its forward: it takes the arguments of the loop's call, and returns the prediction in
            the container that the network itself would return.
        """
        module = cast("torch.nn.Module", getattr(network, "_orig_mod", network))  # inside torch.compile's wrapper
        names = argument_names(type(module))

        def forward(*values: Any, **named: Any) -> Any:
            return self._call(network, {**dict(zip(names, values, strict=False)), **named}, names[0])

        return forward

    def _call(self, network: torch.nn.Module, inputs: dict[str, Any], first: str) -> Any:
        """One call of a network; `first` is the name of its first argument."""
        self.called = True
        if self._first is not None:
            self._first()
        name = first if first in inputs else next(iter(inputs))
        call = NetworkCall(
            inputs=inputs,
            sigma=self._scheduler.current_sigma,
            step=self._scheduler.current_step,
            branch=self._branch(len(inputs[name])),
            batch=self._batch,
            latents_name=name,
            tokens=self._layout.tokens,
            network=network,
            positive_first=self._layout.positive_first,
            first_image=self._first_image,
            take_rows=self._layout.take_rows,
        )
        if not self._arounds:  # nothing stands here: the network's own answer, as it is
            return self._run_raw(call)
        answers: list[Any] = []

        def run(last: NetworkCall) -> Tensor:
            answers.append(self._run_raw(last))
            return tensor_of(first_of(answers[-1]))

        return self._wrapped(_through(self._arounds, run)(call), inputs, name, answers)

    def _run_raw(self, call: NetworkCall) -> Any:
        self.forwards += len(call.inputs[call.latents_name]) / self._batch
        network = cast("torch.nn.Module", call.network)
        if self._answered:
            return network(**call.inputs)
        with told(lambda error: unrun(network, error), if_=in_a_library):
            answer = network(**call.inputs)
        self._answered = True
        return answer

    def _branch(self, rows: int) -> Branch:
        """Which branch a call of `rows` rows is for."""
        evaluation, calls = self._evaluation
        now = self._scheduler.current_evaluation
        calls = calls + 1 if now == evaluation else 1
        self._evaluation = (now, calls)
        if not self._guided:
            return "only"
        if rows == 2 * self._batch:
            return "both"
        if rows != self._batch:
            return "only"  # perturbed attention adds a third branch, which cannot be taken apart
        return "positive" if (calls == 1) != self._layout.negative_call_first else "negative"

    def _wrapped(self, made: Tensor, inputs: Mapping[str, Any], name: str, answers: Sequence[Any]) -> Any:
        """`made` as the loop unpacks it: in the container that the network just returned, or that the call asks for."""
        if answers:
            return like_output(answers[-1], made)
        listed: Any = list(made.unbind(0)) if isinstance(inputs[name], (list, tuple)) else made
        if inputs.get("return_dict", True) is False:
            return (listed,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=listed)


def guided_per_step(guidance: Guidance, base: float, weight: Callable[[float], float]) -> Around:
    """CFG with another scale at each step, inside a loop that was given one scale.

    The loop computes p + w(base) (p - n) of the two branches. With n moved towards p until the remaining fraction is
    w(scale) / w(base), that gives what the scale asks for; where the fraction is 0 the negative branch is not run at
    all.

    Args:
        guidance: The scale at a sigma.
        base: The scale that the loop was given.
        weight: w: how far a scale leads from the positive branch, 0 where guidance is off.

    Returns:
        A function to pass as one of a seam's `arounds`.
    """
    kept: list[Tensor] = []

    def around(call: NetworkCall, run: Next) -> Tensor:
        if call.branch == "only":
            return run(call)
        share = weight(guidance(call.sigma)) / weight(base)
        if call.branch == "positive":
            kept[:] = [run(call)]
            return kept[0]
        if call.branch == "negative":
            positive, rows = kept.pop(), call.latents.shape[1]
            if call.latents.ndim == 3 and positive.shape[1] > rows:
                positive = positive[:, -rows:]  # where the positive branch has text tokens before those of the image
            return positive if share == 0.0 else _moved(run(call), positive, share)
        if share == 0.0:
            alone = run(call.positive())
            return torch.cat([alone, alone])
        halves = run(call).chunk(2)
        positive, negative = halves if call.positive_first else halves[::-1]
        moved = _moved(negative, positive, share)
        return torch.cat([positive, moved] if call.positive_first else [moved, positive])

    return around


def moved_to(place: tuple[int, int]) -> Around:
    """A tile's calls with the positions that its tokens have in the whole image.

    Args:
        place: (row, column) of the tile's first token.

    Returns:
        A function to pass as one of a seam's `arounds`. Calls without positions pass unchanged; tokens of text and of
        reference images stay where they are.
    """

    def around(call: NetworkCall, run: Next) -> Tensor:
        name = next((each for each in POSITIONS if call.inputs.get(each) is not None), None)
        if name is None:
            return run(call)
        found: Tensor = call.inputs[name]
        # In float32: 16 bits hold whole numbers to 256 only, and networks compute angles in 32 at least.
        moved = found.to(torch.float32 if found.is_floating_point() else found.dtype, copy=True)
        image = moved[..., -call.latents.shape[-2] :, :]  # after those of the text, where one input holds both
        own = (image[..., 0] == image[..., :1, 0]).to(moved)
        image[..., 1] += place[0] * own
        image[..., 2] += place[1] * own
        return run(call.replace(**{name: moved}))

    return around


def _moved(negative: Tensor, positive: Tensor, share: float) -> Tensor:
    return negative if share == 1.0 else positive + share * (negative - positive)


def _through(arounds: Sequence[Around], run: Next) -> Next:
    """`run` behind all of `arounds`, the first outermost."""
    for around in reversed(arounds):
        run = _behind(around, run)
    return run


def _behind(around: Around, run: Next) -> Next:
    return lambda call: around(call, run)
