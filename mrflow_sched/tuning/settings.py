"""How a LoRA is tuned by a reward: `TuneSettings`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.methods.reward import Path, Surrogate, Through
from mrflow_sched.plan.checks import MAX_SEED, check_choice, checked_number, checked_whole

__all__ = ["AUTO", "MOST_RANK", "MOST_UPDATES", "BackwardPath", "TuneSettings", "View"]

AUTO = "auto"
MOST_UPDATES, MOST_BATCH, MOST_RANK = 100_000, 1024, 512
_FALLBACK: Path = "leap"

BackwardPath = Literal["auto", "full", "sparse", "bridge", "lagrange", "leap", "clean", "renoised", "detached"]
"""A path of `methods.reward.Surrogate`; "auto" is "full", and "leap" where memory runs out with one image."""
View = Literal["low", "none", "up", "vjp"]
"""What the reward sees: the decoded image of stage 1, or the final one, with that much of the hand-off's gradient."""


@dataclass(frozen=True)
class TuneSettings:
    """How a LoRA is tuned.

    Attributes:
        updates: Steps of the optimiser, 1 or more.
        batch: Images of an update, over all processes.
        rank: Of the LoRA, 1 to 512.
        rate: Learning rate of AdamW, above 0 and at most 1.
        backward: How the reward's gradient is led back.
        through: What the reward sees.
        target: Rewards above it are raised no further; None: no limit.
        guard_drop: How far the guard may fall on the held-out prompts before tuning stops, as a share of how much it
            varies between their images (one standard deviation) before tuning; 0 or more.
        check_every: Updates from one look at the held-out prompts to the next.
        ema: Share of the averaged weights that stays at an update, 0 to below 1: those are checked and saved.
        checkpointing: Let the network keep less and compute it twice: less memory, more time.
        seed: Of the LoRA, the prompts' order and the noise.

    Raises:
        MrFlowError: A value out of range.
    """

    updates: int = 60
    batch: int = 4
    rank: int = 8
    rate: float = 3e-4
    backward: BackwardPath = AUTO
    through: View = "low"
    target: float | None = None
    guard_drop: float = 0.1
    check_every: int = 10
    ema: float = 0.9
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.backward, "backward", get_args(BackwardPath))
        check_choice(self.through, "through", get_args(View))
        whole = {
            "updates": (1, MOST_UPDATES),
            "batch": (1, MOST_BATCH),
            "rank": (1, MOST_RANK),
            "check_every": (1, MOST_UPDATES),
            "seed": (0, MAX_SEED),
        }
        for name, (low, high) in whole.items():
            object.__setattr__(self, name, checked_whole(getattr(self, name), name, low, high))
        numbers = {"rate": (1e-9, 1.0), "guard_drop": (0.0, 100.0), "ema": (0.0, 0.9999)}
        for name, (least, most) in numbers.items():
            object.__setattr__(self, name, checked_number(getattr(self, name), name, least, most))
        if self.target is not None:
            object.__setattr__(self, "target", checked_number(self.target, "target", -1e9, 1e9))
        if not isinstance(self.checkpointing, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise MrFlowError(f"checkpointing must be True or False, got {quoted(self.checkpointing)}.")
        if self.through != "low" and self.backward in ("clean", "renoised", "detached"):
            raise MrFlowError(
                f"through is {self.through!r}, which refines what stage 1 sampled, and backward {self.backward!r} ends "
                "elsewhere; use full, bridge, leap, sparse or lagrange, or through low."
            )

    def surrogate(self, path: BackwardPath | None = None) -> Surrogate:
        """The surrogate path of a way.

        Args:
            path: Which; None: `backward`.

        Returns:
            Its settings: steps picked evenly over the run, as late ones alone miss what captions decide.
        """
        chosen = path or self.backward
        if chosen in (AUTO, "full"):
            return Surrogate("full")
        if chosen == "sparse":
            return Surrogate("sparse", unbiased=True)
        return Surrogate(chosen, coupling=0.3 if chosen == "leap" else 0.5)

    def fallback(self) -> Surrogate | None:
        """What takes over where one image's `surrogate` does not fit into memory.

        Returns:
            It; None: nothing does.
        """
        return self.surrogate(_FALLBACK) if self.backward == AUTO else None

    @property
    def handoff(self) -> Through | None:
        """How the reward is followed through the hand-off; None: stage 1's image is rewarded."""
        return None if self.through == "low" else self.through

    def to_dict(self) -> dict[str, Any]:
        """The settings as numbers and strings.

        Returns:
            Them, by name.
        """
        return asdict(self)
