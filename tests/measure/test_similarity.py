"""Scores by CLIP-type models of a local folder: what transformers says of them, and folders made to do harm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_clip_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file

from mrflow_sched._runtime.errors import MissingFileError, MrFlowError
from mrflow_sched.measure.scores import get_score
from mrflow_sched.measure.similarity import Preprocessing

PROMPTS = ["a red star", "a blue circle over hills", "a red star"]
SIDE = 32
_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def transformers() -> Any:
    """The library, importable beside a torch that its torchvision was not built for."""
    from mrflow_sched._runtime.torchvision_ops import ensure_ops

    ensure_ops()
    import transformers as library

    return library


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.eval()


def build_clip(folder: Path) -> Path:
    library = transformers()
    write_clip_tokenizer(folder)
    size = len(json.loads((folder / "vocab.json").read_text()))
    ends = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    text = {**_TOWER, "vocab_size": size, "max_position_embeddings": 40, **ends}
    image = {**_TOWER, "image_size": SIDE, "patch_size": 8}
    config = library.CLIPConfig(text_config=text, vision_config=image, projection_dim=12)
    randomised(library.CLIPModel(config)).save_pretrained(folder)
    crop = {"height": SIDE, "width": SIDE}
    library.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(folder)
    return folder


def build_siglip(folder: Path) -> Path:
    library, words = transformers(), write_words(folder)
    text = {**_TOWER, "vocab_size": len(words), "max_position_embeddings": 8}
    config = library.SiglipConfig(text_config=text, vision_config={**_TOWER, "image_size": SIDE, "patch_size": 8})
    randomised(library.SiglipModel(config)).save_pretrained(folder)
    library.SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def build_blip(folder: Path) -> Path:
    library, words = transformers(), write_words(folder)
    text = {**_TOWER, "vocab_size": len(words), "max_position_embeddings": 12, "encoder_hidden_size": 16}
    ends = {"bos_token_id": 2, "sep_token_id": 1, "pad_token_id": 0, "eos_token_id": 1}
    image = {**_TOWER, "image_size": SIDE, "patch_size": 8}
    config = library.BlipConfig(text_config={**text, **ends}, vision_config=image, image_text_hidden_size=12)
    randomised(library.BlipForImageTextRetrieval(config)).save_pretrained(folder)
    library.BlipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def write_words(folder: Path) -> list[str]:
    """A tokenizer of whole words; returns its words."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    library = transformers()
    folder.mkdir(parents=True, exist_ok=True)
    words = ["<pad>", "<unk>", "a", "red", "blue", "star", "circle", "over", "hills"]
    tokenizer = Tokenizer(WordLevel({word: row for row, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = library.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return words


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def clip_copy(clip: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clip, tmp_path / "clip"))


def images(height: int, width: int) -> tuple[torch.Tensor, list[Image.Image]]:
    coarse = torch.rand((3, 3, 7, 9), generator=torch.Generator().manual_seed(3))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    bytes_ = (smooth * 255).round()
    shown = [Image.fromarray(np.ascontiguousarray(each.permute(1, 2, 0).byte().numpy())) for each in bytes_]
    return bytes_ / 255, shown


# The processor rounds what it resized to bytes; an image of the network's size it leaves as it is.
@pytest.mark.parametrize(
    ("height", "width", "error"), [(32, 32, 1e-5), (96, 96, 3e-3), (48, 100, 3e-3), (20, 24, 3e-3)]
)
def test_clip_is_what_transformers_says(clip: Path, height: int, width: int, error: float) -> None:
    library = transformers()
    tensor, shown = images(height, width)
    found = get_score(f"clip:{clip}")(tensor, PROMPTS)
    model = library.CLIPModel.from_pretrained(clip).eval()
    processor = library.CLIPImageProcessor.from_pretrained(clip)
    tokens = library.CLIPTokenizer.from_pretrained(clip)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        given = model(**tokens, pixel_values=processor(shown, return_tensors="pt").pixel_values)
    expected = given.logits_per_image.diag() / model.logit_scale.exp()
    assert found.tolist() == pytest.approx(expected.tolist(), abs=error)
    assert float(found.std()) > 0.01


def test_siglip_is_what_transformers_says(tmp_path: Path) -> None:
    library, folder = transformers(), build_siglip(tmp_path / "siglip")
    tensor, shown = images(SIDE, SIDE)
    found = get_score(f"clip:{folder}")(tensor, PROMPTS)
    model = library.SiglipModel.from_pretrained(folder).eval()
    processor = library.SiglipImageProcessor.from_pretrained(folder)
    ids = [[2, 3, 5, 0, 0, 0, 0, 0], [2, 4, 6, 7, 8, 0, 0, 0], [2, 3, 5, 0, 0, 0, 0, 0]]  # filled up, no mask
    with torch.no_grad():
        pixels = processor(shown, return_tensors="pt").pixel_values
        given = model(input_ids=torch.tensor(ids), pixel_values=pixels)
    expected = (given.logits_per_image.diag() - model.logit_bias) / model.logit_scale.exp()
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert float(found.std()) > 0.001


def test_blip_is_what_transformers_says(tmp_path: Path) -> None:
    library, folder = transformers(), build_blip(tmp_path / "blip")
    tensor, shown = images(SIDE, SIDE)
    found = get_score(f"clip:{folder}")(tensor, PROMPTS)
    model = library.BlipForImageTextRetrieval.from_pretrained(folder).eval()
    pixels = library.BlipImageProcessor.from_pretrained(folder)(shown, return_tensors="pt").pixel_values
    for row, ids in enumerate([[2, 3, 5], [2, 4, 6, 7, 8], [2, 3, 5]]):  # each alone, so nothing is filled up
        with torch.no_grad():
            match = model(input_ids=torch.tensor([ids]), pixel_values=pixels[row : row + 1]).itm_score.softmax(-1)[0, 1]
        assert float(found[row]) == pytest.approx(float(match.logit()), abs=1e-3)
    assert float(found.std()) > 0.001


@pytest.mark.parametrize("build", [build_clip, build_blip], ids=["clip", "blip"])
def test_a_reward_can_be_followed_back_to_the_image(build: Callable[[Path], Path], tmp_path: Path) -> None:
    from mrflow_sched.measure.similarity import load_similarity

    read = load_similarity(build(tmp_path / "model"))
    pixels = images(40, 48)[0]
    plain = read(pixels, ["a cat"] * len(pixels))
    assert not plain.requires_grad
    slope = torch.autograd.grad(read(pixels.requires_grad_(), ["a cat"] * len(pixels)).sum(), pixels)[0]
    assert bool((slope.abs().flatten(1).sum(1) > 0).all())
    with torch.no_grad():
        assert torch.equal(read(pixels, ["a cat"] * len(pixels)), plain)


def test_every_image_is_scored_by_its_own_text(clip: Path) -> None:
    tensor, _ = images(SIDE, SIDE)
    many, texts = tensor.repeat(8, 1, 1, 1), [f"a {'star ' * (row % 5)}" for row in range(24)]
    score = get_score(f"clip:{clip}")
    alone = [float(score(many[row : row + 1], texts[row : row + 1])) for row in range(24)]
    assert score(many, texts).tolist() == pytest.approx(alone, abs=1e-5)
    assert score(many[:1], ["word " * 500]).isfinite().all()  # longer than the model's length
    assert get_score(f"-clip:{clip}")(many, texts).tolist() == pytest.approx([-each for each in alone], abs=1e-5)


def old(folder: Path) -> None:
    """As the first CLIP folders have it: plain numbers, and nothing of scaling or the filter."""
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "size": SIDE,
                "crop_size": SIDE,
                "do_center_crop": True,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "feature_extractor_type": "CLIPFeatureExtractor",
            }
        )
    )


