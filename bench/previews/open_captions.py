"""Captions that leave attributes of a scene out, so that the seed has more to decide."""

from __future__ import annotations

import numpy as np

from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.scenes import Scene, left_open


def open_caption(scene: Scene, seed: int) -> str:
    """The scene in one line that leaves some of its attributes open.

    Args:
        scene: What to describe.
        seed: Chooses what is left out; the same seed leaves the same out.

    Returns:
        For instance "a circle over green hills", where the full caption is "a red circle over green hills under a pink
        sky". It leaves out one attribute at least.
    """
    rng = np.random.default_rng(seed)
    named = left_open(scene, rng)
    while named == scene:
        named = left_open(scene, rng)
    return caption(named)
