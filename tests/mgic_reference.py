"""A slow oracle of multigrid in channels in numpy float64: every convolution dense, pixel by pixel."""

from __future__ import annotations

import numpy as np
from mgic_conv_reference import dense_kernel, mgic_conv_reference
from reference import conv_reference
from scipy.special import erf

from lcc.specs import ConvSpec

ACTIVATIONS = {
    None: lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "relu6": lambda y: np.minimum(np.maximum(y, 0), 6),
    "leaky_relu": lambda y: np.where(y > 0, y, 0.01 * y),
    "silu": lambda y: y / (1 + np.exp(-y)),
    "hardswish": lambda y: y * np.clip(y + 3, 0, 6) / 6,
    "gelu": lambda y: y * (1 + erf(y / np.sqrt(2))) / 2,
}


def mgic_reference(op, method, x):
    """Return what either form gives."""
    return (mgic_conv_reference if isinstance(op.spec, ConvSpec) else _block_form)(op, method, x)


def _block_form(op, method, x):
    """Return the cycle, level by level: down to the coarsest, then up."""
    spec = op.spec
    weights = {name: tensor.detach().numpy() for name, tensor in op.state_dict().items()}
    mobile = any(conv.groups > 1 for conv in spec.convs)
    widths = [spec.channels, *(conv.out_channels for conv in spec.convs)]
    n, depth = min(widths), 0
    prefixes, inputs, divided = ["cycle.finest."], [_opened(weights, spec, x)], []
    while True:  # down
        prefix = prefixes[-1]
        involved = [n // 2, spec.channels // 2 ** (depth + 1), *(width // 2**depth for width in widths)]
        fewer = range(max(n // method.group_size, 1), 0, -1)
        groups = next(g for g in fewer if all(width % g == 0 for width in involved))
        coarse = _grouped(weights[prefix + "down.weight"], inputs[-1], groups)
        if method.as_released and mobile:
            coarse = _norm(weights, prefix + "down_norm.", coarse, spec.norm_eps)
        inputs.append(coarse)
        divided.append(groups)
        prefixes.append(prefix + "coarser.")
        if n / 2 < method.coarsest:
            break
        n, depth = n // 2, depth + 1
    z = _block(weights, prefixes[-1], spec, method, inputs[-1], groups=1, at_bottom=True)
    for level in reversed(range(len(divided))):
        prefix, groups = prefixes[level], divided[level]
        correction = _grouped(weights[prefix + "up.weight"], z - inputs[level + 1], groups)
        u = inputs[level] + _norm(weights, prefix + "up_norm.", correction, spec.norm_eps)
        z = _block(weights, prefix + "block.", spec, method, u, groups=groups, at_bottom=False)
    return z


def _opened(weights, spec, x):
    """Return what the first level sees."""
    if "cycle.opening.weight" not in weights:
        return x
    kernel = weights["cycle.opening.weight"]
    alone = kernel.shape[2] > 1
    y = _grouped(kernel, x, x.shape[1] if alone else 1, stride=spec.stride)
    if not alone:
        return y
    return ACTIVATIONS[spec.activation](_norm(weights, "cycle.opening_norm.", y, spec.norm_eps))


def _block(weights, prefix, spec, method, u, *, groups, at_bottom):
    """Return the host's block at some width: convolution, norm, activation, and so on, plus u."""
    mobile = any(conv.groups > 1 for conv in spec.convs)
    y, last = u, len(spec.convs) - 1
    for number, conv in enumerate(spec.convs):
        kernel = weights[f"{prefix}convs.{number}.weight"]
        alone = conv.groups > 1
        y = _grouped(
            kernel, y, y.shape[1] if alone else groups, dilation=conv.dilation, mode=conv.padding_mode
        )
        y = _norm(weights, f"{prefix}norms.{number}.", y, spec.norm_eps)
        gated = bool(spec.squeeze) and (alone if mobile else number == last)
        early = method.as_released and conv.in_channels != spec.channels
        if gated and early:
            y = _gated(weights, prefix, spec, y, mobile=mobile)
        if number < last:
            y = ACTIVATIONS[spec.activation](y)
        if gated and not early:
            y = _gated(weights, prefix, spec, y, mobile=mobile)
    if method.as_released and mobile:
        return ACTIVATIONS[spec.post](np.maximum(y + u, 0) + u)
    narrow = any(conv.out_channels < spec.channels for conv in spec.convs)
    if method.as_released and narrow and at_bottom:
        y = np.maximum(y, 0)
    return ACTIVATIONS[spec.post](y + u)


def _gated(weights, prefix, spec, y, *, mobile):
    """Return squeeze-and-excitation, image by image."""
    out = np.empty_like(y)
    for image in range(len(y)):
        pooled = y[image].mean(axis=(1, 2))
        hidden = weights[prefix + "gate.squeeze.weight"][:, :, 0, 0] @ pooled
        hidden = hidden + weights.get(prefix + "gate.squeeze.bias", 0)
        hidden = ACTIVATIONS["silu" if spec.activation == "silu" else "relu"](hidden)
        opened = weights[prefix + "gate.excite.weight"][:, :, 0, 0] @ hidden
        opened = opened + weights.get(prefix + "gate.excite.bias", 0)
        hard = mobile and spec.activation in ("relu", "hardswish")
        gate = np.clip(opened + 3, 0, 6) / 6 if hard else 1 / (1 + np.exp(-opened))
        out[image] = y[image] * gate[:, None, None]
    return out


def _norm(weights, prefix, y, eps):
    """Return a BatchNorm with its running statistics."""
    scale, shift, mean, variance = (
        weights[prefix + name][:, None, None] for name in ("weight", "bias", "running_mean", "running_var")
    )
    return (y - mean) / np.sqrt(variance + eps) * scale + shift


def _grouped(kernel, x, groups, *, stride=(1, 1), dilation=(1, 1), mode="zeros"):
    """Return a grouped convolution that keeps the size but for a stride."""
    dense = dense_kernel(kernel, groups)
    around = tuple((d * (k - 1) // 2,) * 2 for d, k in zip(dilation, kernel.shape[2:], strict=True))
    return conv_reference(x, dense, None, stride=stride, margin=around, dilation=dilation, mode=mode)
