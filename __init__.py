"""ComfyUI's door: this repository, cloned into `custom_nodes`, is a pack of nodes.

The package is loaded from beside this file under its own name, whatever the folder is called, and nothing is put on
Python's path. Outside ComfyUI this file does nothing.
"""

import importlib.util
import logging
import sys
from pathlib import Path

WEB_DIRECTORY = "./comfy_web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

_NAME = "mrflow_sched"
_FOLDER = Path(__file__).resolve().parent / _NAME


async def comfy_entrypoint():
    """Called once by ComfyUI for the nodes.

    Returns:
        Its extension object.
    """
    _load()
    from mrflow_sched.apps.comfy.extension import MrFlowExtension

    return MrFlowExtension()


def _load():
    """Load the package beside this file, in place of another copy that is installed or was loaded before."""
    other = sys.modules.get(_NAME)
    if other is not None:
        if Path(str(other.__file__)).resolve().parent == _FOLDER:
            return
        logging.getLogger("mrflow").warning(
            "MrFlow: another copy of %s (%s) was loaded from %s; these nodes use their own.",
            *(_NAME, getattr(other, "__version__", "unknown version"), other.__file__),
        )
        for name in [each for each in sys.modules if each == _NAME or each.startswith(f"{_NAME}.")]:
            del sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        _NAME, _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[_NAME]  # nothing half loaded for the next attempt
        raise
