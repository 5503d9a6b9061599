"""Hostile model folders, through `generate` and `doctor`: Python beside the weights, indexes that lie, absurd sizes."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import diffusers

from bench.reliability.runner import CONTROL, EXECUTED, MIB, WRONG, Bench, Case, Tally, common_faults, found_bad
from bench.reliability.upscalers import ESCAPE, Call
from mrflow_sched import demo

TITLE = "hostile model folders"
_NEED = 100 * MIB
"""Bytes that the embedded model's folder may take when it is loaded, in float32, and to run it at 64 pixels."""

Change = Callable[[Path], object]


def edit(name: str, **values: Any) -> Change:
    """Set entries of a JSON file of the folder."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def write(name: str, text: str | bytes) -> Change:
    """Replace a file of the folder."""

    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)

    return change


def both(*changes: Change) -> Change:
    """One change after the other."""

    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def index(**values: Any) -> Change:
    """Set entries of model_index.json."""
    return edit("model_index.json", **values)


def as_sd3(folder: Path) -> None:
    """Make a whole StableDiffusion3Pipeline folder of the embedded model's, since loaders treat the two differently."""
    library: Any = diffusers
    shutil.rmtree(folder / "transformer")
    library.SD3Transformer2DModel(
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=64,
    ).save_pretrained(folder / "transformer")
    for part in ("text_encoder", "tokenizer"):
        (folder / f"{part}_2").rename(folder / f"{part}_3")
        shutil.copytree(folder / part, folder / f"{part}_2")
    clip = ["transformers", "CLIPTextModelWithProjection"]
    parts = {"text_encoder": clip, "text_encoder_2": clip, "text_encoder_3": ["transformers", "T5EncoderModel"]}
    parts |= {"tokenizer_2": ["transformers", "CLIPTokenizer"], "tokenizer_3": ["transformers", "T5TokenizerFast"]}
    parts |= {"transformer": ["diffusers", "SD3Transformer2DModel"]}
    path = folder / "model_index.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "_mrflow_family"}
    path.write_text(json.dumps(kept | parts | {"_class_name": "StableDiffusion3Pipeline"}))


def code_in_folders(mark: Path) -> Iterator[tuple[str, Change]]:
    """Ways to have Python run by whoever loads the folder."""
    payload = f"open({str(mark)!r}, 'w').write('executed')\n"
    class_of = payload + "class Evil:\n    config_class = None\n"
    pipeline = payload + "from diffusers import {0}\nclass Evil({0}):\n    pass\n"
    for kind, name in {"FluxPipeline": index(), "StableDiffusion3Pipeline": as_sd3}.items():
        yield f"{kind}: None.py", both(name, write("None.py", pipeline.format(kind)))
        yield f"{kind}: pipeline.py", both(name, write("pipeline.py", pipeline.format(kind)))
        for part in ("transformer", "text_encoder", "scheduler", "vae"):
            file = write(f"{part}/evil.py", class_of)
            yield f"{kind}: {part}/evil.py", both(name, index(**{part: ["evil", "Evil"]}), file)
        yield f"{kind}: a module of the working folder", both(name, index(text_encoder=["evil_here", "Evil"]))
        yield f"{kind}: subprocess.Popen as a part", both(name, index(text_encoder=["subprocess", "Popen"]))
        yield f"{kind}: os.system as a part", both(name, index(vae=["os", "system"]))
    yield "pipeline class of a file", both(index(_class_name=["evil", "Evil"]), write("evil.py", pipeline))
    yield "custom_pipeline", both(index(_custom_pipeline="evil"), write("evil.py", class_of))
    remote = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for part, file in {"text_encoder": "config.json", "tokenizer": "tokenizer_config.json"}.items():
        kind = "AutoModel" if part == "text_encoder" else "AutoTokenizer"
        for entry in ({part: ["transformers", kind]}, {}):
            yield (
                f"auto_map of {part}, {entry or 'its own class'}",
                both(
                    index(**entry),
                    edit(f"{part}/{file}", auto_map=remote, model_type="evil", tokenizer_class="Evil"),
                    write(f"{part}/evil.py", class_of),
                ),
            )
    pickled = pickle.dumps(Call(open, str(mark), "w"))
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
            yield f"pickle {part}/{name} beside safetensors", write(f"{part}/{name}", pickled)
        yield f"pickle in place of {part}'s safetensors", both(_drop(part), write(f"{part}/pytorch_model.bin", pickled))
        renamed = "diffusion_pytorch_model.safetensors" if part in ("transformer", "vae") else "model.safetensors"
        yield f"pickle as {part}/{renamed}", write(f"{part}/{renamed}", pickled)
    yield "adapter_config.json", write("transformer/adapter_config.json", '{"base_model_name_or_path": "evil/evil"}')


def _drop(part: str) -> Change:
    def change(folder: Path) -> None:
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()

    return change


def _linked(part: str, target: Path) -> Change:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / part)
        (folder / part).symlink_to(target)

    return change


