"""Pipelines that come with a quantised network run as they are: by torchao, quanto, bitsandbytes, or from GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from tiny_pipelines import TWICE

from mrflow_sched import MrFlow, MrFlowError

SIZE: dict[str, Any] = {"width": 64, "height": 64, "seed": 3, "low_steps": 2, "output_type": "pt"}


def _torchao(pipe: Any, _: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(pipe.transformer, torchao.Int8WeightOnlyConfig())


def _quanto(pipe: Any, folder: Path) -> None:
    """By diffusers' configuration, which leaves its quantiser on the network."""
    pytest.importorskip("optimum.quanto")
    diffusers: Any = pytest.importorskip("diffusers")
    pipe.transformer.save_pretrained(folder)
    asked = diffusers.QuantoConfig(weights_dtype="int8")
    pipe.transformer = type(pipe.transformer).from_pretrained(folder, quantization_config=asked)


def _replaced(pipe: Any, layer_of: Any) -> None:
    for module in pipe.transformer.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and child.in_features % 32 == 0:
                setattr(module, name, layer_of(child))


def _bitsandbytes(pipe: Any, _: Path) -> None:
    library: Any = pytest.importorskip("bitsandbytes")

    def packed(child: torch.nn.Linear) -> Any:
        size = (child.in_features, child.out_features)
        layer = library.nn.Linear4bit(*size, bias=child.bias is not None, compute_dtype=torch.float32)
        layer.weight = library.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
        layer.bias = child.bias
        return layer.to("cpu")

    _replaced(pipe, packed)


def _gguf(pipe: Any, folder: Path) -> None:
    """The weights as GGUF holds them: each matrix in its blocks of eight bits, dequantised where it is used."""
    gguf = pytest.importorskip("gguf")
    utils: Any = pytest.importorskip("diffusers.quantizers.gguf.utils")
    kind = gguf.GGMLQuantizationType.Q8_0

    def packed(child: torch.nn.Linear) -> Any:
        weight = torch.from_numpy(gguf.quants.quantize(child.weight.detach().numpy(), kind))
        layer = utils.GGUFLinear(child.in_features, child.out_features, child.bias is not None, torch.float32)
        layer.weight, layer.bias = utils.GGUFParameter(weight, quant_type=kind), child.bias
        return layer

    _replaced(pipe, packed)


@pytest.mark.parametrize("quantise", [_torchao, _quanto, _bitsandbytes, _gguf], ids=lambda each: each.__name__[1:])
@pytest.mark.parametrize("kind", ["sd3", "flux1-dev"])
def test_they_run_and_stay_as_they_are(kind: str, quantise: Any, tmp_path: Path) -> None:
    own, pipe = tiny_pipelines.make(kind), tiny_pipelines.make(kind)
    quantise(pipe, tmp_path / "network")
    kinds = {name: type(each) for name, each in pipe.transformer.named_modules()}
    made = MrFlow(pipe, upscaler=TWICE)("a cat", **SIZE).images
    plain = MrFlow(own, upscaler=TWICE)("a cat", **SIZE).images
    assert 0.0 < float((made - plain).abs().mean()) < 0.15
    assert {name: type(each) for name, each in pipe.transformer.named_modules()} == kinds
    if getattr(pipe.transformer, "hf_quantizer", None) is not None:
        with pytest.raises(MrFlowError, match="was loaded quantised already"):
            MrFlow(pipe, precision="int8")
