"""The rows of a table of prompts as images to make, each with its plan and its key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.cli.inputs import LoraChoice, hash_of
from mrflow_sched.apps.cli.load import find_upscaler, plan_family, upscaler_kind
from mrflow_sched.apps.cli.options import ModelChoices, PlanChoices, read_option
from mrflow_sched.apps.cli.parsing import check_seeds, size_option, whole_number
from mrflow_sched.batch.items import Item, key_of
from mrflow_sched.batch.table import Row, Table
from mrflow_sched.images.record import MAX_BATCH
from mrflow_sched.plan.checks import MAX_SEED
from mrflow_sched.plan.options import OPTIONS, PlanOptions

if TYPE_CHECKING:
    from mrflow_sched.plan.families import Family
    from mrflow_sched.plan.stages import StagedPlan

_TEXTS = ("prompt", "negative", "refine_prompt", "refine_negative")
_NAME = "id"

COLUMNS = (*_TEXTS, "batch", "size", "width", "height", "lora", _NAME, *OPTIONS)
"""Columns of a table of prompts; an option of the plan has the name that it has in Python."""


@dataclass(frozen=True)
class Defaults:
    """What holds where a row says nothing.

    Attributes:
        negative: What the images should not show, or None.
        refine_prompt: What the later stages show instead, or None.
        refine_negative: What those should not show instead, or None.
        batch: How many images of a row.
        choices: Options of the plan.
        model: The model, its LoRAs and the upscaler.
        suffix: Ending of the image files.
    """

    negative: str | None
    refine_prompt: str | None
    refine_negative: str | None
    batch: int
    choices: PlanChoices
    model: ModelChoices
    suffix: str


@dataclass(frozen=True)
class Wanted:
    """What a table asks for.

    Attributes:
        items: The images, those of a row together, in the order of their seeds.
        family: The model's, or its name.
        plans: Those that differ in more than their seeds.
        loras: FILE[:SCALE] -> the LoRA.
        notes: What the user should know.
    """

    items: tuple[Item, ...]
    family: str | Family
    plans: tuple[StagedPlan, ...]
    loras: Mapping[str, LoraChoice]
    notes: tuple[str, ...]


@dataclass
class _Reader:
    """Reads rows; plans and LoRAs that several rows share are made once."""

    defaults: Defaults
    family: str | Family
    plans: dict[Any, StagedPlan] = field(default_factory=dict[Any, "StagedPlan"])
    loras: dict[str, LoraChoice] = field(default_factory=dict[str, LoraChoice])
    hashes: dict[str, str] = field(default_factory=dict[str, str])

    def read(self, row: Row, inputs: Mapping[str, Any]) -> list[Item]:
        """The images of a row.

        Args:
            row: The row.
            inputs: What decides every image of the command.

        Returns:
            One for each seed.
        """
        values = row.values
        loras = self._loras(values.get("lora"))
        plan = self._plan(values)
        batch = _whole(values, "batch", 1, MAX_BATCH, self.defaults.batch)
        check_seeds(plan.seed, batch)
        texts = [values.get(name, getattr(self.defaults, name, None)) for name in _TEXTS]
        common = {
            **inputs,
            **dict(zip(_TEXTS, texts, strict=True)),
            "loras": [(self.hashes[lora], self.loras[lora].scale) for lora in loras],
        }
        items: list[Item] = []
        for seed in range(plan.seed, plan.seed + batch):
            own = replace(plan, seed=seed)
            key = key_of({**common, "plan": own.to_string()})
            items.append(
                Item(key, row.line, own, str(texts[0]), texts[1], texts[2], texts[3], loras, values.get(_NAME))
            )
        return items

    def _loras(self, text: str | None) -> tuple[str, ...]:
        if text is None:
            words = tuple(f"{each.file}:{each.scale:g}" for each in self.defaults.model.loras)
        else:
            words = tuple(word.strip() for word in text.split(";") if word.strip())
        for word in words:
            if word not in self.loras:
                self.loras[word] = LoraChoice.from_text(word)
                self.hashes[word] = hash_of(self.loras[word].file)
        return words

    def _plan(self, values: Mapping[str, str]) -> StagedPlan:
        """The plan of a row, with its seed."""
        given = {name: text for name, text in values.items() if name in (*OPTIONS, "size", "width", "height")}
        seed = given.pop("seed", None)
        known = tuple(sorted(given.items()))
        if known not in self.plans:
            choices = self.defaults.choices
            options = {name: read_option(name, text) for name, text in given.items() if name in OPTIONS}
            choices = replace(
                choices,
                size=_size(given) or choices.size,
                options=cast("PlanOptions", {**choices.options, **options}),
            )
            self.plans[known] = choices.make_plan(self.family, upscaler_kind=upscaler_kind(self.defaults.model))
        plan = self.plans[known]
        return plan if seed is None else replace(plan, seed=_whole({"seed": seed}, "seed", 0, MAX_SEED, 0))


def read_items(table: Table, defaults: Defaults) -> Wanted:
    """Plan all images of a table.

    Args:
        table: The rows.
        defaults: What holds where a row says nothing.

    Returns:
        The images, none twice.

    Raises:
        MrFlowError: A row cannot be used, told with its line; or the model or the upscaler.
    """
    model = defaults.model
    family = plan_family(model)
    inputs = _inputs(defaults)
    reader = _Reader(defaults, family)
    found: dict[str, Item] = {}
    repeated: list[tuple[int, int]] = []
    for row in table.rows:
        try:
            items = reader.read(row, inputs)
        except MrFlowError as error:
            raise table.refusal(row, error) from error
        for item in items:
            first = found.setdefault(item.key, item)
            if first is not item:
                repeated.append((item.row, first.row))
    notes: list[str] = []
    if table.ignored:
        notes.append(f"The columns {', '.join(table.ignored)} of {table.name!r} are not used.")
    if repeated:
        line, before = repeated[0]
        count = f"{len(repeated)} images are" if len(repeated) > 1 else "An image is"
        notes.append(f"{count} asked for twice and made once; the first stands in line {line}, as in line {before}.")
    return Wanted(tuple(found.values()), family, tuple(reader.plans.values()), reader.loras, tuple(notes))


def _inputs(defaults: Defaults) -> dict[str, Any]:
    """What decides every image of the command, for the keys."""
    model = defaults.model
    if model.model is None:
        from mrflow_sched import demo

        where = str(demo.weights_path())
    else:
        where = model.model
    from mrflow_sched.engines.diffusers.folder import model_fingerprint

    upscaler = find_upscaler(model)
    return {
        "model": model_fingerprint(where, model.config),
        "dtype": model.dtype,
        "upscaler": None if upscaler is None else hash_of(upscaler),
        "upscaler_dtype": model.upscaler_dtype,
        "format": defaults.suffix,
    }


def _size(given: Mapping[str, str]) -> tuple[int, int] | None:
    sides = [given[name] for name in ("width", "height") if name in given]
    if "size" in given and sides:
        raise MrFlowError("size and width or height say the same; leave one out.")
    if len(sides) == 1:
        raise MrFlowError("width and height go together; give both, or size.")
    text = "x".join(sides) if sides else given.get("size")
    return None if text is None else _read("size", text, size_option)


def _whole(values: Mapping[str, str], name: str, low: int, high: int, default: int) -> int:
    return _read(name, values[name], whole_number(low, high)) if name in values else default


def _read(name: str, text: str, reader: Callable[[str], Any]) -> Any:
    import argparse

    try:
        return reader(text)
    except argparse.ArgumentTypeError as error:
        raise MrFlowError(f"{name}: {error}.") from error
