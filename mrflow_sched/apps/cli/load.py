"""Load the model and the upscaler that a command asks for, and record what was loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.cli.console import say
from mrflow_sched.apps.cli.inputs import Reference, StartImage, hash_of
from mrflow_sched.apps.cli.lora import add_loras
from mrflow_sched.apps.cli.options import LANCZOS, ModelChoices
from mrflow_sched.apps.cli.stopping import current
from mrflow_sched.apps.cli.wording import with_options
from mrflow_sched.images.record import RecordedLora, RunRecord, library_versions
from mrflow_sched.plan.families import FAMILIES
from mrflow_sched.plan.families.base import NetworkCost
from mrflow_sched.plan.stages import StagedPlan

if TYPE_CHECKING:
    from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
    from mrflow_sched.plan.checks import UpscalerKind
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
        start: The image that the run starts from, or None.
        refine_prompt: The prompt of the stages after the first; None: `prompt`.
        refine_negative: Their negative prompt; None: `negative`.
        references: What an editing model looks at.
        refine_mask: White where later stages refine; None: everywhere.
    """

    plan: StagedPlan
    prompt: str
    negative: str | None = None
    batch: int = 1
    images: tuple[int, ...] = (0,)
    source: RunRecord | None = None
    start: StartImage | None = None
    refine_prompt: str | None = None
    refine_negative: str | None = None
    references: tuple[Reference, ...] = ()
    refine_mask: Reference | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the plan has to say to the user, with options named as on the command line."""
        notes = self.plan.notes if self.start is None else self.start.notes(self.plan)
        return tuple(with_options(note) for note in notes)


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
        "demo" for the embedded model, else the family of the folder, with the size of the network that lies there.

    Raises:
        MrFlowError: --family or --model-config does not fit the embedded model, or the folder is no model that can be
            sampled.
    """
    if model.model is None:
        if model.config is not None:
            raise MrFlowError("--model-config describes the file of --model; give --model FILE too, or leave it out.")
        if model.family not in (None, "demo"):
            raise MrFlowError(
                f"--family is {model.family!r}, but the embedded model is of family demo; give --model DIR."
            )
        return "demo"
    from mrflow_sched.engines.diffusers.folder import read_layout

    layout = read_layout(model.model, model.family, config=model.config)
    family, network = layout.family, layout.network
    weights, counted = sum(each.numel() for each in network.parameters()), family.network_cost
    alive = 0.0 if counted is None else counted.alive * min(1.0, weights / counted.weights)
    return replace(family, network_cost=NetworkCost(weights, alive))


def find_upscaler(model: ModelChoices, source: RunRecord | None = None) -> Path | None:
    """Find the upscaler's file.

    Args:
        model: The model and the upscaler that were asked for.
        source: The record that is repeated. Where it was made without an upscaler file, the embedded model takes none
            either; otherwise it brings its own.

    Returns:
        The file to load; None means Lanczos.

    Raises:
        MrFlowError: --upscaler names no file, or options of an upscaler's network were given where there is none.
    """
    file = _upscaler_file(model, source)
    own = {"--upscaler-tile": model.upscaler_tile is not None, "--upscaler-dtype": model.upscaler_dtype != "auto"}
    idle = next((name for name, given in own.items() if given), None)
    if file is None and idle is not None:
        raise MrFlowError(
            f"{idle} is for an upscaler from a file, and none is used here; give --upscaler FILE, or leave it out."
        )
    return file


def upscaler_kind(model: ModelChoices, source: RunRecord | None = None) -> UpscalerKind:
    """Tell what will upscale the image, before anything is loaded or refused.

    Args:
        model: The model and the upscaler that were asked for.
        source: As in `find_upscaler`.

    Returns:
        "interpolation" where it is Lanczos, or a network that does not upscale (x1); else "network".
    """
    from mrflow_sched.upscaling.load import read_scale

    try:
        file = _upscaler_file(model, source)
        own = file is None or model.upscaler is None  # the embedded upscaler's scale is known
        return "interpolation" if file is None or (not own and read_scale(file) == 1) else "network"
    except MrFlowError:  # refused where it is loaded, if not for its scale
        return "network"


def _upscaler_file(model: ModelChoices, source: RunRecord | None) -> Path | None:
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


def check_packages(model: ModelChoices, plan: StagedPlan | None = None) -> None:
    """Look for the packages that --offload, --lora and --precision need; on a CPU nothing is offloaded.

    Args:
        model: What was asked for.
        plan: The run's plan; None: it says nothing of packages.

    Raises:
        MrFlowError: A package is missing.
    """
    from mrflow_sched._runtime.device import resolve_device

    device = resolve_device(model.device)
    offloads = model.offload is not None and model.model is not None and device.type != "cpu"
    needed = {"accelerate": f"--offload {model.offload}"} if offloads else {}
    needed |= {"peft": "--lora"} if model.loras else {}
    for package, option in needed.items():
        if find_spec(package) is None:
            raise MrFlowError(f"{option} needs the package {package}, which is not installed; pip install {package}.")
    low = [stage.precision for stage in plan.stages if stage.precision != "own"] if plan is not None else []
    if low and find_spec("torchao") is None:
        raise MrFlowError(
            f"precision {low[0]} needs torchao, which is not installed; run pip install 'mrflow-sched[lowp]'."
        )


