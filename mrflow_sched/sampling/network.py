"""The network seam: one call of a pipeline's network, as a value that a method can inspect, change and run again.

A method passes a function `around(call, run)` to `StageRun.sample`. It is called in place of every call that the
pipeline's loop makes of its network, and returns what the loop gets as the network's output:

    def around(call, run):
        return run(call)                 # what happens without a seam

`call` can be kept (and run later, with gradients), changed (`call.replace(hidden_states=...)`), restricted to some of
its image tokens (`call.subset(tokens)`) or not be run at all. docs/library.md has an example of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError

__all__ = ["Around", "Branch", "NetworkCall", "Next", "TokenInputs"]

Branch = Literal["positive", "negative", "both", "only"]
"""Which guidance branch a call is for: of two calls a step, the "positive" or the "negative" one; "both" in one batch;
or "only", where nothing is guided by a second branch."""


@dataclass(frozen=True)
class TokenInputs:
    """Which inputs of a network hold image tokens, with the tokens along the second last dimension.

    Attributes:
        latents: Name of the input that holds the tokens themselves, (B, N, C).
        positions: Name of the input with their positions, (N, P) or (B, N, P).
        residuals: Names of inputs that hold lists of further tensors (B, N, C), such as a ControlNet's.
    """

    latents: str
    positions: str
    residuals: tuple[str, ...] = ()


@dataclass(frozen=True)
class NetworkCall:
    """One call of a network by a pipeline's loop.

    Attributes:
        inputs: Every argument of the call by name. The tensors are those of the loop: do not change them in place.
        sigma: Of the evaluation: flow sigma, or sigma_ve for variance-exploding models.
        step: The solver's step, from 0.
        branch: Which guidance branch the call is for.
        batch: Images in this call; the tensors hold twice as many rows where `branch` is "both".
        latents_name: Name of the input that holds the noisy latents.
        tokens: Which inputs hold image tokens; None where a subset cannot be passed.
        network: What is run.
        positive_first: Whether the first half of "both" is the positive branch.
        first_image: Number of the call's first image in the run's batch: short memory splits a batch.
        take_rows: (inputs, rows, count) -> inputs: the rows of every input that holds `count` samples.
    """

    inputs: Mapping[str, Any]
    sigma: float
    step: int
    branch: Branch
    batch: int
    latents_name: str
    tokens: TokenInputs | None
    network: Callable[..., Any] = field(repr=False)
    positive_first: bool = False
    first_image: int = 0
    take_rows: Callable[[Mapping[str, Any], slice, int], Mapping[str, Any]] | None = field(default=None, repr=False)

    @property
    def latents(self) -> Tensor:
        """The noisy latents as the network gets them, (rows, ...); a list of tensors is stacked."""
        return tensor_of(self.inputs[self.latents_name])

    def replace(self, **inputs: Any) -> NetworkCall:
        """The same call with other inputs.

        Args:
            **inputs: New values by the network's own argument names.

        Returns:
            A copy of the call.

        Raises:
            MrFlowError: The call has no input of that name.
        """
        unknown = [name for name in inputs if name not in self.inputs]
        if unknown:
            raise MrFlowError(
                f"{unknown[0]} is no input of this call of {_name(self.network)}; use one of {', '.join(self.inputs)}."
            )
        return replace(self, inputs={**self.inputs, **inputs})

    def subset(self, tokens: Tensor) -> NetworkCall:
        """The same call for some of the image tokens, each with its own position.

        Args:
            tokens: Indices of the tokens to keep, (n,) integers from 0 to N - 1.

        Returns:
            A call whose `run` returns (B, n, C).

        Raises:
            MrFlowError: The network makes positions from the size of its input, so none can be left out.
        """
        if self.tokens is None:
            raise MrFlowError(
                f"{_name(self.network)} makes its positions from the size of the image, so a subset of tokens cannot "
                "be passed to it; ask engine.capabilities.token_subsets first."
            )
        names = self.tokens
        chosen: dict[str, Any] = {
            name: self.inputs[name].index_select(-2, tokens.to(self.inputs[name].device))
            for name in (names.latents, names.positions)
        }
        for name in names.residuals:
            kept = cast("Sequence[Tensor] | None", self.inputs.get(name))
            if kept is not None:
                chosen[name] = [each.index_select(-2, tokens.to(each.device)) for each in kept]
        return self.replace(**chosen)

    def of_image(self, number: int) -> NetworkCall:
        """The call for one of its images, with all branches that it has.

        Args:
            number: Of the image within this call, from 0.

        Returns:
            A call of one image; of "both" it has two rows.
        """
        count = len(self.latents)
        inputs = (self.take_rows or _take_rows)(self.inputs, slice(number, count, self.batch), count)
        return replace(self, inputs=inputs, batch=1, first_image=self.first_image + number)

    def positive(self) -> NetworkCall:
        """The positive branch alone of a call of "both".

        Returns:
            That call; a call of another branch is returned unchanged.
        """
        if self.branch != "both":
            return self
        rows = slice(0, self.batch) if self.positive_first else slice(self.batch, 2 * self.batch)
        inputs = (self.take_rows or _take_rows)(self.inputs, rows, 2 * self.batch)
        return replace(self, inputs=inputs, branch="positive")

    def run(self) -> Tensor:
        """Run the network on these inputs; a graph is kept where gradients are recorded.

        Returns:
            The network's output, (rows, ...); a list of tensors is stacked.
        """
        return tensor_of(first_of(self.network(**self.inputs)))


Next = Callable[[NetworkCall], Tensor]
Around = Callable[[NetworkCall, Next], Tensor]
"""What stands between a loop and its network: gets a call and the function that runs it, returns the output."""


def first_of(output: Any) -> Any:
    """The prediction in a network's return value.

    Args:
        output: What the network returned: a tuple, an output object with `sample`, or the prediction itself.

    Returns:
        The first of the tuple, the `sample`, or `output`: a tensor or a list of tensors.
    """
    if isinstance(output, tuple):
        return cast("tuple[Any, ...]", output)[0]
    return output.sample if hasattr(output, "sample") and not isinstance(output, Tensor) else output


def tensor_of(value: Any) -> Tensor:
    """A prediction as one tensor.

    Args:
        value: A tensor, or a list of tensors of one shape, one per image.

    Returns:
        The tensor, or the list stacked along a new first dimension.
    """
    return torch.stack(list(cast("Sequence[Tensor]", value))) if isinstance(value, (list, tuple)) else value


def like_output(output: Any, made: Tensor) -> Any:
    """A new prediction in the container that the network returned, as the loop unpacks it.

    Args:
        output: What the network returned.
        made: (rows, ...), to be put in place of its prediction.

    Returns:
        A tuple, an output object, a list or a tensor, as `output` is.
    """
    first = first_of(output)
    inner: Any = list(made.unbind(0)) if isinstance(first, (list, tuple)) else made
    if isinstance(output, tuple):
        return (inner, *cast("tuple[Any, ...]", output)[1:])
    if inner is first:
        return output
    if output is first:
        return inner
    return type(output)(sample=inner)


def _take_rows(inputs: Mapping[str, Any], rows: slice, count: int) -> dict[str, Any]:
    return {name: rows_of(value, rows, count) for name, value in inputs.items()}


def rows_of(value: Any, rows: slice, count: int) -> Any:
    """Some of the samples of a network's inputs.

    Args:
        value: A tensor, or a mapping, list or tuple of such, nested as it likes.
        rows: Which samples.
        count: How many samples the call holds: tensors and lists of tensors of this length are cut, all else is kept.

    Returns:
        `value` with those samples.
    """
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):
        found = cast("Mapping[str, Any]", value)
        return {name: rows_of(each, rows, count) for name, each in found.items()}
    if isinstance(value, (list, tuple)):
        many = list(cast("Sequence[Any]", value))
        if isinstance(value, list) and len(many) == count and all(isinstance(each, Tensor) for each in many):
            kept = many[rows]  # one tensor per image; a tuple is a pair, such as the cosines and sines of positions
        else:
            kept = [rows_of(each, rows, count) for each in many]
        return tuple(kept) if isinstance(value, tuple) else kept
    return value


def _name(network: Any) -> str:
    return type(getattr(network, "__self__", network)).__name__
