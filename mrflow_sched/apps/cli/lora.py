"""LoRA weights on a loaded pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from mrflow_sched._runtime.errors import MrFlowError, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from mrflow_sched.apps.cli.inputs import LoraChoice


def add_loras(pipe: Any, choices: Sequence[LoraChoice]) -> None:
    """Put LoRAs on a pipeline, each with its scale. The weights are read here: no code, and no network.

    Args:
        pipe: A diffusers pipeline.
        choices: The LoRAs, in the order in which they are added.

    Raises:
        MrFlowError: The pipeline takes no LoRA, or a file holds none that fits it.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise MrFlowError(f"--lora was given, but {type(pipe).__name__} takes no LoRA; leave it out.")
    names = [f"lora{number}" for number in range(len(choices))]
    for name, choice in zip(names, choices, strict=True):
        file = str(choice.file)
        try:
            pipe.load_lora_weights(_weights(file), adapter_name=name)
        except Exception as error:  # whatever a reader of a foreign file, or a layer of another size, may raise
            raise MrFlowError(
                f"--lora is {file!r}, which cannot be put on this model ({first_line(error)}); give a LoRA made for it."
            ) from error
        if not any(name in adapters for adapters in pipe.get_list_adapters().values()):
            raise MrFlowError(f"--lora is {file!r}, none of whose weights fits this model; give a LoRA made for it.")
    pipe.set_adapters(names, [choice.scale for choice in choices])


def _weights(file: str) -> dict[str, Tensor]:
    import safetensors

    with cast("Any", safetensors).safe_open(file, framework="pt") as opened:  # its types are partial
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
