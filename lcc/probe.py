"""A network's answer to a seeded input: what a copy of it must answer too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lcc import weights
from lcc.errors import ArtifactError, one_line

if TYPE_CHECKING:
    from lcc.models import Preprocessing

# Largest difference that rounding may cause, relative to the largest number: other machines, thread counts
# and library versions differ in the last bits.
TOLERANCE = 1e-3


def example(model: nn.Module, preprocessing: Preprocessing) -> Tensor:
    """Return a seeded input, (1, C, H, W), in float32 or the model's float64."""
    shape = (1, len(preprocessing.mean), *preprocessing.image_size)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    is_double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return example.double() if is_double else example


def outputs(model: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """Return what the model gives in eval mode on the CPU, by place in its output; the model stays as it was.

    Half precision runs as float32: the weights are exact in it, and every CPU can.
    """
    state = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        on_cpu = tensor.detach().cpu()
        state[name] = on_cpu.float() if on_cpu.dtype in (torch.float16, torch.bfloat16) else on_cpu
    try:
        with _in_eval_mode(model), torch.no_grad():
            output = functional_call(model, state, (example,))
    except (RuntimeError, ValueError, TypeError) as error:
        shape = "x".join(str(length) for length in example.shape)
        raise ArtifactError(
            f"the network can't run on a {shape} input ({one_line(error)}); try another --image-size"
        ) from error
    leaves = dict(_leaves("output", output))
    if not leaves:
        raise ArtifactError(
            f"the network returns a {type(output).__name__}, in which lcc finds no tensor to compare; return "
            "tensors, or lists or dicts of them"
        )
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in leaves.items()}


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a nested output, by its place."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(f"{name}.{index}", item)


def relative_difference(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the largest difference over the largest number wanted; infinite if even the shapes differ."""
    if weights.shapes(got) != weights.shapes(wanted):
        return math.inf
    worst = 0.0
    for name, tensor in wanted.items():
        a, b = got[name].double(), tensor.double()
        same = (a == b) | (a.isnan() & b.isnan())
        if not same.all():
            most = b[b.isfinite()].abs().amax() if b.isfinite().any() else b.new_zeros(())
            ratio = float((a - b)[~same].abs().max() / most)
            worst = math.inf if math.isnan(ratio) else max(worst, ratio)
    return worst
