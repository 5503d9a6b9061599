"""`mrflow serve --ray`: replicas make what a single run makes, and one that is lost costs nothing."""

from __future__ import annotations

import asyncio
import base64
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from serve_tools import ON_CPU, SMALL, WORDS, Process, served_on, until, wanted
from test_serve_process import ask, metric

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.serve import ray_engines
from mrflow_sched.apps.serve.limits import Refused
from mrflow_sched.apps.serve.ray_engines import RayEngines
from mrflow_sched.apps.serve.served import ImageRequest, Made, Served, make_image
from mrflow_sched.batch.ray_cluster import Cluster
from mrflow_sched.plan.make import make_plan
from mrflow_sched.sampling.progress import Progress


class Lost(Exception):
    """In place of Ray's error for a replica that is gone."""


class Stream:
    """What a replica yields, from an event loop of its own."""

    def __init__(self, steps: Any) -> None:
        self.loop, self.steps, self.cancelled = asyncio.new_event_loop(), steps, threading.Event()

    def __iter__(self) -> Iterator[Any]:
        while not self.cancelled.is_set():
            try:
                yield self.loop.run_until_complete(anext(self.steps))
            except StopAsyncIteration:
                return
        self.loop.run_until_complete(self.steps.aclose())

    def cancel(self) -> None:
        self.cancelled.set()


