"""Models and upscalers as a command asks for them, and the record of what was loaded."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.cli.console import say
from mrflow_sched.apps.cli.options import LANCZOS, ModelChoices
from mrflow_sched.images.record import RunRecord, library_versions
from mrflow_sched.plan.families import FAMILIES
from mrflow_sched.plan.stages import StagedPlan

if TYPE_CHECKING:
    from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
    from mrflow_sched.plan.families import Family
    from mrflow_sched.upscaling.role import PixelUpscaler

EMBEDDED = "embedded"
"""What a record calls the model that ships with the package."""

UPSCALER = "upscaler"
"""What a record's table of dtypes calls the upscaler."""


@dataclass(frozen=True)
class Job:
    """All that a run needs, decided before anything large is loaded.

    `images` are the wanted ones of the batch, and `source` is the record that is repeated, if any.
    """

    plan: StagedPlan
    prompt: str
    negative: str | None = None
    batch: int = 1
    images: tuple[int, ...] = (0,)
    source: RunRecord | None = None


@dataclass(frozen=True)
class Loaded:
    """An engine and, where there is a second stage, an upscaler; `file` is the upscaler's, None for Lanczos."""

    engine: PipelineEngine
    upscaler: PixelUpscaler | None
    file: Path | None

    @property
    def dtypes(self) -> dict[str, str]:
        """Name of the dtype of every part that has weights."""
        own = getattr(self.upscaler, "dtype", None)
        return {**self.engine.dtypes, **({} if own is None else {UPSCALER: _dtype_name(own)})}


# --- before anything is loaded -----------------------------------------------------------------


def plan_family(model: ModelChoices) -> str | Family:
    """The family to plan for, found before anything large is loaded."""
    if model.model is None:
        if model.family not in (None, "demo"):
            raise MrFlowError(
                f"--family is {model.family!r}, but the embedded model is of family demo; give --model DIR."
            )
        return "demo"
    from mrflow_sched.engines.diffusers.folder import read_layout

    return read_layout(model.model, model.family).family


def find_upscaler(model: ModelChoices, source: RunRecord | None = None) -> Path | None:
    """The file to load; None means Lanczos. The embedded model brings its own, unless `source` was made without."""
    if model.upscaler is None:
        if model.model is not None or (source is not None and source.upscaler_sha256 is None):
            return None
        from mrflow_sched import demo

        return Path(demo.upscaler_path())
    if model.upscaler.lower() == LANCZOS:
        return None
    path = Path(model.upscaler)
    if not path.is_file():
        raise MrFlowError(
            f"--upscaler is {model.upscaler!r}, which is not a file; give an ESRGAN-type file, or {LANCZOS}."
        )
    return path


# --- loading -----------------------------------------------------------------------------------


def load(model: ModelChoices, job: Job, file: Path | None) -> Loaded:
    """The engine and the upscaler of `file` for a job.

    A repeated run gets the device and, part by part, the dtypes of its record, where `model` leaves them open.
    """
    from mrflow_sched.upscaling.load import load_upscaler

    _check_offload(model)
    source = job.source
    device = _device_of(source) if source is not None and model.device == "auto" else model.device
    dtypes: str | Mapping[str, str] = model.dtype
    own = "auto"
    if source is not None and model.dtype == "auto":
        dtypes = source.part_dtypes()
        own = source.dtype_of(UPSCALER) or own
    family = model.family if source is None else job.plan.family
    engine = load_engine(replace(model, device=device, family=family), dtypes)
    if len(job.plan.stages) == 1:
        return Loaded(engine, None, None)
    return Loaded(engine, load_upscaler(file, device=engine.device, dtype=own), file)


def _check_offload(model: ModelChoices) -> None:
    """Refuse --offload-text where the library that it needs is missing; on a CPU nothing is offloaded."""
    from mrflow_sched._runtime.device import resolve_device

    if not model.offload or model.model is None or find_spec("accelerate") is not None:
        return
    if resolve_device(model.device).type != "cpu":
        raise MrFlowError(
            "--offload-text needs the package accelerate, which is not installed; pip install accelerate."
        )


def load_engine(model: ModelChoices, dtypes: str | Mapping[str, str]) -> PipelineEngine:
    """The engine of the embedded model or of the folder; `dtypes` is one name for all parts or a name for each."""
    if model.model is None:
        from mrflow_sched import demo

        if model.offload:
            say("--offload-text has no effect on the embedded model, which is small.")
        return demo.load_engine(device=model.device, dtype=dtypes)
    from mrflow_sched.engines.diffusers.pipeline import PipelineEngine

    known = model.family if model.family in FAMILIES else None  # a family read from a configuration is read again
    return PipelineEngine.from_folder(
        model.model, device=model.device, dtype=dtypes, family=known, offload=model.offload
    )


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _device_of(record: RunRecord) -> str:
    """The device that an image was made on where this machine has it, so that its bits repeat; else "auto"."""
    from mrflow_sched._runtime.device import resolve_device

    try:
        return resolve_device(record.device).type
    except MrFlowError:
        return "auto"


@contextlib.contextmanager
def threads_of(record: RunRecord | None) -> Generator[None, None, None]:
    """Work with the CPU threads of `record`, as sums are split by thread count; the count is put back at the end."""
    if record is None or record.device != "cpu":
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(record.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the record --------------------------------------------------------------------------------


def make_record(model: ModelChoices, job: Job, loaded: Loaded) -> RunRecord:
    """The record of a job's first image, as it is loaded now."""
    import torch

    engine, upscaler = loaded.engine, loaded.upscaler
    return RunRecord(
        plan=job.plan.to_string(),
        prompt=job.prompt,
        negative=job.negative,
        seed=job.plan.seed,
        batch=job.batch,
        image=0,
        model=EMBEDDED if model.model is None else engine.name,
        model_fingerprint=engine.fingerprint,
        upscaler="none" if upscaler is None else upscaler.name,
        upscaler_sha256=None if upscaler is None or loaded.file is None else _sha256(loaded.file),
        device=engine.device.type,
        dtype=_dtype_name(engine.dtype),
        vae_dtype=_dtype_name(engine.vae_dtype),
        threads=torch.get_num_threads(),
        versions=library_versions(),
        dtypes=loaded.dtypes,
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
