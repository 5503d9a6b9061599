"""torchvision imports beside a torch that its operators were not built for; nothing changes where they exist."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mrflow_sched._runtime import torchvision_ops as _torchvision_ops
from mrflow_sched._runtime.torchvision_ops import ensure_ops

ROOT = Path(__file__).resolve().parents[2]


def forget_torchvision() -> dict[str, ModuleType]:
    """Take torchvision out of the imported modules; what was there."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "torchvision"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder at the head of the import path, with torchvision not imported; everything is put back after.

    The operators' usual names are left out of play: they must stay free for the real library in this process.
    """
    saved = forget_torchvision()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(_torchvision_ops, "_SCHEMAS", {"first_kind": "(Tensor x) -> Tensor"})
    yield tmp_path
    forget_torchvision()
    sys.modules.update(saved)


def write_double(folder: Path, *operators: str) -> None:
    """A stand-in for torchvision: as the real one, it registers a shape rule for each operator while it is imported."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from torchvision import extension, _meta_registrations\n")
    (package / "extension.py").write_text("")
    rule = '@torch.library.register_fake("torchvision::{0}")\ndef {0}_shape(*args): return None\n'
    (package / "_meta_registrations.py").write_text("import torch\n" + "".join(map(rule.format, operators)))


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_the_installed_torchvision_and_spandrel_import_after_it() -> None:
    code = (
        "from mrflow_sched._runtime.torchvision_ops import ensure_ops\n"
        "ensure_ops()\n"
        "import torchvision, spandrel\n"
        "from torchvision.transforms.functional import rotate\n"
        "print(ensure_ops(), spandrel.ImageModelDescriptor.__name__)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "() ImageModelDescriptor", done.stderr


def test_operators_that_are_missing_are_named_whichever_they_are(folder: Path) -> None:
    write_double(folder, "first_missing", "second_missing")
    with pytest.raises(RuntimeError, match="torchvision::first_missing does not exist"):
        import_module("torchvision")
    forget_torchvision()
    assert ensure_ops() == ("first_kind", "first_missing", "second_missing")
    assert import_module("torchvision").extension
    assert ensure_ops() == ()
    with pytest.raises(RuntimeError):  # named, not made: calling one still fails
        torch.ops.torchvision.first_kind(torch.zeros(1))


def test_operators_that_exist_stay_as_they_are(folder: Path) -> None:
    real = torch.library.Library("torchvision", "FRAGMENT")
    real.define("real_one(Tensor real) -> Tensor")
    write_double(folder, "real_one")
    assert ensure_ops() == ()
    assert str(torch.ops.torchvision.real_one.default._schema) == "torchvision::real_one(Tensor real) -> Tensor"


def test_nothing_is_imported_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "torchvision.py").write_text("raise RuntimeError('operator torchvision::never does not exist')\n")
    monkeypatch.setitem(sys.modules, "torchvision", sys)
    assert ensure_ops() == ()


@pytest.mark.parametrize("body", ["raise ImportError('none here')", "raise RuntimeError('another reason')"])
def test_other_failures_are_left_to_whoever_imports(folder: Path, body: str) -> None:
    (folder / "torchvision.py").write_text(body + "\n")
    assert ensure_ops() == ()
    assert "torchvision" not in sys.modules


def test_a_package_without_the_usual_sources(folder: Path) -> None:
    (folder / "torchvision.py").write_text("raise RuntimeError('operator torchvision::lonely does not exist')\n")
    assert "lonely" in ensure_ops()
