"""`mrflow batch --ray`: actors make the same images, and one that is killed costs nothing."""

from __future__ import annotations

import json
import os
import signal
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
    monkeypatch.setattr("mrflow_sched.batch.ray_cluster.find_spec", lambda name: None)
    with pytest.raises(MrFlowError, match="--ray needs Ray, which is not installed"):
        RayPool(lambda device, threads: lambda task, cancel: task, "local", workers=1, device=None, threads=1)


def start(path: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mrflow_sched", "batch", str(path), *SMALL, "--json", "--out", str(out), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_images(process: subprocess.Popen[str], out: Path, count: int) -> None:
    end = time.monotonic() + 180
    while not (out.exists() and len(list(out.glob("*.png"))) >= count):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


def test_actors_make_the_same_images_though_one_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na blue star over green hills\n")
    out, alone = tmp_path / "out", tmp_path / "alone"
    process = start(path, out, "--batch", "20", "--ray", "local", "--workers", "2", "--threads", "1")
    wait_for_images(process, out, 2)
    actors = [each for each in psutil.Process(process.pid).children(recursive=True) if "_Actor" in _title(each)]
    assert actors
    actors[0].kill()
    found, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert (json.loads(found)["made"], json.loads(found)["failed"]) == (40, [])
    start(path, alone, "--batch", "20").communicate(timeout=240)
    names = sorted(file.name for file in alone.glob("*.png"))
    assert names == sorted(file.name for file in out.glob("*.png"))
    assert all((alone / name).read_bytes() == (out / name).read_bytes() for name in names)


@pytest.mark.parametrize("word", ["sleep", "stop"])
def test_an_actor_that_hangs_is_ended_and_its_task_tried_again(tmp_path: Path, word: str) -> None:
    pytest.importorskip("ray")
    script = tmp_path / "hangs.py"
    script.write_text(
        "import sys\n"
        "from batch_makers import WordMaker\n"
        "from test_batch_schedule import Notes, unit\n"
        "from mrflow_sched.batch.patience import Patience\n"
        "from mrflow_sched.batch.ray_pool import RayPool\n"
        "from mrflow_sched.batch.schedule import run_units\n"
        "pool = RayPool(WordMaker(), 'local', workers=1, device='cpu', threads=1)\n"
        "notes = Notes()\n"
        "run_units([unit(word) for word in sys.argv[1:]], pool, notes.outlet(), Patience(3.0))\n"
        "pool.close()\n"
        "print([(name, tries) for name, _, tries in notes.done], notes.aside)\n"
    )
    words = ["a", f"once {word} {tmp_path / 'mark'}", "b"]
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(here))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *words]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == str([("a", 1), (words[1], 2), ("b", 1)]) + " []"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_is_done(tmp_path: Path, number: int) -> None:
    pytest.importorskip("ray")
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n")
    out = tmp_path / "out"
    process = start(path, out, "--batch", "1000", "--ray", "local", "--workers", "1", "--threads", "1")
    wait_for_images(process, out, 2)
    process.send_signal(number)
    found, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    value = json.loads(found)
    assert value["cancelled"]
    assert "The same command goes on" in value["error"]
    assert len(list(out.glob("*.png"))) == value["made"]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
