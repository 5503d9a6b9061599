"""The parts of a pipeline: their classes, which diffusers or transformers has, and loading one from its folder.

Before weights are read, every network is built without memory, and refused where its weight files could not fill it. A
weight that a file lacks is an error, never a guess.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from mrflow_sched._runtime.errors import MrFlowError, first_line, shown
from mrflow_sched.engines.diffusers.arguments import takes_a_number
from mrflow_sched.engines.diffusers.files import (
    DIFFUSERS_STEM,
    OWN_SCHEDULER,
    TRANSFORMERS_STEM,
    Weights,
    refuse,
    variant_of,
)

__all__ = [
    "check_size",
    "convert",
    "dtype_argument",
    "is_model",
    "load_part",
    "part_class",
    "pipeline_class",
    "quiet_loading",
    "skeleton",
    "stem_of",
]


def pipeline_class(folder: Path, index: Mapping[str, Any]) -> Any:
    """The pipeline class that a folder names.

    Args:
        folder: The model's.
        index: From `read_index`.

    Returns:
        A class of diffusers.

    Raises:
        MrFlowError: The installed diffusers has no such pipeline.
    """
    import diffusers

    library, name = cast("Any", diffusers), str(index["_class_name"])
    kind = getattr(library, name, None) if name.isidentifier() else None
    base = library.DiffusionPipeline
    if not (isinstance(kind, type) and issubclass(kind, base) and kind is not base):
        refuse(
            folder,
            f"is made for {shown(name, 60)}, which diffusers {library.__version__} does not have; update diffusers, or "
            "give another folder",
        )
    return kind


def part_class(folder: Path, name: str, value: Sequence[Any]) -> Any:
    """The class of a part: a network, scheduler, tokenizer ... that diffusers or transformers has, or our scheduler.

    Args:
        folder: The model's.
        name: Of the part.
        value: (library, class), as model_index.json has it and `check_files` let it pass.

    Returns:
        The class.

    Raises:
        MrFlowError: The installed libraries have no such class, or it is none of a part.
    """
    import diffusers
    import transformers

    origin, kind = (str(each) for each in value)
    if (origin, kind) == OWN_SCHEDULER:
        from mrflow_sched.engines.diffusers.scheduler import MrFlowScheduler

        return MrFlowScheduler
    libraries: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    try:
        home = libraries.get(origin) or getattr(libraries["diffusers"].pipelines, origin, None)
        found = getattr(home, kind, None) if home is not None else None
    except Exception as error:  # a module of the library that cannot be imported here
        refuse(folder, f"whose {name} is of {origin}.{kind}, which cannot be imported ({first_line(error)})", error)
    if not (isinstance(found, type) and issubclass(found, _bases())):
        refuse(
            folder,
            f"whose {shown(name, 60)} is of {shown(origin, 60)}.{shown(kind, 60)}, which neither diffusers nor "
            "transformers has; update them, or give another folder",
        )
    return found


def _bases() -> tuple[type, ...]:
    """What a part may be; not a pipeline or an automatic class, which would decide themselves what to load."""
    import diffusers
    import transformers

    library, other = cast("Any", diffusers), cast("Any", transformers)
    kinds: list[Any] = [library.ModelMixin, library.SchedulerMixin]
    kinds += [getattr(library, "BaseGuidance", None), getattr(getattr(library, "guiders", None), "BaseGuidance", None)]
    kinds += [other.PreTrainedModel, other.PreTrainedTokenizerBase, other.ProcessorMixin]
    kinds += [other.ImageProcessingMixin, other.FeatureExtractionMixin]
    return tuple(kind for kind in kinds if isinstance(kind, type))


def load_part(folder: Path, name: str, kind: Any, dtype: torch.dtype | None) -> Any:
    """Load one part from its folder.

    Args:
        folder: The model's.
        name: Of the part.
        kind: Its class.
        dtype: Of a network's weights; other parts have none.

    Returns:
        The part; a network is in `dtype`, ready to run, and has every weight that it needs.

    Raises:
        MrFlowError: It is damaged or lacks a weight.
    """
    more: dict[str, Any] = {}
    if is_model(kind):
        more = {"use_safetensors": True, "output_loading_info": True, dtype_argument(_library_of(kind)): dtype}
        more["variant"] = variant_of(folder, name, stem_of(kind))
    try:
        loaded = kind.from_pretrained(folder / name, local_files_only=True, **more)
    except Exception as error:  # whatever a reader of a damaged file may raise: several libraries are involved
        refuse(folder, f"whose {name} cannot be read ({first_line(error)}); download it again", error)
    if not more:
        return loaded
    model, report = loaded
    lacking = sorted(report["missing_keys"])
    if lacking:
        refuse(folder, f"whose {name} lacks {len(lacking)} weights, first {shown(repr(lacking[0]))}")
    convert(model, cast("torch.dtype", dtype))
    return model.eval().requires_grad_(False)


def convert(model: Any, dtype: torch.dtype) -> None:
    """Bring weights into `dtype` that the loader left in another; those that a model needs in float32 stay.

    diffusers without accelerate leaves networks in the dtype of their file.

    Args:
        model: A network; one that is quantised is left as it is.
        dtype: What was asked for.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.dtype != dtype and not kept & set(name.split(".")):
            weight.data = weight.data.to(dtype)


# ------------------------------------------------------------------------------------------------------------ skeletons

_MOST_MODULES = 50_000
"""Modules of a network; the largest published ones have a tenth of them."""


