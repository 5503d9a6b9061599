"""Models, upscalers and their records for the commands."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.images.record import RunRecord, library_versions
from mrflow_sched.plan.families import FAMILIES
from mrflow_sched.plan.stages import StagedPlan

if TYPE_CHECKING:
    from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
    from mrflow_sched.plan.families import Family
    from mrflow_sched.upscaling.role import PixelUpscaler
from mrflow_sched.apps.cli.console import say

EMBEDDED = "embedded"
"""What a record calls the model that ships with the package."""

LANCZOS = "lanczos"


# --- mrflow generate --------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """All that a `generate` run needs, decided before anything large is loaded."""

    plan: StagedPlan
    prompt: str
    negative: str | None
    batch: int
    images: tuple[int, ...]
    source: RunRecord | None = None


def model_family(args: argparse.Namespace) -> str | Family:
    """The family to plan for, found before anything large is loaded."""
    if args.model is None:
        if args.family not in (None, "demo"):
            raise MrFlowError(
                f"--family is {args.family!r}, but the embedded model is of family demo; give --model DIR."
            )
        return "demo"
    from mrflow_sched.engines.diffusers.folder import read_layout

    return read_layout(args.model, args.family).family


def find_upscaler(args: argparse.Namespace, source: RunRecord | None = None) -> Path | None:
    """The file to load; None means Lanczos. The embedded model brings its own, unless `source` was made without."""
    if args.upscaler is None:
        if args.model is not None or (source is not None and source.upscaler_sha256 is None):
            return None
        from mrflow_sched import demo

        return Path(demo.upscaler_path())
    if args.upscaler.lower() == LANCZOS:
        return None
    path = Path(args.upscaler)
    if not path.is_file():
        raise MrFlowError(
            f"--upscaler is {args.upscaler!r}, which is not a file; give an ESRGAN-type file, or {LANCZOS}."
        )
    return path


def load_parts(
    args: argparse.Namespace, job: Job, upscaler_path: Path | None
) -> tuple[PipelineEngine, PixelUpscaler | None]:
    from mrflow_sched.upscaling.load import load_upscaler

    device, dtype = args.device, args.dtype
    if job.source is not None:
        _use_threads(job.source)
        device = _device_of(job.source) if device == "auto" else device
        dtype = job.source.dtype if dtype == "auto" else dtype
    family = args.family if job.source is None else job.plan.family
    engine = load_engine(args, device, dtype, family)
    if len(job.plan.stages) == 1:
        return engine, None
    return engine, load_upscaler(upscaler_path, device=engine.device)


def _device_of(record: RunRecord) -> str:
    """The device that a picture was made on where this machine has it, so that its bits repeat; else "auto"."""
    from mrflow_sched._runtime.device import resolve_device

    try:
        return resolve_device(record.device).type
    except ValueError:
        return "auto"


def _use_threads(record: RunRecord) -> None:
    """Sums are split by thread count, so the same bits need the same count."""
    import torch

    if record.device == "cpu" and 1 <= record.threads <= 4096:
        torch.set_num_threads(record.threads)


def load_engine(args: argparse.Namespace, device: str, dtype: Any, family: str | None) -> PipelineEngine:
    if args.model is None:
        from mrflow_sched import demo

        if args.offload_text:
            say("--offload-text has no effect on the embedded model, which is small.")
        return demo.load_engine(device=device, dtype=dtype)
    from mrflow_sched.engines.diffusers.pipeline import PipelineEngine

    known = family if family in FAMILIES else None  # a family made from a configuration is made from it again
    return PipelineEngine.from_folder(args.model, device=device, dtype=dtype, family=known, offload=args.offload_text)


def make_record(
    args: argparse.Namespace,
    job: Job,
    engine: PipelineEngine,
    upscaler: PixelUpscaler | None,
    upscaler_path: Path | None,
) -> RunRecord:
    import torch

    used = upscaler is not None and upscaler_path is not None
    return RunRecord(
        plan=job.plan.to_string(),
        prompt=job.prompt,
        negative=job.negative,
        seed=job.plan.seed,
        batch=job.batch,
        image=0,
        model=EMBEDDED if args.model is None else engine.name,
        model_fingerprint=engine.fingerprint,
        upscaler="none" if upscaler is None else upscaler.name,
        upscaler_sha256=_sha256(upscaler_path) if used and upscaler_path else None,
        device=engine.device.type,
        dtype=str(engine.dtype).removeprefix("torch."),
        vae_dtype=str(engine.vae_dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        versions=library_versions(),
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
