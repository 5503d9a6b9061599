"""Files that are not what they should be: judged by first bytes and declared sizes, in one sentence, at no cost."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched._runtime.torchvision_ops import ensure_ops
from mrflow_sched.upscaling import contents, load
from mrflow_sched.upscaling.load import load_upscaler, read_scale
from mrflow_sched.upscaling.model import ModelUpscaler
from mrflow_sched.upscaling.pickles import Declared, read_pickle


@pytest.fixture(scope="module", autouse=True)
def _imports() -> None:
    """Import spandrel first: what that allocates is no file's."""
    ensure_ops()
    import_module("spandrel")


def esrgan(**options: Any) -> dict[str, Tensor]:
    """Weights of spandrel's own ESRGAN network, tiny and random."""
    ensure_ops()
    from spandrel.architectures.ESRGAN import ESRGAN

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ESRGAN(**{"num_filters": 4, "num_blocks": 1, "scale": 2, **options})
    return dict(net.state_dict())


def refused(path: Path, allowance: int = 1 << 20) -> str:
    """The sentence with which a file is refused, by the loader and by the reader of scales alike.

    Python's own allocations stay below twice the file's size and `allowance` bytes.
    """
    said: list[str] = []
    for read in (lambda: load_upscaler(path, device="cpu"), lambda: read_scale(path)):
        tracemalloc.start()
        try:
            with pytest.raises(MrFlowError) as caught:
                read()
            assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size + allowance
        finally:
            tracemalloc.stop()
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert path.name in said[0]
    assert said[0].isprintable()
    assert said[0].endswith(".")
    assert len(said[0]) < 600
    return said[0]


def write_zip(path: Path, entries: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def tensor_pickle(numel: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """The pickle of {"x": a tensor of these sizes}, as torch writes it."""

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    identity = text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(numel)
    sizes = b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, stride)) + b"t"
    tail = b"\x89ccollections\nOrderedDict\n)RtR"
    return (
        b"\x80\x02}"
        + text("x")
        + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + identity
        + b"tQ"
        + number(offset)
        + sizes
        + tail
        + b"s."
    )


