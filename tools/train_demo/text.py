"""Text: two small tokenizers and two small encoders for the caption grammar.

As in FLUX.1 the encoders are trained first and frozen. Here they learn to parse: every token of the long encoder gives
its role and the object it belongs to, and the pooled vector of the short one gives the whole scene.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from mrflow_sched.demo import captions
from mrflow_sched.demo import scenes as S
from mrflow_sched.demo.judge import FIELDS, labels

_TOKENIZERS: Any = transformers  # their annotations name other arguments than they take
WIDTH = 128
LENGTH = 32
_LOWER = "abcdefghijklmnopqrstuvwxyz"


def first_words() -> list[str]:
    """The vocabulary without the words that were added later, which come after everything else in both tokenizers."""
    return [word for word in captions.vocabulary() if word not in captions.ADDED_WORDS]


def make_t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581" + word, -2.0) for word in first_words()] + [("\u2581", -3.0), (",", -3.0)]
    pieces += [(char, -9.0) for char in S.LETTERS + _LOWER + "0123456789.-'!?"]
    pieces += [("\u2581" + word, -2.0) for word in captions.ADDED_WORDS]
    return _TOKENIZERS.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def _byte_alphabet() -> list[str]:
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in keep] + [chr(256 + n) for n in range(256 - len(keep))]


def make_clip_tokenizer() -> tuple[Any, dict[str, int], list[str]]:
    alphabet = _byte_alphabet()
    merges: list[str] = []
    first = _merge(merges, first_words())
    pieces = [*alphabet, *(char + "</w>" for char in alphabet), *first]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    pieces = list(dict.fromkeys([*pieces, *_merge(merges, list(captions.ADDED_WORDS))]))
    vocab = {piece: index for index, piece in enumerate(pieces)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = _TOKENIZERS.CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=77)
    return tokenizer, vocab, merges


def _merge(merges: list[str], words: list[str]) -> list[str]:
    """Add the merges that make each word one token; returns the tokens that they make."""
    before = len(merges)
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            if merge not in merges:
                merges.append(merge)
            parts = [parts[0] + parts[1], *parts[2:]]
    return [merge.replace(" ", "") for merge in merges[before:]]


def make_encoders(t5_vocab: int, clip_vocab: int, ends: tuple[int, int]) -> tuple[T5EncoderModel, CLIPTextModel]:
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
            bos_token_id=ends[0],
            eos_token_id=ends[1],
            pad_token_id=ends[1],
        )
    )
    return t5, clip


# ----------------------------------------------------------------------------------------------- what there is to
# know

ROLES = ["other", "eos", "glue", "ground", "sky", "word", "ink", "wall", "detail", "light", "side"]
ROLES += [f"{kind}{index}" for index in range(2) for kind in ("colour", "texture", "shape")]
ROLES += [f"letter{k}/{n}" for n in range(2, S.MAX_LETTERS + 1) for k in range(n)]


def token_roles(scene: S.Scene, *, name_sky: bool = True) -> list[int]:
    """Role index of every token: one per word, comma and letter, one for the mark before letters, then the end."""
    roles: list[int] = []
    for word, role in captions.caption_words(scene, name_sky=name_sky):
        if role == "word":
            names = ["glue"] + [f"letter{k}/{len(word)}" for k in range(len(word))]
        else:
            names = [role] + ["glue"] * word.count(",")
        roles += [ROLES.index(name) for name in names]
    return [*roles, ROLES.index("eos")]


# ------------------------------------------------------------------------------------------------------------
# training

BINDING = ("colour", "texture", "shape")


class Parser(nn.Module):
    """Both encoders with their training heads, which are discarded after training."""

    def __init__(self, t5: T5EncoderModel, clip: CLIPTextModel, words: int) -> None:
        super().__init__()
        self.t5, self.clip = t5, clip
        self.role, self.same = nn.Linear(WIDTH, len(ROLES)), nn.Linear(WIDTH, words)
        self.bind = nn.ModuleDict({kind: nn.Linear(WIDTH, len(FIELDS[kind + "0"])) for kind in BINDING})
        self.fields = nn.ModuleDict({field: nn.Linear(WIDTH, len(options)) for field, options in FIELDS.items()})

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(of the tokens, of the pooled vector)."""
        hidden = self.t5(batch.ids).last_hidden_state.flatten(0, 1)
        pooled = self.clip(batch.clip_ids).pooler_output
        tokens = _entropy(self.role(hidden), batch.roles.flatten()) + _entropy(self.same(hidden), batch.ids.flatten())
        for kind, head in self.bind.items():
            tokens = tokens + _entropy(head(hidden), batch.bound[kind].flatten())
        whole = sum(
            (_entropy(head(pooled), batch.fields[field]) for field, head in self.fields.items()), torch.zeros(())
        )
        return tokens, whole

    @torch.inference_mode()
    def score(self, batch: Batch) -> list[float]:
        """Share of correct answers: roles of tokens, bindings of tokens, fields of the pooled vector."""
        hidden = self.t5(batch.ids).last_hidden_state
        pooled = self.clip(batch.clip_ids).pooler_output
        role = (self.role(hidden).argmax(-1) == batch.roles)[batch.roles > 0]
        bound = [(head(hidden).argmax(-1) == batch.bound[k])[batch.bound[k] >= 0] for k, head in self.bind.items()]
        whole = [(head(pooled).argmax(-1) == batch.fields[f])[batch.fields[f] >= 0] for f, head in self.fields.items()]
        return [float(part.float().mean()) for part in (role, torch.cat(bound), torch.cat(whole))]