def skeleton(folder: Path, name: str, kind: Any, held: Weights | None) -> torch.nn.Module:
    """The network that a part's configuration describes, without memory for its weights.

    Args:
        folder: The model's.
        name: Of the part.
        kind: Its class.
        held: What its weight files hold, which bounds the modules that are built; None: not known.

    Returns:
        The network, on the device "meta".

    Raises:
        MrFlowError: The configuration cannot be read, or has more modules than the files could fill.
    """
    most = _MOST_MODULES if held is None else min(_MOST_MODULES, 200 + 8 * held.tensors)
    try:
        with _at_most(most), torch.device("meta"):
            if _library_of(kind).__name__ == "transformers":
                return kind(kind.config_class.from_pretrained(folder / name, local_files_only=True))
            config = kind.load_config(folder / name, local_files_only=True)
            _check_kinds(folder, name, kind, config)
            return kind.from_config(config)
    except MrFlowError:
        raise
    except _TooManyError:
        refuse(folder, f"whose {name} has a configuration of more layers than its weight files hold; download it again")
    except Exception as error:  # whatever building a network from a damaged configuration may raise
        refuse(
            folder,
            f"whose {name} has a configuration that cannot be read ({first_line(error)}); download it again, or update "
            f"{_library_of(kind).__name__}",
            error,
        )


def _check_kinds(folder: Path, name: str, kind: Any, config: Mapping[str, Any]) -> None:
    """Refuse text where a class takes a number: it would be kept as it is, and fail in the middle of a run."""
    for each in inspect.signature(kind.__init__).parameters.values():
        value = config.get(each.name)
        if takes_a_number(each) and isinstance(value, (str, dict)):
            said = shown(repr(cast("object", value)), 60)
            refuse(folder, f"whose {name}/config.json has {each.name}: {said}, where a number or true or false belongs")


class _TooManyError(Exception):
    """A network became too large while it was built."""


@contextlib.contextmanager
def _at_most(modules: int) -> Generator[None, None, None]:
    """Stop building networks in this thread when they have so many modules."""
    count, thread = 0, threading.get_ident()

    def counted(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > modules:
            raise _TooManyError

    handle = torch.nn.modules.module.register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


_QUANTISED = 16
"""Weights that one number of a quantised file may stand for, at most."""
_FEW = 10_000_000
"""Numbers that a network may have beside its files, which hold no tables that it computes."""


def check_size(folder: Path, name: str, network: torch.nn.Module, held: Weights) -> None:
    """Refuse a network that its weight files cannot fill, or that would leave much of them aside.

    Args:
        folder: The model's.
        name: Of the part.
        network: From `skeleton`.
        held: What its weight files hold.

    Raises:
        MrFlowError: Network and files do not fit.
    """
    weights = sum(each.numel() for each in network.parameters())
    tables = sum(each.numel() for each in network.buffers())
    stored = sum(each.numel() for each in network.state_dict().values())
    quantised = getattr(getattr(network, "config", None), "quantization_config", None) is not None
    # Libraries differ in what they store besides weights, and transformers files may hold more than the part in use.
    lacking = weights > 1.5 * held.numbers + 1000 and not quantised
    beyond = weights + tables > held.numbers * (_QUANTISED if quantised else 2) + _FEW
    # A ControlNet that uses parts of the transformer may have been saved with them.
    whole = stem_of(type(network)) == DIFFUSERS_STEM and not hasattr(type(network), "from_transformer")
    left = held.numbers > 1.1 * stored + 1000 and not quantised and whole
    if lacking or beyond or left:
        refuse(
            folder,
            f"whose {name} has a configuration of {weights + tables:,} weights, while its files hold "
            f"{held.numbers:,}; download it again",
        )


def stem_of(kind: type) -> str:
    """How the library of a class names its weight files.

    Args:
        kind: Class of a network.

    Returns:
        Their stem.
    """
    return TRANSFORMERS_STEM if _library_of(kind).__name__ == "transformers" else DIFFUSERS_STEM


def is_model(kind: Any) -> bool:
    """Whether a part's class has weights.

    Args:
        kind: Any class.

    Returns:
        True for networks.
    """
    return issubclass(kind, torch.nn.Module)


def _library_of(kind: type) -> Any:
    import diffusers
    import transformers

    return transformers if issubclass(kind, transformers.PreTrainedModel) else diffusers


def dtype_argument(library: Any) -> str:
    """The argument that gives a loader the dtype; newer ones warn about the old name.

    Args:
        library: diffusers or transformers.

    Returns:
        Its name.
    """
    renamed = {"diffusers": (0, 42), "transformers": (4, 56)}[library.__name__]
    return "dtype" if tuple(int(part) for part in library.__version__.split(".")[:2]) >= renamed else "torch_dtype"


# ------------------------------------------------------------------------------------------------------ quiet loading


@contextlib.contextmanager
def quiet_loading() -> Generator[None, None, None]:
    """Silence the progress bars and log messages of both libraries' loaders, and restore their settings afterwards.

    Yields:
        Nothing; the settings hold inside the `with` block.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    # The oldest diffusers we support cannot say whether its bars are on; they are unless somebody turned them off.
    before = [(each.get_verbosity(), getattr(each, "is_progress_bar_enabled", lambda: True)()) for each in loggers]
    try:
        for logger in loggers:
            logger.set_verbosity_error()
            logger.disable_progress_bar()
        yield
    finally:
        for logger, (verbosity, bars) in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
            if bars:
                logger.enable_progress_bar()
