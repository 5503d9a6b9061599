"""How text of others is quoted in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrflow_sched._runtime.errors import first_line, shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("CLIPTextModel", "CLIPTextModel"),
        ("a château, 猫, 🐱", "a château, 猫, 🐱"),
        ("\x1b]0;title\x07x", r"\x1b]0;title\x07x"),
        ("two\nlines\r", r"two\nlines\r"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\udc80", r"\udc80"),
        (12.5, "12.5"),
        (["a"], "['a']"),
        ("x" * 80, "x" * 80),
        ("x" * 81, "x" * 77 + "..."),
        ("\0" * 10**6, r"\x00" * 19 + r"\..."),
    ],
)
def test_foreign_text_is_shown_without_effect(text: object, said: str) -> None:
    assert shown(text) == said


@given(st.text(st.characters(codec=None)), st.integers(4, 200))
def test_whatever_comes_prints_and_is_short(text: str, most: int) -> None:
    said = shown(text, most)
    assert len(said) <= most
    assert said.isprintable()
    if text.isprintable() and len(text) <= most:
        assert said == text


def test_errors_are_told_in_one_line() -> None:
    told: Sequence[tuple[Exception, str]] = (
        (ValueError("first\nsecond"), "first"),
        (KeyError(), "KeyError"),
        (RuntimeError("Error(s) in loading state_dict for Net:\n\tsize mismatch for a."), "size mismatch for a"),
        (ValueError("ends with a stop."), "ends with a stop"),
        (ValueError("x" * 500), "x" * 157 + "..."),
        (ValueError("key \x1b[31mred"), r"key \x1b[31mred"),
    )
    for error, line in told:
        assert first_line(error) == line
