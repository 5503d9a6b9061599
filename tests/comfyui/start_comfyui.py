"""Runs ComfyUI's main.py: `python start_comfyui.py CHECKOUT MAIN.PY [ARGUMENTS]`, with ComfyUI's folder on PYTHONPATH.

Beside a torch that torchvision's compiled operators were not built for, ComfyUI does not start. They are named first,
by a file of the checkout that needs nothing else of it, so that the package itself stays unknown to this process.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Name the operators, then become ComfyUI."""
    checkout, script, *arguments = sys.argv[1:]
    file = Path(checkout) / "mrflow_sched" / "_runtime" / "torchvision_ops.py"
    spec = importlib.util.spec_from_file_location("torchvision_ops", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ensure_ops()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
