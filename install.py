"""Run by the WebUI at every launch and by ComfyUI's manager: says whether MrFlow has all it needs, installs nothing.

Everything MrFlow needs comes with these hosts. Only the standard library is imported, so this takes no time, and the
syntax is old enough for an old Python to say that it is too old.
"""

import importlib.util
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
NEEDED = ("torch", "numpy", "PIL", "safetensors", "spandrel")
OLDEST = (3, 10)


def _is_missing(name):
    """Return whether a top-level module cannot be found; it is not imported."""
    try:
        return importlib.util.find_spec(name) is None
    except (ImportError, ValueError):
        return True


def _in_comfyui():
    """Return whether ComfyUI is the host, by the folder's place or by what its manager sets."""
    return os.path.basename(os.path.dirname(HERE)).lower() == "custom_nodes" or "COMFYUI_PATH" in os.environ


def report():
    """Check the host's environment.

    Returns:
        What the user should know, in one sentence.
    """
    comfyui = _in_comfyui()
    this, host = ("this ComfyUI", "ComfyUI") if comfyui else ("this WebUI", "the WebUI")
    if sys.version_info < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        found = ".".join(map(str, sys.version_info[:2]))
        return "MrFlow needs Python {} or newer, and {} runs on {}.".format(wanted, this, found)  # noqa: UP032
    if not os.path.isfile(os.path.join(HERE, "mrflow_sched", "apps", "comfy" if comfyui else "webui", "__init__.py")):
        where = "with the manager" if comfyui else "from the Extensions tab"
        return "MrFlow is not complete: remove its folder and install it again {}.".format(where)  # noqa: UP032
    missing = [name for name in NEEDED if _is_missing(name)]
    if missing:
        return "MrFlow needs packages that {} lacks: {}; update {}, or install them there.".format(
            this, ", ".join(missing), host
        )
    return "MrFlow is ready: everything it needs came with {}, and nothing was installed.".format(host)  # noqa: UP032


if __name__ == "__main__":
    print(report())
