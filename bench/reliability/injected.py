"""Subjects with a fault in them: parts of the model that fail or give NaN, bad upscalers, callbacks that raise.

A fault is put into the classes of the libraries, below the package, so it acts alike in every version and through every
door. It stays in the child that runs the subject.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.reliability import subjects

PROMPT = "a blue star over green hills"
LOW_STEPS = 2


def memory_errors() -> dict[str, Callable[[], BaseException]]:
    """How devices and systems say that memory is full."""
    import numpy as np
    import torch

    numpy_error = getattr(np, "_core", np).__dict__.get("_exceptions")
    lines = {
        "CUDA": "CUDA out of memory. Tried to allocate 20.00 GiB",
        "CUDA driver": "CUDA error: out of memory",
        "cuBLAS": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN": "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "cuDNN, allocating": "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "HIP": "HIP out of memory. Tried to allocate 2.00 GiB",
        "hipBLAS": "HIP error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
        "MPS": "MPS backend out of memory (MPS allocated: 18.00 GB, max allowed: 18.13 GB)",
        "XPU": "XPU out of memory. Tried to allocate 2.00 GiB",
        "CPU": "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes.",
        "CPU, Windows": "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried 9",
        "mapping": "unable to mmap 100 bytes from file <x>: Cannot allocate memory (12)",
    }
    found: dict[str, Callable[[], BaseException]] = {
        name: (lambda text=text: RuntimeError(text)) for name, text in lines.items()
    }
    found |= {
        "torch.OutOfMemoryError": lambda: torch.OutOfMemoryError("CUDA out of memory."),
        "MemoryError": MemoryError,
        "ENOMEM": lambda: OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    }
    if numpy_error is not None:
        found["numpy"] = lambda: numpy_error._ArrayMemoryError((10**9,), np.dtype("float32"))
    return found


def _spoil(value: Any, fault: str) -> Any:
    """A part's answer with NaN or infinity in it."""
    import torch

    if isinstance(value, torch.Tensor):
        spoiled = value.clone()
        bad = {"NaN": float("nan"), "infinity": float("inf"), "one NaN": float("nan"), "huge": 1e30}[fault]
        if fault == "one NaN":
            spoiled[(0,) * spoiled.ndim] = bad
            return spoiled
        return torch.full_like(spoiled, bad)
    if isinstance(value, tuple):
        return tuple(_spoil(each, fault) for each in value)
    if hasattr(value, "latent_dist"):
        value.latent_dist.mean = _spoil(value.latent_dist.mean, fault)
        return value
    for name in ("sample", "last_hidden_state"):
        if isinstance(getattr(value, name, None), torch.Tensor):
            setattr(value, name, _spoil(getattr(value, name), fault))
    return value


def inject(part: str, call: int, fault: str) -> None:
    """Make a part fail from its `call`-th call on: with a memory error of that name, or with spoiled values."""
    import diffusers
    import spandrel
    import transformers

    errors = memory_errors()
    where: dict[str, tuple[Any, str]] = {
        "text": (transformers.T5EncoderModel, "forward"),
        "network": (diffusers.FluxTransformer2DModel, "forward"),
        "decode": (diffusers.AutoencoderKL, "decode"),
        "encode": (diffusers.AutoencoderKL, "encode"),
        "upscaler": (spandrel.ImageModelDescriptor, "__call__"),
    }
    owner, name = where[part]
    before = getattr(owner, name)
    calls = [0]

    def spoiled(self: Any, *arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] < call:
            return before(self, *arguments, **keywords)
        if fault in errors:
            raise errors[fault]()
        if fault == "failure":
            raise RuntimeError("expected m1 and m2 to have the same dtype, but got: float != c10::BFloat16")
        return _spoil(before(self, *arguments, **keywords), fault)

    setattr(owner, name, spoiled)


def command(part: str, call: int, fault: str, out: str, more: list[str]) -> int:
    """`mrflow generate` with a fault."""
    inject(part, call, fault)
    size = ["--size", "64x64", "--low-steps", str(LOW_STEPS), "--dtype", "float32", "--no-progress", "--seed", "7"]
    return subjects.command(["generate", PROMPT, *size, "--out", out, *more])


def pipeline(part: str, call: int, fault: str) -> dict[str, Any]:
    """`MrFlow(pipe)(...)`, which upscales by Lanczos, with a fault."""
    made = subjects.mrflow()
    inject(part, call, fault)
    result = made(PROMPT, width=64, height=64, low_steps=LOW_STEPS, seed=7, output_type="pt")
    return _told(result, result.images[0])


def _told(result: Any, image: Any) -> dict[str, Any]:
    return {
        "flat": bool(image.float().std() < 0.02) if bool(image.isfinite().all()) else True,
        "unfinished": bool(result.unfinished),
        "warnings": list(result.warnings),
    }


