"""Whether a network, changed for a trial, computes the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lcc.errors import SourceError, cannot_run
from lcc.tracing import evaluating

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


def run_once(model: nn.Module, example: Tensor, handles: Sequence[Any] = ()) -> Any:
    """Return the model's output in eval mode; the hooks are removed, modes and random state put back.

    Raises: SourceError: the model can't run on the example.
    """
    devices = [example.device] if example.is_cuda else []
    with evaluating(model), torch.random.fork_rng(devices=devices):
        try:
            return model(example.clone())  # a first layer in place must not change the next run
        except Exception as error:
            raise cannot_run(example.shape, error) from error
        finally:
            for handle in handles:
                handle.remove()


def answer_of(model: nn.Module, example: Tensor) -> str:
    """Return some digits of what a model gives, by which to know one that computes something else.

    Few, so that other sums of rounding errors, as with more threads, make no difference.
    """
    output = run_once(model, example)
    return f"{output.double().norm():.4e}" if isinstance(output, Tensor) else ""


def same_outputs(a: Any, b: Any, *, tolerance: float = 0.0) -> bool:
    """Whether two outputs, tensors or nested containers of them, agree; in every bit, without `tolerance`.

    It is relative to a tensor's largest value. Raises: SourceError: something else is in them.
    """
    if isinstance(a, Tensor):
        if tolerance == 0 or not a.is_floating_point():
            return bool(torch.equal(a, b))
        return a.shape == b.shape and bool(((a - b).abs() <= tolerance * a.abs().amax()).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_outputs(a[key], b[key], tolerance=tolerance) for key in a)
    if isinstance(a, list | tuple):
        pairs = zip(a, b, strict=False)
        return len(a) == len(b) and all(same_outputs(x, y, tolerance=tolerance) for x, y in pairs)
    if a is None or isinstance(a, str | int | float):
        return bool(a == b)
    raise SourceError(
        f"the network returns a {type(a).__name__}, which lcc can't compare: give it tensors, lists or dicts"
    )


def largest(items: list[T], holds: Callable[[list[T]], bool]) -> list[T]:
    """Return the items for which `holds`: all of them, else what halves of them give."""
    if holds(items):
        return items
    middle = len(items) // 2
    return largest(items[:middle], holds) + largest(items[middle:], holds) if middle else []
