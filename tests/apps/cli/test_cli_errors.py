"""How the commands end: refusals, faults, what was printed and what is left behind."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_tools import RECORD, SMALL, watch_network

import mrflow_sched
from mrflow_sched._runtime.errors import MissingFileError, MrFlowError
from mrflow_sched.apps.cli.console import Outcome, saying_warnings
from mrflow_sched.apps.cli.load import Job
from mrflow_sched.apps.cli.main import COMMANDS, main
from mrflow_sched.apps.cli.options import Commands, common_options
from mrflow_sched.apps.cli.results import Results
from mrflow_sched.images.files import load_image, read_text, save_png
from mrflow_sched.images.record import RunRecord
from mrflow_sched.plan.make import make_plan

BAD = {
    "size 0": ["generate", "p", "--size", "0"],
    "size 0x0": ["generate", "p", "--size", "0x0"],
    "size 13x": ["generate", "p", "--size", "13x"],
    "size huge": ["generate", "p", "--size", "9999999x8"],
    "negative size": ["generate", "p", "--size", "-8x8"],
    "sigma 1.5": ["generate", "p", "--sigma", "1.5"],
    "sigma nan": ["generate", "p", "--sigma", "nan"],
    "sigma word": ["generate", "p", "--sigma", "much"],
    "unknown family": ["plan", "--family", "flux9", "--size", "64x64"],
    "family of the embedded model": ["generate", "p", "--family", "sdxl"],
    "unknown preset": ["generate", "p", "--preset", "12-1"],
    "unknown solver": ["generate", "p", "--solver", "rk45"],
    "missing file": ["generate", "p", "--upscaler", "nothing.pth"],
    "empty prompt": ["generate", " "],
    "no prompt": ["generate"],
    "not UTF-8": ["generate", "a \udcff star"],
    "negative not UTF-8": ["generate", "p", "--negative", "a \udcff star"],
    "batch 0": ["generate", "p", "--batch", "0"],
    "batch word": ["generate", "p", "--batch", "two"],
    "seed -2": ["generate", "p", "--seed", "-2"],
    "seed 1.5": ["generate", "p", "--seed", "1.5"],
    "seed too large": ["generate", "p", "--seed", str(2**63)],
    "guidance": ["generate", "p", "--guidance", "-1"],
    "mu": ["plan", "--family", "demo", "--mu", "inf"],
    "shift tokens": ["generate", "p", "--shift-tokens", "some"],
    "factor": ["generate", "p", "--factor", "9"],
    "unknown word": ["generate", "p", "--frobnicate"],
    "abbreviation": ["generate", "p", "--siz", "32x32"],
    "unknown command": ["improve", "p"],
    "no family": ["plan"],
    "native and sigma": ["generate", "p", "--native", "--sigma", "0.1"],
    "native and stages saved": ["generate", "p", "--native", "--save-stages"],
    "mu and shift tokens": ["plan", "--family", "demo", "--mu", "0.5", "--shift-tokens", "low"],
    "sigma without a refine step": ["generate", "p", "--refine-steps", "0", "--sigma", "0.2"],
    "curve without a refine step": ["plan", "--family", "demo", "--refine-steps", "0", "--refine-curve", "linear"],
    "an interval": ["generate", "p", "--guidance-interval", "0.9"],
    "a flag with a value": ["plan", "--family", "demo", "--native=yes"],
    "native comparison": ["compare", "p", "--native"],
    "native and upscaler": ["generate", "p", "--native", "--upscaler", "lanczos"],
    "steps without native": ["generate", "p", "--steps", "5"],
    "one stage compared": ["compare", "p", "--stages", "1"],
    "repeats 0": ["compare", "p", "--repeats", "0"],
    "from nothing": ["generate", "--from", "nothing.png"],
    "device": ["generate", "p", "--device", "quantum"],
    "device without numbers": ["generate", "p", "--device", "meta"],
    "too large for the schedule": ["plan", "--family", "flux1-dev", "--size", "32768x32768", "--stages", "2"],
    "out is --": ["generate", "p", "--out=--"],
    "size is --": ["plan", "--family", "demo", "--size=--"],
    "out is empty": ["generate", "p", "--out="],
    "out with NUL": ["generate", "p", "--out", "a\0b"],
    "escapes": ["generate", "p", "--seed", "\x1b[31m5"],
    "escapes of a name": ["generate", "p", "--frob\x1b[31m\u202e"],
    "a long value": ["generate", "p", "--size", "x" * 5000],
    "long unknown words": ["generate", "p", "y" * 5000],
    "upscaler tile": ["generate", "p", "--upscaler-tile", "4"],
    "a LoRA that is no file": ["generate", "p", "--lora", "nothing.safetensors"],
    "format": ["generate", "p", "--format", "gif"],
    "seeds end": ["generate", "p", "--seed", str(2**63 - 1), "--batch", "2"],
    "seeds of calibrate end": ["calibrate", "p", "q", "--seed", str(2**63 - 1)],
    "from and family": ["generate", "--from", "nothing.png", "--family", "flux1-dev"],
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_one_sentence_and_code_2(
    name: str, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = BAD[name]
    if name not in ("family of the embedded model", "unknown command") and words[0] != "plan":
        words = [*words, "--model", str(tiny_folder)]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mrflow: ")
    assert len(err.strip().splitlines()) == 1
    assert err.strip()[-1] in ".)?!"
    assert err.strip().isprintable()
    assert len(err) < 800
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_is_a_refusal(mrflow: Any, tmp_path: Path) -> None:
    code, _, err = mrflow("generate", "p", "--out", str(tmp_path / "o"), model=tmp_path / "none")
    assert code == 2
    assert "not a folder" in err
    assert not (tmp_path / "o").exists()


def test_no_command_shows_help_and_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "generate" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"mrflow {mrflow_sched.__version__}\n"


def test_an_out_that_takes_no_files(mrflow: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for out, which in ((file, "that"), (file / "below" / "it", repr(str(file)))):
        code, _, err = mrflow("generate", "p", *SMALL, "--out", str(out))
        assert code == 2
        assert f"--out is {str(out)!r}, but {which} is not a folder; give another." in err
    assert file.read_text() == "x"


def test_a_full_disk_leaves_nothing(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = mrflow("generate", "p", *SMALL, "--out", str(tmp_path / "new" / "o"))
    assert (code, out) == (2, "")
    assert "No space left" in err
    assert err.count("Traceback") == 0
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_full_from_the_start(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    code, _, err = mrflow("generate", "p", *SMALL, "--out", str(tmp_path))
    assert code == 2
    assert "the disk is full" in err


def test_a_reader_that_went_away_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(tmp_path / "stdout", "w") as stream:

        class Closed(io.StringIO):
            def write(self, _text: str) -> int:
                raise BrokenPipeError

            def fileno(self) -> int:
                return stream.fileno()

        monkeypatch.setattr(sys, "stdout", Closed())
        assert main(["plan", "--family", "demo"]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_result_that_cannot_be_printed_is_a_refusal(unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "mrflow_sched", "plan", "--family", "demo"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    assert found.returncode == 2
    assert found.stderr.startswith("mrflow: the disk is full")
    assert len(found.stderr.splitlines()) == 1


@dataclass(frozen=True)
class Nothing:
    """A request of a command that only raises."""


def failing(error: BaseException) -> Any:
    """A command named "fail" that raises `error`, and a "shout" that prints: as a module of commands would be."""

    def add_parser(commands: Commands) -> None:
        def run(_request: Nothing) -> Outcome:
            raise error

        parser = commands.add_parser("fail", parents=[common_options()])
        parser.set_defaults(from_args=lambda _args: Nothing(), run=run)

    return SimpleNamespace(add_parser=add_parser)


def ended(capsys: pytest.CaptureFixture[str], error: Exception, *words: str) -> tuple[int, str]:
    code = main(["fail", *words], commands=(*COMMANDS, failing(error)))
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


def test_a_command_is_a_module_and_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "echo_command.py").write_text(
        """
