"""Whether a run fits into memory, told before anything is loaded."""

from __future__ import annotations

from dataclasses import replace

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.cli.options import ModelChoices
from mrflow_sched.apps.plan_lines import counted
from mrflow_sched.plan.card import Fitted, fit_card
from mrflow_sched.plan.cost import peak_memory
from mrflow_sched.plan.families import FAMILIES, Family
from mrflow_sched.plan.stages import StagedPlan

_LARGEST_SCALE = 4
LEAST_TILE = 512
"""Side in pixels of the tiles that VAE and upscaler fall back to where a GPU's memory runs out."""


def check_memory(
    model: ModelChoices,
    family: str | Family,
    *plans: StagedPlan,
    batch: int = 1,
    workers: int = 1,
    loaded: bool = False,
) -> None:
    """Refuse a run that needs more memory than is free, unless --force was given.

    A CPU's memory runs out without an error that could be caught (the system ends the process), so whole images count
    there; on a GPU parts go on in tiles, so tiles count.

    Args:
        model: The device, the dtype and --force.
        family: The model's family, or its name.
        *plans: What is run, one after the other.
        batch: Images that are made at once.
        workers: Processes that each make as many; on a CPU they share its memory.
        loaded: The model is loaded, so that its weights are not counted again where no part waits elsewhere.

    Raises:
        MrFlowError: It does not fit; the sentence says what it needs and what is free.
    """
    from mrflow_sched._runtime.device import has_bfloat16, resolve_device
    from mrflow_sched._runtime.memory import free_bytes, idle_bytes

    device = resolve_device(model.device)
    offloads = model.offload is not None and device.type != "cpu"
    if model.force or (offloads and model.offload == "layers"):  # a layer at a time: what it needs was not counted
        return
    free = free_bytes(device)
    if loaded and free is not None:
        free += idle_bytes(device)
    wide = model.dtype == "float32" or (model.dtype == "auto" and not has_bfloat16(device))
    tile = None if device.type == "cpu" else LEAST_TILE
    known = FAMILIES.get(family) if isinstance(family, str) else family
    offer = "" if device.type == "cpu" or offloads else ", or --offload model"
    shares = workers if device.type == "cpu" else 1
    for plan in plans:
        peak = peak_memory(
            plan,
            known,
            batch=batch,
            value_bytes=4 if wide else 2,
            offload=offloads,
            vae_tile=tile,
            upscaler_tile=tile,
        )
        needed = 0.0 if peak is None else peak.total - (peak.weights if loaded and not offloads else 0.0)
        if peak is not None and free is not None and needed * shares > free:
            what = f"{counted(batch, 'image')} of {plan.width}x{plan.height}"
            what += "" if shares == 1 else f" in each of {shares} workers"
            raise MrFlowError(
                f"the run needs about {_gigabytes(needed * shares)} of memory for {what}, in {peak.name}, and "
                f"{_gigabytes(free)} are free on {device}; choose a smaller size or batch{offer}, or add --force."
            )


def most_together(model: ModelChoices, family: str | Family, plan: StagedPlan, most: int, *, workers: int = 1) -> int:
    """How many images of a plan can be sampled at once within what is free.

    Args:
        model: The device, the dtype and --offload.
        family: The model's family, or its name.
        plan: Their plan.
        most: As many as are wanted.
        workers: As in `check_memory`.

    Returns:
        From 1 to `most`; 1 where memory was never counted.
    """
    known = FAMILIES.get(family) if isinstance(family, str) else family
    if known is None or peak_memory(plan, known) is None or model.offload == "layers":
        return 1
    fits = 1
    while fits < most:
        try:
            check_memory(replace(model, force=False), family, plan, batch=min(2 * fits, most), workers=workers)
        except MrFlowError:
            break
        fits = min(2 * fits, most)
    return fits


def fit_to_card(
    model: ModelChoices, family: str | Family, plan: StagedPlan, gigabytes: float, *, batch: int = 1, tiles: bool = True
) -> tuple[ModelChoices, Fitted]:
    """Choose offload and tiles for a card of a given size.

    Args:
        model: The device, the dtype, --offload and --force.
        family: The model's family, or its name.
        plan: What is run.
        gigabytes: Memory of the card in GiB.
        batch: Images that are made at once.
        tiles: The plan may get tiles.

    Returns:
        The model with the offload and tiles that were chosen, and what was counted.

    Raises:
        MrFlowError: It does not fit and --force was not given, or --offload was given as well.
    """
    from mrflow_sched._runtime.device import has_bfloat16, resolve_device

    if model.offload is not None:
        raise MrFlowError("--memory chooses what is offloaded, and so does --offload; leave one out.")
    device = resolve_device(model.device)
    wide = model.dtype == "float32" or (model.dtype == "auto" and not has_bfloat16(device))
    fitted = fit_card(
        plan,
        gigabytes,
        FAMILIES.get(family) if isinstance(family, str) else family,
        batch=batch,
        value_bytes=4 if wide else 2,
        offloads=device.type != "cpu",
        tiles=tiles,
        name="--memory",
    )
    if not (fitted.fits or model.force):
        raise MrFlowError(f"{fitted.sentence[:-1]}; choose a smaller size or batch, or add --force.")
    # The side that an upscaler is given: what it makes of it is at most four times as large.
    upscaler_tile = None if fitted.upscaler_tile is None else fitted.upscaler_tile // _LARGEST_SCALE
    chosen = replace(
        model,
        offload=fitted.offload,
        vae_tile=fitted.vae_tile,
        upscaler_tile=model.upscaler_tile or upscaler_tile,
    )
    return chosen, fitted


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
