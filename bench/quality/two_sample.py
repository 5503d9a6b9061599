"""Can two sets of pictures of the same scenes be told apart? A linear rule, always asked about a scene it has not seen.

The rule is Fisher's, on paired differences: the direction that best separates the two pictures of every other scene,
relative to how much such differences vary. It has told a pair apart if it gives the first picture the higher value.
Chance is one half; two draws of the ground truth are the control. A few scenes differ far more than all others (a grid
that one of the two sets lost), so differences count up to three times their median and no further.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 12
"""Pairs below which a share says nothing: at chance, two of three such pairs are often told apart."""
MOST = 3.0
"""Medians that a difference counts at most."""


def told_apart(first: Tensor, second: Tensor) -> float:
    """The share of pairs told apart by the rule learned from all other pairs.

    Args:
        first: Features of a set of pictures, (N, F).
        second: Those of the other set, of the same scenes in the same order.

    Returns:
        0 to 1, pairs without a difference counting half; not a number below three pairs.
    """
    if len(first) < 3:
        return float("nan")
    differences = first.double() - second.double()
    typical = differences.abs().median(0).values + 1e-9
    differences = (differences / typical).clamp(-MOST, MOST)
    values = torch.stack([differences[row] @ _direction(_without(differences, row)) for row in range(len(first))])
    return float(((values > 0).double() + (values == 0).double() / 2).mean())


def _without(rows: Tensor, row: int) -> Tensor:
    return torch.cat([rows[:row], rows[row + 1 :]])


def _direction(differences: Tensor) -> Tensor:
    """Fisher's direction of paired differences (N, F), their covariance shrunk towards its diagonal by F / (F + N)."""
    count, size = differences.shape
    share = size / (size + count)
    covariance = torch.cov(differences.T).reshape(size, size)
    diagonal = torch.diag(covariance.diagonal() + 1e-6)
    return torch.linalg.solve((1 - share) * covariance + share * diagonal + 1e-9 * torch.eye(size), differences.mean(0))
