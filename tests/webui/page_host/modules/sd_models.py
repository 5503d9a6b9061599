"""The loaded model: one of Forge's shape, or none yet."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any


class Flux:
    """What the extension looks at in Forge's engine of that name."""

    def __init__(self) -> None:
        predictor = SimpleNamespace(prediction_type="const")
        self.forge_objects = SimpleNamespace(unet=SimpleNamespace(model=SimpleNamespace(predictor=predictor)))
        self.sd_checkpoint_info = SimpleNamespace(name="flux1-dev.safetensors", name_for_extra="flux1-dev")
        self.use_distilled_cfg_scale = True


def _loaded() -> Any:
    return Flux() if os.environ.get("PAGE_MODEL", "flux") == "flux" else None


model_data = SimpleNamespace(sd_model=_loaded())
