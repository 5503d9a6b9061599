"""Load the model and the upscaler that a command asks for, and record what was loaded."""

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

    Attributes:
        plan: All numbers of the run.
        prompt: What the images show.
        negative: What they should not show, or None.
        batch: How many images are sampled together.
        images: Which of the batch are saved, counted from 0.
        source: The record that is repeated, or None.
    """

    plan: StagedPlan
    prompt: str
    negative: str | None = None
    batch: int = 1
    images: tuple[int, ...] = (0,)
    source: RunRecord | None = None


@dataclass(frozen=True)
class Loaded:
    """What was loaded for a job.

    Attributes:
        engine: The model.
        upscaler: The upscaler; None where the plan has one stage.
        file: The upscaler's file; None for Lanczos.
    """

    engine: PipelineEngine
    upscaler: PixelUpscaler | None
    file: Path | None

    @property
    def dtypes(self) -> dict[str, str]:
        """Name of the dtype of each part that has weights, such as "bfloat16"."""
        own = getattr(self.upscaler, "dtype", None)
        return {**self.engine.dtypes, **({} if own is None else {UPSCALER: _dtype_name(own)})}


# --- before anything is loaded -----------------------------------------------------------------


def plan_family(model: ModelChoices) -> str | Family:
    """Find the family to plan for, before anything large is loaded.

    Args:
        model: The model that was asked for.

    Returns:
        "demo" for the embedded model, else the family of the folder.

    Raises:
        MrFlowError: --family does not fit the embedded model, or the folder is no model that can be sampled.
    """
    if model.model is None:
        if model.family not in (None, "demo"):
            raise MrFlowError(
                f"--family is {model.family!r}, but the embedded model is of family demo; give --model DIR."
            )
        return "demo"
    from mrflow_sched.engines.diffusers.folder import read_layout

    return read_layout(model.model, model.family).family


def find_upscaler(model: ModelChoices, source: RunRecord | None = None) -> Path | None:
    """Find the upscaler's file.

    Args:
        model: The model and the upscaler that were asked for.
        source: The record that is repeated. Where it was made without an upscaler file, the embedded model takes none
            either; otherwise it brings its own.

    Returns:
        The file to load; None means Lanczos.

    Raises:
        MrFlowError: --upscaler names no file.
    """
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
    """Load the engine and the upscaler for a job.

    A repeated run gets the device and, part by part, the dtypes of its record, unless `model` names others.

    Args:
        model: The model, the device and the dtype that were asked for.
        job: The run.
        file: The upscaler's file from `find_upscaler`; None means Lanczos.

    Returns:
        Engine and upscaler, on one device.

    Raises:
        MrFlowError: The model or the upscaler cannot be used, or --offload-text lacks the package that it needs.
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
    """Refuse --offload-text where the package that it needs is missing; on a CPU nothing is offloaded."""
    from mrflow_sched._runtime.device import resolve_device

    if not model.offload or model.model is None or find_spec("accelerate") is not None:
        return
    if resolve_device(model.device).type != "cpu":
        raise MrFlowError(
            "--offload-text needs the package accelerate, which is not installed; pip install accelerate."
        )


def load_engine(model: ModelChoices, dtypes: str | Mapping[str, str]) -> PipelineEngine:
    """Load the engine of the embedded model or of a folder.

    Args:
        model: The model and the device that were asked for.
        dtypes: One dtype name for all parts, or a name for each; "auto" is allowed.

    Returns:
        The engine.

    Raises:
        MrFlowError: The folder, the family, the device or a dtype cannot be used.
    """
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
    """Return the device that an image was made on, so that its bits repeat; "auto" where this machine lacks it."""
    from mrflow_sched._runtime.device import resolve_device

    try:
        return resolve_device(record.device).type
    except MrFlowError:
        return "auto"


@contextlib.contextmanager
def threads_of(record: RunRecord | None) -> Generator[None, None, None]:
    """Run the block with the CPU thread count of a record, because sums are split by thread count.

    Args:
        record: The record that is repeated; None, or one made on another device than the CPU, changes nothing.

    Yields:
        Nothing; the count is put back at the end.
    """
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
    """Make the record of a job's first image from what is loaded now.

    Args:
        model: The model that was asked for.
        job: The run.
        loaded: Its engine and upscaler.

    Returns:
        The record to save in the image; `image` is 0, to be replaced for other images of the batch.
    """
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
