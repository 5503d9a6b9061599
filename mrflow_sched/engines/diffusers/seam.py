"""Between a pipeline's loop and its network: where calls are inspected, changed, skipped or run again.

A stage's view of a pipeline has a *shell* in place of its network: a module with the same configuration, dtype,
parameters and adapters, whose calls come here first. The owner's network is called as a whole, so its own hooks
(offloading, caching, whatever its owner registered) run once for every call that is really made.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mrflow_sched.engines.diffusers.blame import in_a_library, told, unrun
from mrflow_sched.engines.diffusers.view import attributes_of
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

__all__ = ["NetworkSeam", "guided_per_step", "shell_of"]

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)


def shell_of(network: torch.nn.Module, forward: Callable[..., Any]) -> torch.nn.Module:
    """A module that looks like `network` and whose call is `forward`.

    Args:
        network: Its attributes, parameters and submodules are shared; it is not changed.
        forward: Called with the shell's arguments.

    Returns:
        The shell: of the same class, without hooks of its own.
    """
    shell: torch.nn.Module = object.__new__(type(network))
    # Past `__setattr__`: torch.compile's wrapper hands what is set on it to the module inside.
    own, shared = attributes_of(shell), attributes_of(network)
    own.update(shared)
    own.update({name: OrderedDict[Any, Any]() for name in _HOOKS if name in shared})
    own.update(forward=forward, _compiled_call_impl=None)
    return shell


class NetworkSeam:
    """Every call of the network in one stage: described as a `NetworkCall`, passed through `arounds`, counted.

    Attributes:
        forwards: Evaluations of the network per image that were made, CFG's second branch included.
        called: Whether the loop has called the network.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        *,
        scheduler: MrFlowScheduler,
        batch: int,
        guided: bool,
        layout: Layout,
        before: Callable[[], object] | None = None,
        arounds: Sequence[Around] = (),
    ) -> None:
        """Stand before `network`.

        Args:
            network: What runs a call: the owner's module, or its compiled twin.
            scheduler: Knows which evaluation is next.
            batch: Images of the stage.
            guided: Whether CFG is in force.
            layout: Knows which half of a doubled batch is which, and which inputs hold image tokens.
            before: Called before each call.
            arounds: From the outermost to the innermost.
        """
        self._network, self._scheduler, self._batch, self._guided = network, scheduler, batch, guided
        module = cast("torch.nn.Module", getattr(network, "_orig_mod", network))  # inside torch.compile's wrapper
        self._names = _argument_names(type(module))
        self._layout, self._before, self._arounds = layout, before, tuple(arounds)
        self._evaluation = (-1, 0)
        self.forwards = 0.0
        self.called = self._answered = False

    def __call__(self, *values: Any, **named: Any) -> Any:
        """Stand in for the network's forward.

        Args:
            *values: Positional arguments of the loop's call.
            **named: Its keyword arguments.

        Returns:
            The prediction, in the container that the network itself would return.
        """
        self.called = True
        if self._before is not None:
            self._before()
        inputs = {**dict(zip(self._names, values, strict=False)), **named}
        name = self._names[0] if self._names[0] in inputs else next(iter(inputs))
        call = NetworkCall(
            inputs=inputs,
            sigma=self._scheduler.current_sigma,
            step=self._scheduler.current_step,
            branch=self._branch(len(inputs[name])),
            batch=self._batch,
            latents_name=name,
            tokens=self._layout.tokens,
            network=self._network,
            positive_first=self._layout.positive_first,
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
        if self._answered:
            return self._network(**call.inputs)
        with told(lambda error: unrun(self._network, error), if_=in_a_library):
            answer = self._network(**call.inputs)
        self._answered = True
        return answer

    def _branch(self, rows: int) -> Branch:
        """Which branch a call of `rows` rows is for: the first call of an evaluation is the positive one."""
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
        return "positive" if calls == 1 else "negative"

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
            positive = kept.pop()
            return positive if share == 0.0 else _moved(run(call), positive, share)
        if share == 0.0:
            alone = run(call.positive())
            return torch.cat([alone, alone])
        halves = run(call).chunk(2)
        positive, negative = halves if call.positive_first else halves[::-1]
        moved = _moved(negative, positive, share)
        return torch.cat([positive, moved] if call.positive_first else [moved, positive])

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


@lru_cache(maxsize=64)
def _argument_names(kind: type) -> tuple[str, ...]:
    """Names of the arguments of a network's `forward`, as its class has it."""
    forward = getattr(cast("Any", kind), "forward")  # noqa: B009  # pyright: ignore[reportUnknownVariableType]
    return tuple(inspect.signature(forward).parameters)[1:]
