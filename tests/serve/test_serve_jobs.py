"""The queue: its order, its limits, how jobs end, and what is kept of them. No model is needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from serve_tools import Press, ended, queue_of, until, wanted

from mrflow_sched.apps.serve.jobs import Jobs
from mrflow_sched.apps.serve.limits import Refused
from mrflow_sched.apps.serve.metrics import Metrics


@pytest.fixture
def press() -> Press:
    return Press()


@pytest.fixture
def made(press: Press) -> Iterator[Any]:
    """Makes queues, which are closed at the end."""
    queues: list[Jobs] = []

    def make(**limits: Any) -> Jobs:
        queues.append(queue_of(press, **limits))
        return queues[-1]

    yield make
    press.gate.set()
    for queue in queues:
        queue.close()


def test_jobs_are_made_in_their_order_and_told_their_places(press: Press, made: Any) -> None:
    queue = made(queue=3)
    jobs = [queue.submit(wanted(name), kept=True) for name in ("one", "two", "three")]
    until(lambda: jobs[0].state == "running" and jobs[0].progress)
    assert [queue.view(job, "")["position"] for job in jobs] == [None, 1, 2]
    assert queue.view(jobs[0], "")["progress"]["fraction"] == 0.5
    press.gate.set()
    assert [ended(job).state for job in jobs] == ["done"] * 3
    assert press.made == ["one", "two", "three"]
    names = [event.name for event in queue.events(jobs[2], 0)]
    assert list(dict.fromkeys(names)) == ["waiting", "running", "progress", "image", "done"]


def test_a_full_queue_refuses_and_says_when_to_come_again(press: Press, made: Any) -> None:
    queue = made(queue=2)
    for _ in range(3):
        queue.submit(wanted(), kept=True)
    with pytest.raises(Refused, match="the queue is full, as 2 jobs may wait; try again in") as refused:
        queue.submit(wanted(), kept=True)
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    assert 1 <= (refused.value.retry_after or 0) <= 60


def test_without_a_queue_one_job_runs_and_none_waits(press: Press, made: Any) -> None:
    queue = made(queue=0)
    first = queue.submit(wanted(), kept=True)
    until(lambda: first.state == "running")
    with pytest.raises(Refused, match="0 jobs may wait"):
        queue.submit(wanted(), kept=True)


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_at_its_next_step(press: Press, made: Any) -> None:
    queue = made()
    running, waiting, last = (queue.submit(wanted(name), kept=True) for name in ("one", "two", "three"))
    until(lambda: running.state == "running")
    queue.cancel(waiting)
    assert waiting.state == "cancelled"
    assert queue.view(waiting, "")["error"]["message"] == "the job was cancelled."
    assert queue.view(last, "")["position"] == 1
    queue.cancel(running)
    assert ended(running).state == "cancelled"
    queue.cancel(running)
    press.gate.set()
    assert ended(last).state == "done"
    assert queue.metrics.ended == {"done": 1, "failed": 0, "cancelled": 2}


@pytest.mark.parametrize(
    "error", [MemoryError("full"), RuntimeError("odd"), SystemExit(3), Refused(500, "nan", "NaN.")]
)
def test_a_job_that_fails_leaves_the_queue_alive(press: Press, made: Any, error: BaseException) -> None:
    queue = made()
    press.error = error
    press.gate.set()
    failed = ended(queue.submit(wanted(), kept=True))
    assert failed.state == "failed"
    assert failed.error is not None
    press.error = None
    assert ended(queue.submit(wanted(), kept=True)).state == "done"
    assert queue.is_open


def test_a_job_that_takes_too_long_fails_with_a_sentence(made: Any) -> None:
    queue = made(seconds=0.05)
    job = ended(queue.submit(wanted(), kept=True))
    assert job.error is not None
    assert (job.state, job.error.status, job.error.code) == ("failed", 504, "timeout")
    assert "ran longer than 0.05 seconds" in str(job.error)


def test_events_of_a_job_are_bounded_and_its_end_is_among_them(press: Press, made: Any) -> None:
    queue = made(events=4, images=10)
    press.gate.set()
    job = ended(queue.submit(wanted(count=10), kept=True))
    events = queue.events(job, 0)
    assert len(events) == 4
    assert events[-1].name == "done"
    assert queue.events(job, events[-1].number) == ()
    assert len(queue.view(job, "http://a")["images"]) == 10


def test_ended_jobs_are_dropped_when_they_are_old_many_or_large(press: Press, made: Any) -> None:
    press.gate.set()
    for limits in ({"keep": 0.05}, {"jobs": 1}, {"kept_bytes": 100}):
        queue = made(**limits)
        first = ended(queue.submit(wanted("a star"), kept=True))
        if "keep" in limits:
            time.sleep(0.1)
        else:
            last = ended(queue.submit(wanted("another star"), kept=True))
            until(lambda queue=queue, first=first: queue.get(first.id) is None)
            assert queue.get(last.id) is last
            assert queue.file(last.token, 0) is not None
        assert queue.get(first.id) is None
        assert queue.file(first.token, 0) is None


def test_closing_tells_those_who_wait_and_lets_the_running_job_end(press: Press, made: Any) -> None:
    queue = made()
    running, waiting = queue.submit(wanted(), kept=True), queue.submit(wanted(), kept=True)
    until(lambda: running.state == "running")
    closing = threading.Thread(target=queue.close)
    closing.start()
    until(lambda: waiting.is_over)
    assert waiting.error is not None
    assert (waiting.error.status, waiting.error.code) == (503, "stopping")
    with pytest.raises(Refused, match="the server is being stopped"):
        queue.submit(wanted(), kept=True)
    press.gate.set()
    closing.join(20)
    assert running.state == "done"


def test_closing_cancels_the_running_job_when_its_grace_is_over(made: Any) -> None:
    queue = made(grace=0.05)
    running = queue.submit(wanted(), kept=True)
    until(lambda: running.state == "running")
    queue.close()
    assert running.state == "cancelled"
    assert running.error is not None
    assert running.error.code == "stopping"
    assert not queue.is_open


def test_several_jobs_run_at_once_and_the_others_wait(press: Press, made: Any) -> None:
    queue = made(at_once=2, queue=1, grace=0.05)
    jobs = [queue.submit(wanted(name), kept=True) for name in ("one", "two", "three")]
    until(lambda: [job.state for job in jobs] == ["running", "running", "waiting"])
    assert queue.gauges()["jobs_running"] == 2
    with pytest.raises(Refused, match="1 jobs may wait"):
        queue.submit(wanted(), kept=True)
    queue.cancel(jobs[0])
    assert ended(jobs[0]).state == "cancelled"
    until(lambda: jobs[2].state == "running")
    assert queue.gauges()["jobs_waiting"] == 0
    queue.close()
    assert [job.state for job in jobs] == ["cancelled"] * 3
    assert not queue.is_open


def test_metrics_are_text_that_prometheus_reads() -> None:
    metrics = Metrics()
    metrics.begin(0.3)
    metrics.end("done", 3.0)
    metrics.refuse("queue_full")
    lines = metrics.text({"jobs_waiting": 2}).splitlines()
    assert "mrflow_jobs_waiting 2" in lines
    assert 'mrflow_jobs_total{state="done"} 1' in lines
    assert 'mrflow_refused_total{code="queue_full"} 1' in lines
    assert 'mrflow_job_seconds_bucket{le="2.5"} 0' in lines
    assert 'mrflow_job_seconds_bucket{le="5"} 1' in lines
    assert 'mrflow_job_seconds_bucket{le="+Inf"} 1' in lines
    assert "mrflow_job_wait_seconds_sum 0.3" in lines
    assert len({line for line in lines if line.startswith("# TYPE")}) == 6
    assert metrics.usual_seconds == 3.0