def new(folder: Path) -> None:
    """As transformers 5 saves a whole processor."""
    said = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "CLIPProcessor", "image_processor": said})
    )


@pytest.mark.parametrize("rewrite", [old, new])
def test_older_and_newer_folders_say_the_same(clip: Path, clip_copy: Path, rewrite: Callable[[Path], None]) -> None:
    rewrite(clip_copy)
    assert Preprocessing.of(clip_copy.parent, clip_copy) == Preprocessing.of(clip.parent, clip)
    (clip_copy / "README.md").write_text("A model.")
    (clip_copy / "pytorch_model.bin").write_bytes(b"not read")
    tensor, _ = images(48, 40)
    assert torch.equal(get_score(f"clip:{clip_copy}")(tensor, PROMPTS), get_score(f"clip:{clip}")(tensor, PROMPTS))


def test_images_are_prepared_without_rounding(clip: Path) -> None:
    prepared = Preprocessing.of(clip.parent, clip)(torch.full((1, 3, 40, 50), 0.123456))
    assert prepared.shape == (1, 3, SIDE, SIDE)
    mean, std = (
        torch.tensor(each) for each in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    assert torch.allclose(prepared[0, :, 0, 0], (0.123456 - mean) / std, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- hostile folders

Damage = Callable[[Path], object]


def edit(file: str, **entries: Any) -> Damage:
    """Set entries of a JSON file; None takes one out."""

    def damage(folder: Path) -> None:
        path = folder / file
        said = {**(json.loads(path.read_text()) if path.exists() else {}), **entries}
        path.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))

    return damage


