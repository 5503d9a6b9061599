"""Diffusers' own context parallelism under the staged sampler: two processes share every forward of one image."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

SIZE = 64


def images(rank: int, port: int, folder: str) -> None:
    """One of the two processes: an image alone, then the same image by both."""
    import torch
    import torch.distributed as processes

    from mrflow_sched import demo, make_plan
    from mrflow_sched.sampler import sample_staged

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    # diffusers takes the rank modulo the number of accelerators, which is 0 here.
    torch.accelerator.device_count = lambda: 1
    import diffusers

    library: Any = diffusers
    engine = demo.load_engine(device="cpu", dtype="float32")
    plan = make_plan("demo", SIZE, SIZE, low_steps=3)
    alone = sample_staged(engine, plan, "a red circle").images
    processes.init_process_group("gloo")
    try:
        network: Any = engine.pipe.transformer
        network.enable_parallelism(config=library.ContextParallelConfig(ulysses_degree=2))
        shared = sample_staged(engine, plan, "a red circle").images
    finally:
        processes.destroy_process_group()
    torch.save((alone, shared), Path(folder, f"{rank}.pt"))


def test_two_processes_make_the_image_of_one(tmp_path: Path) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    import torch
    import torch.multiprocessing as processes

    if not hasattr(diffusers, "ContextParallelConfig") or not hasattr(torch, "accelerator"):
        pytest.skip("this diffusers or torch has no context parallelism")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch was built without gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn: Any = processes.spawn  # pyright: ignore[reportUnknownMemberType]
    spawn(images, (port, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for alone, shared in found:
        assert torch.equal(alone, found[0][0])
        assert torch.equal(shared, found[0][1])
        assert (alone - shared).abs().max() < 1e-4  # sums of attention are split otherwise
        assert shared.std() > 0.05
