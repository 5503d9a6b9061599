"""`mrflow batch --ray`: actors make the same images, and one that is killed costs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.batch.ray_pool import RayPool

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--size", "32x32", "--low-steps", "3", "--refine-steps", "1", "--dtype", "float32", "--device", "cpu")


def test_without_ray_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrflow_sched.batch.ray_pool.find_spec", lambda name: None)
    with pytest.raises(MrFlowError, match="--ray needs Ray, which is not installed"):
        RayPool(lambda device, threads: lambda task, cancel: task, "local", workers=1, device=None, threads=1)


def test_actors_make_the_same_images_though_one_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na blue star over green hills\n")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mrflow_sched", "batch", str(path), *SMALL, "--batch", "20", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--out", str(out), "--ray", "local", "--workers", "2", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    end = time.monotonic() + 180
    while not (out.exists() and len(list(out.glob("*.png"))) >= 2):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    actors = [each for each in psutil.Process(process.pid).children(recursive=True) if "_Actor" in _title(each)]
    assert actors
    actors[0].kill()
    found, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert (json.loads(found)["made"], json.loads(found)["failed"]) == (40, [])
    alone = tmp_path / "alone"
    subprocess.run([*command, "--out", str(alone)], check=True, env=environment, capture_output=True)
    names = sorted(file.name for file in alone.glob("*.png"))
    assert names == sorted(file.name for file in out.glob("*.png"))
    assert all((alone / name).read_bytes() == (out / name).read_bytes() for name in names)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
