"""Asks `mrflow serve` for many images at once, on the embedded model, and counts what became of each.

    python -m bench.serve --out bench/results                 200 requests at once, 16 of which may wait
    python -m bench.serve --requests 12 --size 64x64 --steps 2

Writes serve.json and serve.md; exit code 1 where a job failed, was lost, or is another image than the one that is made
alone. A request that is refused with 429 is sent again after the seconds of Retry-After.

latency   seconds from sending the request that was taken to its last byte
in all    the same from a client's first try on
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.command import results_folder, run_command, to_json
from bench.markdown import table
from mrflow_sched import demo, load_upscaler, make_plan
from mrflow_sched.images.convert import to_pil
from mrflow_sched.sampler import sample_staged

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a red star over green hills"
FIRST_SEED = 1000
SHARES = {"half": 0.5, "nine of ten": 0.9, "99 of 100": 0.99, "slowest": 1.0}


@dataclass
class Client:
    """One client and what became of its request."""

    seed: int
    tries: int = 0
    latency: float = 0.0
    in_all: float = 0.0
    status: int = 0
    image: bytes | None = None
    refusals: list[tuple[str, bool]] = field(default_factory=list[tuple[str, bool]])
    error: str = ""

    def run(self, address: str, asked: dict[str, Any], patience: float) -> None:
        """Send the request until it is taken, or patience is at its end."""
        began = time.monotonic()
        while True:
            sent = time.monotonic()
            self.tries += 1
            try:
                self.status, value, headers = post(address, {**asked, "seed": self.seed})
            except (OSError, ValueError, http.client.HTTPException) as error:
                self.status, self.error = 0, f"{type(error).__name__}: {error}"
                return
            now = time.monotonic()
            if self.status == 200:
                self.latency, self.in_all = now - sent, now - began
                self.image = base64.b64decode(value["data"][0]["b64_json"])
                return
            self.error = str(value["error"]["message"])
            if self.status != 429 or now - began > patience:
                return
            wait = headers.get("retry-after", "")
            self.refusals.append((self.error, wait.isdigit()))
            time.sleep(float(wait or 1))


def post(address: str, value: dict[str, Any]) -> tuple[int, Any, Any]:
    """(status, JSON, headers) of an answer."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=3600)
    try:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/images/generations", json.dumps(value), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), answer.headers
    finally:
        connection.close()


@contextmanager
def server(queue: int) -> Iterator[str]:
    """`mrflow serve` on the embedded model, in a process of its own; its address."""
    words = ["serve", "--port", "0", "--queue", str(queue), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "mrflow_sched", *words], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    try:
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"The API is at (http://\S+?)/v1", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield found[1]
                return
        raise RuntimeError("".join(lines))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def wrong_images(clients: Sequence[Client], asked: dict[str, Any], count: int) -> int:
    """How many of the first images differ from those that are made alone, in this process."""
    engine = demo.load_engine(device="cpu", dtype="float32")
    upscaler = load_upscaler(demo.upscaler_path())
    width, height = map(int, asked["size"].split("x"))
    wrong = 0
    for client in [each for each in clients if each.image is not None][:count]:
        plan = make_plan("demo", width, height, seed=client.seed, **asked["mrflow"])
        alone = to_pil(sample_staged(engine, plan, PROMPT, upscaler=upscaler).images[0])
        wrong += alone.tobytes() != Image.open(io.BytesIO(client.image or b"")).tobytes()
    return wrong


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Send all requests and count."""
    asked = {"prompt": PROMPT, "size": options.size, "mrflow": {"low_steps": options.steps, "refine_steps": 1}}
    clients = [Client(FIRST_SEED + number) for number in range(options.requests)]
    with server(options.queue) as address:
        post(address, {**asked, "seed": 1})  # the first image of a process takes longer
        threads = [threading.Thread(target=each.run, args=(address, asked, options.patience)) for each in clients]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
    done = [each for each in clients if each.status == 200]
    refusals = [refusal for each in clients for refusal in each.refusals]
    return {
        "requests": len(clients),
        "queue": options.queue,
        "size": options.size,
        "steps": [options.steps, 1],
        "done": len(done),
        "failed": sum(each.status not in (0, 200, 429) for each in clients),
        "lost": sum(each.status == 0 for each in clients),
        "given_up": sum(each.status == 429 for each in clients),
        "refused": len(refusals),
        "without_retry_after": sum(not has for _, has in refusals),
        "sentences": sorted({re.sub(r"\d+ seconds", "N seconds", sentence) for sentence, _ in refusals}),
        "errors": sorted({each.error for each in clients if each.status not in (200, 429)}),
        "checked": min(options.check, len(done)),
        "wrong": wrong_images(done, asked, options.check),
        "seconds": seconds,
        "images_per_second": len(done) / seconds,
        "latency": quantiles([each.latency for each in done]),
        "in_all": quantiles([each.in_all for each in done]),
        "tries": statistics.mean(each.tries for each in clients),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}",
    }


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """The values below which each of `SHARES` lies."""
    ordered = sorted(seconds)
    return {name: ordered[max(0, round(share * len(ordered)) - 1)] for name, share in SHARES.items() if ordered}


def report(found: dict[str, Any]) -> str:
    """What was counted, and the latencies, as tables."""
    names = ("requests", "queue", "done", "refused", "failed", "lost", "given_up", "wrong")
    counts = table(names, [[found[name] for name in names]], "r")
    rows = [[name, f"{found['latency'][name]:.2f}", f"{found['in_all'][name]:.2f}"] for name in found["latency"]]
    return counts + "\n\n" + table(["requests", "latency, s", "in all, s"], rows)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=200, help="at once (default 200)")
    parser.add_argument("--queue", type=int, default=16, help="that may wait (default 16)")
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--steps", type=int, default=4, help="low steps; one refine step follows")
    parser.add_argument("--check", type=int, default=10, help="images that are made again alone and compared")
    parser.add_argument("--patience", type=float, default=3600.0, help="seconds after which a client gives up")
    parser.add_argument("--out", type=results_folder, help="folder for serve.json and serve.md")
    asked = parser.parse_args(words)
    found = measure(asked)
    print(report(found))
    if asked.out is not None:
        (asked.out / "serve.json").write_text(to_json(found), "utf-8")
        (asked.out / "serve.md").write_text(report(found) + "\n", "utf-8")
    bad = ("failed", "lost", "given_up", "wrong", "without_retry_after")
    return 1 if any(found[name] for name in bad) else 0


if __name__ == "__main__":
    run_command(main)
