"""A modular pipeline of diffusers as the engine sees any other pipeline: `as_pipeline`.

A modular pipeline is blocks in a row: text encoders, what prepares a loop, the loop, a decoder. Its call has whatever
inputs its blocks have. `ModularView` answers what is asked of a pipeline with them: `encode_prompt` runs the blocks
that read text, and a call runs those from there to the end of the loop, beginning at the latents that it is given, with
the schedule of its scheduler. The owner's pipeline, its blocks and its components stay as they are.

Needs diffusers 0.42 or newer, where blocks say which of them run, and imports it when they are run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.quiet import leaving_out
from mrflow_sched.engines.diffusers.view import view_of

__all__ = ["ModularView", "as_pipeline"]

_READERS = ("text_encoder", "tokenizer", "processor", "prompt_upsampler")
"""How the names of components that read text begin."""
_BY_CLASS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"Krea2TurboModularPipeline": {"is_distilled": True}})
"""What a classic pipeline has in its configuration, and a modular one in its class."""
_ERRORS = "Error in block"
"""Each block logs an error that passes through it, with a traceback; whoever catches it says what is needed."""


def as_pipeline(pipe: Any) -> Any:
    """A pipeline that has what the engine asks of one.

    Args:
        pipe: Any pipeline of diffusers.

    Returns:
        The pipeline itself; a `ModularView` of it where it is modular.

    Raises:
        MrFlowError: It is modular and lacks a component that has to be loaded, has no loop, or needs more than text.
    """
    kinds = [base.__name__ for base in type(pipe).__mro__]
    if "ModularPipeline" not in kinds:
        return pipe
    _check_loaded(pipe)
    blocks = _read(pipe)
    return _view_class(kinds[: kinds.index("ModularPipeline")], blocks)(pipe, blocks)


@dataclass(frozen=True)
class _Blocks:
    """The blocks of a pipeline that turn a prompt into latents.

    Attributes:
        text: Those that read text.
        stage: Those from there to the loop, which is the last.
        made: What the former leave for the latter, by name, with the group of values that it belongs to.
    """

    text: tuple[Any, ...]
    stage: tuple[Any, ...]
    made: Mapping[str, str | None]


class ModularView:
    """A modular pipeline behind the interface of the others.

    Its components and whatever else the pipeline has are attributes; components that are set here take the place of the
    pipeline's in calls of this view, and of copies of it.

    Attributes:
        config: The pipeline's configuration, with what a classic pipeline would have in it.
    """

    def __init__(self, modular: Any, blocks: _Blocks) -> None:
        """Look at `modular`, which stays as it is.

        Args:
            modular: A modular pipeline with loaded components.
            blocks: Its blocks, divided.
        """
        self._modular, self._blocks = modular, blocks
        self.config = {**dict(modular.config), **_BY_CLASS.get(type(modular).__name__, {})}

    def __getattr__(self, name: str) -> Any:
        """What is not set here is the pipeline's.

        Args:
            name: Of the attribute.

        Returns:
            The pipeline's.

        Raises:
            AttributeError: The pipeline has none either.
        """
        modular = self.__dict__.get("_modular")
        if modular is None or name.startswith("__"):
            raise AttributeError(name)
        return getattr(modular, name)

    @property
    def components(self) -> dict[str, Any]:
        """Component by name."""
        return {name: getattr(self, name) for name in self._modular.components}

    def maybe_free_model_hooks(self) -> None:
        """Do nothing: a components manager moves modules by itself when it needs room."""

    def encode_prompt(self, **inputs: Any) -> dict[str, Any]:
        """Run the blocks that read text.

        Args:
            **inputs: Their inputs.

        Returns:
            What later blocks read of it, by name; what the blocks left out is not there.
        """
        state: Any = self._run(self._blocks.text, {}, inputs)
        return {name: state.get(name) for name in self._blocks.made if state.get(name) is not None}

    def __call__(self, **arguments: Any) -> None:
        """Run the loop and the blocks that prepare it; the scheduler has the result.

        Args:
            **arguments: What `encode_prompt` returned, `latents` as the loop has its state, and inputs of the blocks.
        """
        from mrflow_sched.engines.diffusers.modular_start import StageStart

        *before, loop = self._blocks.stage
        text = {name: arguments[name] for name in self._blocks.made if name in arguments}
        self._run((*before, StageStart(), loop), text, {**arguments, "latents": None, "start": arguments["latents"]})

    def _run(self, blocks: Sequence[Any], text: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
        """Run blocks on a copy of the pipeline that has this view's components; returns the state after them."""
        from diffusers.modular_pipelines.modular_pipeline import PipelineState, SequentialPipelineBlocks

        row: Any = SequentialPipelineBlocks.from_blocks_dict({str(number): each for number, each in enumerate(blocks)})
        own = {name: self.__dict__[name] for name in self._modular.components if name in self.__dict__}
        runner = view_of(self._modular, _blocks=row, **own)
        state = PipelineState()
        for name, value in text.items():
            cast("Any", state).set(name, value, self._blocks.made[name])
        known = {each.name for each in row.inputs} - text.keys()
        with leaving_out(_ERRORS):
            return runner(state, **{name: value for name, value in inputs.items() if name in known})


