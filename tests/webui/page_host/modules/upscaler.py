"""One entry of the WebUI's list of upscalers."""

from __future__ import annotations

from typing import Any


class UpscalerData:
    """Name, file, scale, and the scaler that runs it."""

    def __init__(self, name: str, path: str | None, upscaler: Any = None, scale: int = 4, model: Any = None) -> None:
        self.name, self.data_path, self.local_data_path = name, path, path
        self.scaler, self.scale, self.model = upscaler, scale, model
