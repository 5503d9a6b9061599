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
    "black-forest-labs/FLUX.1-Fill-dev": "flux1-fill",
    "black-forest-labs/FLUX.2-dev": "flux2-dev",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2-klein-base",
    "black-forest-labs/FLUX.2-klein-4B": "flux2-klein",
    "Qwen/Qwen-Image": "qwen-image",
    "Qwen/Qwen-Image-2.1": "qwen-image-2.1",
    "Qwen/Qwen-Image-2.1-Turbo": "qwen-image-2.1-turbo",
    "krea/Krea-2-Raw": "krea2",
    "krea/Krea-2-Turbo": "krea2-turbo",
    "baidu/ERNIE-Image": "ernie-image",
    "baidu/ERNIE-Image-Turbo": "ernie-image-turbo",
    "meituan-longcat/LongCat-Image": "longcat-image",
    "AIDC-AI/Ovis-Image-7B": "ovis-image",
    "NucleusAI/Nucleus-Image": "nucleus-image",
    "stabilityai/stable-diffusion-3.5-large": "sd3",
    "Tongyi-MAI/Z-Image": "z-image",
    "Tongyi-MAI/Z-Image-Turbo": "z-image-turbo",
    "lodestones/Chroma1-HD": "chroma",
    "Alpha-VLLM/Lumina-Image-2.0": "lumina2",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "sana",
    "fal/AuraFlow-v0.3": "auraflow",
    "hunyuanvideo-community/HunyuanImage-2.1-Diffusers": "hunyuan-image",
    "HiDream-ai/HiDream-I1-Full": "hidream",
    "ideogram-ai/ideogram-v4": "ideogram4",
    "briaai/BRIA-3.2": "bria",
    "briaai/FIBO": "bria-fibo",
    "briaai/Fibo-2.0-dev": "bria-fibo2",
    "kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers": "kandinsky5",
    "Photoroom/prx-1024-t2i-beta": "prx",
    "Photoroom/prxpixel-t2i": "prx-pixel",
    "carlofkl/DreamLite-base": "dreamlite",
    "carlofkl/DreamLite-mobile": "dreamlite-mobile",
    "Tongyi-MAI/Z-Image-Omni-Base": "z-image-omni",
    "Alpha-VLLM/Lumina-Next-SFT-diffusers": "lumina-next",
    "THUDM/CogView4-6B": "cogview4",
    "zai-org/GLM-Image": "glm-image",
    "nvidia/Cosmos-Predict2-2B-Text2Image": "cosmos-predict2",
    "Shitao/OmniGen-v1-diffusers": "omnigen",
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers": "sana-sprint",
    "Kwai-Kolors/Kolors-diffusers": "kolors",
    "PixArt-alpha/PixArt-XL-2-1024-MS": "pixart-alpha",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "pixart-sigma",
    "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers": "hunyuan-dit",
    "THUDM/CogView3-Plus-3B": "cogview3-plus",
    "SimianLuo/LCM_Dreamshaper_v7": "lcm",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "black-forest-labs/flux-3-image-klein": "flux3-klein",
    "black-forest-labs/flux-3-image-klein-base": "flux3-klein-base",
    "circlestone-labs/Anima-Base-v1.0-Diffusers": "anima",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan-2.2",
    "hunyuanvideo-community/HunyuanVideo": "hunyuan-video",
    "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v": "hunyuan-video-1.5",
    "Lightricks/LTX-Video": "ltx-video",
}
REFUSED = next(block for block in BLOCKS if "# prompt is missing" in block)
EXAMPLES = [block for block in BLOCKS if block is not REFUSED]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that holds the files which the page names: the upscaler, a picture and its mask."""
    from PIL import Image
    from safetensors.torch import load_file

    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(tmp_path / "quay.png")
    Image.linear_gradient("L").resize((96, 64)).point([0] * 129 + [255] * 127).save(tmp_path / "mask.png")

    torch.save(load_file(demo.upscaler_path()), tmp_path / "RealESRGAN_x2plus.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny(block: str) -> tuple[str, dict[str, Any]]:
    """The block with its pipeline replaced, and the names that it may use."""
    found = LOADING.search(block)
    assert found is not None, "every example loads its pipeline"
    name = MODELS[found[2]]
    pipe = tiny_pipelines.make(f"{name}-modular" if found[1] == "FluxModularPipeline" else name)
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