# --- loading -----------------------------------------------------------------------------------


def load(model: ModelChoices, job: Job, file: Path | None) -> Loaded:
    """Load the upscaler and the engine for a job, in this order: a wrong file is told before gigabytes are read.

    A repeated run gets the device and, part by part, the dtypes of its record, unless `model` names others.

    Args:
        model: The model, the device and the dtype that were asked for.
        job: The run.
        file: The upscaler's file from `find_upscaler`; None means Lanczos.

    Returns:
        Engine and upscaler, on one device.

    Raises:
        MrFlowError: The model or the upscaler cannot be used.
    """
    source = job.source
    device = _device_of(source) if source is not None and model.device == "auto" else model.device
    dtypes: str | Mapping[str, str] = model.dtype
    own = model.upscaler_dtype
    if source is not None and model.dtype == "auto":
        dtypes = source.part_dtypes()
    if source is not None and own == "auto":
        own = source.dtype_of(UPSCALER) or own
    family = model.family if source is None else job.plan.family
    chosen = replace(model, device=device, family=family, upscaler_dtype=own)
    upscaler = None if len(job.plan.stages) == 1 else open_upscaler(chosen, file)
    engine = _looking_at(load_engine(chosen, dtypes), job.references)
    return Loaded(engine, upscaler, None if upscaler is None else file)


def _looking_at(engine: PipelineEngine, references: Sequence[Reference]) -> PipelineEngine:
    """The engine with references; refuses those that it does not take, and a model that cannot do without."""
    from mrflow_sched.apps.pictures import check_references, references_of
    from mrflow_sched.engines.diffusers.editing import Pictures

    check_references(engine.pipe, len(references))
    if not references:
        return engine
    return engine.looking_at(Pictures(references_of([each.pixels for each in references], engine.pipe, say)))


def open_upscaler(model: ModelChoices, file: Path | None) -> PixelUpscaler:
    """Load the upscaler.

    Args:
        model: Its dtype and tile, and the device.
        file: The file from `find_upscaler`; None means Lanczos.

    Returns:
        The upscaler, on the model's device.

    Raises:
        MrFlowError: The file is no upscaler, or the device cannot be used.
    """
    from mrflow_sched._runtime.device import resolve_device
    from mrflow_sched.upscaling.load import load_upscaler

    device = resolve_device(model.device)
    upscaler = load_upscaler(file, device=device, dtype=model.upscaler_dtype, tile=model.upscaler_tile)
    current().check()
    return upscaler


def load_engine(model: ModelChoices, dtypes: str | Mapping[str, str]) -> PipelineEngine:
    """Load the engine of the embedded model or of a folder, with the LoRAs that were asked for.

    Args:
        model: The model, its LoRAs and the device that were asked for.
        dtypes: One dtype name for all parts, or a name for each; "auto" is allowed.

    Returns:
        The engine.

    Raises:
        MrFlowError: The folder, the family, the device, a dtype or a LoRA cannot be used.
    """
    from mrflow_sched.engines.diffusers.vae_tiles import tile_vae

    engine = _bare_engine(model, dtypes)
    if model.vae_tile is not None and not tile_vae(engine.pipe.vae, model.vae_tile):
        say("The VAE cannot work in tiles, so it needs more memory than was counted.")
    current().check()
    if model.loras:
        add_loras(engine.pipe, model.loras)
        current().check()
    return engine


def _bare_engine(model: ModelChoices, dtypes: str | Mapping[str, str]) -> PipelineEngine:
    from mrflow_sched._runtime.device import resolve_device

    if model.model is None:
        from mrflow_sched import demo

        if model.offload:
            say("--offload has no effect on the embedded model, which is small.")
        return demo.load_engine(device=model.device, dtype=dtypes)
    from mrflow_sched.engines.diffusers.pipeline import PipelineEngine

    device = resolve_device(model.device)
    if model.offload and device.type == "cpu":
        say("--offload has no effect on a CPU, where all parts are already.")
    known = model.family if model.family in FAMILIES else None  # a family read from a configuration is read again
    return PipelineEngine.from_folder(
        model.model,
        device=device,
        dtype=dtypes,
        family=known,
        offload=model.offload or False,
        config=model.config,
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

    engine, upscaler, start = loaded.engine, loaded.upscaler, job.start
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
        upscaler_sha256=None if upscaler is None or loaded.file is None else hash_of(loaded.file),
        device=engine.device.type,
        dtype=_dtype_name(engine.dtype),
        vae_dtype=_dtype_name(engine.vae_dtype),
        threads=torch.get_num_threads(),
        versions=library_versions(),
        dtypes=loaded.dtypes,
        start=None if start is None else start.file.name,
        start_sha256=None if start is None else start.sha256,
        strength=None if start is None else start.strength,
        refine_prompt=job.refine_prompt,
        refine_negative=job.refine_negative,
        references=tuple(each.sha256 for each in job.references),
        refine_mask=None if job.refine_mask is None else job.refine_mask.sha256,
        loras=tuple(RecordedLora(each.file.name, hash_of(each.file), each.scale) for each in model.loras),
    )
