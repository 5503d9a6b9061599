"""What a command loads: model and upscaler as they were asked for, or as the record of a repeated run says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_tools import RECORD

from mrflow_sched import demo
from mrflow_sched.apps.cli.load import find_upscaler, threads_of, upscaler_kind
from mrflow_sched.apps.cli.options import ModelChoices


def test_the_embedded_model_brings_its_upscaler_unless_the_record_was_made_without() -> None:
    own = Path(demo.upscaler_path())
    assert find_upscaler(ModelChoices()) == own
    assert find_upscaler(ModelChoices(), replace(RECORD, upscaler_sha256="0" * 64)) == own
    assert find_upscaler(ModelChoices(), RECORD) is None
    assert find_upscaler(ModelChoices(model="folder")) is None
    assert find_upscaler(ModelChoices(upscaler="Lanczos")) is None


def test_threads_of_a_record_are_put_back_even_after_an_error() -> None:
    before = torch.get_num_threads()
    record = replace(RECORD, threads=before + 1)
    with threads_of(record):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), threads_of(record):
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
    for other in (None, replace(record, device="cuda")):
        with threads_of(other):
            assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (ModelChoices(), "network"),
        (ModelChoices(upscaler="lanczos"), "interpolation"),
        (ModelChoices(model="folder"), "interpolation"),
        (ModelChoices(model="folder", upscaler=str(demo.upscaler_path())), "network"),
        (ModelChoices(upscaler="missing.pth"), "network"),
    ],
)
def test_the_kind_of_upscaler_is_known_before_anything_is_loaded(model: ModelChoices, kind: str) -> None:
    assert upscaler_kind(model) == kind
