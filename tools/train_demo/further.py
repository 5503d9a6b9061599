"""Training from the shipped weights on: captions that leave things open, and detail that only the full size holds.

The shipped network knows the guidance scale already. One loss keeps that: half of a batch is trained at scale 1
against the data, half at another scale against the data moved by (scale - 1) times what the caption changes in the
network's own velocity at scale 1. It asks for two more forwards, so only some steps do it. On a CPU two processes of
one thread each train together: on two cores that is faster than two threads. A GPU, where there is one, trains alone,
with larger batches.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mrflow_sched import demo
from mrflow_sched.demo import captions
from mrflow_sched.demo.drawing import layout, render
from mrflow_sched.demo.paths import weights_path
from mrflow_sched.demo.scenes import TEXTURES, Scene, fine_scene, left_open, random_scene
from tools.train_demo import data, flow, text

STREAM = 11
PROCESSES = 2
_PORT = 29611
_CLIP_LENGTH = 56


@dataclass(frozen=True)
class FurtherSettings:
    seconds: float = 6300.0
    scenes: int = 6000  # of each process
    first_scene: int = 0  # training that goes on sees others
    fine_share: float = 0.5  # of the scenes
    full_only: bool = False  # no open captions: the control
    batch_low: int = 12  # of each process
    batch_half: int = 6
    batch_high: int = 3
    batch_quarter: int = 12
    shares: tuple[float, float, float, float] = (0.50, 0.22, 0.08, 0.20)  # low, quarter, half, high
    late_shares: tuple[float, float, float, float] = (0.42, 0.20, 0.08, 0.30)  # in the last third
    word_share: float = 0.3
    hard_share: float = 0.4  # of the batches, of scenes of one kind that is learnt last
    # Those kinds, as `hard_kind` names them; equally often.
    hard: tuple[str, ...] = ("small letters", "small faces", "large faces", "pattern", "birds", "detail", "textures")
    drop_text: float = 0.08
    guided_share: float = 0.5  # of the steps, half of whose batch is trained at other scales than 1
    open_share: tuple[float, float] = (0.35, 0.50)  # of the captions, in either half of the time
    muon_lr: float = 0.006
    adam_lr: float = 6e-4
    text_lr: float = 3e-4
    flat_until: float = 0.45
    warmup_steps: int = 60
    ema: float = 0.998
    meaning_weight: float = 0.05
    mark_weight: float = 3.0
    small_weight: float = 8.0  # of the loss where small letters, eyes, mouths and birds are
    long_text: float = 0.015
    save_every: float = 180.0  # seconds
    compiled: bool = True  # on a CPU: a tenth to a quarter faster, after a minute or two
    seed: int = 21


ON_GPU = FurtherSettings(
    scenes=24000,
    batch_low=128,
    batch_half=64,
    batch_high=32,
    batch_quarter=128,
    muon_lr=0.015,
    adam_lr=1.2e-3,
    text_lr=4e-4,
    flat_until=0.55,
    warmup_steps=200,
    ema=0.9995,
)
"""For a GPU that makes twenty steps a second."""


LOW, QUARTER, HALF, HIGH = "low", "quarter", "half", "high"
KINDS = (LOW, QUARTER, HALF, HIGH)
FACES = "large faces"
_COMPILED = (LOW, QUARTER, HIGH)  # on a CPU; half bands are too few to pay for it
_BAND = {QUARTER: 8, HALF: 16}  # rows of tokens


# ---------------------------------------------------------------------------------------------------------------- data


def scene_at(index: int, fine_share: float) -> Scene:
    """A scene of this training, with or without fine detail."""
    rng = np.random.default_rng([STREAM, index])
    return fine_scene(rng) if rng.random() < fine_share else random_scene(rng)


def picture_of(scene: Scene, index: int, size: int = data.HIGH) -> np.ndarray:
    return render(scene, size, seed=index * 10 + STREAM)


@dataclass(frozen=True)
class Encoder:
    """The shipped VAE's encoder as the affine map of 4x4 patches that it is."""

    analysis: np.ndarray  # (48, 16)
    offset: np.ndarray  # (16,)

    @classmethod
    def read_off(cls, engine: Any) -> Encoder:
        zero = torch.zeros(1, 3, 8, 8)
        offset = engine.encode(zero)[0, :, 0, 0]
        rows = []
        for k in range(data.PATCH**2 * 3):
            probe = zero.clone()
            probe[0, k % 3, k // (3 * data.PATCH), k // 3 % data.PATCH] = 1.0
            rows.append(engine.encode(probe)[0, :, 0, 0] - offset)
        return cls(torch.stack(rows).numpy(), offset.numpy())

    def latents(self, pictures: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) in [0, 1] -> (B, 16, H/4, W/4)."""
        return (data.patches(pictures) @ self.analysis + self.offset).transpose(0, 3, 1, 2)


@dataclass
class Drawn:
    """A process's scenes, their latents, what every token of them shows, and which tokens hold small parts."""

    scenes: list[Scene]
    latents: dict[int, np.ndarray]
    meanings: dict[int, np.ndarray]
    small: dict[int, np.ndarray]


def draw(first: int, count: int, encoder: Encoder, fine_share: float) -> Drawn:
    scenes = [scene_at(index, fine_share) for index in range(first, first + count)]
    sizes = (data.HIGH, data.LOW)
    side = {size: size // data.PATCH for size in sizes}
    latents = {size: np.empty((count, data.CHANNELS, side[size], side[size]), np.float16) for size in sizes}
    grids = {size: size // data.TOKEN for size in sizes}
    meanings = {size: np.empty((count, len(data.MEANINGS), grids[size], grids[size]), np.uint8) for size in sizes}
    small = {size: np.empty((count, grids[size], grids[size]), bool) for size in sizes}
    for start in range(0, count, 32):
        part = range(start, min(start + 32, count))
        # Rounded to eight bits, as pictures are stored.
        block = np.stack([np.rint(picture_of(scenes[k], first + k) * 255) / 255 for k in part]).astype(np.float32)
        latents[data.HIGH][part.start : part.stop] = encoder.latents(block)
        latents[data.LOW][part.start : part.stop] = encoder.latents(data.shrink(block))
        for k in part:
            for size in sizes:
                seed = (first + k) * 10 + STREAM
                meanings[size][k] = data.meaning(scenes[k], seed, grids[size])
                small[size][k] = small_places(scenes[k], seed, grids[size])
    return Drawn(scenes, latents, meanings, small)


def _draw_part(args: tuple[int, int, Encoder, float]) -> Drawn:
    return draw(*args)


def draw_in_parallel(first: int, count: int, encoder: Encoder, fine_share: float, processes: int) -> Drawn:
    """`draw` by this process's share of the cores."""
    workers = max(1, (os.cpu_count() or 1) // processes)
    if workers == 1:
        return draw(first, count, encoder, fine_share)
    edges = np.linspace(first, first + count, workers + 1).astype(int)
    context: Any = torch.multiprocessing
    with ProcessPoolExecutor(workers, mp_context=context.get_context("spawn")) as pool:
        jobs = [(int(a), int(b - a), encoder, fine_share) for a, b in pairwise(edges)]
        parts = list(pool.map(_draw_part, jobs))

    def joined(name: str) -> dict[int, np.ndarray]:
        return {size: np.concatenate([getattr(part, name)[size] for part in parts]) for size in parts[0].latents}

    scenes = [scene for part in parts for scene in part.scenes]
    return Drawn(scenes, joined("latents"), joined("meanings"), joined("small"))


def small_places(scene: Scene, seed: int, grid: int) -> np.ndarray:
    """Which tokens of an image hold small letters, eyes, mouths or birds: (grid, grid)."""
    places = np.zeros((grid, grid), bool)
    for mark in layout(scene, seed) if scene.is_fine else ():
        if mark.kind in ("small letter", "eye", "mouth", "bird"):
            top, left = int(mark.top * grid + 0.25), int(mark.left * grid + 0.25)
            bottom, right = int(np.ceil(mark.bottom * grid - 0.25)), int(np.ceil(mark.right * grid - 0.25))
            places[max(0, top) : max(bottom, top + 1), max(0, left) : max(right, left + 1)] = True
    return places


def hard_kind(scene: Scene) -> str:
    """What of a scene is learnt last; empty where nothing of it is.

    Small letters, moods of faces, hairlines, the number of birds, many small things, and textures side by side.
    """
    if scene.small_word:
        return "small letters"
    if scene.faces:
        return "small faces" if scene.face_size else FACES
    if scene.pattern:
        return "pattern"
    if scene.birds:
        return "birds"
    if scene.category == "detail":
        return "detail"
    return "textures" if len(scene.things) > 1 and any(each.texture in TEXTURES[1:] for each in scene.things) else ""


def rows_of_interest(drawn: Drawn, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """First and last row of tokens at 256 pixels, at most a quarter of them, that decide how each image is read.

    Those with small parts if there are any, else with letters, else with things or lights, else any.
    """
    part = drawn.meanings[data.HIGH][:, 0]
    rows = part.shape[1]
    first = rng.integers(0, rows, len(part))
    last = first.copy()
    for k, masks in enumerate(zip(drawn.small[data.HIGH], flow.is_letter(part), flow.is_mark(part), strict=True)):
        found = next((np.flatnonzero(mask.any(1)) for mask in masks if mask.any()), None)
        if found is not None:
            first[k], last[k] = found[0], min(found[-1], found[0] + _BAND[QUARTER] - 1)
    return first, last


@dataclass(frozen=True)
class Batch:
    top: int  # first row of tokens
    x0: Tensor  # (B, 16, h, w)
    ids: Tensor  # of T5
    clip_ids: Tensor
    shown: Tensor  # (B, 3, tokens): what each token shows
    weight: Tensor  # (B, 1, h, w): how much each latent's error counts


OPEN_WORDINGS, FULL_WORDINGS = 6, 4
"""Captions of each scene that are kept as numbers."""


class Batches:
    """Random batches of one process, on its device."""

    def __init__(
        self, drawn: Drawn, settings: FurtherSettings, tokenizers: tuple[Any, Any], seed: list[int], device: str
    ) -> None:
        self.settings, self.tokenizers, self.device = settings, tokenizers, device
        self.rng = np.random.default_rng(seed)
        self.count = len(drawn.scenes)
        self.lettered = np.array([k for k, scene in enumerate(drawn.scenes) if scene.word or scene.small_word])
        kinds = [hard_kind(scene) for scene in drawn.scenes]
        self.hard = {
            name: np.array([k for k, kind in enumerate(kinds) if kind == name])
            for name in settings.hard
            if name in kinds
        }
        self.first, self.last = rows_of_interest(drawn, self.rng)
        self.latents = {size: torch.from_numpy(each).to(device) for size, each in drawn.latents.items()}
        self.meanings = {size: torch.from_numpy(each).to(device) for size, each in drawn.meanings.items()}
        self.small = {size: torch.from_numpy(each).to(device) for size, each in drawn.small.items()}
        worded = [text for scene in drawn.scenes for text in self._wordings(scene)]
        ids, clip_ids = self.tokenise([*worded, ""])
        kept = (self.count, FULL_WORDINGS + OPEN_WORDINGS, -1)
        self.empty = ids[-1:], clip_ids[-1:]
        self.ids, self.clip_ids = ids[:-1].view(kept), clip_ids[:-1].view(kept)

    def _wordings(self, scene: Scene) -> list[str]:
        """Captions that name everything (one in four but the sky), then captions that leave things open."""
        kinds = ((True, False), (True, False), (True, True), (False, False))
        full = [captions.caption(scene, name_sky=sky, ground_first=ground) for sky, ground in kinds]
        opened: list[str] = []
        for _ in range(OPEN_WORDINGS):
            ground_first, bare = (bool(self.rng.random() < 0.3) for _ in range(2))
            opened.append(captions.caption(left_open(scene, self.rng), ground_first=ground_first, bare_ground=bare))
        return full + opened

    def tokenise(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        pad = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = self.tokenizers[0](texts, max_length=text.LENGTH, **pad).input_ids
        clip_ids = self.tokenizers[1](texts, max_length=_CLIP_LENGTH, **pad).input_ids
        return ids.to(self.device), clip_ids.to(self.device)

    def draw(self, kind: str, done: float, *, long_text: bool) -> Batch:
        settings, rng = self.settings, self.rng
        count = 4 if long_text else getattr(settings, f"batch_{kind}")
        among = self.lettered if rng.random() < settings.word_share else np.arange(self.count)
        # Of these, 128 pixels hold large faces alone.
        hard = [each for name, each in self.hard.items() if kind != LOW or name == FACES]
        if hard and rng.random() < settings.hard_share:
            among = hard[int(rng.integers(len(hard)))]
        size, top = (data.LOW if kind == LOW else data.HIGH), 0
        if kind in _BAND:
            height, all_rows = _BAND[kind], data.HIGH // data.TOKEN
            one = rng.choice(among)
            low, high = max(0, self.last[one] - height + 1), min(self.first[one], all_rows - height)
            top = int(rng.integers(low, high + 1))
            among = np.flatnonzero((self.first >= top) & (self.last < top + height))
        chosen = torch.from_numpy(rng.choice(among, count))
        rows = chosen.to(self.device)
        x0, shown, small = self.latents[size][rows].float(), self.meanings[size][rows].long(), self.small[size][rows]
        if kind in _BAND:
            x0 = x0[:, :, 2 * top : 2 * (top + _BAND[kind])].contiguous()
            shown, small = shown[:, :, top : top + _BAND[kind]], small[:, top : top + _BAND[kind]]
        ids, clip_ids = self._captions(rows, done)
        if long_text:
            ids = nn.functional.pad(ids, (0, 512 - ids.shape[1]))
        return Batch(top, x0, ids, clip_ids, shown.flatten(2), self._weights(shown[:, 0], small))

    def _captions(self, rows: Tensor, done: float) -> tuple[Tensor, Tensor]:
        settings, count = self.settings, len(rows)
        is_open = self.rng.random(count) < (0.0 if settings.full_only else settings.open_share[int(done > 0.5)])
        wording = self.rng.integers(0, FULL_WORDINGS, count)
        wording = np.where(is_open, FULL_WORDINGS + self.rng.integers(0, OPEN_WORDINGS, count), wording)
        which = torch.from_numpy(wording).to(self.device)
        none = torch.from_numpy(self.rng.random(count) < settings.drop_text).to(self.device)[:, None]
        ids, clip_ids = self.ids[rows, which], self.clip_ids[rows, which]
        return torch.where(none, self.empty[0], ids), torch.where(none, self.empty[1], clip_ids)

    def _weights(self, part: Tensor, small: Tensor) -> Tensor:
        weight = torch.where(flow.is_mark(part), self.settings.mark_weight, 1.0)
        weight = torch.where(small, self.settings.small_weight, weight)[:, None]
        return weight.repeat_interleave(2, 2).repeat_interleave(2, 3)


# ------------------------------------------------------------------------------------------------------------- network


class Further(nn.Module):
    """The shipped transformer and text encoders, with new heads for the naming loss."""

    def __init__(self, pipeline: Any, t5_words: int, clip_words: int) -> None:
        super().__init__()
        self.transformer = pipeline.transformer.float()
        self.t5, self.clip = pipeline.text_encoder_2.float(), pipeline.text_encoder.float()
        _widen(self.t5, t5_words)
        _widen(self.clip, clip_words)
        width = self.transformer.inner_dim
        self.meaning = nn.ModuleDict({kind: nn.Linear(width, len(names)) for kind, names in data.MEANINGS.items()})
        self.train().requires_grad_(True)

    naming_loss = flow.TextToVelocity.naming_loss

    def encode(self, ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.t5(ids).last_hidden_state, self.clip(clip_ids).pooler_output


@torch.no_grad()
def _widen(encoder: Any, words: int) -> None:
    """Give an encoder rows for more words; new ones begin as the mean word, a little apart from each other."""
    old = encoder.get_input_embeddings()
    if words == old.num_embeddings:
        return
    new = nn.Embedding(words, old.embedding_dim)
    spread = old.weight.std(0)
    generator = torch.Generator().manual_seed(0)
    new.weight[:] = old.weight.mean(0) + spread * torch.randn(new.weight.shape, generator=generator)
    new.weight[: old.num_embeddings] = old.weight
    encoder.set_input_embeddings(new)
    encoder.config.vocab_size = words


def _attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _rotate(x: Tensor, angles: tuple[Tensor, Tensor], **_: Any) -> Tensor:
    cos, sin = (each.to(x.dtype)[None, :, None] for each in angles)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-imaginary, real], -1).flatten(-2) * sin


def _norm(self: nn.RMSNorm, x: Tensor) -> Tensor:
    weight = None if self.weight is None else self.weight.to(x.dtype)
    return nn.functional.rms_norm(x, tuple(self.normalized_shape), weight, self.eps)


def make_fast_on_a_cpu() -> None:
    """Let this process's Flux networks attend, rotate and norm by plain operations in the dtype of what they are given.

    In bfloat16 on a CPU these take less time than the library's; results differ by rounding.
    """
    from diffusers.models.transformers import transformer_flux

    flux: Any = transformer_flux
    flux.dispatch_attention_fn, flux.apply_rotary_emb = _attention, _rotate
    nn.RMSNorm.forward = _norm


def load(work: Path) -> tuple[Any, Further, tuple[Any, Any]]:
    """The shipped engine, the network to train, and tokenizers that know all words."""
    torch.manual_seed(0)
    from diffusers import FluxPipeline

    engine = demo.load_engine(device="cpu", dtype="float32")
    kind: Any = FluxPipeline
    pipeline = kind.from_pretrained(weights_path())
    folder = work / "text"
    t5_tokenizer, (clip_tokenizer, vocab, merges) = text.make_t5_tokenizer(), text.make_clip_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    model = Further(pipeline, len(t5_tokenizer), len(clip_tokenizer))
    if not (folder / "tokenizer_2").exists():
        text.save(folder, model.t5, model.clip, t5_tokenizer, clip_tokenizer, vocab, merges)
    return engine, model, (t5_tokenizer, clip_tokenizer)


# ------------------------------------------------------------------------------------------------------------ training


def train(work: Path, settings: FurtherSettings | None = None) -> None:
    """Train on the GPU, or in two processes; writes ``further.pt``, resumes from it, and writes ``further.json``."""
    gpu = torch.cuda.is_available()
    settings = settings or (ON_GPU if gpu else FurtherSettings())
    work.mkdir(parents=True, exist_ok=True)
    load(work)
    if gpu:
        _train(0, work, settings, "cuda", 1)
        return
    context: Any = torch.multiprocessing
    context.spawn(_process, args=(work, settings), nprocs=PROCESSES)


def _process(rank: int, work: Path, settings: FurtherSettings) -> None:
    torch.set_num_threads(1)
    make_fast_on_a_cpu()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{_PORT}", rank=rank, world_size=PROCESSES)
    _train(rank, work, settings, "cpu", PROCESSES)
    dist.destroy_process_group()


def _train(rank: int, work: Path, settings: FurtherSettings, device: str, processes: int) -> None:
    engine, model, tokenizers = load(work)
    encoder = Encoder.read_off(engine)
    del engine
    begin = time.time()
    first = settings.first_scene + rank * settings.scenes
    drawn = draw_in_parallel(first, settings.scenes, encoder, settings.fine_share, processes)
    print("drawn", len(drawn.scenes), round(time.time() - begin), "s", flush=True)
    _Training(rank, work, settings, model.to(device), drawn, tokenizers, device, processes).run()


class _Training:
    def __init__(
        self,
        rank: int,
        work: Path,
        settings: FurtherSettings,
        model: Further,
        drawn: Drawn,
        tokenizers: tuple[Any, Any],
        device: str,
        processes: int,
    ) -> None:
        self.rank, self.path, self.settings, self.model = rank, work / "further.pt", settings, model
        self.device, self.processes = device, processes
        self.ema = copy.deepcopy(model).requires_grad_(False)
        rates = flow.FlowSettings(
            muon_lr=settings.muon_lr,
            adam_lr=settings.adam_lr,
            text_lr=settings.text_lr,
            flat_until=settings.flat_until,
            warmup_steps=settings.warmup_steps,
        )
        self.rates, self.opts = rates, flow.optimisers(model, rates)
        self.step, self.elapsed, self.curve = 0, 0.0, list[list[float | None]]()
        self.samples: dict[str, int] = dict.fromkeys(KINDS, 0)
        if self.path.exists():
            state = torch.load(self.path, weights_only=False, map_location=device)
            model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            for opt, saved in zip(self.opts, state["opts"], strict=True):
                opt.load_state_dict(saved)
            self.step, self.elapsed, self.curve = state["step"], state["elapsed"], state["curve"]
            self.samples = state["samples"]
        torch.manual_seed(settings.seed + 1000 * rank + self.step)
        self.batches = Batches(drawn, settings, tokenizers, [settings.seed, rank, self.step], device)
        self.shared = np.random.default_rng([settings.seed, self.step])
        self.smooth: Callable[[], object] = flow._without_fast_waves(
            model.transformer.time_text_embed.guidance_embedder.linear_1.weight
        )
        compiles = device == "cpu" and settings.compiled
        self.fast: Any = torch.compile(model.transformer, dynamic=False) if compiles else model.transformer
        self.features: list[Tensor] = []
        block = model.transformer.single_transformer_blocks[flow.MEANING_BLOCK]
        block.register_forward_hook(lambda _module, _inputs, out: self.features.append(out[1]))

    def run(self) -> None:
        names = (*KINDS, "guided", "meaning")
        running: dict[str, list[float]] = {name: [] for name in names}
        if self.processes > 1:
            dist.barrier()
        begin, last_save = time.time() - self.elapsed, time.time()
        while self._agreed(time.time() - begin) < self.settings.seconds:
            done = self.elapsed / self.settings.seconds
            flow.set_rates(self.opts, self.rates, self.step, done)
            shares = self.settings.late_shares if done > 0.66 else self.settings.shares
            kind = KINDS[int(self.shared.choice(4, p=shares))]
            long_text = bool(self.shared.random() < self.settings.long_text)
            kind = LOW if long_text else kind
            for name, value in self._learn(kind, done, long_text=long_text).items():
                running[name].append(value)
            self.step += 1
            if self.step % 50 == 0:
                row = [float(np.mean(each)) if each else None for each in running.values()]
                self.curve.append([self.step, self.elapsed, *row])
                running = {name: [] for name in names}
                if self.rank == 0:
                    print("further", [self.step, round(self.elapsed)], dict(zip(names, row, strict=True)), flush=True)
            if time.time() - last_save > self.settings.save_every:
                self._save()
                last_save = time.time()
        self._save()
        if self.rank == 0:
            record = {"settings": asdict(self.settings), "steps": self.step, "seconds": self.elapsed}
            record |= {"samples": self.samples, "curve": self.curve}
            self.path.with_suffix(".json").write_text(json.dumps(record))

    def _agreed(self, elapsed: float) -> float:
        value = torch.tensor([elapsed])
        if self.processes > 1:
            dist.broadcast(value, 0)
        self.elapsed = float(value)
        return self.elapsed

    def _learn(self, kind: str, done: float, *, long_text: bool) -> dict[str, float]:
        settings, model = self.settings, self.model
        batch = self.batches.draw(kind, done, long_text=long_text)
        x0, top, count = batch.x0, batch.top, len(batch.x0)
        size = data.LOW if kind == LOW else data.HIGH
        sigma = flow.draw_sigma(count, flow.SHIFTS[size], 0.2).to(self.device)
        s = sigma.view(-1, 1, 1, 1)
        noise = torch.randn_like(x0)
        x = (1 - s) * x0 + s * noise
        plain = count - (count // 2 if self.shared.random() < settings.guided_share else 0)
        guidance = torch.ones(count, device=self.device)
        guidance[plain:].uniform_(*flow.GUIDANCE_RANGE)
        with torch.autocast(self.device, torch.bfloat16):
            tokens, pooled = model.encode(batch.ids, batch.clip_ids)
            correction = 0.0
            if plain < count:
                rest = slice(plain, count)
                correction = self._guided(x[rest], sigma[rest], tokens[rest], pooled[rest], guidance[rest], top)
            self.features.clear()
            network = self.fast if kind in _COMPILED and not long_text else model.transformer
            v = flow.velocity(network, x, sigma, tokens, pooled, guidance, top)
            naming = model.naming_loss(self.features[0], batch.shown)
        target = noise - x0
        target[plain:] += correction
        squares = (v - target).square()
        loss = (squares * batch.weight).mean() / batch.weight.mean() + settings.meaning_weight * (
            1 - 0.8 * done
        ) * naming
        loss.backward()
        if self.processes > 1:
            self._share_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in self.opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        self.smooth()
        flow.update_ema(self.ema, model, min(settings.ema, (self.step + 1) / (self.step + 10)))
        self.samples[kind] += count * self.processes
        found = {kind: float(squares[:plain].mean().detach()), "meaning": float(naming.detach())}
        return found | ({"guided": float(squares[plain:].mean().detach())} if plain < count else {})

    @torch.no_grad()
    def _guided(self, x: Tensor, sigma: Tensor, tokens: Tensor, pooled: Tensor, guidance: Tensor, top: int) -> Tensor:
        """(scale - 1) times what the caption changes in the network's own velocity at scale 1."""
        count = len(x)
        empty_tokens, empty_pooled = self.model.encode(*self.batches.empty)
        if tokens.shape[1] != empty_tokens.shape[1]:
            empty_tokens = nn.functional.pad(empty_tokens, (0, 0, 0, tokens.shape[1] - empty_tokens.shape[1]))
        pair = flow.velocity(
            self.model.transformer,
            x.repeat(2, 1, 1, 1),
            sigma.repeat(2),
            torch.cat([tokens, empty_tokens.expand(count, -1, -1)]),
            torch.cat([pooled, empty_pooled.expand(count, -1)]),
            torch.ones(2 * count, device=self.device),
            top,
        )
        with_text, without = pair.chunk(2)
        return (guidance.view(-1, 1, 1, 1) - 1) * (with_text - without)

    def _share_gradients(self) -> None:
        # A process whose images have no colour to name has no gradient for that head.
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.model.parameters()]
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        shared = (flat / self.processes).split([part.numel() for part in parts])
        for parameter, part in zip(self.model.parameters(), shared, strict=True):
            parameter.grad = part.view_as(parameter)

    def _save(self) -> None:
        if self.rank == 0:
            flow.save_state(
                self.path,
                model=self.model.state_dict(),
                ema=self.ema.state_dict(),
                opts=[opt.state_dict() for opt in self.opts],
                step=self.step,
                elapsed=self.elapsed,
                curve=self.curve,
                samples=self.samples,
            )
