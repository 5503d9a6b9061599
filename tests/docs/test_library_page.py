"""docs/library.md is run as it stands, top to bottom, on the embedded model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "library.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_every_example_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"library.md, example {number + 1}", "exec"), names)
    assert len(BLOCKS) > 8
    result, warm, fewer = names["result"], names["warm"], names["fewer"]
    assert result.images.shape == warm.images.shape == fewer.images.shape == (1, 3, 256, 256)
    plain = names["sample_staged"](names["engine"], names["plan"], names["prompt"], upscaler=names["upscaler"])
    shift = (warm.images - plain.images).mean((0, 2, 3))
    assert shift[0] > 0.01 > -0.01 > shift[2]
    assert 2 <= fewer.forwards < names["plan"].forwards
    assert names["sharp"].size == (256, 256)
    assert float(names["weight"].grad.abs().sum()) > 0
    assert (tmp_path / "compare.png").is_file()
    assert torch.isfinite(fewer.images).all()
