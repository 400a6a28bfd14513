"""Reaction-diffusion steps to test, and a slow oracle: their formula in dense matrices, in numpy float64."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from lcc.methods.reaction_diffusion import RdCirculant, RdExplicit, RdImplicit
from lcc.specs import ConvSpec, Size, StepSpec

EXPLICIT = [RdExplicit(), RdCirculant(), RdCirculant(boundary="periodic")]
EVERY = [*EXPLICIT, RdImplicit(), RdImplicit(stiffness=math.inf)]
SIZE = Size(height=6, width=5)


def conv(channels=4, kernel=(3, 3), **options):
    options = {"padding": tuple(k // 2 for k in kernel)} | options
    return ConvSpec(**{"in_channels": channels, "out_channels": channels, "kernel_size": kernel} | options)


def step(channels=4, kernel=(3, 3), **options):
    return StepSpec(channels=channels, convs=(conv(channels, kernel),) * 2, **options)


@torch.no_grad()
def operator(method, spec=None, *, seed=0):
    """The operator in float64 and eval mode, with a BatchNorm that does something."""
    torch.manual_seed(seed)
    op = method.build(spec or step()).double().eval()
    op.norm.weight.uniform_(0.5, 1.5)
    op.norm.bias.normal_()
    op.norm.running_mean.normal_()
    op.norm.running_var.uniform_(0.5, 1.5)
    return op


@torch.no_grad()
def without_reaction(method, stencil):
    op = method.build(step(len(stencil))).double().eval()
    op.project_(nn.Identity())
    nn.init.zeros_(op.norm.bias)  # the reaction off
    op.stencil.copy_(stencil * root_of_sum(op))
    return op


def root_of_sum(op):
    """What the parameter of a circulant step is larger by than its taps."""
    return len(op.stencil) ** 0.5 if type(op).__name__ == "RdCirculantOp" else 1.0


def coupled(x, taps, *, circulant, periodic):
    """K on images x (..., C, H, W): channel i under stencil i; circulant: channels i + d under stencils d."""
    c, kh, kw = taps.shape
    height, width = x.shape[-2:]
    out = np.zeros_like(x)
    for d in range(c if circulant else 1):
        weights = taps[d] if circulant else taps.transpose(1, 2, 0)[..., None, None]
        for a in range(kh):
            for b in range(kw):
                up, left = a - kh // 2, b - kw // 2
                if periodic:
                    seen = np.roll(x, (-up, -left), axis=(-2, -1))
                else:
                    around = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(kh, kh), (kw, kw)])
                    seen = around[..., kh + up : kh + up + height, kw + left : kw + left + width]
                out += weights[a, b] * np.roll(seen, -d, axis=-3)
    return out


def k_matrix(op, taps, height, width):
    """K over all channels and pixels, column by column from the images with one bright pixel."""
    c = len(taps)
    units = np.eye(c * height * width).reshape(-1, c, height, width)
    name = type(op).__name__
    circulant = name == "RdCirculantOp"
    periodic = name == "RdImplicitOp" or getattr(op, "periodic", False)
    return coupled(units, taps, circulant=circulant, periodic=periodic).reshape(len(units), -1).T


def length(op):
    with torch.no_grad():
        return float(op.step)


def used_stencil(op):
    """The op's taps, shrunk where the implicit step has a cap: h (sum of |taps|)^2 is at most the cap."""
    taps = op.stencil.detach().numpy() / root_of_sum(op)
    cap = getattr(op, "stiffness", math.inf)
    bound = length(op) * np.abs(taps).sum((1, 2), keepdims=True) ** 2
    return taps * np.minimum(1, np.sqrt(cap / bound))


POST = {None: lambda y: y, "relu": lambda y: np.maximum(y, 0), "silu": lambda y: y / (1 + np.exp(-y))}


def step_of(op, x, post=None):
    """The formula of the step in dense matrices."""
    h, k = length(op), k_matrix(op, used_stencil(op), *x.shape[2:])
    norm = {key: value.numpy()[:, None, None] for key, value in op.norm.state_dict().items() if value.ndim}
    mixed = np.einsum("ij,njhw->nihw", op.mix.weight.detach().numpy()[:, :, 0, 0], x.numpy())
    scaled = (mixed - norm["running_mean"]) / np.sqrt(norm["running_var"] + op.norm.eps)
    reaction = np.maximum(scaled * norm["weight"] + norm["bias"], 0).reshape(len(x), -1).T
    y = x.numpy().reshape(len(x), -1).T
    if type(op).__name__ == "RdImplicitOp":
        new = np.linalg.solve(np.eye(len(k)) + h * k.T @ k, y + h * reaction)
    else:
        new = y + h * (reaction - k.T @ (k @ y))
    return POST[post](new.T.reshape(x.shape))


def largest_symbol(op, count=256):
    """The largest |k^|^2 over many frequencies, over those of the channels too where they couple."""
    taps, turns = used_stencil(op), 2 * np.pi * np.arange(count) / count
    waves = [np.exp(1j * np.outer(turns, np.arange(k))) for k in taps.shape[1:]]
    if type(op).__name__ == "RdCirculantOp":
        taps = np.fft.fft(taps, axis=0)
    return (np.abs(np.einsum("ua,cab,vb->cuv", waves[0], taps, waves[1])) ** 2).max()