# ------------------------------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a gzip archive", gzip.compress), ("a bzip2 archive", bz2.compress), ("an xz archive", lzma.compress)],
)
def test_compressed_archives_are_refused_by_their_first_bytes(tmp_path: Path, name: str, pack: Any) -> None:
    """A tar header in a few hundred bytes may announce gigabytes: looking for one would unpack them."""
    header = bytearray(512)
    header[:15] = b"././@LongLink\0\0"
    header[124:136] = b"77777777777\0"
    header[156:157] = b"L"
    path = tmp_path / "bomb.pth"
    path.write_bytes(pack(bytes(header) + bytes(8 << 20)))
    assert f"it is {name}" in refused(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html><title>404</title></html>", "a web page"),
        (b"\n<html>", "a web page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "a PNG image"),
        (b"GGUF" + bytes(40), "a GGUF file"),
        (b"7767517\n3 3\n", "an ncnn file"),
        (bytes(257) + b"ustar" + bytes(300), "a tar archive"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_files_are_named(tmp_path: Path, content: bytes, said: str, suffix: str) -> None:
    (tmp_path / f"some{suffix}").write_bytes(content)
    assert f"it is {said}" in refused(tmp_path / f"some{suffix}")


@pytest.mark.parametrize("entry", ["a/data.pkl", "a/data/0"])
def test_zip_entries_that_would_grow(tmp_path: Path, entry: str) -> None:
    good = {"a/data.pkl": tensor_pickle(4, (4,), (1,)), "a/data/0": bytes(16)}
    path = write_zip(tmp_path / "bomb.pth", {**good, entry: bytes(64 << 20)}, zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(path)


def test_a_directory_that_lies_about_sizes(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "lie.pth", {"a/data.pkl": tensor_pickle(4, (4,), (1,)), "a/data/0": bytes(16)})
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02")
    data[place + 20 : place + 28] = struct.pack("<LL", 1 << 30, 1 << 30)
    path.write_bytes(data)
    assert "more bytes than the file has" in refused(path)


def test_a_directory_of_a_million_entries(tmp_path: Path) -> None:
    path = tmp_path / "many.pth"
    record = b"PK\x01\x02" + bytes(42)
    directory = record * 50_000
    end = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 50_000, 50_000, len(directory), 30, 0)
    path.write_bytes(b"PK\x03\x04" + bytes(26) + directory + end)
    assert "directory has 2,300,000 bytes" in refused(path)


def test_torchscript_is_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "script.pth", {"a/data.pkl": b"\x80\x02}.", "a/code/__torch__.py": b"import os"})
    assert "TorchScript" in refused(path)


def test_a_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    assert "zip archive without a table" in refused(write_zip(tmp_path / "other.pth", {"a.txt": b"hello"}))


# ------------------------------------------------------------------------------------------------------- declared sizes


@pytest.mark.parametrize(
    "declared",
    [
        (1 << 40, (1 << 40,), (1,), 0),
        (5, (5,), (1,), 0),
        (4, (1 << 30,), (0,), 0),
        (4, (4,), (1,), 1),
        (4, (2, 2), (3, 1), 0),
        (4, (-4,), (1,), 0),
        (4, (1 << 62, 1 << 62), (1, 1), 0),
        (4, (1,) * 60, (1,) * 60, 0),
    ],
)
def test_more_values_than_the_file_holds(tmp_path: Path, declared: tuple[Any, ...]) -> None:
    path = write_zip(tmp_path / "lie.pth", {"a/data.pkl": tensor_pickle(*declared), "a/data/0": bytes(16)})
    assert "it declares" in refused(path) or "it is cut short, or declares more values" in refused(path)


def test_a_giant_of_a_few_kilobytes(tmp_path: Path) -> None:
    """Tensors without strides declare an ESRGAN of 8192 features and 17 GB."""
    table = {
        name: torch.zeros(1).expand(*(8192 if side == 4 else side for side in value.shape))
        for name, value in esrgan().items()
    }
    torch.save(table, tmp_path / "giant.pth")
    assert (tmp_path / "giant.pth").stat().st_size < 20_000
    assert "declares more values than it holds" in refused(tmp_path / "giant.pth")


def test_one_block_shown_by_hundreds_of_tensors(tmp_path: Path) -> None:
    block = torch.zeros(1000)
    torch.save({f"body.{index % 9}.a{index}": block for index in range(300)}, tmp_path / "shared.pth")
    assert "declares more values than it holds" in refused(tmp_path / "shared.pth")


def test_a_wide_network_of_which_the_file_holds_one_layer(tmp_path: Path) -> None:
    table = esrgan()
    table["model.0.weight"] = torch.zeros(20_000, 3, 3, 3)
    save_file(table, tmp_path / "wide.safetensors")
    assert "size mismatch" in refused(tmp_path / "wide.safetensors")


def test_layers_without_end(tmp_path: Path) -> None:
    table = esrgan()
    table["model.1.sub.60.RDB1.conv1.0.weight"] = torch.zeros(1)
    save_file(table, tmp_path / "deep.safetensors")
    with pytest.raises(MrFlowError, match="more layers than any real model has"):
        read_scale(tmp_path / "deep.safetensors")


def test_a_scale_that_no_memory_holds(tmp_path: Path) -> None:
    ensure_ops()
    from spandrel.architectures.Compact import Compact

    save_file(Compact(num_feat=1, num_conv=1, upscale=40).state_dict(), tmp_path / "x40.safetensors")
    assert "enlarges 40 times" in refused(tmp_path / "x40.safetensors")


# -------------------------------------------------------------------------------------------------------------- pickles


def laughing(depth: int, end: bytes) -> bytes:
    """Tuples of the tuple before, twice: 2**depth leaves in a few bytes."""
    body = b"K\x01K\x02\x86q\x00"
    for index in range(1, depth):
        body += b"h" + bytes([index - 1]) + b"h" + bytes([index - 1]) + b"\x86q" + bytes([index])
    return b"\x80\x02" + body + b"}h" + bytes([depth - 1]) + end


@pytest.mark.parametrize(
    "content",
    [
        laughing(60, b"X\x01\x00\x00\x00as."),
        b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
        b"\x80\x02}X\x01\x00\x00\x00x" + b"]" * 200_000 + b"a" * 199_999 + b"s.",
        b"\x80\x02(" + b"N" * 1_000_000 + b"t.",
        b"\x80\x02X\xff\xff\xff\xffabc.",
        b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".",
        b"\x80\x02a.",
        b"\x80\x02h\x05.",
        b"\x80\x02)R.",
        b"\x80\x02" + b")\x85" * 900_000 + b".",
    ],
)
def test_pickles_that_hang_or_swell_elsewhere(tmp_path: Path, content: bytes) -> None:
    refused(write_zip(tmp_path / "bomb.pth", {"a/data.pkl": content}), allowance=8 << 20)


@pytest.mark.parametrize(
    ("content", "asked"),
    [
        (b"\x80\x02cposix\nsystem\nX\x01\x00\x00\x00x\x85R.", "posix.system"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "posix.system"),
        (b"\x80\x02c__builtin__\neval\n.", "__builtin__.eval"),
        (b"\x80\x02ctorch\nload\n.", "torch.load"),
        (b"\x80\x02cos\x1b[31m\nsystem\n.", "os\\x1b[31m.system"),
    ],
)
def test_what_a_pickle_asks_to_run_is_named(tmp_path: Path, content: bytes, asked: str) -> None:
    assert f"asks to run {asked}, which was refused" in refused(write_zip(tmp_path / "a.pth", {"a/data.pkl": content}))


@pytest.mark.parametrize(
    "content", [b"\x80\x02(cposix\nsystem\no.", b"\x80\x02\x82\x01.", b"\x80\x02(iposix\nsystem\n."]
)
def test_instructions_that_weights_do_not_need(content: bytes) -> None:
    with pytest.raises(MrFlowError, match=r"refused|instruction"):
        read_pickle(io.BytesIO(content))


@settings(max_examples=300)
@given(st.binary(max_size=60).map(lambda tail: b"\x80\x02" + tail))
def test_any_bytes_end_in_a_table_or_a_refusal(content: bytes) -> None:
    with suppress(MrFlowError):
        read_pickle(io.BytesIO(content))


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(0, 255), st.sampled_from([".pth", ".safetensors", "old.pth"]))
def test_a_changed_byte_ends_in_an_upscaler_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int, kind: str
) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"a{kind}"
    if kind == ".safetensors":
        save_file(esrgan(num_filters=1), path)
    else:
        torch.save(esrgan(num_filters=1), path, _use_new_zipfile_serialization=kind == ".pth")
    data = bytearray(path.read_bytes())
    data[place % len(data)] = value
    path.write_bytes(data)
    with suppress(MrFlowError):
        load_upscaler(path, device="cpu", dtype="float32")


