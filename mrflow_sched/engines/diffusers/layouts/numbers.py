"""The numbers of a pipeline's scheduler and VAE that are computed with: diffusers takes whatever a file says."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.checks import checked_number, checked_numbers

__all__ = ["check_numbers"]

_ADVICE = "correct the model's configuration, or download the model again"
_MOST_CHANNELS = 1024
_SCHEDULER: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "num_train_timesteps": (1, 1e6),
        "shift": (1e-3, 1e3),
        "flow_shift": (1e-3, 1e3),
        "base_shift": (-20, 20),
        "max_shift": (-20, 20),
        "base_image_seq_len": (1, 2**31),
        "max_image_seq_len": (1, 2**31),
        "shift_terminal": (0, 1),
    }
)
_VAE: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"scaling_factor": (1e-6, 1e6), "shift_factor": (-1e6, 1e6), "batch_norm_eps": (0, 1)}
)


def check_numbers(pipe: Any) -> None:
    """Refuse a configuration with a value that no computation can use.

    Args:
        pipe: A loaded diffusers pipeline.

    Raises:
        MrFlowError: A value is no number, or outside what models have.
    """
    for part, ranges in (("scheduler", _SCHEDULER), ("vae", _VAE)):
        if getattr(pipe, part, None) is None:  # pixels are the latents
            continue
        config = dict(getattr(pipe, part).config)
        for name, (low, high) in ranges.items():
            if config.get(name) is not None:
                checked_number(config[name], f"pipe.{part}.config.{name}", low, high, _ADVICE)
    if getattr(pipe, "vae", None) is None:
        return
    config = dict(pipe.vae.config)
    channels = config.get("latent_channels") or config.get("z_dim")
    for name in ("latents_mean", "latents_std"):
        if config.get(name) is None:
            continue
        count = len(checked_numbers(config[name], f"pipe.vae.config.{name}", _MOST_CHANNELS))
        if channels is not None and count != channels:
            raise MrFlowError(f"pipe.vae.config.{name} must hold {channels} numbers, got {count}; {_ADVICE}.")
