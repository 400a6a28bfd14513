"""A slow oracle for one kernel that serves several layers: every patch written out, in numpy float64."""

from __future__ import annotations

import numpy as np
from reference import PAD


def best_shared_conv(inputs, outputs, *, kernel_size, stride=(1, 1), padding=(0, 0), **options):
    """Return the kernel and bias with the least sum_l |y_l - conv(x_l)|^2, and that least sum.

    `inputs` is a list of x_l (N, C, H, W), `outputs` one of y_l (N, O, H', W'). Options: `dilation`,
    `groups`, `mode` of padding, `bias` (False: none, None is returned), `weights` (L, O): the factor of every
    layer's and output channel's error, before it is squared. Where several are best, the one of least norm.
    """
    bias, groups = options.pop("bias", True), options.pop("groups", 1)
    weights = options.pop("weights", None)
    targets = [np.moveaxis(np.asarray(y, np.float64), 1, -1).reshape(-1, y.shape[1]) for y in outputs]
    count = targets[0].shape[1]
    weights = np.ones((len(targets), count)) if weights is None else np.asarray(weights, np.float64)
    geometry = {"kernel_size": kernel_size, "stride": stride, "padding": padding, **options}
    rows = [patches(np.asarray(x, np.float64), **geometry) for x in inputs]  # (pixels, C, kh, kw) each
    channels = rows[0].shape[1] // groups
    kernel, shift, least = np.zeros((count, channels, *kernel_size)), np.zeros(count), 0.0
    for o in range(count):
        first = o // (count // groups) * channels
        matrices, wanted = [], []
        for layer, (row, target) in enumerate(zip(rows, targets, strict=True)):
            own = row[:, first : first + channels].reshape(len(row), -1)
            own = np.concatenate([own, np.ones((len(row), 1))], axis=1) if bias else own
            matrices.append(own * weights[layer, o])
            wanted.append(target[:, o] * weights[layer, o])
        matrix, right = np.concatenate(matrices), np.concatenate(wanted)
        found = np.linalg.lstsq(matrix, right, rcond=None)[0]
        kernel[o] = found[: kernel[o].size].reshape(kernel[o].shape)
        shift[o] = found[-1] if bias else 0.0
        least += ((matrix @ found - right) ** 2).sum()
    return kernel, shift if bias else None, least


def patches(x, *, kernel_size, stride, padding, dilation=(1, 1), mode="zeros"):
    """Return what every output pixel of a convolution sees of x (N, C, H, W): (N * H' * W', C, kh, kw)."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel_size, stride, padding, dilation
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)), mode=PAD[mode])
    n, channels, height, width = padded.shape
    found = []
    for image in range(n):
        for i in range(0, height - dh * (kh - 1), sh):
            for j in range(0, width - dw * (kw - 1), sw):
                seen = np.zeros((channels, kh, kw))
                for a in range(kh):
                    for b in range(kw):
                        seen[:, a, b] = padded[image, :, i + a * dh, j + b * dw]
                found.append(seen)
    return np.stack(found)