from __future__ import annotations
import argparse
from dataclasses import dataclass
from mrflow_sched.apps.cli.console import Outcome
from mrflow_sched.apps.cli.options import common_options

@dataclass(frozen=True)
class EchoRequest:
    word: str

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> EchoRequest:
        return cls(args.word)

def add_parser(commands):
    parser = commands.add_parser("echo", parents=[common_options()], help="print a word")
    parser.add_argument("word")
    parser.set_defaults(from_args=EchoRequest.from_args, run=run)

def run(request: EchoRequest) -> Outcome:
    return Outcome(request.word, (request.word,), code=5)
"""
    )
    spec = importlib.util.spec_from_file_location("echo_command", tmp_path / "echo_command.py")
    assert spec is not None
    assert spec.loader is not None
    echo: Any = importlib.util.module_from_spec(spec)
    sys.modules["echo_command"] = echo  # dataclasses look their module up
    try:
        spec.loader.exec_module(echo)
        assert [main(["echo", "hello", *more], commands=(*COMMANDS, echo)) for more in ((), ("--json",))] == [5, 5]
    finally:
        del sys.modules["echo_command"]
    assert capsys.readouterr().out == 'hello\n"hello"\n'
    assert main(["echo", "hello"]) == 2


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--family", "flux9"),
        ("families", "flux9"),
        ("generate", "p", "--size", "0x0"),
        ("generate", "--from", "nothing.png"),
        ("generate", "p", "--frobnicate"),
        ("compare",),
        ("compare", "p", "--device", "quantum"),
        ("calibrate", "--size", "1x1"),
        ("doctor", "--frobnicate"),
        ("improve",),
    ],
)
def test_a_refusal_is_a_json_value_too(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--json"]) == 2
    out, err = capsys.readouterr()
    assert err == f"mrflow: {json.loads(out)['error']}\n"
    assert list(json.loads(out)) == ["error"]


def test_a_fault_and_a_stop_are_a_json_value_too(capsys: pytest.CaptureFixture[str]) -> None:
    for error, code, words in ((ValueError("x"), 70, "fault of mrflow"), (KeyboardInterrupt(), 130, "Stopped.")):
        assert main(["fail", "--json"], commands=(failing(error),)) == code
        out, err = capsys.readouterr()
        assert words in json.loads(out)["error"]
        assert json.loads(out)["error"] in err


def test_json_as_a_prompt_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--device", "quantum", "--", "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_what_was_saved_before_the_disk_was_full_is_told(
    mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, left = os.fsync, [2]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        usual(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    code, out, err = mrflow("generate", "p", *SMALL, "--batch", "3", "--out", str(tmp_path), "--json")
    found = json.loads(out)
    assert (code, sorted(found["images"])) == (2, sorted(str(path) for path in tmp_path.iterdir()))
    assert f"{str(tmp_path / 'mrflow-2.png')!r} cannot be written" in found["error"]
    assert err.endswith(f"mrflow: {found['error']}\n")


@pytest.mark.parametrize(
    "error",
    [MrFlowError("the size is odd"), MissingFileError("there is no file 'x'."), PermissionError(13, "No right", "x")],
)
def test_a_refusal_is_one_sentence_and_with_debug_a_traceback_too(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = ended(capsys, error)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("mrflow: ")
    assert err.endswith(".\n")
    code, told = ended(capsys, error, "--debug")
    assert code == 2
    assert "Traceback" in told
    assert told.endswith(err)


@pytest.mark.parametrize(
    "error",
    [ValueError("mat1 and mat2 must have the same dtype"), TypeError("a fault"), OSError("no number, no system error")],
)
def test_any_other_exception_is_a_fault_with_a_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = ended(capsys, error)
    assert code == 70
    assert "Traceback" in err
    assert str(error) in err
    assert err.splitlines()[-1] == (
        "mrflow: this is a fault of mrflow, or of a library or model that it uses; "
        "please report it with the lines above."
    )


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")],
)
def test_memory_that_runs_out_is_a_refusal(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = ended(capsys, error)
    assert (code, err.count("\n")) == (2, 1)
    assert "not enough memory" in err


def test_a_plain_error_of_a_library_in_a_run_is_a_fault(
    mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_number: int) -> None:
        raise ValueError("expected 4 channels")

    watch_network(monkeypatch, broken)
    code, _, err = mrflow("generate", "p", *SMALL, "--out", str(tmp_path / "o"))
    assert code == 70
    assert "expected 4 channels" in err
    assert "please report it" in err
    assert not (tmp_path / "o").exists()


def test_nothing_of_the_process_is_changed(mrflow: Any, tmp_path: Path) -> None:
    """Warnings, threads and signals are as they were, whatever the record asked for."""
    import torch

    before = warnings.showwarning, list(warnings.filters), torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    threads = before[2] + 1
    _, out, _ = mrflow("generate", "p", *SMALL, "--out", str(tmp_path))
    text = read_text(out.strip())
    record = replace(RunRecord.from_json(text["mrflow"]), threads=threads)
    save_png(tmp_path / "other.png", load_image(out.strip()), {"mrflow": record.to_json()})
    code, _, err = mrflow("generate", "--from", str(tmp_path / "other.png"), "--out", str(tmp_path / "again"))
    assert (code, "threads" in err) == (0, False)
    assert before == (
        *(warnings.showwarning, list(warnings.filters), torch.get_num_threads(), signal.getsignal(signal.SIGINT)),
    )


def test_the_module_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    monkeypatch.setattr(sys, "argv", ["mrflow", "plan", "--family", "demo", "--json"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("mrflow_sched", run_name="__main__")
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out)["family"] == "demo"


def test_a_failure_leaves_an_older_folder_alone(mrflow: Any, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine.txt").write_text("x")
    code, _, _ = mrflow("generate", "p", *SMALL, "--device", "quantum", "--out", str(tmp_path / "o"))
    assert code == 2
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["mine.txt"]


def test_paths_of_any_letters_are_printed_whatever_the_encoding(mrflow: Any, tmp_path: Path) -> None:
    call = "Outcome(None, (sys.argv[1],)).show(None, as_json=False)"
    code = f"import sys; from mrflow_sched.apps.cli.console import Outcome; {call}"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    found = subprocess.run([sys.executable, "-c", code, "港.png"], capture_output=True, text=True, check=True, env=env)
    assert found.stdout == "\\u6e2f.png\n"
    shown = mrflow("generate", "p", *SMALL, "--out", str(tmp_path / "a \udcff"))
    assert shown[0] == 0
    assert "\\udcff" in shown[1]


@pytest.mark.parametrize("words", [("--upscaler", "FILE"), ("--from", "PICTURE")])
def test_files_are_looked_at_before_a_model_is_loaded(
    mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    picture = mrflow("generate", "p", *SMALL, "--out", str(tmp_path))[1].strip()
    file = tmp_path / "x2.safetensors"
    file.write_bytes(b"no weights")
    if words[0] == "--from":
        record = replace(RunRecord.from_json(read_text(picture)["mrflow"]), upscaler="x2", upscaler_sha256="0" * 64)
        save_png(picture, load_image(picture), {"mrflow": record.to_json()})
        words = ("--from", picture, "--upscaler", str(file))
    else:
        words = ("p", *SMALL, "--upscaler", str(file))

    def load_engine(*_given: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("mrflow_sched.apps.cli.load.load_engine", load_engine)
    code, _, err = mrflow("generate", *words, "--out", str(tmp_path / "o"))
    assert (code, err.count("\n")) == (2, 1)
    if words[0] == "--from":
        digest = hashlib.sha256(b"no weights").hexdigest()
        assert f"'x2' (SHA-256 000000000000...), not 'x2' (SHA-256 {digest[:12]}...)" in err
    assert not (tmp_path / "o").exists()


def test_parallel_runs_into_one_folder_lose_nothing(mrflow: Any, tmp_path: Path, tiny_folder: Path) -> None:
    """Their pictures are finished at the same moment; each path that is told holds its own."""
    prompts = [f"a star {number}" for number in range(8)]
    paths: dict[str, str] = {}
    gate = threading.Barrier(len(prompts))

    def save(prompt: str) -> None:
        results = Results()
        plan = make_plan("demo", 32, 32)
        image = torch.full((1, 3, 8, 8), 0.5)
        record = replace(RECORD, plan=plan.to_string(), prompt=prompt)
        made: Any = SimpleNamespace(images=image, stages=(), unfinished_images=(False,))
        gate.wait()
        results.save(tmp_path / "o", ".png", Job(plan, prompt), record, made)
        paths[prompt] = str(results.images[0].path)

    threads = [threading.Thread(target=save, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == sorted(
        Path(path).name for path in paths.values()
    )
    assert len(set(paths.values())) == len(prompts)
    for prompt, path in paths.items():
        assert RunRecord.from_json(read_text(path)["mrflow"]).prompt == prompt


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_run_does_not_need_somebody_who_listens(tmp_path: Path, tiny_folder: Path) -> None:
    words = ["generate", "a star ☃", *SMALL, "--model", str(tiny_folder), "--progress", "--out", str(tmp_path / "☃")]
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "mrflow_sched", *words],
            stdout=subprocess.PIPE,
            stderr=full,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            check=False,
        )
    assert found.returncode == 0
    assert found.stdout.decode("ascii") == f"{tmp_path}/\\u2603/mrflow-0.png\n"
    assert [path.name for path in (tmp_path / "☃").iterdir()] == ["mrflow-0.png"]


def test_warnings_are_told_even_where_the_block_raises(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        for _ in range(2):
            logging.getLogger("mrflow_sched.sampler").warning("%s", "ours")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), saying_warnings():
        fail()
    assert capsys.readouterr().err == "mrflow: ours\n"


def test_text_that_the_locale_cannot_read_is_utf_8() -> None:
    """What Python makes of an argument in UTF-8 where LANG=C and nothing helps."""
    code = "import sys; from mrflow_sched.apps.cli.parsing import prompt_option as p; print(ascii(p(sys.argv[1])))"
    env = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    found = subprocess.run([sys.executable, "-c", code, "ünï ☃"], capture_output=True, check=True, env=env)
    assert found.stdout == b"'\\xfcn\\xef \\u2603'\n"


def test_plan_needs_no_torch() -> None:
    code = "import sys; from mrflow_sched.__main__ import main; code = main(); sys.exit(code or 'torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code, "plan", "--family", "demo"], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stderr) == (0, "")
