"""Gram matrices of a convolution's regressors, gathered batch by batch at sampled output positions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from lcc.ops.fit import HELD_OUT_EVERY, Gram, Solution, best_ridge
from lcc.ops.padding import pad

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lcc.specs import ConvSpec

MIN_SAMPLES = 16_384  # positions looked at in each call, where there are as many
SAMPLES_PER_UNKNOWN = 128
CHUNK = 8_192  # samples at a time,
CHUNK_NUMBERS = 2**26  # or as many as make this many numbers

G = TypeVar("G", bound=Gram[Any])


class SampledGrams(ABC, Generic[G]):
    """Gram matrices of what a convolution sees under its taps and what is wanted of it, without activations.

    A subclass says how samples enter a Gram matrix. Every fifth image is held out.
    """

    def __init__(
        self,
        spec: ConvSpec,
        taps: Sequence[tuple[int, int]],
        grams: tuple[G, G],
        *,
        unknowns: int,
        centered: bool,
    ) -> None:
        self.spec, self.taps, self.centered = spec, taps, centered
        self.train, self.held_out = grams
        self.images = 0
        self.samples = max(MIN_SAMPLES, SAMPLES_PER_UNKNOWN * unknowns)

    @abstractmethod
    def take_in(self, gram: G, patches: Tensor, outputs: Tensor) -> None:
        """Add M samples: patches (M, C_in, T), the inputs under the T taps, and outputs (M, C_out)."""

    @torch.no_grad()
    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in (N, C_in, H, W) inputs and the (N, C_out, H', W') outputs wanted for them."""
        count, _, height, width = outputs.shape
        generator = torch.Generator().manual_seed(self.images)
        per_image = min(height * width, -(-self.samples // count))
        # The same number of positions in every image, without repetition inside one.
        scores = torch.rand(count, height * width, generator=generator)
        positions = scores.topk(per_image, dim=1).indices.flatten().to(inputs.device)
        image = torch.arange(count, device=inputs.device).repeat_interleave(per_image)
        held_out = (image + self.images) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        self.images += count
        padded = pad(inputs, self.spec)
        chunk = min(CHUNK, max(1, CHUNK_NUMBERS // (inputs.shape[1] * len(self.taps))))
        for gram, chosen in ((self.train, ~held_out), (self.held_out, held_out)):
            for rows in chosen.nonzero()[:, 0].split(chunk):
                n, i, j = image[rows], positions[rows] // width, positions[rows] % width
                self.take_in(gram, self._patches(padded, n, i, j), outputs[n, :, i, j])

    def best(self, start: Any) -> Solution[Any]:
        """Return the ridge solution that does best on held-out images, towards the weights `start`."""
        return best_ridge(self.train, self.held_out, start, centered=self.centered)

    def _patches(self, padded: Tensor, n: Tensor, i: Tensor, j: Tensor) -> Tensor:
        (sh, sw), (dh, dw) = self.spec.stride, self.spec.dilation
        return torch.stack([padded[n, :, i * sh + a * dh, j * sw + b * dw] for a, b in self.taps], dim=-1)
