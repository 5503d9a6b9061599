"""What this host and the loaded model can do, found by looking at objects handed in: never at a version's name.

Three kinds of host meet here. New Forge (Forge main, Neo): `sd_model.forge_objects.unet.model.predictor` exists and
mixes noise the model's own way. A1111: no `forge_objects`; flow models carry `add_noise_to_latent`. Old Forge
(Classic, reForge): `forge_objects` without `predictor`, where noise is always added the variance-exploding way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mrflow_sched.plan.families import Family, HostFacts, family_of_host, get_family

__all__ = [
    "Host",
    "HostApi",
    "ModelInfo",
    "attach",
    "capabilities",
    "kept_random_state",
    "own_attributes",
    "probe_model",
]

Noising = Literal["flow", "ve", "none"]


# ------------------------------------------------------------------------------------------------------------ the host


class HostApi(Protocol):
    """What a running WebUI is asked for beyond the job object."""

    @property
    def opts(self) -> Any:
        """The host's options: attributes, and `data`, the dict behind them."""
        ...

    @property
    def state(self) -> Any:
        """The host's progress: `interrupted`, `skipped`, `stopping_generation`."""
        ...

    @property
    def dynamic_args(self) -> Any:
        """Forge Neo's record of what kind of model is loaded; None on other hosts."""
        ...

    def upscalers(self) -> Sequence[Any]:
        """The host's upscalers, each with a `name`."""
        ...

    def timestep_samplers(self) -> frozenset[str]:
        """Names of the samplers that walk timesteps and ignore sigma lists (DDIM, PLMS, ...)."""
        ...

    def make_noise(self, p: Any, shape: Sequence[int], seeds: Sequence[int], subseeds: Sequence[int]) -> Tensor:
        """The host's own seeded noise (len(seeds), *shape) with the job's variation settings; no other random number
        of the process is changed."""
        ...


@dataclass(frozen=True)
class _WebUI:
    """`HostApi` over a host's modules."""

    shared: Any
    rng: Any
    samplers: frozenset[str]
    dynamic_args: Any

    @property
    def opts(self) -> Any:
        return self.shared.opts

    @property
    def state(self) -> Any:
        return self.shared.state

    def upscalers(self) -> Sequence[Any]:
        return list(self.shared.sd_upscalers)

    def timestep_samplers(self) -> frozenset[str]:
        return self.samplers

    def make_noise(self, p: Any, shape: Sequence[int], seeds: Sequence[int], subseeds: Sequence[int]) -> Tensor:
        # The host's generator seeds torch's global one on the way; sampling goes on from there, so it is put back.
        with kept_random_state():
            return self.rng.ImageRNG(
                tuple(shape),
                list(seeds),
                subseeds=list(subseeds),
                subseed_strength=p.subseed_strength,
                seed_resize_from_h=p.seed_resize_from_h,
                seed_resize_from_w=p.seed_resize_from_w,
            ).next()


def own_attributes(thing: Any) -> dict[str, Any]:
    """The attributes of an object itself, without those of its class: a live dict, as `vars` gives."""
    return thing.__dict__


@contextmanager
def kept_random_state() -> Generator[None, None, None]:
    """Inside, torch's global generators may be seeded and drawn from; afterwards they are as they were."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    library: Any = torch.random  # partially typed
    with library.fork_rng(devices=[torch.cuda.current_device()] if used else []):
        yield


def attach(import_module: Callable[[str], Any]) -> HostApi:
    """The running WebUI, found through its modules by `import_module`, which must be `importlib.import_module`'s like.

    Call it while the script is loaded: some hosts take the extension's folder off the path afterwards.
    """
    samplers: frozenset[str] = frozenset()
    try:
        data = import_module("modules.sd_samplers_timesteps").samplers_data_timesteps
        samplers = frozenset(str(entry.name) for entry in data)
    except (ImportError, AttributeError):
        pass
    try:
        dynamic_args = import_module("backend.args").dynamic_args
    except (ImportError, AttributeError):
        dynamic_args = None
    return _WebUI(import_module("modules.shared"), import_module("modules.rng"), samplers, dynamic_args)


@dataclass(frozen=True)
class Host:
    """What this host's job object and model offer. `noising`: how its hires pass mixes noise in ("none": no model)."""

    has_hr_cfg: bool
    has_every_sampling: bool
    has_modified_noise: bool
    has_hr_scheduler: bool
    has_additional_modules: bool
    upscaler_names: tuple[str, ...]
    noising: Noising


def capabilities(p: Any, upscalers: Sequence[Any] = ()) -> Host:
    """What the host of job `p` can do; `upscalers` is its list (`HostApi.upscalers`)."""
    return Host(
        has_hr_cfg=hasattr(p, "hr_cfg"),
        has_every_sampling=hasattr(getattr(p, "scripts", None), "process_before_every_sampling"),
        has_modified_noise=hasattr(p, "modified_noise"),
        has_hr_scheduler=hasattr(p, "hr_scheduler"),
        has_additional_modules=hasattr(p, "hr_additional_modules"),
        upscaler_names=tuple(str(entry.name) for entry in upscalers),
        noising=_noising(getattr(p, "sd_model", None)),
    )


