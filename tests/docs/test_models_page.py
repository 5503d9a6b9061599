"""docs/models.md: its memory is what the cost model counts, its families and commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mrflow_sched import FAMILIES, make_plan
from mrflow_sched.plan.cost import peak_memory

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "models.md").read_text("utf-8")
CARDS = (8, 12, 16, 24, 32, 48, 80, 96, 141)
TILES = {"offload": True, "vae_tile": 512, "upscaler_tile": 512}


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if re.match(r"\| [a-z]", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def counted(name: str, side: int | None = None) -> list[str]:
    """A row of cells: GiB in 16 bits with all on the card, then offloaded in 16, 8 and 4 bits, each with its card."""
    family = FAMILIES[name]
    size = family.default_size or family.native_size if side is None else (side, side)
    whole = make_plan(family, *size)
    cut = whole if side is None else make_plan(family, *size, tile=max(family.native_size))
    peaks = [
        peak_memory(whole),
        *(peak_memory(cut, weight_bytes=weight, **TILES) for weight in (2.0, 1.0, 0.55)),
    ]
    sizes = [peak.total / 2**30 for peak in peaks if peak and peak.counted]
    cards = [next(card for card in CARDS if size * 1.1 <= card) for size in sizes]
    return [f"{size:.1f} ({card})" for size, card in zip(sizes, cards, strict=True)]


def test_memory_is_what_is_counted() -> None:
    told = rows(PAGE.split("<!-- memory -->")[1].split("<!-- end -->")[0])
    found = {name: counted(name) for name in FAMILIES if name != "demo"}
    assert [row for row in told if row[0] != "family"] == [[name, *cells] for name, cells in found.items() if cells]


def test_memory_of_large_images_is_what_is_counted() -> None:
    told = rows(PAGE.split("<!-- large memory -->")[1].split("<!-- end -->")[0])
    found = [
        [name, f"{side}x{side}", *cells]
        for name in FAMILIES
        for side in (2048, 4096)
        if name != "demo" and (cells := counted(name, side))
    ]
    assert [row for row in told if row[0] != "family"] == found


def test_the_page_names_every_family() -> None:
    table = PAGE.split("| family | repository")[1].split("\n\n")[0]
    named = {name.strip() for row in rows(table) for name in row[0].removesuffix(" of 9B").split(",")}
    assert named == set(FAMILIES) - {"demo"}


@pytest.mark.parametrize("page", ["install", "models", "reliability", "troubleshooting"])
def test_links_to_other_pages_and_headings_hold(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([\w/-]+\.md)?(?:#([\w-]+))?\)", (DOCS / f"{page}.md").read_text("utf-8")):
        text = (DOCS / (target or f"{page}.md")).read_text("utf-8")
        heads = {
            re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)$", text, re.M)
        }
        assert not anchor or anchor in heads, (target, anchor)
