"""A solver that a loop drives, one evaluation at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.sampling.solvers import SolverSteps, solver_steps


class Walk:
    """A solver that a loop drives, one evaluation at a time; the loop may change the state between two.

    Every solver here works on slopes, or on differences of estimates, and so is invariant under a shift of the origin:
    a state that was moved by some offset is solved as if it had not been, and the offset is added to the result.
    """

    def __init__(self, solver: str, x: Tensor, sigmas: Sequence[float]) -> None:
        """Start a solver.

        Args:
            solver: A name in `mrflow_sched.sampling.solvers.SOLVERS`.
            x: The state (B, ...) at `sigmas[0]`; taken as float32 (float64 stays float64).
            sigmas: The schedule, strictly falling, in the model's units.
        """
        self._steps: SolverSteps = solver_steps(solver, x, sigmas)
        self._solved, _ = next(self._steps)
        self._offset: Tensor | None = None
        self._handed_out: tuple[Tensor, int, float] | None = None

    @property
    def state(self) -> Tensor:
        """The state to evaluate, or after the last step the final one."""
        return self._solved if self._offset is None else self._solved + self._offset

    def push(self, denoised: Tensor) -> None:
        """Advance to the next state.

        Args:
            denoised: The clean estimate of `state`, in its shape and dtype.
        """
        try:
            self._solved, _ = self._steps.send(denoised if self._offset is None else denoised - self._offset)
        except StopIteration as end:
            self._solved = end.value

    def hand_out(self, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """A copy of the state for the loop: changes to it do not reach the state itself.

        Args:
            dtype: Of the copy.
            scale: The loop's state is this times ours.

        Returns:
            The copy; `follow` recognises it.
        """
        copied = self._copied(dtype, scale)
        self._handed_out = (copied, _version(copied), scale)
        return copied

    def follow(self, sample: Tensor) -> None:
        """Move to the loop's state, unless it is what was handed out, itself or copied.

        Args:
            sample: The state as the loop has it now.

        Raises:
            MrFlowError: It has another shape.
        """
        if self._handed_out is None:
            return
        copied, version, scale = self._handed_out
        if sample is copied and not sample.is_inference() and _version(sample) == version:
            return  # told without waiting for the device
        if sample.shape != self._solved.shape:
            before, got = tuple(self._solved.shape), tuple(sample.shape)
            raise MrFlowError(f"sample must keep the shape of the state before it, {before}, got {got}.")
        if not torch.equal(sample, self._copied(copied.dtype, scale).to(sample)):
            self._offset = sample.to(self._solved) / scale - self._solved

    def _copied(self, dtype: torch.dtype, scale: float) -> Tensor:
        return self.state.to(dtype, copy=True) if scale == 1.0 else (self.state * scale).to(dtype)


def _version(tensor: Tensor) -> int:
    """How many in-place changes `tensor` has seen; 0 for tensors of inference mode, which do not count them."""
    return 0 if tensor.is_inference() else tensor._version  # pyright: ignore[reportPrivateUsage]
