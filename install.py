"""Run by the WebUI at every launch: checks that everything MrFlow needs is there, says so, and installs nothing.

Everything MrFlow needs comes with the WebUI. Only the standard library is imported, so this takes no time, and the
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


def report():
    """Check the WebUI's environment.

    Returns:
        What the user should know, in one sentence.
    """
    if sys.version_info < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        found = ".".join(map(str, sys.version_info[:2]))
        return "MrFlow needs Python {} or newer, and this WebUI runs on {}.".format(wanted, found)  # noqa: UP032
    if not os.path.isfile(os.path.join(HERE, "mrflow_sched", "apps", "webui", "__init__.py")):
        return "MrFlow is not complete: remove its folder and install it again from the Extensions tab."
    missing = [name for name in NEEDED if _is_missing(name)]
    if missing:
        return "MrFlow needs packages that this WebUI lacks: {}; update the WebUI, or install them there.".format(
            ", ".join(missing)
        )
    return "MrFlow is ready: everything it needs came with the WebUI, and nothing was installed."


if __name__ == "__main__":
    print(report())
