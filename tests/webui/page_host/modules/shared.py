"""Options and upscalers of a WebUI that just started."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class OptionInfo:
    """One setting: what the settings page makes of it."""

    def __init__(
        self,
        default: Any = None,
        label: str = "",
        component: Any = None,
        component_args: Any = None,
        section: Any = None,
    ) -> None:
        self.default, self.label, self.component, self.component_args = default, label, component, component_args
        self.section = section
        self.comment_after = ""

    def info(self, text: str) -> OptionInfo:
        self.comment_after += f"<span class='info'>({text})</span>"
        return self

    def needs_reload_ui(self) -> OptionInfo:
        self.comment_after += " <span class='info'>(requires Reload UI)</span>"
        return self


class Options:
    """The settings by name, as attributes."""

    def __init__(self) -> None:
        pack = os.environ.get("PAGE_PACK")
        self.data: dict[str, Any] = {
            "sd_model_checkpoint": "flux1-dev.safetensors",
            "localization": Path(pack).stem if pack else "None",
        }
        self.data_labels: dict[str, OptionInfo] = {}

    def add_option(self, key: str, info: OptionInfo) -> None:
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)

    def __getattr__(self, key: str) -> Any:
        try:
            return self.__dict__["data"][key]
        except KeyError:
            raise AttributeError(key) from None


opts = Options()
state = SimpleNamespace(interrupted=False, skipped=False, stopping_generation=False)
cmd_opts = SimpleNamespace(no_half=False)


def _upscalers() -> list[Any]:
    plain = SimpleNamespace(name="None")
    found: list[Any] = [
        SimpleNamespace(name=name, data_path=None, scaler=plain) for name in ("None", "Lanczos", "Nearest")
    ]
    folder = os.environ.get("PAGE_ESRGAN")
    if folder:
        scaler = SimpleNamespace(name="ESRGAN", model_path=folder, user_path=None)
        for file in sorted(Path(folder).iterdir()):
            found.append(SimpleNamespace(name=file.stem, data_path=str(file), scaler=scaler))
    return found


sd_upscalers = _upscalers()
