"""Records: what an image remembers of its run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.images.record import RunRecord, library_versions

RECORD = RunRecord(
    plan="p",
    prompt="a star",
    negative=None,
    seed=1,
    batch=2,
    image=1,
    model="m",
    model_fingerprint="f",
    upscaler="u",
    upscaler_sha256=None,
    device="cpu",
    dtype="float32",
    vae_dtype="float32",
    threads=2,
    versions={"torch": "2"},
    dtypes={"transformer": "float32", "vae": "bfloat16", "upscaler": "float16"},
)


@given(prompt=st.text(), negative=st.none() | st.text(), seed=st.integers(0, 2**63), unfinished=st.booleans())
def test_a_record_survives_its_json(prompt: str, negative: str | None, seed: int, unfinished: bool) -> None:
    record = replace(RECORD, prompt=prompt, negative=negative, seed=seed, unfinished=unfinished)
    text = record.to_json()
    assert text.isascii()
    assert "\n" not in text
    assert RunRecord.from_json(text) == record


def test_newer_and_older_records_are_read() -> None:
    found = json.loads(RECORD.to_json())
    del found["unfinished"]
    assert RunRecord.from_json(json.dumps(found | {"added later": 1})) == RECORD


def test_the_dtype_of_a_part_is_found_in_records_of_any_age() -> None:
    assert [RECORD.dtype_of(part) for part in ("transformer", "vae", "upscaler", "unet")] == [
        *("float32", "bfloat16", "float16", None),
    ]
    older = json.loads(replace(RECORD, dtype="float16", vae_dtype="float32").to_json())
    del older["dtypes"]
    found = RunRecord.from_json(json.dumps(older))
    assert found.dtypes == {}
    assert [found.dtype_of(part) for part in ("unet", "text_encoder", "vae", "upscaler")] == [
        *("float16", "float16", "float32", None),
    ]


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": "1"}, {"seed": True}, {"versions": []}, {"prompt": None}, {"prompt": "\ud800"}, {"unfinished": 0}),
        *({"image": 2}, {"image": -1}, {"batch": 0}, {"batch": 10**9}, {"seed": -1}, {"seed": 2**64}),
        *({"threads": 0}, {"threads": 4097}, {"versions": {"torch": 2}}, {"dtypes": {"vae": None}}, {"dtypes": "all"}),
        *({"versions": {str(number): "1" for number in range(1000)}}, {"threads": float("nan")}),
    ],
)
def test_an_altered_record_is_refused(change: dict[str, Any]) -> None:
    text = json.dumps(json.loads(RECORD.to_json()) | change)
    with pytest.raises(MrFlowError, match=f"{next(iter(change))} = .*; the image's text was altered") as caught:
        RunRecord.from_json(text)
    assert str(caught.value).isprintable()
    for other in ("{", "[]", "null", "[" * 200_000):
        with pytest.raises(MrFlowError, match="altered"):
            RunRecord.from_json(other)


@pytest.mark.parametrize(
    "change",
    [
        *({"prompt": "x" * 1_000_001}, {"negative": "x" * 10**6 + "yz"}, {"plan": "\x1b" * 2_000_000}, {"plan": 7}),
        *({"model": "x" * 5000}, {"device": "\x1b[31m" * 1000}, {"versions": {"torch": "x" * 5000}}, {"seed": 10**400}),
        *({"upscaler_sha256": "x" * 5000}, {"threads": 10**30}, {"seed": float("inf")}, {"seed": 1.0}),
    ],
)
def test_what_is_longer_or_larger_than_any_record_is_refused_shortly(change: dict[str, Any]) -> None:
    with pytest.raises(MrFlowError, match="the image's text was altered") as caught:
        RunRecord.from_json(json.dumps(json.loads(RECORD.to_json()) | change))
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()
    longest = replace(RECORD, prompt="x" * 1_000_000)
    assert RunRecord.from_json(longest.to_json()) == longest
    for text in (" " * 70_000_000 + "{}", '{"seed": ' + "9" * 5000 + "}"):
        with pytest.raises(MrFlowError, match="the image's text was altered"):
            RunRecord.from_json(text)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=200)
@given(
    st.dictionaries(st.sampled_from(sorted(json.loads(RECORD.to_json()))), ANY).map(
        lambda change: json.dumps(json.loads(RECORD.to_json()) | change)
    )
    | ANY.map(json.dumps)
    | st.text()
)
def test_any_text_is_a_record_or_refused(text: str) -> None:
    said = ""
    try:
        record = RunRecord.from_json(text)
        assert RunRecord.from_json(record.to_json()) == record
    except MrFlowError as error:
        said = str(error)
    assert said.isprintable()
    assert len(said) < 400


def test_versions_name_what_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    from mrflow_sched.images import record

    monkeypatch.setattr(record, "_LIBRARIES", ("torch", "no-such-library"))
    found = library_versions()
    assert found["no-such-library"] == "absent"
    assert found["torch"][0].isdigit()
