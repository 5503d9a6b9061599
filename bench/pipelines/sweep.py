"""Every pipeline class of the installed diffusers, checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench import tiny
from bench.pipelines.build import NotBuiltError, from_parts, names_of
from bench.pipelines.classes import TRIED, PipelineClass, pipeline_classes
from bench.pipelines.judge import Row, check

NOT_BUILT = "not built"


@dataclass(frozen=True)
class Swept:
    """What was found about a class.

    Attributes:
        kind: The class.
        name: The tiny pipeline of it, of `bench.tiny`; empty where it was put together from another's parts.
        row: The finding.
    """

    kind: PipelineClass
    name: str
    row: Row


def sweep(only: Sequence[str] = (), *, once: bool = False) -> Iterator[Swept]:
    """Check every class that makes images, and every other one that `bench.tiny` has.

    Args:
        only: Names of classes or of tiny pipelines; none: all.
        once: One tiny pipeline a class, instead of all that it has.

    Yields:
        One finding for each tiny pipeline of each class, by the class's name.
    """
    for kind in pipeline_classes():
        names = names_of(kind.name)
        if kind.makes not in TRIED and not names:
            continue
        if only and kind.name not in only:
            names = [name for name in names if name in only]
            if not names:
                continue
        for name in names[:1] if once else names:
            yield Swept(kind, name, check(tiny.make(name)))
        if not names:
            yield Swept(kind, "", put_together(kind))


def put_together(kind: PipelineClass) -> Row:
    """Check a class that `bench.tiny` does not have.

    Args:
        kind: The class.

    Returns:
        The finding; "not built" where its parts are not there, and it was not refused before they were needed.
    """
    try:
        pipe, missing = from_parts(kind.kind)
    except NotBuiltError as error:
        return Row(kind.name, NOT_BUILT, str(error))
    # What a flow model is refused for may be the very part that is missing.
    if missing and kind.flow and kind.makes == "text-to-image":
        return Row(kind.name, NOT_BUILT, f"no tiny pipeline has its {', '.join(missing)}")
    row = check(pipe)
    if missing and (row.outcome != "refused" or "trying it out" in row.sentence):
        return Row(kind.name, NOT_BUILT, f"no tiny pipeline has its {', '.join(missing)}")
    return row


def share(found: Sequence[Swept]) -> tuple[list[str], list[str]]:
    """Which text-to-image flow classes run.

    Args:
        found: The findings.

    Returns:
        The names of all of them, and of those that run wherever they were tried.
    """
    flows = [each for each in found if each.kind.flow and each.kind.makes == "text-to-image"]
    names = list(dict.fromkeys(each.kind.name for each in flows))
    return names, [name for name in names if all(each.row.ran for each in flows if each.kind.name == name)]
