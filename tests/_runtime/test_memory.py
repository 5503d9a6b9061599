"""Memory that ran out: what says so, what does not, and whose it is."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched._runtime.memory import callers_own, free_memory, is_memory_error

FULL = [
    MemoryError(),
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("HIP error: hipErrorOutOfMemory"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("rocblas_status_memory_error"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB, other allocations: 2 GB)"),
    RuntimeError("Invalid buffer size: 16.00 GiB"),
    RuntimeError("XPU out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
    RuntimeError("Could not allocate tensor with 1 bytes. There is not enough GPU video memory available!"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("bad allocation"),
    RuntimeError("unable to mmap 100 bytes from file <x>: Cannot allocate memory (12)"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
OTHER = [
    ValueError("out of memory"),
    KeyError("memory"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
    RuntimeError("a shape does not fit in memory_format channels_last"),
    RuntimeError("Expected all tensors to be on the same device; the allocator is not the point"),
    OSError(errno.ENOSPC, "No space left on device"),
    FileNotFoundError("memory"),
    Cancelled(),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:40])
def test_every_way_in_which_memory_runs_out_is_known(error: BaseException) -> None:
    assert is_memory_error(error)


@pytest.mark.parametrize("error", OTHER, ids=lambda error: repr(error)[:40])
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    assert not is_memory_error(error)


def test_allocators_that_really_refuse() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_memory_error(caught.value)
    with pytest.raises(MemoryError) as refused:
        np.empty(1 << 50)
    assert is_memory_error(refused.value)


@pytest.mark.parametrize("error", FULL[:3], ids=lambda error: str(error)[:40])
def test_what_a_callers_function_raises_is_its_own(error: Exception) -> None:
    fresh = type(error)(*error.args)

    def fail(_step: int) -> None:
        raise fresh

    with pytest.raises(type(error)) as caught:
        callers_own(fail)(1)
    assert caught.value is fresh
    assert not is_memory_error(caught.value)
    assert is_memory_error(type(error)(*error.args))
    assert callers_own(lambda step, *, by=1: step + by)(2, by=3) == 5


@pytest.mark.parametrize("backend", ["cuda", "mps", "xpu"])
def test_cached_memory_is_given_back_on_every_device(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch, backend):
        pytest.skip(f"this torch has no torch.{backend}")
    emptied: list[str] = []
    monkeypatch.setattr(getattr(torch, backend), "empty_cache", lambda: emptied.append(backend), raising=False)
    free_memory(torch.device(backend))
    free_memory(torch.device("cpu"))
    assert emptied == [backend]
