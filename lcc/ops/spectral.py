"""The periodic solve of the implicit step: by FFT in torch, and its real-arithmetic twins for export.

Source: arXiv:1805.07821, eq. (11). Complex numbers stay in here. Everything is per channel: the system
(I + h K^T K) u = f is diagonal in the Fourier basis, with the symbol 1 + h |k^|^2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lcc.ops.stencil import periodic_grid


def solve_periodic(rhs: Tensor, stencil: Tensor, step: Tensor | float) -> Tensor:
    """Return u with (I + step * K^T K) u = rhs, periodic in space, K the depthwise stencil.

    Shapes: rhs (N, C, H, W), stencil (C, kh, kw). The dtype is rhs's; transforms are in float32 at least.
    """
    height, width = rhs.shape[-2:]
    with torch.autocast(rhs.device.type, enabled=False):
        exact = torch.promote_types(rhs.dtype, torch.float32)
        symbol = _system_symbol(stencil.to(exact), step, height, width)
        u = torch.fft.irfft2(torch.fft.rfft2(rhs.to(exact)) / symbol, s=(height, width))
    return laid_out_as(rhs, u)


def laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """Return y in the dtype and the memory format of x; a Fourier transform keeps neither."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.to(x.dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


class Green(NamedTuple):
    """The solve as a periodic stencil: `taps` (C, a, b), tap (i, j) for the offset (i - a // 2, j - b // 2).

    `relative_error` bounds |stencil - solve| / |solve| over all right-hand sides, in the Euclidean norm.
    """

    taps: Tensor
    relative_error: float


@torch.no_grad()
def green(stencil: Tensor, step: float, height: int, width: int, tolerance: float) -> Green:
    """Return the smallest stencil that solves to `tolerance`; the response to a constant image is exact.

    At most as large as the image, where it is exact. What is cut off is given back at the centre tap.
    """
    symbol = _system_symbol(stencil.double(), step, height, width)
    response = torch.fft.irfft2(1 / symbol, s=(height, width))
    for radius in range(max(height, width)):
        size = (min(2 * radius + 1, height), min(2 * radius + 1, width))
        taps = _window(response, size)
        taps[:, size[0] // 2, size[1] // 2] += response.sum((1, 2)) - taps.sum((1, 2))
        got = torch.fft.rfft2(_unwindow(taps, height, width))
        error = float(((got - 1 / symbol) * symbol).abs().max())
        if error <= tolerance or size == (height, width):
            return Green(taps.to(stencil.dtype), error)
    raise AssertionError("a stencil as large as the image is exact")


class RealFourier(NamedTuple):
    """The solve by real matrices: Q^T (mean * Z + mixed * Z[swap_rows][:, swap_columns]) Q with Z = Q x Q^T.

    `rows` (H, H) and `columns` (W, W) are orthonormal cosines and sines; the swap exchanges the cosine and
    the sine of a frequency. `mixed` is None where no channel needs it: |k^| even in each frequency alone.
    """

    rows: Tensor
    columns: Tensor
    swap_rows: Tensor
    swap_columns: Tensor
    mean: Tensor
    mixed: Tensor | None


@torch.no_grad()
def real_fourier(stencil: Tensor, step: float, height: int, width: int) -> RealFourier:
    """Return the solve for one image size in real arithmetic, exact.

    On cos a cos b and sin a sin b, the products for a pair of frequencies, the solve acts as
    [[mean, mixed], [mixed, mean]] with mean and mixed = (s(a, -b) +- s(a, b)) / 2, s the inverse symbol; on
    sin a cos b and cos a sin b as the same with -mixed.
    """
    grid = periodic_grid(stencil.double(), height, width)
    inverse = 1 / (1 + step * torch.fft.fft2(grid).abs().square())
    rows, row_of, row_is_sine, swap_rows = (part.to(stencil.device) for part in _real_basis(height))
    columns, column_of, column_is_sine, swap_columns = (
        part.to(stencil.device) for part in _real_basis(width)
    )
    same = inverse[:, row_of][:, :, column_of]
    opposite = inverse[:, row_of][:, :, (-column_of) % width]
    sign = torch.where(row_is_sine[:, None] == column_is_sine[None, :], 1.0, -1.0).to(inverse)
    mixed = sign * (opposite - same) / 2
    dtype = stencil.dtype
    return RealFourier(
        rows.to(dtype),
        columns.to(dtype),
        swap_rows,
        swap_columns,
        ((same + opposite) / 2).to(dtype),
        mixed.to(dtype) if float(mixed.abs().max()) > 1e-12 else None,
    )


def apply_real_fourier(x: Tensor, fourier: RealFourier) -> Tensor:
    """Return the solve for right-hand sides x (N, C, H, W), H and W those of `fourier`."""
    z = fourier.rows @ x @ fourier.columns.T
    y = fourier.mean * z
    if fourier.mixed is not None:
        y = y + fourier.mixed * z.index_select(2, fourier.swap_rows).index_select(3, fourier.swap_columns)
    return fourier.rows.T @ y @ fourier.columns


def _system_symbol(stencil: Tensor, step: Tensor | float, height: int, width: int) -> Tensor:
    """Return 1 + step |k^|^2 at the frequencies of rfft2, (C, H, W // 2 + 1)."""
    symbol: Tensor = torch.fft.rfft2(periodic_grid(stencil, height, width))
    return 1 + step * (symbol.real.square() + symbol.imag.square())


def _offsets(count: int, length: int, device: torch.device) -> Tensor:
    return (torch.arange(count, device=device) - count // 2) % length


def _window(response: Tensor, size: tuple[int, int]) -> Tensor:
    rows = _offsets(size[0], response.shape[1], response.device)
    columns = _offsets(size[1], response.shape[2], response.device)
    window: Tensor = response[:, rows][:, :, columns]
    return window.clone()


def _unwindow(taps: Tensor, height: int, width: int) -> Tensor:
    result = taps.new_zeros(len(taps), height, width)
    rows = _offsets(taps.shape[1], height, taps.device)
    columns = _offsets(taps.shape[2], width, taps.device)
    result[:, rows[:, None], columns] = taps
    return result


def _real_basis(length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return an orthonormal real Fourier basis (n, n): cosines, then sines; and three facts of each row.

    Its frequency, whether it is a sine, and the row of the frequency's other function (itself, if none).
    """
    cosines = range(length // 2 + 1)
    sines = range(1, (length + 1) // 2)
    frequency = torch.tensor([*cosines, *sines])
    is_sine = torch.tensor([False] * len(cosines) + [True] * len(sines))
    angle = 2 * math.pi / length * frequency[:, None].double() * torch.arange(length)
    basis = torch.where(is_sine[:, None], angle.sin(), angle.cos())
    basis = basis / basis.norm(dim=1, keepdim=True)
    swap = torch.arange(length)
    for place, f in enumerate(sines):
        swap[f], swap[len(cosines) + place] = len(cosines) + place, f
    return basis, frequency, is_sine, swap
