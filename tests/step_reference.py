"""Slow oracles of residual steps: every operator a dense matrix over pixels, in numpy float64."""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import erf

POST = {
    None: lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "gelu": lambda y: y * (1 + erf(y / np.sqrt(2))) / 2,
}


def stencil_matrix(taps, height, width, *, periodic):
    """Return the (H W, H W) matrix of a stencil, row by row; outside is zero, or the other side."""
    kh, kw = taps.shape
    matrix = np.zeros((height * width, height * width))
    for i in range(height):
        for j in range(width):
            for a in range(kh):
                for b in range(kw):
                    row, column = i + a - kh // 2, j + b - kw // 2
                    if periodic:
                        row, column = row % height, column % width
                    if 0 <= row < height and 0 <= column < width:
                        matrix[i * width + j, row * width + column] += taps[a, b]
    return matrix


def coupling_matrix(op, method, height, width):
    """Return K over all channels and pixels, (C H W, C H W)."""
    taps = op.stencil.detach().numpy()
    c, n = len(taps), height * width
    if method.name == "rd_circulant":
        taps = taps / np.sqrt(c)
    periodic = method.name == "rd_implicit" or getattr(method, "boundary", "zeros") == "periodic"
    blocks = [stencil_matrix(tap, height, width, periodic=periodic) for tap in taps]
    matrix = np.zeros((c * n, c * n))
    for i in range(c):
        for d in range(c) if method.name == "rd_circulant" else [0]:
            j = (i + d) % c
            block = blocks[d if method.name == "rd_circulant" else i]
            matrix[i * n : (i + 1) * n, j * n : (j + 1) * n] = block
    return matrix


def step_reference(op, method, x):
    """Return the step: the reaction pixel by pixel, the diffusion by dense matrices."""
    batch, c, height, width = x.shape
    h = float(torch.as_tensor(op.step).detach())
    norm = {key: value.detach().numpy() for key, value in op.norm.state_dict().items()}
    mix = op.mix.weight.detach().numpy()[:, :, 0, 0]
    k = coupling_matrix(op, method, height, width)
    if method.name == "rd_implicit":
        if method.stiffness < np.inf:
            k = k * _shrink(op, method, height, width)[:, None]
        solve = np.linalg.inv(np.eye(len(k)) + h * k.T @ k)
    out = np.zeros_like(x)
    for n in range(batch):
        y = x[n].reshape(c, -1)
        mixed = mix @ y
        scaled = (mixed - norm["running_mean"][:, None]) / np.sqrt(norm["running_var"] + op.norm.eps)[:, None]
        reaction = np.maximum(scaled * norm["weight"][:, None] + norm["bias"][:, None], 0)
        if method.name == "rd_implicit":
            new = solve @ (y + h * reaction).reshape(-1)
        else:
            new = y.reshape(-1) + h * (reaction.reshape(-1) - k.T @ (k @ y.reshape(-1)))
        out[n] = POST[op.post](new.reshape(c, height, width))
    return out


def _shrink(op, method, height, width):
    """Return how much each row of K is shrunk so that h (sum |taps|)^2 stays below the cap."""
    largest = np.abs(op.stencil.detach().numpy()).sum((1, 2))
    factor = np.minimum(1, np.sqrt(method.stiffness / float(torch.as_tensor(op.step).detach())) / largest)
    return np.repeat(factor, height * width)
