"""`mrflow batch` into S3, as moto's server speaks it: names are taken exclusively, a rerun makes nothing again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mrflow_sched.batch.store import open_store

SMALL = ("--size", "32x32", "--low-steps", "3", "--refine-steps", "1", "--dtype", "float32", "--device", "cpu")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    moto: Any = pytest.importorskip("moto.server")
    s3fs: Any = pytest.importorskip("s3fs")
    import fsspec

    library: Any = fsspec
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setitem(library.config.conf, "s3", {"endpoint_url": f"http://{host}:{port}"})
    s3fs.S3FileSystem.clear_instance_cache()
    library.filesystem("s3").makedirs("images", exist_ok=True)  # moto's buckets outlive its servers
    yield f"s3://images/{tmp_path.name}"
    server.stop()


def test_a_name_is_taken_once(bucket: str) -> None:
    store = open_store(bucket)
    assert store.put_new("a.png", b"one")
    assert not store.put_new("a.png", b"two")
    assert open_store(bucket).read("a.png") == b"one"


def test_images_go_there_once(bucket: str, mrflow: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a star\na red circle\n")
    code, out, _ = mrflow("batch", str(path), *SMALL, "--out", bucket, "--json")
    assert (code, json.loads(out)["made"]) == (0, 2)
    code, out, _ = mrflow("batch", str(path), *SMALL, "--out", bucket, "--json")
    assert (code, json.loads(out)["made"], json.loads(out)["there"]) == (0, 0, 2)
    store = open_store(bucket)
    files = [json.loads(line)["file"] for line in store.lines()]
    assert sorted(store.names()) == sorted([*files, "manifest.jsonl"])
    assert all(store.read(name).startswith(b"\x89PNG") for name in files)