def spoil(tensor: str, value: Any) -> Damage:
    """Put other values in a tensor, or take it out."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = load_file(path)
        [name] = [each for each in weights if each.endswith(tensor)]
        if value is None:
            del weights[name]
        else:
            weights[name] = value(weights[name])
        save_file(weights, path, metadata={"format": "pt"})

    return damage


def evil(folder: Path) -> None:
    (folder / "evil.py").write_text("open('mark', 'w').close()\n")


HARM: dict[str, tuple[Damage, str]] = {
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "another model": (edit("config.json", model_type="bert"), "is of the type 'bert'"),
    "a long type": (edit("config.json", model_type="\x1b" * 9000), "is of the type"),
    "a type that is none": (edit("config.json", model_type=[1]), "is of the type"),
    "code by name": (edit("config.json", auto_map={"AutoModel": "evil.Evil"}), "names Python code to run"),
    "code of the tokenizer": (edit("tokenizer_config.json", auto_map={"AutoTokenizer": "e.E"}), "names Python code"),
    "code of the processor": (edit("preprocessor_config.json", auto_map={"AutoProcessor": "e.E"}), "names Python code"),
    "a file of code": (evil, "holds code"),
    "a kernel": (edit("config.json", attn_implementation="evil/kernel"), "names code to fetch"),
    "nested too deeply": (lambda folder: (folder / "config.json").write_text("[" * 200_000), "nested too deeply"),
    "no object": (lambda folder: (folder / "preprocessor_config.json").write_text("[]"), "no JSON object"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "only safetensors are read"),
    "a pickle alone": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "only safetensors are read",
    ),
    "cut weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08" * 40), "cannot be read"),
    "a weight lacks": (spoil("visual_projection.weight", None), "lacks 1 weights"),
    "another shape": (spoil("visual_projection.weight", lambda weight: weight[:, :3].contiguous()), "cannot be read"),
    "NaN": (spoil("visual_projection.weight", lambda weight: weight * float("nan")), "gives NaN"),
    "far too large": (edit("config.json", vision_config={**_TOWER, "hidden_size": 2**23}), "configuration"),
    "too many layers": (edit("config.json", text_config={"num_hidden_layers": 10**6}), "configuration"),
    "negative": (edit("config.json", projection_dim=-3), "cannot be negative"),
    "no preparation": (lambda folder: (folder / "preprocessor_config.json").unlink(), "no preprocessor_config.json"),
    "no size": (edit("preprocessor_config.json", size=None), "no preprocessor_config.json with a size"),
    "a huge size": (edit("preprocessor_config.json", size={"shortest_edge": 10**9}), "leads to no one size"),
    "a size in words": (edit("preprocessor_config.json", size="large"), "leads to no one size"),
    "no crop": (edit("preprocessor_config.json", do_center_crop=False), "leads to no one size"),
    "a crop beyond": (edit("preprocessor_config.json", crop_size={"height": 99, "width": 99}), "cuts 99x99"),
    "another side": (
        edit("preprocessor_config.json", size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        "cannot read an image",
    ),
    "another filter": (edit("preprocessor_config.json", resample=1), "resizes by 1"),
    "another scale": (edit("preprocessor_config.json", rescale_factor=0.5), "scales bytes by 0.5"),
    "no deviation": (edit("preprocessor_config.json", image_std=[0, 1, 1]), "image_mean and image_std"),
    "means in words": (edit("preprocessor_config.json", image_mean="grey"), "image_mean and image_std"),
    "an unknown tokenizer": (edit("tokenizer_config.json", tokenizer_class="os"), "neither diffusers nor"),
    "a tokenizer with a path": (edit("tokenizer_config.json", tokenizer_class="../evil"), "neither diffusers nor"),
    "no vocabulary": (lambda folder: (folder / "vocab.json").unlink(), "cannot be read"),
}


@pytest.mark.parametrize("case", HARM)
def test_hostile_folders_get_one_sentence(
    case: str, clip_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, sentence = HARM[case]
    damage(clip_copy)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MrFlowError) as caught:
        get_score(f"clip:{clip_copy}")
    said = str(caught.value)
    assert sentence in said
    assert said.isprintable()
    assert len(said) < 700
    assert not (tmp_path / "mark").exists()


def test_a_tokenizer_with_more_words_than_the_network_is_refused(clip_copy: Path) -> None:
    """Which of them a prompt has is not known when it is loaded; on a GPU they would end all that runs there."""
    edit("vocab.json", **{"r</w>": 5000})(clip_copy)
    score = get_score(f"clip:{clip_copy}")
    with pytest.raises(MrFlowError, match="words that its network does not have"):
        score(images(SIDE, SIDE)[0][:1], ["a star"])


@pytest.mark.parametrize("folder", ["nowhere", "openai/clip-vit-base-patch32", "\x00", "a" * 5000, "~nobody/x"])
def test_a_folder_that_is_none_gets_one_sentence(folder: str) -> None:
    with pytest.raises(MissingFileError, match="names no folder here") as caught:
        get_score(f"clip:{folder}")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