# ----------------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class ModelInfo:
    """The loaded model. `refusal`: the sentence why it cannot run staged, or None.

    `known`: its schedule is in the family table; for others stage 1 follows the host's. `grid_final`, `grid_low`:
    sides of the final and of the low-resolution picture are multiples of these pixels. `five_d`: latents carry a time
    axis (B, C, T, h, w). `experimental`: no flow model, run by equal signal-to-noise ratio.
    """

    family: Family
    title: str
    flow: bool
    experimental: bool
    refusal: str | None
    grid_final: int
    grid_low: int
    five_d: bool
    known: bool = True


_EDITS = re.compile(r"kontext|(?:image|qwen)[-_ .]?edit|(?<![a-z])edit(?![a-z])", re.IGNORECASE)
_PLAIN = "generate without MrFlow, or choose another checkpoint"


def probe_model(p: Any, host: HostApi | None = None) -> ModelInfo:
    """What is loaded: `p` is a job, or anything with `sd_model`; `host` adds what only Neo's own record tells.

    Never raises for a model it does not know: `refusal` says why one cannot be used.
    """
    model = getattr(p, "sd_model", None)
    noising = _noising(model)
    engine = type(model).__name__
    if model is None or noising == "none":
        return _refused("sd15", engine, "MrFlow needs a loaded checkpoint, and there is none yet")
    name = _checkpoint_name(model)
    flow = _is_flow(model)
    family, known = _family(p, model, engine, name, flow)
    refusal = _refusal(model, engine, name, flow, noising, family.title, host)
    new_forge = _predictor(model) is not None
    return ModelInfo(
        family=family,
        title=family.title,
        flow=flow,
        experimental=not flow,
        refusal=refusal,
        grid_final=16 if flow and (family.shift.kind == "flux2" or not new_forge) else family.vae_factor,
        grid_low=family.grid,
        five_d=bool(getattr(model, "is_wan", False)),
        known=known,
    )


def _refused(family: str, title: str, sentence: str) -> ModelInfo:
    known = get_family(family)
    return ModelInfo(known, title, False, True, f"{sentence}; {_PLAIN}.", 8, known.grid, False)


def _refusal(
    model: Any, engine: str, name: str, flow: bool, noising: Noising, title: str, host: HostApi | None
) -> str | None:
    record = getattr(host, "dynamic_args", None)
    if engine.startswith("Wan") or bool(getattr(record, "wan", False)):
        return f"MrFlow makes pictures, and {name or engine} makes videos; {_PLAIN}."
    edits = any(bool(getattr(record, kind, False)) for kind in ("kontext", "edit"))
    if edits or _EDITS.search(name):
        return f"MrFlow cannot be used with the edit model {name or engine}, whose encoder stores references; {_PLAIN}."
    if engine == "StableDiffusionXLRefiner":
        return f"MrFlow needs a base model, and {name or engine} is a refiner; {_PLAIN}."
    if bool(getattr(model, "is_inpaint", False)):
        return f"MrFlow cannot be used with the inpainting model {name or engine}; {_PLAIN}."
    if flow and noising == "ve":
        return (
            f"MrFlow cannot be used with {title} on this WebUI, which adds noise to flow models the variance-exploding "
            "way in its hires pass; generate without MrFlow, or use Forge or Forge Neo."
        )
    return None


def _family(p: Any, model: Any, engine: str, name: str, flow: bool) -> tuple[Family, bool]:
    """The family of the loaded model, and whether its schedule is known."""
    repository = getattr(getattr(model, "model_config", None), "huggingface_repo", "")
    facts = HostFacts(
        engine=engine,
        text=f"{name} {repository}".lower(),
        flow=flow,
        guidance=getattr(p, "cfg_scale", None),
        distilled_scale=bool(getattr(model, "use_distilled_cfg_scale", True)),
        is_sd3=bool(getattr(model, "is_sd3", False)),
        is_sdxl=bool(getattr(model, "is_sdxl", False)),
    )
    found = family_of_host(facts)
    if found is not None:
        return found, True
    # The grid and the guidance of most flow models; its schedule is not asked for.
    return replace(get_family("z-image"), name="flow", title=engine or "flow model"), False


def _checkpoint_name(model: Any) -> str:
    info = getattr(model, "sd_checkpoint_info", None)
    return str(getattr(info, "name_for_extra", None) or getattr(info, "name", None) or "")


def _predictor(model: Any) -> Any:
    objects = getattr(model, "forge_objects", None)
    return getattr(getattr(getattr(objects, "unet", None), "model", None), "predictor", None)


def _noising(model: Any) -> Noising:
    """How the host mixes noise into this model's latents in its hires pass."""
    if model is None:
        return "none"
    predictor = _predictor(model)
    if predictor is not None:
        return "flow" if predictor.prediction_type == "const" else "ve"
    if getattr(model, "forge_objects", None) is not None:
        return "ve"
    if hasattr(model, "add_noise_to_latent"):
        return "flow"
    # A1111's LDM models; a placeholder that hosts keep before the first load has neither of these.
    return "ve" if hasattr(model, "get_first_stage_encoding") and hasattr(model, "decode_first_stage") else "none"


def _is_flow(model: Any) -> bool:
    """Whether the model predicts a velocity of the flow interpolant."""
    if _noising(model) == "flow":
        return True
    if _predictor(model) is not None:
        return False
    inner = getattr(getattr(getattr(model, "forge_objects", None), "unet", None), "model", None)
    kind = getattr(getattr(inner, "model_type", None), "name", "")
    return str(kind).startswith("FL") or bool(getattr(model, "is_sd3", False))
