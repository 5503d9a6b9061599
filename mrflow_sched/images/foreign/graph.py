"""ComfyUI's graph of nodes: what a link leads to, and what is written there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, cast

from mrflow_sched.images.foreign.run import scale, text

__all__ = ["NUMBERS", "inputs_of", "kind_of", "link_of", "node", "prompt", "reached", "value", "way"]

_LONGEST_WAY = 32  # links in a row; graphs that people draw have a dozen
# Inputs that hold a node's text, its number, or lead on to them.
_TEXTS = ("text", "t5xxl", "text_g", "clip_l", "clip_g", "text_l", "prompt", "string", "value")
NUMBERS = ("value", "seed", "noise_seed", "int", "float", "number")
_ONWARDS = ("conditioning", "conditioning_to", "conditioning_1", "positive")


def kind_of(node: Any) -> str:
    """The class of a node.

    Args:
        node: What stands in the graph under its name.

    Returns:
        Its class; "" where it is no node.
    """
    kind: Any = cast("dict[str, Any]", node).get("class_type") if isinstance(node, dict) else None
    return kind if isinstance(kind, str) else ""


def inputs_of(node: Any) -> dict[str, Any]:
    """The inputs of a node.

    Args:
        node: What stands in the graph under its name.

    Returns:
        Values and links by name.
    """
    inputs: Any = cast("dict[str, Any]", node).get("inputs") if isinstance(node, dict) else None
    return cast("dict[str, Any]", inputs) if isinstance(inputs, dict) else {}


def link_of(given: Any) -> str | None:
    """The node that a link [name, output] names.

    Args:
        given: What stands under an input.

    Returns:
        The name; None where it is no link.
    """
    name: Any = cast("list[Any]", given)[0] if isinstance(given, list) and given else None
    return name if isinstance(name, str) else None


def node(graph: Mapping[str, Any], link: Any) -> tuple[str, dict[str, Any]] | None:
    """Follow a link.

    Args:
        graph: Nodes by name.
        link: What stands under an input.

    Returns:
        Class and inputs of the node; None where it is no link or leads nowhere.
    """
    name = link_of(link)
    found = None if name is None else graph.get(name)
    return (kind_of(found), inputs_of(found)) if isinstance(found, dict) else None


def way(graph: Mapping[str, Any], link: Any, *onwards: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Follow links for a limited way.

    Args:
        graph: Nodes by name.
        link: Where to start.
        *onwards: Inputs through which to go on: at each node the first of them that is a link.

    Yields:
        Class and inputs of each node.
    """
    for _ in range(_LONGEST_WAY):
        found = node(graph, link)
        if found is None:
            return
        yield found
        link = next((found[1][name] for name in onwards if isinstance(found[1].get(name), list)), None)


def value(graph: Mapping[str, Any], given: Any, names: tuple[str, ...]) -> Any:
    """A value, or what the nodes that it is linked to hold.

    Args:
        graph: Nodes by name.
        given: What stands under an input.
        names: Inputs that hold such a value in those nodes.

    Returns:
        The value; `given` itself where it leads to none.
    """
    for _, inputs in way(graph, given, *names):
        found = next((inputs[name] for name in names if isinstance(inputs.get(name), (str, int, float))), None)
        if found is not None:
            return found
    return given


def prompt(graph: Mapping[str, Any], link: Any, side: str) -> tuple[str | None, float | None]:
    """The text behind a conditioning, and the embedded guidance set on the way.

    Args:
        graph: Nodes by name.
        link: The conditioning.
        side: "positive" or "negative", for nodes that take both.

    Returns:
        (text, guidance); None for what is not there.
    """
    embedded: float | None = None
    for kind, inputs in way(graph, link, side, *_ONWARDS):
        if kind == "ConditioningZeroOut":
            return None, embedded
        if "guidance" in inputs and embedded is None:
            embedded = scale(value(graph, inputs["guidance"], ("value", "float", "guidance")))
        for name in _TEXTS:
            found = text(value(graph, inputs.get(name), _TEXTS))
            if found:
                return found, embedded
    return None, embedded


def reached(graph: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The nodes behind the saved images, the nearest first; then those behind whatever else a graph ends in.

    Args:
        graph: Nodes by name.

    Yields:
        Names, each once, with the names of the nodes on the shortest way to it, from the end on.
    """
    linked = {name for each in graph.values() for name in map(link_of, inputs_of(each).values())}
    ends = [name for name in graph if name not in linked]
    saving = [name for name in ends if "Save" in kind_of(graph[name])]
    seen = set[str]()
    for start in (*saving, *ends):
        waiting = deque[tuple[str, tuple[str, ...]]]([(start, ())])
        while waiting:
            name, passed = waiting.popleft()
            if name in seen or name not in graph:
                continue
            seen.add(name)
            yield name, passed
            before = (each for each in map(link_of, inputs_of(graph[name]).values()) if each is not None)
            waiting.extend((each, (*passed, name)[:_LONGEST_WAY]) for each in before)