class FakeServe:
    """Ray Serve with one replica, in this process."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.deleted: list[str] = []
        self.lost = 0
        self.streams: list[Stream] = []
        self.status = lambda: SimpleNamespace(applications={}, proxies={})
        self.ended = False

    def start(self, *, proxy_location: str) -> None:
        assert proxy_location == "Disabled"

    def deployment(self, kind: Any) -> Any:
        def options(**given: Any) -> Any:
            self.options = given
            return SimpleNamespace(bind=lambda *words: kind(*words))

        return SimpleNamespace(options=options)

    def run(self, replica: Any, *, name: str, route_prefix: None) -> Any:
        def stream(asked: Any, index: int) -> Any:
            if self.lost:
                self.lost -= 1

                def gone() -> Iterator[Any]:
                    raise Lost
                    yield

                return gone()
            self.streams.append(Stream(replica.make(asked, index)))
            return self.streams[-1]

        described = SimpleNamespace(remote=lambda: SimpleNamespace(result=lambda: asyncio.run(replica.describe())))
        made = SimpleNamespace(make=SimpleNamespace(remote=stream))
        return SimpleNamespace(describe=described, options=lambda stream: made)

    def delete(self, name: str) -> None:
        self.deleted.append(name)

    def shutdown(self) -> None:
        self.ended = True


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    """A cluster with two GPUs that is none."""
    serve = FakeServe()
    ray = SimpleNamespace(exceptions=SimpleNamespace(RayActorError=Lost), shutdown=lambda: None)
    monkeypatch.setattr(ray_engines, "connect", lambda address: Cluster(ray, 2, 8))
    monkeypatch.setattr(ray_engines, "_ray_serve", lambda: serve)
    return serve


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Replicas in this process set torch's threads."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def served(tiny_folder: Path) -> Served:
    return served_on(tiny_folder)


def engines_of(maker: Callable[[], Served], *, replicas: int | None = None, device: str = "auto") -> RayEngines:
    return RayEngines(maker, "auto", replicas=replicas, device=device, check=lambda: None)


def small() -> ImageRequest:
    return replace(wanted(), plan=make_plan("demo", 32, 32, low_steps=3, refine_steps=1))


def test_a_replica_makes_what_this_process_makes(cluster: FakeServe, served: Served) -> None:
    engines = engines_of(lambda: served)
    assert (engines.replicas, engines.described.name) == (2, served.name)
    assert cluster.options["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1}
    asked, told = small(), []
    alone = make_image(served, asked, 1, lambda step: None, lambda: False)
    cluster.lost = 2  # twice the replica is lost, and the third makes it
    made = engines.make(asked, 1, told.append, lambda: False)
    assert made == alone
    assert [step.fraction for step in told] == sorted(step.fraction for step in told)
    assert told[-1].name == "done"
    cluster.lost = 3
    with pytest.raises(Refused, match="3 replicas were lost over this image"):
        engines.make(asked, 0, told.append, lambda: False)
    engines.close()
    assert (len(cluster.deleted), cluster.ended) == (1, True)


def test_whoever_cancels_waits_for_no_replica(cluster: FakeServe, served: Served) -> None:
    engines = engines_of(lambda: served)
    stop = threading.Event()
    with pytest.raises(Cancelled):
        engines.make(small(), 0, lambda step: stop.set(), stop.is_set)
    assert cluster.streams[0].cancelled.is_set()
    cluster.status = lambda: SimpleNamespace(applications={"another": 1}, proxies={})
    engines.close()
    assert not cluster.ended  # another application needs it


def test_what_goes_wrong_in_a_replica_is_told_here(
    cluster: FakeServe, served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Made:
        raise KeyError("a secret of the machine")

    monkeypatch.setattr(ray_engines, "make_image", broken)
    with pytest.raises(Refused, match="this is a fault of the server") as refused:
        engines_of(lambda: served).make(small(), 0, lambda step: None, lambda: False)
    assert refused.value.status == 500
    assert "a secret of the machine" in capsys.readouterr().err

    def full(_: Any) -> None:
        raise MrFlowError("the run needs about 40 GB of memory.")

    with pytest.raises(Refused, match="about 40 GB") as refused:
        engines_of(lambda: replace(served, check=full)).make(small(), 0, lambda step: None, lambda: False)
    assert (refused.value.status, refused.value.code) == (422, "invalid")


def test_a_replica_whose_run_does_not_end_is_not_healthy(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def hangs(_served: Served, _asked: Any, _index: int, tell: Callable[[Any], object], _cancel: Any) -> Made:
        tell(Progress(0.5, 1, 2, 1, 2, "stage 1 sample"))
        gate.wait(30)
        return Made(b"", 0, ())

    monkeypatch.setattr(ray_engines, "make_image", hangs)
    monkeypatch.setattr(ray_engines, "_HUNG", 0.05)

    async def life() -> None:
        replica = ray_engines._Replica(lambda: served, 1)
        steps: Any = replica.make(small(), 0)
        await anext(steps)
        await asyncio.sleep(0.1)
        replica.check_health()  # it has all the time that it needs
        await steps.aclose()
        replica.check_health()
        await asyncio.sleep(0.1)
        with pytest.raises(RuntimeError, match="told to end"):
            replica.check_health()
        gate.set()
        until(lambda: replica._left and replica._left[0].done())
        replica.check_health()

    asyncio.run(life())


def test_a_cluster_or_a_model_that_will_not_do_is_refused(cluster: FakeServe, served: Served) -> None:
    def missing() -> Served:
        raise MrFlowError("the folder is empty.")

    with pytest.raises(MrFlowError, match="the folder is empty"):
        engines_of(missing)
    with pytest.raises(MrFlowError, match="--replicas is 3, and the cluster has 2 GPUs, one for each; give at most 2"):
        engines_of(lambda: served, replicas=3)
    with pytest.raises(MrFlowError, match="the cluster has 8 CPU cores, one for each"):
        engines_of(lambda: served, replicas=9, device="cpu")
    assert engines_of(lambda: served, device="cpu").replicas == 1
    assert cluster.options["ray_actor_options"] == {"num_cpus": 8, "num_gpus": 0}
    with pytest.raises(MrFlowError, match="start it there, with --ray auto"):
        RayEngines(lambda: served, "ray://host:10001", replicas=None, device="auto", check=lambda: None)


def test_without_ray_it_is_one_sentence(mrflow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrflow_sched.batch.ray_cluster.find_spec", lambda name: None)
    for words, sentence in (
        (("--ray", "local"), "--ray needs Ray, which is not installed; run pip install 'mrflow-sched[ray]'."),
        (("--replicas", "2"), "--replicas 2 is for a Ray cluster; give --ray ADDRESS too"),
    ):
        code, _, err = mrflow("serve", "--port", "0", *words)
        assert (code, sentence in err) == (2, True), err
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MrFlowError, match="--ray needs Ray Serve, which is not installed"):
        ray_engines._ray_serve()


# ------------------------------------------------------------------------------------------------------- with Ray


def replicas_of(server: Process) -> list[psutil.Process]:
    found = psutil.Process(server.process.pid).children(recursive=True)
    return [each for each in found if "ServeReplica:mrflow" in " ".join(each.cmdline())]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM")
def test_two_replicas_serve_as_one_process_does(tiny_folder: Path, mrflow: Any, tmp_path: Path) -> None:
    pytest.importorskip("ray.serve", exc_type=ImportError)
    long = {**SMALL, "size": "128x128", "n": 10, "mrflow": {"low_steps": 200, "refine_steps": 1}}
    server = Process("--model", str(tiny_folder), "--ray", "local", "--replicas", "2", "--queue", "1", "--grace", "0.5")
    try:
        get = partial(ask, server)
        status, value, _ = get("POST", "/v1/images", SMALL)
        assert status == 200
        code, out, _ = mrflow("generate", *WORDS, *ON_CPU, "--out", str(tmp_path))
        assert code == 0
        from PIL import Image

        (tmp_path / "ours.png").write_bytes(base64.b64decode(value["data"][0]["b64_json"]))
        assert Image.open(tmp_path / "ours.png").tobytes() == Image.open(out.strip()).tobytes()

        paths = [get("POST", "/v1/jobs", long)[2]["location"] for _ in range(3)]
        until(lambda: metric(server, "mrflow_jobs_running") == 2)
        assert get("POST", "/v1/images", SMALL)[0] == 429
        assert get("POST", "/v1/images", {**SMALL, "size": "big"})[0] == 422
        assert get("GET", paths[2])[1]["position"] == 1
        assert get("DELETE", paths[0])[0] == 200
        until(lambda: get("GET", paths[0])[1]["state"] == "cancelled")
        until(lambda: get("GET", paths[2])[1]["state"] == "running")
        get("DELETE", paths[2])
        until(lambda: (get("GET", paths[1])[1]["progress"] or {}).get("fraction", 0) > 0)
        for each in replicas_of(server):
            each.kill()
        assert get("GET", paths[1])[1]["state"] == "running"  # it waits for a new replica
        get("DELETE", paths[1])
        until(lambda: metric(server, "mrflow_jobs_running") == 0)
        assert get("POST", "/v1/images", SMALL)[1]["data"] == value["data"]
        assert metric(server, 'mrflow_jobs_total{state="cancelled"}') == 3

        left = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 143
        assert not psutil.wait_procs(left, timeout=20)[1]
        assert "Traceback" not in "".join(server.lines)
    finally:
        server.close()
