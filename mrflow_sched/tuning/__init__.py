"""Reward tuning: a LoRA of a flow model that raises a reward of its images, watched by a second one."""

from __future__ import annotations

from mrflow_sched.tuning.run import LORA, RECORD, Tuned, tune
from mrflow_sched.tuning.settings import TuneSettings

__all__ = ["LORA", "RECORD", "TuneSettings", "Tuned", "tune"]
