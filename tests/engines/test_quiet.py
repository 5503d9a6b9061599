"""Log lines of the libraries: some are left out or shortened while a call makes them, and no others."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Generator

import pytest
import torch

from mrflow_sched import demo
from mrflow_sched.engines.diffusers.quiet import leaving_out, short_lines


@pytest.fixture
def heard() -> Generator[io.StringIO, None, None]:
    """What the handlers of both libraries write."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).addHandler(handler)
    yield said
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).removeHandler(handler)


def test_only_named_lines_are_left_out_and_only_while_the_block_runs(heard: io.StringIO) -> None:
    log = logging.getLogger("diffusers.somewhere")
    with leaving_out("of no use", "at all"):
        log.warning("this is %s use", "of no")
        log.warning("this is of use")
        log.warning("not at all")
    log.warning("and of no use")
    assert heard.getvalue() == "this is of use\nand of no use\n"


def test_a_quoted_prompt_is_cut_short(heard: io.StringIO) -> None:
    log = logging.getLogger("transformers.somewhere")
    with short_lines():
        log.warning("cut off: %s", "x" * 5000)
        log.warning("Token indices sequence length is longer than 77")
        log.warning("short")
    cut, short = heard.getvalue().splitlines()
    assert cut.startswith("cut off: xxx")
    assert cut.endswith("x...")
    assert len(cut) == 203
    assert short == "short"


def test_libraries_do_not_repeat_a_prompt_that_the_engine_says_is_cut(heard: io.StringIO) -> None:
    engine = demo.load_engine(device="cpu", dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the engine's own sentence
        engine.encode_text(["a blue star over green hills " * 400])
    assert heard.getvalue() == ""


def test_float16_on_a_cpu_loads_and_decodes_in_silence(heard: io.StringIO) -> None:
    engine = demo.load_engine(device="cpu", dtype={"default": "float32", "vae": "float16"})
    engine.decode(torch.zeros(1, *engine.latent_shape(32, 32)))
    assert heard.getvalue() == ""
