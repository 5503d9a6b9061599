"""The API in this process, on a small real model: what it makes, what it refuses, and whom."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from PIL import Image
from serve_tools import KEY, ON_CPU, SMALL, WORDS, Press, failure, served_on, until
from starlette.testclient import TestClient

from mrflow_sched.apps.serve.jobs import Jobs
from mrflow_sched.apps.serve.limits import Limits
from mrflow_sched.apps.serve.routes import application, jobs_of
from mrflow_sched.apps.serve.served import Served
from mrflow_sched.images.record import KEY as RECORD
from mrflow_sched.images.record import RunRecord

LIMITS = Limits(pixels=64 * 64, images=3, body=4096, grace=1.0)
BASE = "http://127.0.0.1:7871"


@pytest.fixture(scope="module")
def served(tiny_folder: Path) -> Served:
    return served_on(tiny_folder)


@pytest.fixture(scope="module")
def jobs(served: Served) -> Iterator[Jobs]:
    made = jobs_of(served, LIMITS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(served: Served, jobs: Jobs) -> Iterator[TestClient]:
    with TestClient(application(served, jobs, names=("127.0.0.1", "localhost")), base_url=BASE) as found:
        yield found


def image(data: bytes) -> Image.Image:
    found = Image.open(io.BytesIO(data))
    found.load()
    return found


# ------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("path", ["/v1/images", "/v1/images/generations"])
def test_an_image_is_that_of_generate_to_the_last_bit(
    client: TestClient, mrflow: Any, tmp_path: Path, path: str
) -> None:
    answer = client.post(path, json={**SMALL, "n": 2})
    assert answer.status_code == 200
    value = answer.json()
    assert [each["seed"] for each in value["data"]] == [5, 6]
    for number, each in enumerate(value["data"]):
        assert set(each) == {"b64_json", "seed"}
        words = [*WORDS[:-1], str(5 + number), *ON_CPU, "--out", str(tmp_path)]
        code, out, _ = mrflow("generate", *words)
        assert code == 0
        ours, theirs = image(base64.b64decode(each["b64_json"])), Image.open(out.strip())
        assert ours.tobytes() == theirs.tobytes()
        assert RunRecord.from_json(ours.info[RECORD]) == RunRecord.from_json(theirs.info[RECORD])
        assert ours.info["parameters"] == theirs.info["parameters"]
    assert value["mrflow"]["plan"].startswith("mrflow2;")
    assert value["mrflow"]["seconds"]["ran"] > 0


def test_a_native_image_and_further_texts_are_in_the_record(client: TestClient) -> None:
    asked = {"prompt": "a star", "size": "32x32", "refine_prompt": "a red star", "mrflow": {"preset": "2+1"}}
    made = client.post("/v1/images", json=asked).json()["data"][0]
    record = RunRecord.from_json(image(base64.b64decode(made["b64_json"])).info[RECORD])
    assert (record.refine_prompt, record.seed, record.upscaler) == ("a red star", made["seed"], "Lanczos")
    native = {"prompt": "a star", "size": "32x32", "mrflow": {"native": True, "steps": 2}}
    made = client.post("/v1/images", json=native).json()["data"][0]
    assert RunRecord.from_json(image(base64.b64decode(made["b64_json"])).info[RECORD]).upscaler == "none"


def test_a_link_leads_to_the_image_until_it_expires(client: TestClient, jobs: Jobs) -> None:
    answer = client.post("/v1/images", json={**SMALL, "response_format": "url"}).json()
    link = answer["data"][0]["url"]
    assert link.startswith(f"{BASE}/v1/files/")
    found = client.get(link)
    assert (found.status_code, found.headers["content-type"]) == (200, "image/png")
    assert found.headers["x-content-type-options"] == "nosniff"
    assert image(found.content).size == (32, 32)
    assert answer["mrflow"]["expires"] > answer["created"]
    for wrong in (link.replace("0.png", "1.png"), link.replace("0.png", "0.jpg"), link[:-8] + "/0.png", link + "/x"):
        assert client.get(wrong).status_code == 404
    jobs.limits = replace(LIMITS, keep=0.0)
    try:
        expired = client.get(link)
    finally:
        jobs.limits = LIMITS
    assert (expired.status_code, expired.json()["error"]["code"]) == (404, "not_found")


def test_a_job_is_followed_by_its_events(client: TestClient) -> None:
    begun = client.post("/v1/jobs", json=SMALL)
    assert (begun.status_code, begun.json()["object"]) == (202, "mrflow.job")
    path = begun.headers["location"]
    events = read_events(client, path)
    assert [name for _, name, _ in events if name != "progress"] == ["waiting", "running", "image", "done"]
    fractions = [data["fraction"] for _, name, data in events if name == "progress"]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert client.get(events[-2][2]["url"]).status_code == 200
    again = read_events(client, path, {"last-event-id": str(events[-3][0])})
    assert [number for number, _, _ in again] == [events[-2][0], events[-1][0]]
    assert read_events(client, path, {"last-event-id": str(events[-1][0])}) == []
    view = client.get(path).json()
    assert view["state"] == "done"
    assert "b64_json" in view["images"][0]
    assert client.delete(path).json()["state"] == "done"
    assert client.get(path).status_code == 404


def read_events(client: TestClient, path: str, headers: Any = None) -> list[tuple[int, str, Any]]:
    text = client.get(f"{path}/events", headers=headers).text
    found: list[tuple[int, str, Any]] = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found


# ------------------------------------------------------------------------------------------------------------ refusals

REFUSED: dict[str, tuple[Any, int, str]] = {
    "no prompt": ({}, 422, "prompt is missing or empty"),
    "an empty prompt": ({"prompt": " \n"}, 422, "prompt is missing or empty"),
    "no text": ({"prompt": ["a star"]}, 422, "prompt must be text, got ['a star']"),
    "NUL": ({"prompt": "a\0star"}, 422, "prompt holds a NUL"),
    "half a pair": ({"prompt": "a star", "negative_prompt": "\ud83d"}, 422, "negative_prompt holds a NUL or half"),
    "unknown": ({"prompt": "a star", "quality": "hd"}, 422, "quality is no field of a request; there are prompt"),
    "near": ({"prompt": "a star", "promt": "b"}, 422, "promt is no field of a request; did you mean prompt?"),
    "another model": ({"prompt": "a star", "model": "dall-e-3"}, 422, "model is 'dall-e-3', and this server has"),
    "n": ({"prompt": "a star", "n": 4}, 413, "n must be a whole number from 1 to 3, got 4."),
    "no n": ({"prompt": "a star", "n": 0}, 422, "n must be a whole number from 1 to 3, got 0."),
    "n of text": ({"prompt": "a star", "n": "2"}, 422, "n must be a whole number from 1 to 3, got '2'."),
    "n of truth": ({"prompt": "a star", "n": True}, 422, "n must be a whole number"),
    "seed": ({"prompt": "a star", "seed": -1}, 422, "seed must be a whole number from 0"),
    "last seed": ({"prompt": "a star", "n": 2, "seed": 2**63 - 1}, 422, "seed must be a whole number from 0"),
    "large": ({"prompt": "a star", "size": "128x64"}, 413, "size is 128x64, 0.00819 megapixels; this server makes at"),
    "size": ({"prompt": "a star", "size": "big"}, 422, "size must be WIDTHxHEIGHT in pixels"),
    "no size": ({"prompt": "a star", "size": "0x64"}, 422, "width must be a whole number from 1"),
    "format": ({"prompt": "a star", "response_format": "png"}, 422, "response_format must be 'b64_json' or 'url'"),
    "options": ({"prompt": "a star", "mrflow": [1]}, 422, "mrflow must be an object"),
    "option": ({"prompt": "a star", "mrflow": {"lowsteps": 2}}, 422, "lowsteps is no option of a plan; did you mean"),
    "its seed": ({"prompt": "a star", "mrflow": {"seed": 2}}, 422, "seed is a field of the request itself"),
    "its value": ({"prompt": "a star", "mrflow": {"low_steps": 0}}, 422, "low_steps must be a whole number from 1 to"),
    "two": ({"prompt": "a star", "mrflow": {"native": True, "low_steps": 2}}, 422, "leave low_steps=2 out."),
    "later": (
        {"prompt": "a", "refine_prompt": "b", "mrflow": {"native": True}},
        422,
        "refine_prompt is for the stages",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_a_sentence(client: TestClient, case: str) -> None:
    asked, status, sentence = REFUSED[case]
    for path in ("/v1/images/generations", "/v1/jobs"):
        body = json.dumps(asked, ensure_ascii=True)
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
        error = answer.json()["error"]
        assert (answer.status_code, sentence in error["message"]) == (status, True), error
        assert error["message"].endswith((".", "?"))
        assert error["type"] == "invalid_request_error"
        assert answer.headers["x-should-retry"] == "false"


BODIES: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, "the request is not JSON"),
    "half": (b'{"prompt": "a', 400, "the request is not JSON"),
    "a list": (b"[1]", 400, "the request is a JSON list; send an object"),
    "deep": (b"[" * 4000, 400, "the request is not JSON"),
    "no number": (b'{"prompt": "a", "seed": NaN}', 400, "NaN is no number of JSON"),
    "a long number": (b'{"seed": ' + b"9" * 4000 + b"}", 422, "seed must be a whole number"),
    "no UTF-8": (b'{"prompt": "\xff"}', 400, "the request is not JSON"),
    "large": (b'{"prompt": "' + b"a" * 5000 + b'"}', 413, "the request has more than 4096 bytes"),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_body_that_is_no_request_is_refused(client: TestClient, case: str) -> None:
    body, status, sentence = BODIES[case]

    def parts() -> Iterator[bytes]:  # without a declared length
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    for content in (body, parts()):
        answer = client.post("/v1/images", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == status
        assert sentence in answer.json()["error"]["message"]


def test_a_body_that_does_not_arrive_is_refused(served: Served) -> None:
    jobs = Jobs(Press(held=False), failure, replace(LIMITS, arrival=0.05))
    app = application(served, jobs)
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"a"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/images", "headers": headers, "query_string": b""}
    asyncio.run(app({**scope, "http_version": "1.1", "scheme": "http", "server": ("a", 80)}, receive, send))
    assert sent[0]["status"] == 408
    assert b"the request did not arrive within 0.05 seconds." in sent[1]["body"]
    jobs.close()


def test_other_types_paths_and_methods_are_refused(client: TestClient) -> None:
    form = client.post("/v1/images", content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert (form.status_code, form.json()["error"]["code"]) == (415, "not_json")
    for method, path, status in (("GET", "/v1/images", 405), ("GET", "/", 404), ("GET", "/v1/jobs/job-1", 404)):
        answer = client.request(method, path)
        assert answer.status_code == status
        assert "there " in answer.json()["error"]["message"]
    assert client.get("/v1/models").json()["data"][0]["object"] == "model"


# ---------------------------------------------------------------------------------------------------------------- whom


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.168.1.2:7871", "[::2]", ""])
def test_other_names_of_this_machine_are_refused(client: TestClient, host: str) -> None:
    answer = client.get("/health", headers={"host": host})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_host")
    assert client.get("/health", headers={"host": "LOCALHOST:1"}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:7872"])
def test_pages_of_other_sites_are_refused(client: TestClient, origin: str) -> None:
    answer = client.post("/v1/images", json=SMALL, headers={"origin": origin})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
    assert client.get("/health", headers={"origin": BASE}).status_code == 200


def test_a_key_is_asked_for_everywhere_but_for_health_and_links(served: Served) -> None:
    press = Press(held=False)
    jobs = Jobs(press, failure, LIMITS)
    with TestClient(application(served, jobs, key=KEY), base_url="http://any.example") as client:
        for path in ("/metrics", "/v1/models", "/v1/jobs/job-1", "/nothing"):
            for headers in ({}, {"authorization": f"Bearer {KEY}x"}, {"authorization": KEY}):
                answer = client.get(path, headers=headers)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
                assert KEY not in answer.text
        assert client.get("/health").status_code == 200
        own = {"authorization": f"bearer {KEY}"}
        made = client.post("/v1/images", json={**SMALL, "response_format": "url"}, headers=own).json()
        assert client.get(made["data"][0]["url"]).status_code == 200
        assert 'mrflow_refused_total{code="wrong_key"} 12' in client.get("/metrics", headers=own).text
    jobs.close()


# ------------------------------------------------------------------------------------------------------------ failures


def failing(served: Served) -> tuple[Jobs, TestClient]:
    jobs = jobs_of(served, LIMITS)
    return jobs, TestClient(application(served, jobs), base_url=BASE)


def break_network(monkeypatch: pytest.MonkeyPatch, broken: Callable[[Any], Any]) -> None:
    """Let `broken` have what FLUX.1's network returns, until the patch is taken back."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    kind: Any = FluxTransformer2DModel
    usual = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *given, **named: broken(usual(*given, **named)))


