"""Images: on disk, as tensors, and the record in their metadata. The only folder that uses Pillow.

Names are loaded on first use, so that the record can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mrflow_sched.images.convert import from_pictures, to_pil
    from mrflow_sched.images.files import load_image, open_image, read_text, save_new, save_png
    from mrflow_sched.images.foreign import ForeignRun, read_foreign
    from mrflow_sched.images.parameters import parameters_text

__all__ = [
    "ForeignRun",
    "from_pictures",
    "load_image",
    "open_image",
    "parameters_text",
    "read_foreign",
    "read_text",
    "save_new",
    "save_png",
    "to_pil",
]

_HOMES = {
    "ForeignRun": "foreign",
    "from_pictures": "convert",
    "parameters_text": "parameters",
    "read_foreign": "foreign",
    "to_pil": "convert",
}
"""Where a name is defined, unless in `files`."""


def __getattr__(name: str) -> Any:
    """Load the module that defines a public name on first use (PEP 562).

    Args:
        name: One of `__all__`.

    Returns:
        What has that name.

    Raises:
        AttributeError: Another name.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'files')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
