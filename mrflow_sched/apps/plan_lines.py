"""A plan as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mrflow_sched.plan.cost import part_costs, peak_memory, work_ratio
from mrflow_sched.plan.stages import Stage, StagedPlan

__all__ = ["counted", "plan_lines"]


def plan_lines(
    plan: StagedPlan,
    seconds: Sequence[tuple[str, float]] | None = None,
    *,
    notes: Sequence[str] | None = None,
    from_image: bool = False,
    guidance: bool = True,
) -> Iterator[str]:
    """A plan for people: what it makes and costs, its stages with their sigmas, its notes, and its one line.

    Args:
        plan: The plan.
        seconds: The predicted run time by part; None: nothing is known of it.
        notes: What to tell besides; None: the plan's own notes.
        from_image: A picture takes the place of stage 1, which is neither shown nor counted.
        guidance: Show the guidance of each stage.

    Yields:
        Lines of text.
    """
    shown = [*enumerate(plan.stages, 1)][from_image:]
    size, forwards = f"{plan.width}x{plan.height}", counted(sum(stage.forwards for _, stage in shown), "forward")
    yield f"{plan.family} {plan.preset}: {size}, {forwards}, seed {plan.seed}"
    if not from_image:
        yield from _cost_lines(plan)
    if seconds is not None:
        share = ", ".join(f"{name} {value:.2f}" for name, value in seconds)
        yield f"predicted run time: {sum(value for _, value in seconds):.2f} s ({share})"
    for number, stage in shown:
        shift = "no shift" if stage.mu is None else f"mu {stage.mu:.4g}"
        yield (
            f"stage {number}: {stage.width}x{stage.height}, {_tokens(stage)}, {shift}, {stage.solver}, "
            f"{f'guidance {stage.guidance:g}, ' if guidance else ''}{counted(stage.forwards, 'forward')}"
            f"{f', noise {stage.renoise:g} anew' if stage.renoise else ''}"
            f"{'' if stage.precision == 'own' else f', {stage.precision}'}"
            f"{', few-step LoRA' if stage.few_step else ''}"
        )
        yield "  sigmas " + (" ".join(f"{sigma:.5g}" for sigma in stage.sigmas) or "none: the upscaled image is kept")
    for note in plan.notes if notes is None else notes:
        yield f"note: {note}"
    yield f"plan: {plan.to_string()}"


def _cost_lines(plan: StagedPlan) -> Iterator[str]:
    """Yield what the run costs: the network alone, all parts, peak memory."""
    native = counted(plan.native_steps, "native step")
    compared = len(plan.stages) > 1 or any(stage.shares for stage in plan.stages)
    if compared:
        yield f"network cost: {_compared(plan.cost_ratio)} than {native}"
    parts, peak = part_costs(plan), peak_memory(plan)
    if parts is not None:
        share = ", ".join(f"{part.name} {_tera(part.flop)}" for part in parts)
        has_vae = any(part.name.endswith("decode") for part in parts)
        what = "with VAE and upscaler" if has_vae else "with upscaler; the VAE was not counted"
        whole = f"total cost ({what}): {_tera(sum(part.flop for part in parts))} TFLOP per image ({share})"
        yield whole if not compared else f"{whole}, {_compared(work_ratio(plan))} than {native}"
    if peak is not None and peak.counted:
        yield (
            f"memory in 16 bits: about {_size(peak.total)} at the peak, which is {peak.name}; "
            f"{_size(peak.weights)} of it are weights"
        )


def _tokens(stage: Stage) -> str:
    """Write how many tokens a stage has, and which share of them the network sees where that is not all."""
    shares = [f"{share:.4g}" for share in dict.fromkeys(stage.shares)]
    return counted(stage.tokens, "token") + (f" of which it sees {', then '.join(shares)}" if shares else "")


def _compared(ratio: float) -> str:
    """Write the ratio of another cost to ours as "2.00x less" or "2.00x more"."""
    return f"{ratio:.2f}x less" if ratio >= 1 else f"{1 / ratio:.2f}x more"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.0f} MiB"


def _tera(flop: float) -> str:
    return f"{flop / 1e12:.3g}"


def counted(number: int, thing: str) -> str:
    """Write a number with its noun, as in "1 step", "2 steps".

    Args:
        number: How many.
        thing: The noun in the singular; its plural must end in s.

    Returns:
        The two words.
    """
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
