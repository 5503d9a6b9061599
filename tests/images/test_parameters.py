"""The `parameters` text read back: quoted values, prompts over several lines, and what a prompt may hold of it."""

from __future__ import annotations

import json

from mrflow_sched.images.parameters import read_parameters

LINE = 'Steps: 12, Size: 512x384, MrFlow: "refused (no, never: \\"x\\")", Lora hashes: "a: 1, Seed: 5", Seed: 7'


def test_the_parts_come_back_as_they_were_written() -> None:
    found = read_parameters(f"a red circle,\n  on green \nNegative prompt: fog, rain\nmore fog\n{LINE}")
    assert found.prompt == "a red circle,\n  on green "
    assert found.negative == "fog, rain\nmore fog"
    assert found.values == {
        "Steps": "12",
        "Size": "512x384",
        "MrFlow": 'refused (no, never: "x")',
        "Lora hashes": "a: 1, Seed: 5",
        "Seed": "7",
    }


def test_a_prompt_that_looks_like_the_last_line_is_prompt() -> None:
    found = read_parameters(f"Steps: 1, Sampler: x, Seed: 3\na star\n{LINE}")
    assert found.prompt == "Steps: 1, Sampler: x, Seed: 3\na star"
    assert found.values["Seed"] == "7"


def test_a_text_without_values_is_all_prompt() -> None:
    found = read_parameters("a star\nNegative prompt: fog")
    assert (found.prompt, found.negative, found.values) == ("a star", "fog", {})
    assert read_parameters("").prompt == ""


def test_a_damaged_value_is_left_out_and_the_first_of_two_counts() -> None:
    found = read_parameters('a\nSteps: 4, Seed: 1, Bad: "\\x", Seed: 2, Note: ' + json.dumps("two\nlines"))
    assert found.values == {"Steps": "4", "Seed": "1", "Note": "two\nlines"}