def _entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    known = wanted >= 0
    return nn.functional.cross_entropy(logits[known], wanted[known]) if bool(known.any()) else logits.sum() * 0


@dataclass(frozen=True)
class Batch:
    ids: Tensor
    clip_ids: Tensor
    roles: Tensor
    bound: dict[str, Tensor]
    fields: dict[str, Tensor]


def make_batch(rng: np.random.Generator, count: int, length: int, tokenizers: tuple[Any, Any]) -> Batch:
    """Captions of new scenes, with all labels; a quarter leave the sky open."""
    rows = [(S.random_scene(rng), bool(rng.random() < 0.75)) for _ in range(count)]
    texts = [captions.caption(scene, name_sky=named) for scene, named in rows]
    pad = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = tokenizers[0](texts, max_length=length, **pad).input_ids
    roles = torch.zeros(ids.shape, dtype=torch.long)
    bound = {kind: torch.full(ids.shape, -1) for kind in BINDING}
    truth = []
    for row, (scene, named) in enumerate(rows):
        known = token_roles(scene, name_sky=named)
        roles[row, : len(known)] = torch.tensor(known)
        for column, role in enumerate(known):
            kind, index = ROLES[role][:-1], ROLES[role][-1]
            if kind in BINDING:
                for each in BINDING:
                    bound[each][row, column] = FIELDS[each + "0"].index(getattr(scene.things[int(index)], each))
        truth.append(labels(scene) | ({} if named else {"sky": -1}))
    fields = {field: torch.tensor([each[field] for each in truth]) for field in FIELDS}
    return Batch(ids, tokenizers[1](texts, max_length=48, **pad).input_ids, roles, bound, fields)


def train(work: Path, seconds: float = 900.0, batch: int = 32, report: int = 250) -> dict[str, Any]:
    """Train both encoders to parse captions; writes the folder ``text``."""
    out = work / "text"
    if (out / "done.json").exists():
        return json.loads((out / "done.json").read_text())
    torch.manual_seed(0)
    begin, step, elapsed, curve = time.time(), 0, 0.0, []
    t5_tokenizer, (clip_tokenizer, vocab, merges) = make_t5_tokenizer(), make_clip_tokenizer()
    tokenizers = (t5_tokenizer, clip_tokenizer)
    ends = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    model = Parser(*make_encoders(len(t5_tokenizer), len(clip_tokenizer), ends), len(t5_tokenizer))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    rng = np.random.default_rng(5)
    held_out = [
        make_batch(np.random.default_rng(9), count, length, tokenizers) for count, length in ((256, LENGTH), (16, 512))
    ]
    while elapsed < seconds:
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 200) * max(0.01, 1 - elapsed / seconds)
        long_text = step % 20 == 19
        tokens, whole = model.losses(
            make_batch(rng, 4 if long_text else batch, 512 if long_text else LENGTH, tokenizers)
        )
        optimiser.zero_grad()
        (tokens + 0.3 * whole).backward()
        nn.utils.clip_grad_norm_(model.t5.parameters(), 1.0)
        nn.utils.clip_grad_norm_(model.clip.parameters(), 1.0)
        optimiser.step()
        step += 1
        elapsed = time.time() - begin
        if step % report == 0 or elapsed >= seconds:
            curve.append([step, elapsed, float(tokens), *(share for each in held_out for share in model.score(each))])
            print("text", curve[-1], flush=True)
    save(out, model.t5, model.clip, t5_tokenizer, clip_tokenizer, vocab, merges)
    record = {"steps": step, "batch": batch, "seconds": elapsed, "curve": curve}
    (out / "done.json").write_text(json.dumps(record))
    return record


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
        _TOKENIZERS.T5TokenizerFast.from_pretrained(out / "tokenizer_2"),
        t5,
        _TOKENIZERS.CLIPTokenizer.from_pretrained(out / "tokenizer"),
        clip,
    )
