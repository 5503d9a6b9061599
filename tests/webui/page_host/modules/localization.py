"""Translation packs: files of translations by the name in the menu. PAGE_PACK is the path of the one that is chosen."""

from __future__ import annotations

import json
import os
from pathlib import Path

_chosen = os.environ.get("PAGE_PACK")
localizations: dict[str, list[str]] = {Path(_chosen).stem: [_chosen]} if _chosen else {}


def localization_js(name: str) -> str:
    """What the page needs before its scripts: all files of a pack, later ones first in rank."""
    data: dict[str, str] = {}
    for file in localizations.get(name, []):
        data.update(json.loads(Path(file).read_text(encoding="utf-8")))
    return f"window.localization = {json.dumps(data)};"
