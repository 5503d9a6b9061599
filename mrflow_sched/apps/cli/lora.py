"""LoRA weights on a loaded pipeline."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, cast

from mrflow_sched._runtime.errors import MrFlowError, first_line, shown
from mrflow_sched.apps.cli.console import say

if TYPE_CHECKING:
    from torch import Tensor

    from mrflow_sched.apps.cli.inputs import LoraChoice

_USUAL = 4.0
"""Scales of LoRAs are between 0 and 1.5 or so; those of sliders go further."""


def add_loras(pipe: Any, choices: Sequence[LoraChoice]) -> None:
    """Put LoRAs on a pipeline, each with its scale. The weights are read here: no code, and no network.

    Args:
        pipe: A diffusers pipeline.
        choices: The LoRAs, in the order in which they are added.

    Raises:
        MrFlowError: The pipeline takes no LoRA, a file holds none that fits it, or NaN.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise MrFlowError(f"--lora was given, but {type(pipe).__name__} takes no LoRA; leave it out.")
    names = [f"lora{number}" for number in range(len(choices))]
    for name, choice in zip(names, choices, strict=True):
        file = str(choice.file)
        try:
            weights = _weights(file)
            _check_finite(file, weights)
            with _quiet():
                pipe.load_lora_weights(weights, adapter_name=name)
        except MrFlowError:
            raise
        except Exception as error:  # whatever a reader of a foreign file, or a layer of another size, may raise
            raise MrFlowError(
                f"--lora is {file!r}, which cannot be put on this model ({first_line(error)}); give a LoRA made for it."
            ) from error
        if not any(name in adapters for adapters in pipe.get_list_adapters().values()):
            raise MrFlowError(f"--lora is {file!r}, none of whose weights fits this model; give a LoRA made for it.")
        if abs(choice.scale) > _USUAL:
            say(f"--lora has the scale {choice.scale:g}, far from the 1 it was trained for; expect a spoiled image.")
    pipe.set_adapters(names, [choice.scale for choice in choices])


def _check_finite(file: str, weights: dict[str, Tensor]) -> None:
    """Refuse a file whose numbers would spoil every image."""
    for name, weight in weights.items():
        if weight.dtype.is_floating_point and not weight.float().isfinite().all():
            raise MrFlowError(
                f"--lora is {file!r}, whose weight {shown(name)!r} holds NaN or infinity; download it again, or "
                "leave it out."
            )


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """Leave out what diffusers and peft say of LoRAs that load as they should."""
    from mrflow_sched.engines.diffusers.quiet import leaving_out

    with leaving_out("No LoRA keys associated to"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        yield


def _weights(file: str) -> dict[str, Tensor]:
    import safetensors

    with cast("Any", safetensors).safe_open(file, framework="pt") as opened:  # its types are partial
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
