"""Slow oracles in numpy float64: loops over pixels and taps, sharing no code with what they check."""

from __future__ import annotations

import numpy as np

PAD = {"zeros": "constant", "reflect": "reflect", "circular": "wrap", "replicate": "edge"}


def conv_reference(x, kernel, bias, *, stride, margin, dilation, mode):
    """Return the convolution of x (N, C, H, W) with a dense kernel (O, C, kh, kw), output pixel by pixel."""
    (rows_around, columns_around), (sh, sw), (dh, dw) = margin, stride, dilation
    padded = np.pad(x, ((0, 0), (0, 0), rows_around, columns_around), mode=PAD[mode])
    n, _, height, width = padded.shape
    out, _, kh, kw = kernel.shape
    rows = (height - dh * (kh - 1) - 1) // sh + 1
    columns = (width - dw * (kw - 1) - 1) // sw + 1
    y = np.zeros((n, out, rows, columns))
    for i in range(rows):
        for j in range(columns):
            for a in range(kh):
                for b in range(kw):
                    pixel = padded[:, :, i * sh + a * dh, j * sw + b * dw]
                    y[:, :, i, j] += pixel @ kernel[:, :, a, b].T
    return y if bias is None else y + bias[None, :, None, None]


def margin_of(spec):
    """Return the padding of a spec, ((above, below), (left, right)): `same` keeps the size at stride 1."""
    if spec.padding == "valid":
        return (0, 0), (0, 0)
    if spec.padding == "same":
        reach = [d * (k - 1) for k, d in zip(spec.kernel_size, spec.dilation, strict=True)]
        return tuple((n // 2, n - n // 2) for n in reach)
    return tuple((n, n) for n in spec.padding)


def circulant_reference(op, method, x):
    """Return the convolution with W[i, j] = theta[(j - i) mod c] written out entry by entry."""
    spec = op.spec
    theta = op.theta.detach().numpy()
    c = len(theta)
    dense = np.zeros((c, c, *spec.kernel_size))
    for i in range(c):
        for d in range(c):
            dense[i, (i + d) % c] = theta[d]
    return conv_reference(
        x,
        dense,
        None if op.bias is None else op.bias.detach().numpy(),
        stride=spec.stride,
        margin=margin_of(spec),
        dilation=spec.dilation,
        mode=spec.padding_mode,
    )


def linear_mix_reference(op, method, x):
    """Return K x + M x with K and M written out entry by entry."""
    spec = op.spec
    kh, kw = spec.kernel_size
    spatial = op.spatial.weight.detach().numpy()
    dense = np.zeros((spec.out_channels, spec.in_channels, kh, kw))
    groups = spec.in_channels // method.group_size
    per_group = spec.out_channels // groups
    for o in range(spec.out_channels):
        for k in range(method.group_size):
            i = o // per_group * method.group_size + k
            taps = spatial[o, k]
            if method.stencil == "square":
                dense[o, i] = taps
            if method.stencil == "horizontal":
                dense[o, i, kh // 2] = taps[0]
            if method.stencil == "vertical":
                dense[o, i, :, kw // 2] = taps[:, 0]
            if method.stencil == "cross":
                dense[o, i, kh // 2] = taps[:kw]
                dense[o, i, [r for r in range(kh) if r != kh // 2], kw // 2] = taps[kw:]
    dense[:, :, kh // 2, kw // 2] += op.pointwise.weight.detach().numpy()[:, :, 0, 0]
    bias = None if op.bias is None else op.bias.detach().numpy()
    return conv_reference(
        x,
        dense,
        bias,
        stride=spec.stride,
        margin=margin_of(spec),
        dilation=spec.dilation,
        mode=spec.padding_mode,
    )


def shared_reference(op, method, x):
    """The kernel of the bank, dense and group by group or another method's, then the site's own scale."""
    if method.method is not None:
        y = linear_mix_reference(op.kernel, method.method, x)
    else:
        spec, weight = op.spec, op.kernel.weight.detach().numpy()
        dense = np.zeros((spec.out_channels, spec.in_channels, *spec.kernel_size))
        per_group_out, per_group_in = spec.out_channels // spec.groups, spec.in_channels // spec.groups
        for o in range(spec.out_channels):
            first = o // per_group_out * per_group_in
            dense[o, first : first + per_group_in] = weight[o]
        y = conv_reference(
            x,
            dense,
            None if op.kernel.bias is None else op.kernel.bias.detach().numpy(),
            stride=spec.stride,
            margin=margin_of(spec),
            dilation=spec.dilation,
            mode=spec.padding_mode,
        )
    return y if op.scale is None else y * op.scale.detach().numpy()[:, None, None]