def lying_folders() -> Iterator[tuple[str, Change]]:
    """Indexes and configurations that are broken, absurd or meant for the terminal."""
    shards = "transformer/diffusion_pytorch_model.safetensors.index.json"
    values: tuple[Any, ...] = (None, 7, "x", [], {}, {"a": None}, {"a": 7}, {"a": "../../../etc/passwd"}, {"a": ESCAPE})
    for value in values:
        yield f"shards {value!a}", both(_drop("transformer"), write(shards, json.dumps({"weight_map": value})))
    deep = "[" * 200_000
    for name in ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        for kind, text in {"deep": deep, "empty": "", "a list": "[]", "not UTF-8": "\udc80", "null": "null"}.items():
            yield f"{name}: {kind}", write(name, text.encode("utf-8", "surrogateescape"))
    yield (
        "model_index.json: a folder",
        lambda folder: (
            (folder / "model_index.json").unlink(),
            (folder / "model_index.json").mkdir(),
        ),
    )
    for key, value in {
        "_class_name": (ESCAPE, 7, None, "DiffusionPipeline", "utils", "x" * 100_000, "__class__"),
        "transformer": (["diffusers", ESCAPE], [ESCAPE, "x"], ["diffusers"], [None, None], 7, ["diffusers", "utils"]),
        ESCAPE: (["diffusers", "x"], 7),
        "_mrflow_family": (ESCAPE, 7, ["flux1-dev"], "x" * 100_000),
    }.items():
        for each in value:
            yield f"model_index.json: {key!a} = {ascii(each)[:60]}", index(**{key: each})
    for part, key, many in (
        ("transformer", "num_layers", (10**6, -1, 0, 1.5, "9", None, ESCAPE, 10**30)),
        ("transformer", "num_attention_heads", (10**6, -1, 0)),
        ("transformer", "in_channels", (10**7, 0, -4, ESCAPE)),
        ("vae", "block_out_channels", ([10**6] * 3, [], [0, 0, 0], None)),
        ("vae", "scaling_factor", (0, "nan", None, 1e400, ESCAPE)),
        ("vae", "latent_channels", (0, 10**7, -1)),
        ("text_encoder_2", "num_layers", (10**6, -1)),
        ("text_encoder_2", "vocab_size", (10**9, 0)),
        ("text_encoder", "model_type", (ESCAPE, "evil", 7)),
    ):
        for value in many:
            yield f"{part}: {key} = {ascii(value)[:40]}", edit(f"{part}/config.json", **{key: value})
    for value in (-5, 0, 10**30, None, ESCAPE):
        yield (
            f"tokenizer: model_max_length = {ascii(value)[:40]}",
            edit("tokenizer/tokenizer_config.json", model_max_length=value),
        )
    for name in ("shift", "num_train_timesteps", "base_shift"):
        for value in (0, -1, "nan", 10**400, None, ESCAPE):
            yield f"scheduler: {name} = {ascii(value)[:40]}", edit("scheduler/scheduler_config.json", **{name: value})
    yield "a part is a link to the root", _linked("vae", Path("/"))
    yield (
        "a part is a link to itself",
        lambda folder: (
            shutil.rmtree(folder / "vae"),
            (folder / "vae").symlink_to(folder / "vae"),
        ),
    )


_WILD: tuple[Any, ...] = (None, 0, -1, 10**7, 10**400, 0.5, ESCAPE, [], {}, True, [1, 2, 3], "../../x", {"a": {"b": 1}})


def wild_folders(random: Random) -> Iterator[tuple[str, Change]]:
    """One wild value for each name in each file of configuration."""
    for path in sorted(demo.weights_path().rglob("*.json")):
        name = str(path.relative_to(demo.weights_path()))
        if path.name != "vocab.json":
            for key in json.loads(path.read_text()):
                value = random.choice(_WILD)
                yield f"wild {name}: {key} = {ascii(value)[:40]}", edit(name, **{key: value})


def cases(bench: Bench) -> Iterator[Case]:
    """Every folder through `doctor` and `generate`; the folder they run in holds a module to be imported."""
    module = f"open({str(bench.mark)!r}, 'w').write('executed')\nclass Evil:\n    pass\n"
    (bench.folder / "evil_here.py").write_text(module)
    found = [*code_in_folders(bench.mark), *lying_folders(), *wild_folders(bench.random)]
    for number, (name, change) in enumerate(found[1::4] if bench.quick else found):
        folder = Path(shutil.copytree(demo.weights_path(), bench.folder / "folders" / str(number)))
        change(folder)
        size = ["--size", "64x64", "--low-steps", "1", "--no-progress", "--out", str(bench.folder / "out")]
        generate = ["generate", "a blue star", *size]
        for words in [generate] if name.startswith("wild ") else [["doctor"], generate]:
            arguments = {"arguments": [*words, "--model", str(folder)]}
            yield Case(f"{name}: {words[0]}", "command", arguments, need=_NEED, seconds=30)
        shutil.rmtree(folder)


def run(bench: Bench) -> Tally:
    """Try every folder."""
    tally = Tally()
    for case in cases(bench):
        outcome = bench.one(case)
        kinds = common_faults(case, outcome)
        if outcome.killed is None and outcome.value not in (0, 1, 2):
            kinds.append(WRONG)
        tally.add(case.name, kinds, outcome.said)
    folder = bench.folder / "known"
    folder.mkdir()
    (folder / "None.py").write_text(f"open({str(bench.mark)!r}, 'w').write('executed')\n")
    (folder / "model_index.json").write_text(ESCAPE)
    words = ["doctor", "--model", str(demo.weights_path())]
    good = Case("the embedded model", "command", {"arguments": words}, need=_NEED)
    tally.checked = not common_faults(good, bench.one(good)) and found_bad(
        bench,
        (Case("runs a folder", "bad_folder", {"path": str(folder)}), EXECUTED),
        (Case("prints a folder", "bad_print", {"path": str(folder / "model_index.json")}), CONTROL),
    )
    return tally
