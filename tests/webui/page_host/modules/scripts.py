"""The base class of scripts, as far as building the page goes."""

from __future__ import annotations

import re
from typing import Any

AlwaysVisible = object()
scripts_data: list[Any] = []


class Script:
    """A script of the txt2img tab."""

    is_txt2img = True
    is_img2img = False
    infotext_fields: Any = None
    paste_field_names: Any = None

    def elem_id(self, item: str) -> str:
        title = re.sub(r"[^a-z_0-9]", "", re.sub(r"\s", "_", self.title().lower()))  # pyright: ignore
        return f"script_{title}_{item}"
