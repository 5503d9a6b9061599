"""Noise that is shrunk stays white, and keeps what the larger noise says of every place."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.sampling.shrink import shrink_noise

SIZES = [(32, 16), (32, 32), (33, 11), (24, 16), (33, 20), (33, 32), (7, 5), (9, 1), (1, 1), (64, 63)]


def linear_map(size: tuple[int, int], smaller: tuple[int, int]) -> torch.Tensor:
    """The matrix of the map, (h w, H W), from its values on the unit vectors."""
    count = size[0] * size[1]
    basis = torch.eye(count, dtype=torch.float64).reshape(count, 1, *size)
    return shrink_noise(basis, *smaller).reshape(count, -1).T.double()


@pytest.mark.parametrize(("size", "smaller"), SIZES)
def test_rows_are_orthonormal_along_each_axis(size: int, smaller: int) -> None:
    for full, small in (((size, 2), (smaller, 2)), ((3, size), (3, smaller))):
        down = linear_map(full, small)
        assert torch.allclose(down @ down.T, torch.eye(len(down), dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "smaller"), [((12, 18), (6, 6)), ((10, 12), (5, 8)), ((9, 7), (6, 5)), ((8, 12), (4, 12))]
)
def test_rows_are_orthonormal_where_the_axes_shrink_by_different_ratios(
    size: tuple[int, int], smaller: tuple[int, int]
) -> None:
    down = linear_map(size, smaller)
    assert torch.allclose(down @ down.T, torch.eye(len(down), dtype=torch.float64), atol=1e-6)


def test_half_the_size_is_twice_the_average_to_the_last_bit() -> None:
    noise = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(shrink_noise(noise, 8, 12), 2 * functional.avg_pool2d(noise, 2))
    assert torch.equal(shrink_noise(noise, 16, 24), noise)


def test_both_ways_agree_at_whole_ratios() -> None:
    from mrflow_sched.sampling import shrink

    noise = torch.randn(1, 2, 12, 18, generator=torch.Generator().manual_seed(2))
    whitened = shrink._white_mean(12, 4) @ noise.double() @ shrink._white_mean(18, 9).T  # pyright: ignore[reportPrivateUsage]
    assert torch.allclose(shrink_noise(noise, 4, 9).double(), whitened, atol=1e-6)


@pytest.mark.parametrize("smaller", [(8, 8), (10, 12), (11, 16)])
def test_the_result_is_standard_normal(smaller: tuple[int, int]) -> None:
    noise = torch.randn(4000, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    small = shrink_noise(noise, *smaller).flatten(1).double()
    covariance = small.T @ small / len(small)
    assert (covariance - torch.eye(small.shape[1], dtype=torch.float64)).abs().max() < 0.11  # 6 standard errors
    assert small.mean(0).abs().max() < 0.1


@pytest.mark.parametrize("smaller", [(8, 8), (10, 7)])
def test_each_image_of_a_batch_is_what_it_is_alone(smaller: tuple[int, int]) -> None:
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    together = shrink_noise(noise, *smaller)
    assert all(torch.equal(together[[row]], shrink_noise(noise[[row]], *smaller)) for row in range(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("smaller", [(4, 4), (5, 3)])
def test_the_result_is_float32_and_the_noise_is_left_alone(dtype: torch.dtype, smaller: tuple[int, int]) -> None:
    noise = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(5)).to(dtype)
    before = noise.clone()
    small = shrink_noise(noise, *smaller)
    assert small.dtype == torch.float32
    assert small.shape == (1, 2, *smaller)
    assert torch.equal(noise, before)


@pytest.mark.parametrize(
    ("height", "width", "named"), [(9, 8, "height"), (8, 9, "width"), (0, 8, "height"), (8, -1, "width")]
)
def test_sizes_out_of_range_are_refused(height: int, width: int, named: str) -> None:
    with pytest.raises(MrFlowError, match=f"^{named} must be from 1 to 8, .* got "):
        shrink_noise(torch.zeros(1, 1, 8, 8), height, width)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(MrFlowError, match=r"shape \(B, C, H, W\), got \(2, 8, 8\)"):
        shrink_noise(torch.zeros(2, 8, 8), 4, 4)
