"""A solver that is pushed, one evaluation at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.sampling.solvers import SolverSteps, solver_steps


class Walk:
    """A solver that is pushed, one evaluation at a time, by a loop that may change the state between two.

    Every solver here goes by slopes, or by differences of estimates, and so does not care where the origin is: a state
    that was moved by some offset is solved as if it had not been, and the offset is added to what comes out.
    """

    def __init__(self, solver: str, x: Tensor, sigmas: Sequence[float]) -> None:
        self._steps: SolverSteps = solver_steps(solver, x, sigmas)
        self._solved, _ = next(self._steps)
        self._offset: Tensor | None = None
        self._handed_out: tuple[Tensor, int] | None = None

    @property
    def state(self) -> Tensor:
        """The state to evaluate, or after the last step the final one."""
        return self._solved if self._offset is None else self._solved + self._offset

    def push(self, denoised: Tensor) -> None:
        """Go on to the next state with the clean estimate of this one."""
        try:
            self._solved, _ = self._steps.send(denoised if self._offset is None else denoised - self._offset)
        except StopIteration as end:
            self._solved = end.value

    def hand_out(self, dtype: torch.dtype) -> Tensor:
        """A copy of the state: what happens to it must not reach the state itself."""
        copied = self.state.to(dtype, copy=True)
        self._handed_out = (copied, _version(copied))
        return copied

    def follow(self, sample: Tensor) -> None:
        """Move to `sample` unless it is what was handed out, itself or copied. Raises ValueError for another shape."""
        if self._handed_out is None:
            return
        copied, version = self._handed_out
        if sample is copied and not sample.is_inference() and _version(sample) == version:
            return  # told without waiting for the device
        if sample.shape != self._solved.shape:
            raise MrFlowError(
                f"sample has shape {tuple(sample.shape)}, the state before it {tuple(self._solved.shape)}; keep it."
            )
        if not torch.equal(sample, self.state.to(copied.dtype).to(sample)):
            self._offset = sample.to(self._solved) - self._solved


def _version(tensor: Tensor) -> int:
    """How often `tensor` was changed in place; 0 for tensors of inference mode, which do not count."""
    return 0 if tensor.is_inference() else tensor._version  # pyright: ignore[reportPrivateUsage]
