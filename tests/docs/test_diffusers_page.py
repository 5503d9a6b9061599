"""docs/diffusers.md is run as it stands, on tiny pipelines: only the line that loads one is replaced, and sides are
divided by 16, so that it takes seconds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch

from mrflow_sched import MrFlow, demo

PAGE = Path(__file__).resolve().parents[2] / "docs" / "diffusers.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
LOADING = re.compile(r'^pipe = (\w+)\.from_pretrained\("([^"]+)".*$', re.MULTILINE)
MODELS = {
    "black-forest-labs/FLUX.1-dev": "flux1-dev",
    "black-forest-labs/FLUX.1-schnell": "flux1-schnell",
    "black-forest-labs/FLUX.1-Krea-dev": "flux1-dev",
    "black-forest-labs/FLUX.1-Kontext-dev": "flux1-kontext",
    "black-forest-labs/FLUX.2-dev": "flux2-dev",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2-klein-base",
    "black-forest-labs/FLUX.2-klein-4B": "flux2-klein",
    "Qwen/Qwen-Image": "qwen-image",
    "stabilityai/stable-diffusion-3.5-large": "sd3",
    "Tongyi-MAI/Z-Image": "z-image",
    "Tongyi-MAI/Z-Image-Turbo": "z-image-turbo",
    "lodestones/Chroma1-HD": "chroma",
    "Alpha-VLLM/Lumina-Image-2.0": "lumina2",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "sana",
    "fal/AuraFlow-v0.3": "auraflow",
    "hunyuanvideo-community/HunyuanImage-2.1-Diffusers": "hunyuan-image",
    "HiDream-ai/HiDream-I1-Full": "hidream",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
}
REFUSED = next(block for block in BLOCKS if "# prompt is missing" in block)
EXAMPLES = [block for block in BLOCKS if block is not REFUSED]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that holds the upscaler file which the page names."""
    from safetensors.torch import load_file

    torch.save(load_file(demo.upscaler_path()), tmp_path / "RealESRGAN_x2plus.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny(block: str) -> tuple[str, dict[str, Any]]:
    """The block with its pipeline replaced, and the names that it may use."""
    found = LOADING.search(block)
    assert found is not None, "every example loads its pipeline"
    pipe = tiny_pipelines.make(MODELS[found[2]])
    assert type(pipe).__name__ == found[1]
    code = LOADING.sub("pipe = loaded", block)
    code = code.replace('.to("cuda")', "")
    code = re.sub(r"(width|height)=(\d+)", lambda side: f"{side[1]}={int(side[2]) // 16}", code)
    return code, {"loaded": pipe, "torch": torch, "MrFlow": MrFlow}


def _name(block: str) -> str:
    found = LOADING.search(block)
    return found[2].rpartition("/")[2] if found else "none"


@pytest.mark.parametrize("block", EXAMPLES, ids=_name)
def test_an_example_makes_a_picture(block: str, folder: Path) -> None:
    code, names = tiny(block)
    exec(compile(code, str(PAGE), "exec"), names)
    made = [names[name] for name in ("image", "large", "varied") if name in names]
    made += list(getattr(names.get("result"), "images", []))
    assert made
    for picture in made:
        values = torch.as_tensor([picture.getextrema()]) if hasattr(picture, "getextrema") else picture
        assert float(values.float().std()) > 0
    if "harbour.png" in code:
        assert (folder / "harbour.png").is_file()


def test_every_refusal_says_what_the_page_says() -> None:
    code, names = tiny(REFUSED)
    head, *lines = code[code.index("pipe = ") :].splitlines()[1:]
    exec(f"pipe = loaded\n{head}", names)
    calls, sentences = lines[::2], [line.removeprefix("# ") for line in lines[1::2]]
    assert len(calls) == len(sentences) > 8
    for call, sentence in zip(calls, sentences, strict=True):
        with pytest.raises(ValueError) as caught:
            exec(call, names)
        assert str(caught.value) == sentence


def test_every_family_is_on_the_page() -> None:
    shown = {MODELS[found[2]] for block in EXAMPLES if (found := LOADING.search(block))}
    assert shown == set(MODELS.values())
