"""Just-in-Time sampling: a whole run at the final size on a growing share of the image's tokens.

Source: "Just-in-Time: training-free spatial acceleration for diffusion transformers" (arXiv 2603.10744) and its code.
docs/sparse.md says what was measured, also against plain sampling at equal cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.token_shares import token_count
from mrflow_sched.sampling.engine import capabilities_of
from mrflow_sched.sampling.method import Wrapper
from mrflow_sched.sampling.noise import draw_noise, stage_seed
from mrflow_sched.sampling.tokens import Lift, TokenGrid, anchors, choose, local_variance, on_tokens

if TYPE_CHECKING:
    from mrflow_sched.sampling.method import StageRun

__all__ = ["Jit"]

_BLEND = 1.0 / 3.0
"""Weight of the target in the published code: the first of three equal substeps."""
_ANCHOR_STREAM, _FRESH_STREAM = 101, 102


@dataclass(frozen=True)
class Jit(Wrapper):
    """Just-in-Time sampling where stage 1's plan has `shares`; every other stage is left to `inner`.

    In each phase the network sees some tokens only, with the positions that they have in the whole image. Its velocity
    is spread over the other tokens (`sampling.tokens.Lift`). Before a phase, the tokens whose surroundings vary most
    join, at the noise level that the run has reached (the "micro-flow").

    Attributes:
        micro_flow: How a joining token gets there: "exact" puts it there; "blend" moves it a third of the way, as the
            published code does; "off" leaves it.
        noise: Its noise: the run's "initial" noise, or "fresh" noise as in the published code.
        padding: Of the image's border where variance is measured; "zeros" as in the published code.
    """

    micro_flow: Literal["exact", "blend", "off"] = "exact"
    noise: Literal["initial", "fresh"] = "initial"
    padding: Literal["replicate", "zeros"] = "replicate"

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        """Sample stage 1 on its shares of the tokens.

        Args:
            run: The stage.
            latents: (B, C, h, w), float32, at its first sigma.

        Returns:
            Clean latents in the shape of `latents`, float32.

        Raises:
            MrFlowError: The engine cannot run its network on some of the tokens, or the stage has another solver than
                "euler".
        """
        stage = run.stage
        if run.index > 0 or not stage.shares:
            return self.inner.stage(run, latents)
        if stage.solver != "euler":
            raise MrFlowError(f"Just-in-Time sampling needs the solver euler, got {stage.solver}.")
        if not capabilities_of(run.engine).token_subsets:
            raise MrFlowError(
                f"Just-in-Time sampling needs a network that takes tokens with their positions; that of "
                f"{run.engine.family.title} does not: leave method out."
            )
        grid = TokenGrid.of(stage, latents)
        changes = [step for step in range(1, stage.steps) if stage.shares[step] != stage.shares[step - 1]]
        known = [anchors(grid, stage.shares[0], _generator(seed, _ANCHOR_STREAM)) for seed in run.seeds]
        state, first = latents, latents
        for begin, end in pairwise([0, *changes, stage.steps]):
            lifts = [Lift(grid, tokens) for tokens in known]
            if end == stage.steps:
                return self._walk(run, state, lifts, range(begin, end))
            # The last step of a phase is walked alone: it tells the velocity there.
            before = self._walk(run, state, lifts, range(begin, end - 1)) if end - 1 > begin else state
            state = self._walk(run, before, lifts, range(end - 1, end))
            known, state = self._joined(run, first, before, state, lifts, end)
        return state

    def _walk(self, run: StageRun, state: Tensor, lifts: list[Lift], steps: range) -> Tensor:
        if len(lifts[0].known) == lifts[0].grid.count:
            return run.sample(state, steps=steps)
        tokens = [lift.known for lift in lifts]
        return run.sample(
            state,
            steps=steps,
            around=lambda call, go: on_tokens(call, go, lifts[0].grid, tokens, lambda out, image: lifts[image](out)),
        )

    def _joined(
        self, run: StageRun, first: Tensor, before: Tensor, state: Tensor, lifts: list[Lift], step: int
    ) -> tuple[list[Tensor], Tensor]:
        """The tokens of the next phase, which begins at `step`, and the state with the new ones at its noise level."""
        stage, grid = run.stage, lifts[0].grid
        sigma_before, sigma = stage.sigmas[step - 1], stage.sigmas[step]
        velocity = (before - state) / (sigma_before - sigma)
        clean = grid.fields(before - sigma_before * velocity).flatten(2).transpose(1, 2)
        noise = first
        if self.noise == "fresh":
            seeds = [stage_seed(seed, 0, _FRESH_STREAM, "hash") for seed in run.seeds]
            noise = draw_noise(first.shape[1:], seeds, device=first.device)
        noises = grid.fields(noise).flatten(2).transpose(1, 2)
        states = grid.fields(state).flatten(2).transpose(1, 2).clone()
        importance = local_variance(grid.fields(velocity), padding=self.padding)
        weight = {"exact": 1.0, "blend": _BLEND, "off": 0.0}[self.micro_flow]
        wanted = token_count(grid.count, stage.shares[step])
        found: list[Tensor] = []
        for image, lift in enumerate(lifts):
            new = choose(importance[image], wanted - len(lift.known), lift.known)
            one = slice(image, image + 1)
            structure = lift(clean[one].index_select(1, lift.known.to(clean.device)))
            target = (1.0 - sigma) * structure[0, new] + sigma * noises[image, new]
            states[image, new] = (1.0 - weight) * states[image, new] + weight * target
            found.append(torch.cat([lift.known, new]).sort().values)
        fields = states.transpose(1, 2).reshape(len(states), -1, grid.rows, grid.columns)
        return found, grid.to_latents(fields, state)


def _generator(seed: int, stream: int) -> torch.Generator:
    """Numbers of a run's own that are not those of its noise."""
    return torch.Generator().manual_seed(stage_seed(seed, 0, stream, "hash"))
