"""LoRAs of the embedded model: a loop in two processes that trains one, and its file as other programs read it."""

from __future__ import annotations

import abc
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tools.train_demo import further

PROCESSES = 2
_PORT = 29617
TARGETS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out"),
)
"""The layers that are trained, by the end of their name: the attention and the feed-forward layers of image tokens."""


@dataclass(frozen=True)
class LoraSettings:
    """How long and how fast.

    Attributes:
        seconds: Of training, drawing left out.
        rank: Of every layer's two factors.
        batch: Images of a step, of each process.
        rate: AdamW's, falling to 0 along half a cosine.
        seed: Of all that is drawn.
    """

    seconds: float = 2400.0
    rank: int = 14
    batch: int = 12
    rate: float = 1.5e-3
    seed: int = 3


@dataclass(frozen=True)
class Networks:
    """The embedded model in a training process.

    Attributes:
        transformer: With the LoRA that is trained.
        plain: The same network without it, frozen.
        encode: Texts -> (T5's tokens (B, L, C), CLIP's pooled vector (B, C)).
    """

    transformer: Any
    plain: Any
    encode: Callable[[list[str]], tuple[Tensor, Tensor]]


class Lesson(abc.ABC):
    """What a LoRA learns; made in each process from its arguments, then asked for a loss at every step."""

    @abc.abstractmethod
    def begin(self, networks: Networks, settings: LoraSettings, rank: int) -> None:
        """Draw what is needed before the first step."""

    @abc.abstractmethod
    def loss(self, step: int) -> Tensor:
        """The loss of one batch, with a graph."""


def train(file: Path, folder: str, settings: LoraSettings, lesson: Lesson, begin: Path | None = None) -> dict[str, Any]:
    """Train a LoRA and write it, with its settings and curve in a JSON file beside it.

    Args:
        file: The LoRA's safetensors file.
        folder: The weights that it is for, as in `bench.quality.variety.load_weights`.
        settings: How long and how fast.
        lesson: What it learns; it is sent to other processes.
        begin: A LoRA that this function wrote, to go on from.

    Returns:
        The record that is written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    context: Any = torch.multiprocessing
    context.spawn(_process, args=(file, folder, settings, lesson, begin), nprocs=PROCESSES)
    return json.loads(file.with_suffix(".json").read_text())


def load_networks(folder: str, rank: int) -> Networks:
    """The embedded model with a fresh LoRA of that rank, which changes nothing yet."""
    from peft import LoraConfig

    from bench.quality.variety import load_weights

    pipe = load_weights(folder, dtype="float32").engine.pipe
    plain = pipe.transformer.requires_grad_(False).eval()
    own: Any = copy.deepcopy(plain)
    torch.manual_seed(0)  # the same LoRA in every process
    own.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=_targets(own)))

    @torch.no_grad()
    def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        tokens, pooled, _ = pipe.encode_prompt(texts, texts, max_sequence_length=32)
        return tokens, pooled

    return Networks(own, plain, encode)


def _targets(network: Any) -> list[str]:
    ends = tuple(f".{name}" for name in TARGETS)
    found = [name for name, each in network.named_modules() if isinstance(each, nn.Linear) and name.endswith(ends)]
    return [name for name in found if "transformer_blocks" in name]


def save(file: Path, network: Any) -> None:
    """Write the LoRA of a network, in float16."""
    from diffusers import FluxPipeline
    from peft import get_peft_model_state_dict

    layers = {name: weight.half().contiguous() for name, weight in get_peft_model_state_dict(network).items()}
    pipeline: Any = FluxPipeline
    pipeline.save_lora_weights(file.parent, transformer_lora_layers=layers, weight_name=file.name)


def load(file: Path, network: Any) -> None:
    """Give a network with a LoRA the weights that `save` wrote."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    layers = {name.removeprefix("transformer."): weight.float() for name, weight in load_file(file).items()}
    unknown = set_peft_model_state_dict(network, layers).unexpected_keys
    if unknown:
        raise ValueError(f"{file} is of another network: it has {unknown[0]}")


def _process(rank: int, file: Path, folder: str, settings: LoraSettings, lesson: Lesson, begin: Path | None) -> None:
    torch.set_num_threads(1)
    further.make_fast_on_a_cpu()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{_PORT}", rank=rank, world_size=PROCESSES)
    networks = load_networks(folder, settings.rank)
    if begin is not None:
        load(begin, networks.transformer)
    weights = [each for each in networks.transformer.parameters() if each.requires_grad]
    torch.manual_seed(settings.seed + 1000 * rank)
    lesson.begin(networks, settings, rank)
    optimiser = torch.optim.AdamW(weights, lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.0)
    dist.barrier()
    began, step, share = time.time(), 0, 0.0
    curve: list[list[float]] = []
    running: list[float] = []
    while share < 1.0:
        with torch.autocast("cpu", torch.bfloat16):
            loss = lesson.loss(step)
        loss.backward()
        _share_gradients(weights)
        for group in optimiser.param_groups:
            group["lr"] = settings.rate * _rate(share)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        running.append(float(loss.detach()))
        share = _agreed((time.time() - began) / settings.seconds)
        if step % 25 == 0 or share >= 1.0:
            curve.append([step, round(share * settings.seconds), sum(running) / len(running)])
            running = []
            if rank == 0:
                print(file.stem, curve[-1], flush=True)
                save(file, networks.transformer)
    if rank == 0:
        count = sum(weight.numel() for weight in weights)
        record = {"settings": asdict(settings), "weights": count, "steps": step, "curve": curve}
        file.with_suffix(".json").write_text(json.dumps(record))
    dist.barrier()
    dist.destroy_process_group()


def _rate(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def _agreed(share: float) -> float:
    value = torch.tensor([share], dtype=torch.float64)
    dist.broadcast(value, 0)
    return float(value)


def _share_gradients(weights: list[Any]) -> None:
    flat = torch.cat([weight.grad.flatten() for weight in weights])
    dist.all_reduce(flat)
    for weight, part in zip(weights, (flat / PROCESSES).split([each.numel() for each in weights]), strict=True):
        weight.grad = part.view_as(weight)