def raising(error: Exception) -> Callable[[Any], Any]:
    def broken(_: Any) -> Any:
        raise error

    return broken


FAILURES: dict[str, tuple[Callable[[Any], Any], int, str]] = {
    "out_of_memory": (raising(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")), 422, "enough memory"),
    "nan": (lambda made: (made[0] * float("nan"),), 500, "the image of seed 5 was not finished"),
    "fault": (raising(KeyError("a secret of the machine")), 500, "this is a fault of the server"),
}


@pytest.mark.parametrize("code", FAILURES)
def test_what_goes_wrong_fails_one_job_and_the_server_lives(
    served: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], code: str
) -> None:
    jobs, client = failing(served)
    broken, status, sentence = FAILURES[code]
    break_network(monkeypatch, broken)
    answer = client.post("/v1/images", json=SMALL)
    monkeypatch.undo()
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert sentence in error["message"]
    assert "secret" not in answer.text
    assert answer.headers["x-should-retry"] == "false"
    assert ("a secret of the machine" in capfd.readouterr().err) == (code == "fault")
    assert client.post("/v1/images", json=SMALL).status_code == 200
    assert f'mrflow_refused_total{{code="{code}"}} 1' in client.get("/metrics").text
    jobs.close()


def test_a_run_that_does_not_fit_is_refused_before_it_waits(served: Served) -> None:
    from mrflow_sched._runtime.errors import MrFlowError

    def full(_: Any) -> None:
        raise MrFlowError("the run needs about 40 GB of memory.")

    jobs, client = failing(replace(served, check=full))
    answer = client.post("/v1/jobs", json=SMALL)
    assert (answer.status_code, answer.json()["error"]["message"]) == (422, "the run needs about 40 GB of memory.")
    jobs.close()


def test_a_full_queue_answers_429_with_retry_after(served: Served) -> None:
    press = Press()
    jobs = Jobs(press, failure, replace(LIMITS, queue=1))
    client = TestClient(application(served, jobs), base_url=BASE)
    paths = [client.post("/v1/jobs", json=SMALL).headers["location"] for _ in range(2)]
    answer = client.post("/v1/images", json=SMALL)
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["x-should-retry"] == "true"
    states = [client.delete(path).json()["state"] for path in reversed(paths)]
    assert states[0] == "cancelled"
    until(lambda: client.get(paths[0]).json()["state"] == "cancelled")
    assert client.get(paths[0]).json()["error"]["code"] == "cancelled"
    jobs.close()
    assert client.get("/health").status_code == 503
    assert client.post("/v1/images", json=SMALL).json()["error"]["code"] == "stopping"


def test_whoever_waits_is_answered_when_the_job_is_cancelled_from_elsewhere(served: Served) -> None:
    press = Press()
    jobs = Jobs(press, failure, LIMITS)
    client = TestClient(application(served, jobs), base_url=BASE)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(client.post("/v1/images", json=SMALL)))
    asking.start()
    until(lambda: jobs.gauges()["jobs_running"])
    jobs.close()
    asking.join(30)
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "stopping")
