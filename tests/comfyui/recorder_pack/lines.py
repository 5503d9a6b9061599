"""JSON lines in the file that MRFLOW_RECORDER_FILE names."""

from __future__ import annotations

import json
import os
from typing import Any


def write(event: str, **values: Any) -> None:
    """Append one event."""
    with open(os.environ["MRFLOW_RECORDER_FILE"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, **values}) + "\n")


def write_network(x: Any, time: Any) -> None:
    """Append one call of a network."""
    write("network", time=[float(value) for value in time], shape=list(x.shape), dtype=str(x.dtype))
