"""The text side: two small tokenizers and two small encoders that know the caption grammar.

As in FLUX.1 the encoders are trained first and frozen. Here their task is to parse: every token of the long encoder
says which role it plays and which object it belongs to, the pooled vector of the short one says the whole scene.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from mrflow_sched.demo import scenes as S

WIDTH = 128
LENGTH = 32
_LOWER = "abcdefghijklmnopqrstuvwxyz"


def make_t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581" + word, -2.0) for word in S.vocabulary()] + [("\u2581", -3.0), (",", -3.0)]
    pieces += [(char, -9.0) for char in S.LETTERS + _LOWER + "0123456789.-'!?"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def _byte_alphabet() -> list[str]:
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in keep] + [chr(256 + n) for n in range(256 - len(keep))]


def make_clip_tokenizer() -> tuple[Any, dict[str, int], list[str]]:
    alphabet = _byte_alphabet()
    merges: list[str] = []
    for word in S.vocabulary():
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            if merge not in merges:
                merges.append(merge)
            parts = [parts[0] + parts[1], *parts[2:]]
    pieces = [*alphabet, *(char + "</w>" for char in alphabet), *(merge.replace(" ", "") for merge in merges)]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges], model_max_length=77)
    return tokenizer, vocab, merges


def make_encoders(t5_vocab: int, clip_vocab: int) -> tuple[T5EncoderModel, CLIPTextModel]:
    torch.manual_seed(0)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=t5_vocab,
            d_model=WIDTH,
            d_kv=32,
            num_heads=4,
            d_ff=320,
            num_layers=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip_vocab,
            hidden_size=WIDTH,
            intermediate_size=320,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=WIDTH,
            bos_token_id=clip_vocab - 2,
            eos_token_id=clip_vocab - 1,
            pad_token_id=clip_vocab - 1,
        )
    )
    return t5, clip


# ----------------------------------------------------------------------------------------------- what there is to
# know

ROLES = ["other", "eos", "glue", "ground", "sky", "word", "ink", "wall", "detail", "light", "side"]
ROLES += [f"{kind}{index}" for index in range(2) for kind in ("colour", "texture", "shape")]
ROLES += [f"letter{k}/{n}" for n in range(2, S.MAX_LETTERS + 1) for k in range(n)]

FIELDS: dict[str, tuple[str, ...]] = {
    "category": S.CATEGORIES,
    **{
        f"{kind}{index}": options
        for index in range(2)
        for kind, options in (("colour", tuple(S.COLOURS)), ("texture", S.TEXTURES), ("shape", S.SHAPES))
    },
    "ground": S.GROUNDS,
    "sky": S.SKIES,
    "ink": tuple(S.COLOURS),
    "wall": tuple(S.COLOURS),
    "detail": S.DETAILS,
    "light": S.LIGHTS,
    "side": S.SIDES,
    **{f"letter{k}": tuple(S.LETTERS) for k in range(S.MAX_LETTERS)},
    "length": ("0", "2", "3", "4", "5"),
}


def labels(scene: S.Scene) -> dict[str, int]:
    """Index of every attribute in :data:`FIELDS`, -1 where the scene has none."""
    out = dict.fromkeys(FIELDS, -1)
    values: dict[str, str] = {
        key: getattr(scene, key) for key in ("category", "ground", "sky", "ink", "wall", "detail", "light", "side")
    }
    for index, thing in enumerate(scene.things):
        values |= {f"colour{index}": thing.colour, f"texture{index}": thing.texture, f"shape{index}": thing.shape}
    values |= {f"letter{k}": char for k, char in enumerate(scene.word)}
    values["length"] = str(len(scene.word))
    for field, value in values.items():
        if value:
            out[field] = FIELDS[field].index(value)
    return out


def token_roles(scene: S.Scene) -> list[int]:
    """Role index of every token: one a word, one a comma, one a letter and one for the mark before them, then the
    end."""
    roles: list[int] = []
    for word, role in S.caption_words(scene):
        if role == "word":
            names = ["glue"] + [f"letter{k}/{len(word)}" for k in range(len(word))]
        else:
            names = [role] + ["glue"] * word.count(",")
        roles += [ROLES.index(name) for name in names]
    return [*roles, ROLES.index("eos")]


# ------------------------------------------------------------------------------------------------------------
# training

BINDING = ("colour", "texture", "shape")


def train(work: Path, steps: int = 1600, batch: int = 32, report: int = 100) -> dict[str, Any]:
    out = work / "text"
    if (out / "done.json").exists():
        return json.loads((out / "done.json").read_text())
    start = time.time()
    t5_tokenizer, (clip_tokenizer, vocab, merges) = make_t5_tokenizer(), make_clip_tokenizer()
    t5, clip = make_encoders(len(t5_tokenizer), len(clip_tokenizer))
    role_head, same_head = nn.Linear(WIDTH, len(ROLES)), nn.Linear(WIDTH, len(t5_tokenizer))
    bind_heads = nn.ModuleDict({kind: nn.Linear(WIDTH, len(FIELDS[kind + "0"])) for kind in BINDING})
    field_heads = nn.ModuleDict({field: nn.Linear(WIDTH, len(options)) for field, options in FIELDS.items()})
    modules = [t5, clip, role_head, same_head, bind_heads, field_heads]
    parameters = [p for module in modules for p in module.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(5)
    curve: list[list[float]] = []
    for step in range(steps):
        rows = [S.random_scene(rng) for _ in range(batch)]
        texts = [S.caption(scene) for scene in rows]
        length = int(rng.choice((LENGTH,) * 6 + (48, 128)))
        if step % 50 == 49:
            rows, texts, length = rows[:4], texts[:4], 512
        ids = t5_tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        hidden = t5(ids).last_hidden_state
        roles = torch.zeros(ids.shape, dtype=torch.long)
        bound = {kind: torch.full(ids.shape, -1) for kind in BINDING}
        for row, scene in enumerate(rows):
            known = token_roles(scene)[:length]
            roles[row, : len(known)] = torch.tensor(known)
            for column, role in enumerate(known):
                name = ROLES[role]
                if name[:-1] in BINDING:
                    thing = scene.things[int(name[-1])]
                    for kind in BINDING:
                        bound[kind][row, column] = FIELDS[kind + "0"].index(getattr(thing, kind))
        loss = nn.functional.cross_entropy(role_head(hidden).flatten(0, 1), roles.flatten())
        loss = loss + nn.functional.cross_entropy(same_head(hidden).flatten(0, 1), ids.flatten())
        for kind in BINDING:
            logits = bind_heads[kind](hidden).flatten(0, 1)
            loss = loss + nn.functional.cross_entropy(logits, bound[kind].flatten(), ignore_index=-1)
        pooled = pool(clip, clip_tokenizer, texts)
        truth = [labels(scene) for scene in rows]
        for field, head in field_heads.items():
            target = torch.tensor([row[field] for row in truth])
            if (target >= 0).any():
                loss = loss + 0.3 * nn.functional.cross_entropy(head(pooled), target, ignore_index=-1)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % report == report - 1:
            right = float((role_head(hidden).argmax(-1) == roles)[roles > 0].float().mean())
            letters = float(
                np.mean(
                    [
                        float(
                            (
                                field_heads[f"letter{k}"](pooled).argmax(-1)
                                == torch.tensor([t[f"letter{k}"] for t in truth])
                            )[torch.tensor([t[f"letter{k}"] >= 0 for t in truth])]
                            .float()
                            .mean()
                        )
                        for k in range(2)
                    ]
                )
            )
            curve.append([step + 1, float(loss), right, letters, time.time() - start])
            print("text", curve[-1], flush=True)
    save(out, t5, clip, t5_tokenizer, clip_tokenizer, vocab, merges)
    record = {"steps": steps, "batch": batch, "seconds": time.time() - start, "curve": curve}
    (out / "done.json").write_text(json.dumps(record))
    return record


def pool(clip: CLIPTextModel, tokenizer: Any, texts: list[str]) -> Tensor:
    ids = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt").input_ids
    return clip(ids).pooler_output


def save(
    out: Path, t5: Any, clip: Any, t5_tokenizer: Any, clip_tokenizer: Any, vocab: dict[str, int], merges: list[str]
) -> None:
    t5.save_pretrained(out / "text_encoder_2")
    clip.save_pretrained(out / "text_encoder")
    t5_tokenizer.save_pretrained(out / "tokenizer_2")
    clip_tokenizer.save_pretrained(out / "tokenizer")
    (out / "tokenizer" / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (out / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def load(work: Path) -> tuple[Any, Any, Any, Any]:
    """(t5 tokenizer, t5, clip tokenizer, clip), frozen."""
    out = work / "text"
    t5 = T5EncoderModel.from_pretrained(out / "text_encoder_2").eval().requires_grad_(False)
    clip = CLIPTextModel.from_pretrained(out / "text_encoder").eval().requires_grad_(False)
    return (
        T5TokenizerFast.from_pretrained(out / "tokenizer_2"),
        t5,
        CLIPTokenizer.from_pretrained(out / "tokenizer"),
        clip,
    )


@torch.inference_mode()
def embed(work: Path, texts: list[str], length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Texts → (B, length, 128) and (B, 128), float16."""
    t5_tokenizer, t5, clip_tokenizer, clip = load(work)
    tokens: list[Tensor] = []
    pooled: list[Tensor] = []
    for first in range(0, len(texts), 256):
        part = texts[first : first + 256]
        ids = t5_tokenizer(
            part, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        tokens.append(t5(ids).last_hidden_state.half())
        clip_ids = clip_tokenizer(
            part, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        pooled.append(clip(clip_ids).pooler_output.half())
    return torch.cat(tokens), torch.cat(pooled)
