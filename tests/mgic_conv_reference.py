"""A slow oracle of the conv form of MGIC: dense kernels entry by entry, loops over pixels."""

from __future__ import annotations

import numpy as np
from reference import conv_reference, margin_of


def dense_kernel(weight, groups):
    """Return a grouped kernel (C_out, C_in / G, kh, kw) with its zeros, (C_out, C_in, kh, kw)."""
    out, per_group, kh, kw = weight.shape
    dense = np.zeros((out, per_group * groups, kh, kw))
    for o in range(out):
        for k in range(per_group):
            dense[o, o // (out // groups) * per_group + k] = weight[o, k]
    return dense


def widths_and_groups(method, spec):
    """Return [(width, groups)] of the levels, found by trying."""
    found, width = [], spec.in_channels
    while True:
        divided = [width, width // 2] + ([] if found else [spec.out_channels])
        fitting = [
            g
            for g in range(1, width + 1)
            if g <= max(width // method.group_size, 1) and not any(n % g for n in divided)
        ]
        found.append((width, max(fitting)))
        width //= 2
        if width < method.coarsest:
            return [*found, (width, 1)]


def mgic_conv_reference(op, method, x):
    """Return A_0 x: down through all levels first, then up again, each operator a dense kernel."""
    spec, levels = op.spec, widths_and_groups(method, op.spec)
    weights = {key: value.detach().numpy() for key, value in op.state_dict().items()}

    def pointwise(name, level, x):
        matrix = dense_kernel(weights[f"{name}.{level}.weight"], levels[level][1])[:, :, 0, 0]
        return np.einsum("oi,nihw->nohw", matrix, x)

    def convolved(level, u):
        kernel = dense_kernel(weights[f"kernels.{level}.weight"], levels[level][1])
        around = tuple((d * (k - 1) // 2,) * 2 for d, k in zip(spec.dilation, spec.kernel_size, strict=True))
        return conv_reference(
            u,
            kernel,
            weights.get(f"kernels.{level}.bias"),
            stride=(1, 1) if level else spec.stride,
            margin=around if level else margin_of(spec),
            dilation=spec.dilation,
            mode=spec.padding_mode,
        )

    down = [x]
    for level in range(len(levels) - 1):
        down.append(pointwise("restrict", level, down[-1]))
    z = convolved(len(levels) - 1, down[-1])
    for level in reversed(range(len(levels) - 1)):
        z = convolved(level, down[level] + pointwise("prolong", level, z - down[level + 1]))
    return z
