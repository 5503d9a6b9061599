"""Previews of a native run: a small image that looks like what the full run of the same seed will give.

* `Nested`: a small run from the shrunk noise of the full size, so that a seed has one composition at both sizes.
* `Chain`: the commutator-zero chain (arXiv 2604.09227). A few steps at the full size, then D, a map that shrinks the
  state, then the rest at the small size, steered so that the small velocity stays near D of the large one.

Both are methods for a plan of one stage: the native plan's sigmas at the preview's size
(`mrflow_sched.measure.previews.preview` makes it, runs it, and has the default preview: the full run in few steps).

D commutes with no real model (D v(x) differs from v(D x)), and which D is near enough depends on the model's VAE.
`mrflow preview --check` measures it.
"""

from __future__ import annotations

from mrflow_sched.methods.previews.chain import Chain, CommutatorGuidance, Nested, euler_tail, guided
from mrflow_sched.methods.previews.down import (
    DOWNS,
    DownSelector,
    Estimate,
    Head,
    Switched,
    averaged,
    commutator_norms,
    in_pixels,
    select_phase,
    selected,
)

__all__ = [
    "DOWNS",
    "Chain",
    "CommutatorGuidance",
    "DownSelector",
    "Estimate",
    "Head",
    "Nested",
    "Switched",
    "averaged",
    "commutator_norms",
    "euler_tail",
    "guided",
    "in_pixels",
    "select_phase",
    "selected",
]