def _sample(**more: Any) -> dict[str, Any]:
    import mrflow_sched
    from mrflow_sched import demo

    engine = demo.load_engine(device="cpu", dtype="float32")
    plan = mrflow_sched.make_plan("demo", 64, 64, low_steps=LOW_STEPS, seed=7)
    result = mrflow_sched.sample_staged(engine, plan, PROMPT, **more)
    return _told(result, result.images if result.images.ndim == 3 else result.images[0])


def callback(at: int, error: str) -> dict[str, Any]:
    """A run whose callback raises at its `at`-th call; whatever the caller's own code raises is the caller's."""
    import torch

    calls = [0]
    errors: dict[str, Callable[[], BaseException]] = {
        "ValueError": lambda: ValueError("mine"),
        "MemoryError": lambda: MemoryError("mine"),
        "OutOfMemoryError": lambda: torch.OutOfMemoryError("CUDA out of memory: mine"),
        "RuntimeError": lambda: RuntimeError("cannot allocate memory for my own thing"),
        "KeyError": lambda: KeyError("mine"),
    }

    def raising(_: Any) -> None:
        calls[0] += 1
        if calls[0] == at:
            raise errors[error]()

    return _sample(callback=raising)


def bad_upscalers() -> dict[str, Any]:
    """Upscalers of one's own that answer wrongly, by name."""
    import torch

    def twice(image: Any) -> Any:
        return image.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def divide(image: Any) -> Any:
        return 1 / 0

    answers: dict[str, Callable[[Any], Any]] = {
        "the same size": lambda image: image,
        "NaN": lambda image: twice(image) * float("nan"),
        "None": lambda image: None,
        "an array": lambda image: twice(image).numpy(),
        "bytes 0 to 255": lambda image: (twice(image) * 255).to(torch.uint8),
        "values to 255": lambda image: twice(image) * 255,
        "four channels": lambda image: torch.zeros(1, 4, *twice(image).shape[-2:]),
        "two images": lambda image: twice(image).repeat(2, 1, 1, 1),
        "half precision": lambda image: twice(image).half(),
        "a meta tensor": lambda image: torch.empty(twice(image).shape, device="meta"),
        "gradients": lambda image: twice(image).requires_grad_(),
        "its input emptied": lambda image: twice(image.zero_()),
        "ZeroDivisionError": divide,
    }

    def make(answer: Callable[[Any], Any], scale: Any) -> Any:
        class Upscaler:
            name = "mine"

            def __call__(self, image: Any) -> Any:
                return answer(image)

        made = Upscaler()
        made.scale = scale  # pyright: ignore[reportAttributeAccessIssue]
        return made

    found = {name: make(answer, 2) for name, answer in answers.items()}
    found |= {f"scale {scale!r}": make(twice, scale) for scale in (0, -1, 1.5, float("nan"), 10**6, "2", None)}
    return found | {"a path": "x2.safetensors", "a module": torch.nn.Identity(), "a function": twice, "a number": 2}


def upscaler(name: str) -> dict[str, Any]:
    """A run with one of `bad_upscalers`."""
    return _sample(upscaler=bad_upscalers()[name])


# --- several at once ---------------------------------------------------------------------------


def together(out: str, meeting: str, copies: int) -> int:
    """`mrflow generate` into one folder, where every copy waits for the others before its file gets its name."""
    before = os.fsync

    def meet(number: int) -> None:
        before(number)
        _meet(Path(meeting), copies)

    os.fsync = meet
    size = ["--size", "64x64", "--low-steps", "1", "--dtype", "float32", "--no-progress", "--seed", "7"]
    return subjects.command(["generate", PROMPT, *size, "--out", out])


def _meet(folder: Path, copies: int) -> None:
    """Wait until as many processes have come here, or for ten seconds."""
    (folder / str(os.getpid())).touch()
    end = time.monotonic() + 10
    while len(list(folder.iterdir())) < copies and time.monotonic() < end:
        time.sleep(0.01)


def bad_together(out: str, meeting: str, copies: int) -> int:
    """Looks which names are free, and writes later."""
    number = next(n for n in range(1, 100) if not (Path(out) / f"{n}.png").exists())
    _meet(Path(meeting), copies)
    (Path(out) / f"{number}.png").write_bytes(b"image")
    return 0


# --- known to be bad ---------------------------------------------------------------------------


def bad_blame() -> int:
    """Blames the upscaler for what the network did."""
    print("mrflow: the upscaler x2 gave values that are not finite; use another file.")
    return 2


def bad_black() -> dict[str, Any]:
    """A black image that is said to be finished."""
    return {"flat": True, "unfinished": False, "warnings": []}
