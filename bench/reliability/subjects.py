"""What a child of the worker runs: the package's doors, and subjects that are known to be bad.

Runs under the Python and the checkout that are tried, so it uses only names that every version of the package has, or
asks for the newer one first.
"""

from __future__ import annotations

import importlib
import io
import runpy
import sys
from pathlib import Path
from typing import Any

# --- getting ready -----------------------------------------------------------------------------


def prepare() -> dict[str, str]:
    """Import and use once whatever the children need, in one thread, so that they can be forked.

    Returns:
        Versions of the libraries.
    """
    import torch

    torch.set_num_threads(1)
    import mrflow_sched
    from mrflow_sched import demo

    demo.load_engine(device="cpu")
    mrflow_sched.load_upscaler(demo.upscaler_path(), device="cpu")
    import diffusers
    import PIL
    import transformers

    for name in ("FluxPipeline", "StableDiffusion3Pipeline", "DiffusionPipeline"):
        getattr(diffusers, name)
    for name in ("CLIPTextModelWithProjection", "T5EncoderModel"):
        getattr(transformers, name)
    libraries: list[Any] = [torch, diffusers, transformers, PIL]
    return {library.__name__: str(library.__version__) for library in libraries}


def refusal() -> tuple[type[Exception], ...]:
    """The types of a refusal; an older version has none of its own for it."""
    own = getattr(first("mrflow_sched._runtime.errors", "builtins"), "MrFlowError", None)
    return (own,) if own else (ValueError, FileNotFoundError)


def first(*modules: str) -> Any:
    """The first of these modules that the checkout has; the last one is taken unseen.

    Its files are looked at, because an installed copy of the package may offer the modules that the checkout lacks.
    """
    import mrflow_sched

    root = Path(mrflow_sched.__file__).parent.parent
    for name in modules[:-1]:
        place = root.joinpath(*name.split("."))
        if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
            return importlib.import_module(name)
    return importlib.import_module(modules[-1])


# --- the package's doors -----------------------------------------------------------------------


def command(arguments: list[str]) -> int:
    """`mrflow ARGUMENTS`, as ``python -m mrflow_sched`` runs it; the exit code."""
    sys.argv = ["mrflow", *arguments]
    try:
        runpy.run_module("mrflow_sched", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def upscaler(path: str) -> str:
    """Load an upscaler file and use it once; its name."""
    import torch

    from mrflow_sched import load_upscaler

    loaded: Any = load_upscaler(path, device="cpu")
    loaded(torch.full((1, 3, 16, 16), 0.5))
    return str(loaded.name)


def reader(path: str) -> list[float]:
    """Read an image file as a tensor; mean, least and largest value, then its shape."""
    images = first("mrflow_sched.images.files", "mrflow_sched.images")
    return _numbers(images.load_image(path))


def pillow_image(path: str) -> list[float]:
    """Hand an image that Pillow opened to `MrFlow` and upscale it by Lanczos; as in `reader`."""
    from PIL import Image

    opened = Image.open(path)
    opened.load()
    result = mrflow()("a blue star", image=opened, refine_steps=0, output_type="pt")
    return _numbers(result.images[0])


def _numbers(image: Any) -> list[float]:
    values = image.float()[:3]  # colours, without alpha
    return [float(values.mean()), float(values.min()), float(values.max()), *map(float, image.shape)]


def mrflow(**more: Any) -> Any:
    import diffusers

    from mrflow_sched import MrFlow, demo

    diffusers.utils.logging.disable_progress_bar()
    pipe: Any = diffusers.FluxPipeline.from_pretrained(str(demo.weights_path()), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return MrFlow(pipe, **more)


# --- known to be bad ---------------------------------------------------------------------------


def bad_torch_load(path: str) -> None:
    """Believes a pickle."""
    import torch

    torch.load(path, weights_only=False)


def bad_unpack(path: str) -> int:
    """Unpacks a zip file whatever it declares."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        return sum(len(archive.read(name)) for name in archive.namelist())


def bad_wait() -> None:
    """Never ends."""
    while True:
        pass


def bad_folder(path: str) -> None:
    """Runs the Python of a model folder, as loaders did that called it a component."""
    for file in sorted(Path(path).rglob("*.py")):
        runpy.run_path(str(file))


def bad_reader(path: str) -> None:
    """Opens whatever Pillow can, the formats that start a program too, and holds it as floats."""
    import numpy as np
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    with Image.open(path) as opened:
        np.asarray(opened.convert("RGB"), dtype=np.float32)


def bad_print(path: str) -> None:
    """Prints a file as it is."""
    print(Path(path).read_bytes().decode("latin-1"))


def good_nothing() -> None:
    """Does nothing wrong."""
    io.StringIO("nothing").read()
