"""What a tuning run has come to, in one file: written whole, read without running anything of it."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mrflow_sched._runtime.errors import MrFlowError, shown
from mrflow_sched._runtime.write import write_whole

__all__ = ["Check", "State", "fingerprint"]

_FILE = "state.pt"
_FORMAT = 1


@dataclass(frozen=True)
class Check:
    """A look at the held-out prompts.

    Attributes:
        update: After how many updates.
        seconds: That the updates had taken.
        rewards: Of each held-out image.
        guards: Likewise of the guard.
        psnr: Of each to what the model made before, in dB; infinity where nothing changed.
        trained: Mean reward of the updates since the look before; None: there were none.
    """

    update: int
    seconds: float
    rewards: tuple[float, ...]
    guards: tuple[float, ...]
    psnr: tuple[float, ...]
    trained: float | None

    def to_dict(self) -> dict[str, Any]:
        """The look as numbers and lists.

        Returns:
            Its attributes, by name; an infinite PSNR is None, which JSON can hold.
        """
        return {**asdict(self), "psnr": [value if math.isfinite(value) else None for value in self.psnr]}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Check:
        """Read one.

        Args:
            said: What `to_dict` made of one.

        Returns:
            It.
        """
        lists: dict[str, tuple[float, ...]] = {name: tuple(map(float, said[name])) for name in ("rewards", "guards")}
        lists["psnr"] = tuple(math.inf if value is None else float(value) for value in said["psnr"])
        trained = said["trained"]
        return cls(int(said["update"]), float(said["seconds"]), trained=trained, **lists)


@dataclass
class State:
    """What a run has come to.

    Attributes:
        update: Updates done.
        seconds: That they took.
        weights: Of the LoRA.
        average: Of the averaged LoRA, which is checked and saved.
        optimiser: State of AdamW.
        good: The averaged weights at the last check at which the guard held.
        good_update: When that was.
        checks: All looks at the held-out prompts.
        base: What the model made of the held-out prompts before, (n, 3, H, W), bytes.
        stopped: Why no more is done; empty: it goes on.
        recent: Mean rewards of the updates since the last look.
    """

    update: int
    seconds: float
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    optimiser: dict[str, Any]
    good: dict[str, Tensor]
    good_update: int
    checks: list[Check] = field(default_factory=list[Check])
    base: Tensor | None = None
    stopped: str = ""
    recent: list[float] = field(default_factory=list[float])

    def save(self, folder: Path, made_of: Mapping[str, str]) -> None:
        """Write the run's file over the older one, in one moment.

        Args:
            folder: The run's.
            made_of: From `fingerprint`.

        Raises:
            OSError: It cannot be written; the older one is as it was.
        """
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        content["checks"] = json.dumps([check.to_dict() for check in self.checks])
        buffer = io.BytesIO()
        torch.save({"format": _FORMAT, "made_of": dict(made_of), **content}, buffer)
        write_whole(folder / _FILE, buffer.getvalue())

    @classmethod
    def load(cls, folder: Path, made_of: Mapping[str, str]) -> State | None:
        """Read the run of a folder.

        Args:
            folder: The run's.
            made_of: Of the run that is to go on.

        Returns:
            It; None where there is none.

        Raises:
            MrFlowError: The file is damaged, or of another run.
        """
        file = folder / _FILE
        if not file.is_file():
            return None
        try:
            said = cast("dict[str, Any]", torch.load(file, map_location="cpu", weights_only=True))
            before, form = cast("dict[str, str]", said.pop("made_of")), said.pop("format")
            checks = [Check.from_dict(each) for each in json.loads(said.pop("checks"))]
            found = cls(checks=checks, **said)
        except Exception as error:
            raise MrFlowError(
                f"{shown(file)} cannot be read, so tuning cannot go on from it; delete it, or choose another folder."
            ) from error
        other = [name for name in dict.fromkeys((*before, *made_of)) if before.get(name) != made_of.get(name)]
        if form != _FORMAT or other:
            raise MrFlowError(
                f"{shown(folder)} holds a tuning run of another {' and '.join(other) or 'version'}; choose another "
                "folder, or repeat that run's options to go on with it."
            )
        return found


def fingerprint(network: nn.Module, named: Mapping[str, str], lists: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What a run is made of: that of the run that goes on must be the same.

    Args:
        network: Its layers' names, shapes and first weights count.
        named: What counts as it is, by name.
        lists: What counts by a checksum, by name.

    Returns:
        A short text for each name, and for "model".
    """
    model = hashlib.sha256()
    for name, each in sorted(network.named_parameters()):
        if "lora_" not in name:
            first = float(each.detach().flatten()[0])
            model.update(f"{name.replace('.base_layer', '')} {tuple(each.shape)} {first}\n".encode())
    sums = {name: hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] for name, texts in lists.items()}
    return {**named, **sums, "model": model.hexdigest()[:16]}
