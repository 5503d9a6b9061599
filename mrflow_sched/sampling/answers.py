"""What engines and methods give back, checked where it arrives: another thing than was asked for is their fault."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["float_tensor"]


def float_tensor(answer: object, shape: Sequence[int], owner: object, method: str) -> Tensor:
    """An engine's or a method's answer as what its role promises.

    Args:
        answer: What was returned.
        shape: Its shape by the role.
        owner: The engine or method.
        method: The name of its function.

    Returns:
        The answer in float32.

    Raises:
        TypeError: It is no tensor of real floats.
        RuntimeError: It has another shape.
    """
    due = f"{type(owner).__name__}.{method} must return a float tensor of shape {tuple(shape)}"
    if not isinstance(answer, Tensor):
        raise TypeError(f"{due}; it returned {'None' if answer is None else type(answer).__name__}.")
    if not answer.is_floating_point():
        raise TypeError(f"{due}; it returned values of {answer.dtype}.")
    if tuple(answer.shape) != tuple(shape):
        raise RuntimeError(f"{due}; it returned {tuple(answer.shape)}.")
    return answer.float()
