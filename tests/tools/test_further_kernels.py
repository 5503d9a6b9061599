"""The plain operations that training on a CPU puts in the library's place give what the library gives."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch.nn import functional

from tools.train_demo import further


def test_attention_rotation_and_norm_are_the_librarys() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 20, 4, 16, generator=generator).unbind(0)
    first, second, third = (each.transpose(1, 2) for each in (query, key, value))
    expected = functional.scaled_dot_product_attention(first, second, third).transpose(1, 2)
    torch.testing.assert_close(further._attention(query, key, value), expected)
    angles = torch.rand(20, 8, generator=generator).repeat_interleave(2, 1)
    rotate: Any = apply_rotary_emb
    turned = rotate(query, (angles.cos(), angles.sin()), sequence_dim=1)
    torch.testing.assert_close(further._rotate(query, (angles.cos(), angles.sin())), turned)
    norm = torch.nn.RMSNorm(16, eps=1e-6)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=generator)
    torch.testing.assert_close(further._norm(norm, query), norm(query))
    assert further._norm(norm, query.bfloat16()).dtype == torch.bfloat16