# ---------------------------------------------------------------------------------------------------------- safetensors


def write_safetensors(path: Path, header: Any, values: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + values)
    return path


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [50_000, 50_000], "data_offsets": [0, 10**10]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "\x1b[31m", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
        {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "ab", "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"shape": [1]},
        [],
        None,
        7,
    ],
)
def test_headers_that_lie(tmp_path: Path, entry: Any) -> None:
    said = refused(write_safetensors(tmp_path / "a.safetensors", {"x": entry}, bytes(4)))
    assert "sizes or types that weights do not have" in said or "cut short" in said


@pytest.mark.parametrize(
    ("header", "length", "said"),
    [
        (b"{}", 2**63, "cut short"),
        (b"{" + b"[" * 100_000, None, "damaged"),
        (b'{"x":' + b"9" * 10_000 + b"}", None, "damaged"),
        (b"{" + b" " * (3 << 20) + b"}", None, "3,145,730 bytes"),
        (b"{}", None, "no known super-resolution model"),
        (b'{"a\\ud800":1}', None, "sizes or types"),
    ],
)
def test_headers_that_are_none(tmp_path: Path, header: bytes, length: int | None, said: str) -> None:
    assert said in refused(write_safetensors(tmp_path / "a.safetensors", header, length=length))


# ---------------------------------------------------------------------------------------------- what must go on working


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("half", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_is_read_is_what_torch_reads(tmp_path: Path, old: bool, half: torch.dtype) -> None:
    table = {name: value.to(half) for name, value in esrgan().items()}
    whole = torch.arange(24.0).view(2, 3, 4)
    table |= {
        "view": whole[1:, :, ::2],
        "turned": whole.transpose(0, 2),
        "none": torch.empty(0, 3),
        "one": whole[0, 0, 3],
    }
    saved = {"epoch": 3, "loss": 0.5, "params": {**table, "bound": torch.nn.Parameter(whole)}}
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    found = contents.read_contents(tmp_path / "a.pth")
    read = found.table
    assert isinstance(read, dict)
    declared = {name: value for name, value in read["params"].items() if isinstance(value, Declared)}
    contents.check_declared(found, declared)
    values = contents.read_tensors(tmp_path / "a.pth", found, declared)
    expected = torch.load(tmp_path / "a.pth", weights_only=True)["params"]
    assert list(values) == list(expected)
    assert all(values[name].dtype == expected[name].dtype for name in expected)
    assert all(torch.equal(values[name], expected[name]) for name in expected)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda table: {"params_ema": table, "params": {}},
        lambda table: {"state_dict": {f"netG.{name}": value for name, value in table.items()}},
        lambda table: {"epoch": 1, "model_state_dict": {f"module.{name}": value for name, value in table.items()}},
        lambda table: {"g_ema": table},
        lambda table: {"params": {f"_orig_mod.{name}": value for name, value in table.items()}},
        lambda table: {f"module._orig_mod.{name}": value for name, value in table.items()},
        lambda table: {f"_orig_mod.module.{name}": value for name, value in table.items()},
        lambda table: {**table, "optimizer": {"state": {0: {"step": torch.zeros(1)}}, "param_groups": [{"lr": 0.1}]}},
    ],
)
def test_wrappings_of_training_programs(tmp_path: Path, wrap: Any, old: bool) -> None:
    table = esrgan()
    torch.save(wrap(table), tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    torch.save(table, tmp_path / "plain.pth")
    picture = torch.rand((1, 3, 6, 7), generator=torch.Generator().manual_seed(0))
    wrapped, plain = (load_upscaler(tmp_path / f"{n}.pth", device="cpu", dtype="float32") for n in ("a", "plain"))
    assert torch.equal(wrapped(picture), plain(picture))
    assert read_scale(tmp_path / "a.pth") == 2


def test_harmless_things_beside_the_weights(tmp_path: Path) -> None:
    import argparse

    import numpy as np

    beside = {"psnr": np.float64(31.5), "opt": argparse.Namespace(scale=2), "curve": np.zeros(3)}
    torch.save({"params": esrgan(), **beside}, tmp_path / "a.pth")
    assert load_upscaler(tmp_path / "a.pth", device="cpu").scale == 2


def test_python_2s_ordered_dictionaries(tmp_path: Path) -> None:
    """REDUCE of OrderedDict with a list of pairs, and protocol 2's bytes as names."""
    content = b"\x80\x02ccollections\nOrderedDict\n(](](U\x01aK\x07e](U\x01bNeetR."
    assert read_pickle(io.BytesIO(content)) == {"a": 7, "b": None}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle(tmp_path: Path, protocol: int) -> None:
    torch.save(esrgan(), tmp_path / "a.pth", pickle_protocol=protocol)
    assert load_upscaler(tmp_path / "a.pth", device="cpu").scale == 2
    value = {"a": [1, "b", (2,)], "c": {"d": None}}
    assert read_pickle(io.BytesIO(pickle.dumps(value, protocol))) == value


def test_first_bytes_decide_and_not_the_name(tmp_path: Path) -> None:
    save_file(esrgan(), tmp_path / "really-safetensors.pth")
    torch.save(esrgan(), tmp_path / "really-pickle.safetensors")
    for path in tmp_path.iterdir():
        assert load_upscaler(path, device="cpu").scale == 2
        assert read_scale(path) == 2


@pytest.mark.parametrize("first", [b"\x80", b"P", b"\x1f", b"<"])
def test_a_safetensors_length_may_look_like_anything(tmp_path: Path, first: bytes) -> None:
    text = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    text = text.ljust(256 + first[0])
    assert struct.pack("<Q", len(text))[:1] == first
    path = write_safetensors(tmp_path / "a.safetensors", text, bytes(4))
    assert "no known super-resolution model" in refused(path)


def test_networks_that_cannot_be_built_without_memory(tmp_path: Path) -> None:
    ensure_ops()
    from spandrel.architectures.RCAN import RCAN

    net = RCAN(scale=2, n_resgroups=1, n_resblocks=1, n_feats=16)
    save_file(net.state_dict(), tmp_path / "rcan.safetensors")
    upscaler = load_upscaler(tmp_path / "rcan.safetensors", device="cpu", dtype="float32")
    picture = torch.rand((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    before = picture.clone()
    assert upscaler(picture).shape == (1, 3, 16, 16)
    assert torch.equal(picture, before)  # this network scales its input in place
    with pytest.raises(MrFlowError, match="cannot be told without reading it whole"):
        read_scale(tmp_path / "rcan.safetensors")
    wide = dict(net.state_dict())
    wide["head.0.weight"] = torch.zeros(1, 1, 700, 700)  # the kernel of every layer
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(MrFlowError, match="do not fit together \\(a network larger than the file's weights"):
        load_upscaler(tmp_path / "wide.safetensors", device="cpu")


def test_scales_are_read_without_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(esrgan(num_filters=64), tmp_path / "x2.safetensors")
    torch.save(esrgan(num_filters=64, scale=4), tmp_path / "x4.pth")
    read: list[int] = []
    original = contents.read_tensors

    def count(file: Path, found: contents.Contents, table: Mapping[str, Declared]) -> dict[str, Tensor]:
        read.append(sum(one.numel * one.dtype.itemsize for one in table.values()))
        return original(file, found, table)

    monkeypatch.setattr(load, "read_tensors", count)
    assert (read_scale(tmp_path / "x2.safetensors"), read_scale(tmp_path / "x4.pth")) == (2, 4)
    assert all(
        size <= load._MOST_SMALL < path.stat().st_size / 1.5
        for size, path in zip(read, tmp_path.iterdir(), strict=True)
    )


def test_no_random_number_is_used_up(tmp_path: Path) -> None:
    save_file(esrgan(), tmp_path / "x2.safetensors")
    before = torch.random.get_rng_state()
    upscaler = load_upscaler(tmp_path / "x2.safetensors", device="cpu", dtype="bfloat16")
    assert isinstance(upscaler, ModelUpscaler)
    read_scale(tmp_path / "x2.safetensors")
    assert torch.equal(torch.random.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("wrong", [7, b"x.pth", torch.nn.Identity(), ["x.pth"], "", object()])
def test_what_is_no_path(wrong: Any) -> None:
    with pytest.raises(MrFlowError, match="upscaler must be the path"):
        load_upscaler(wrong)


@pytest.mark.parametrize("name", ["~nosuchuser/x.pth", "a\0b.pth", "\udcff.pth", "\x1b[31m.pth"])
def test_paths_of_nothing(name: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_upscaler(name)
    assert str(caught.value).isprintable()


def test_a_name_that_is_too_long() -> None:
    with pytest.raises(MrFlowError, match=r"cannot be read|no upscaler file"):
        load_upscaler("x" * 5000 + ".pth")


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save_file(esrgan(), tmp_path / "x2.safetensors")
    assert load_upscaler("~/x2.safetensors", device="cpu").scale == 2


@pytest.mark.parametrize("word", ["lanczos", "Lanczos"])
def test_lanczos_is_a_word(word: str) -> None:
    assert load_upscaler(word) == load_upscaler(None)
