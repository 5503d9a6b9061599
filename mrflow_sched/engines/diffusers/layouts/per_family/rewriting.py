"""Pipelines that have a language model rewrite prompts before they read them."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.base import Layout, parameter_defaults
from mrflow_sched.engines.diffusers.quiet import short_lines

__all__ = ["RewritingLayout"]


class RewritingLayout(Layout):
    """A pipeline that rewrites prompts where `rewrite_switch` asks for it: once for all stages of a run."""

    @override
    def rewritten(self, prompts: Sequence[str], options: Mapping[str, Any], size: tuple[int, int]) -> list[str]:
        # Each by itself: in a batch, padding would change what is written.
        switch = self.rewrite_switch
        if not options.get(switch, parameter_defaults(self.pipe.__call__)[switch]) or not self._can_rewrite():
            return list(prompts)
        made: dict[str, str] = {}
        with torch.no_grad(), short_lines():
            for prompt in dict.fromkeys(prompts):
                with _always_the_same_numbers(self.device):
                    made[prompt] = self._rewrite(prompt, size)
        return [made[prompt] for prompt in prompts]

    def _can_rewrite(self) -> bool:
        """Whether the pipeline has the model that it needs for it."""
        return True

    def _rewrite(self, prompt: str, size: tuple[int, int]) -> str:
        raise NotImplementedError


@contextlib.contextmanager
def _always_the_same_numbers(device: torch.device) -> Generator[None, None, None]:
    """Global random numbers of one seed inside, as text is drawn without a generator; untouched ones afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # pyright: ignore[reportUnknownMemberType]
        torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
        yield