def _view_class(names: Sequence[str], blocks: _Blocks) -> type[ModularView]:
    """A class whose bases are called like the modular pipeline's, each beside its classic counterpart.

    Families know their pipelines by the names of classes and of their bases; what a call takes is read from signatures.
    """

    def encode_prompt(self: Any, **inputs: Any) -> Any:
        return ModularView.encode_prompt(self, **inputs)

    def call(self: Any, **arguments: Any) -> Any:
        return ModularView.__call__(self, **arguments)

    signed = ((encode_prompt, _inputs(blocks.text)), (call, _inputs((*blocks.text, *blocks.stage), blocks.made)))
    for function, parameters in signed:
        cast("Any", function).__signature__ = inspect.Signature([_SELF, *parameters])
    kind: Any = ModularView
    for name in reversed(names):
        kind = type(_classic(name), (kind,), {})
        kind = type(name, (kind,), {})
    return type(names[0], (kind,), {"encode_prompt": encode_prompt, "__call__": call})


def _classic(name: str) -> str:
    """The classic pipeline with the same conventions, which may be one for several modular ones."""
    plain = name.replace("ModularPipeline", "Pipeline")
    return {"Flux2KleinBasePipeline": "Flux2KleinPipeline", "Krea2TurboPipeline": "Krea2Pipeline"}.get(plain, plain)


# --------------------------------------------------------------------------------------------------------------- blocks


def _read(modular: Any) -> _Blocks:
    """The blocks that run where only a prompt is given, divided; raises MrFlowError where they cannot be run so."""
    blocks = modular.blocks
    flat = not blocks.sub_blocks or _is_loop(blocks)
    try:
        steps = [blocks] if flat else list(blocks.get_execution_blocks(prompt=True).sub_blocks.values())
    except (AttributeError, TypeError, NotImplementedError) as error:
        raise MrFlowError(
            f"pipe is {type(modular).__name__}, whose blocks cannot say which of them run for a prompt alone; update "
            "diffusers to 0.42 or newer."
        ) from error
    loop = _loop_of(modular, steps)
    _check_from_text(modular, steps[: loop + 1])
    readers = [
        number
        for number, block in enumerate(steps[:loop])
        if any(each.name.startswith(_READERS) for each in block.expected_components)
    ]
    last = readers[-1] + 1 if readers else 0
    text, stage = tuple(steps[:last]), tuple(steps[last : loop + 1])
    read = {each.name for block in stage for each in block.inputs}  # None among them: it reads a whole group
    outputs = [each for block in text for each in block.intermediate_outputs]
    made = {each.name: each.kwargs_type for each in outputs if each.name in read or (None in read and each.kwargs_type)}
    return _Blocks(text, stage, MappingProxyType(made))


def _is_loop(block: Any) -> bool:
    return any(base.__name__ == "LoopSequentialPipelineBlocks" for base in type(block).__mro__)


def _loop_of(modular: Any, steps: Sequence[Any]) -> int:
    """Number of the block that loops over the timesteps."""
    found = [number for number, block in enumerate(steps) if _is_loop(block)]
    if len(found) != 1:
        count = "no loop" if not found else f"{len(found)} loops"
        raise MrFlowError(
            f"pipe is {type(modular).__name__}, whose blocks have {count} over timesteps; stages need one: give a "
            "pipeline with one, or the family's classic pipeline."
        )
    return found[0]


def _check_loaded(modular: Any) -> None:
    """Refuse a pipeline whose weights have not been loaded, as `from_pretrained` leaves it."""
    network = "unet" if "unet" in modular.components else "transformer"
    missing = [name for name in ("vae", network, "scheduler") if getattr(modular, name, None) is None]
    if missing:
        name = type(modular).__name__
        raise MrFlowError(
            f"pipe is {name} without {' and '.join(missing)}; load what it needs with pipe.load_components() first."
        )


def _check_from_text(modular: Any, steps: Sequence[Any]) -> None:
    """Refuse blocks that need something which neither a prompt nor an earlier block gives."""
    made = {"prompt", "height", "width", "num_inference_steps", "latents", "generator"}
    for block in steps:
        for each in block.inputs:
            if each.required and each.name not in made:
                raise MrFlowError(
                    f"pipe is {type(modular).__name__}, whose blocks need {each.name}; stages begin with a prompt "
                    "alone: give the family's text-to-image pipeline."
                )
        made |= {each.name for each in block.intermediate_outputs}


# ----------------------------------------------------------------------------------------------------------- signatures

_SELF = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)


def _inputs(blocks: Sequence[Any], more: Iterable[str] = ()) -> list[inspect.Parameter]:
    """The inputs of blocks that no block before makes, and `more`, as parameters of a function."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    found = {name: inspect.Parameter(name, keyword, default=None) for name in more}
    made: set[str] = set(found)
    for block in blocks:
        for each in block.inputs:
            if each.name and each.name not in made:
                found[each.name] = inspect.Parameter(
                    each.name, keyword, default=each.default, annotation=each.type_hint
                )
        made |= {each.name for each in block.intermediate_outputs} | found.keys()
    return list(found.values())
