"""What every option would do to the network's output, predicted for all of them from a few passes.

First every option's operators are fitted to the activations of the original network. Then, for labels drawn
from the network's own predictions, the slope g of their log-likelihood at every site. Outputs off by e move
it by g . e; half the mean square of that is the Kullback-Leibler divergence of the predictions to second
order, since the Fisher information is the mean of g g^T. Where a host lets no slope through, as under
torch.no_grad, the option is tried instead.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcc.errors import SourceError
from lcc.ops.moments import PooledMoments
from lcc.trials import run_once
from lcc.two_streams import device_of, images_at_once

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lcc.methods import LowCostOp, Method
    from lcc.plan import Site

    Seen = dict[str, list[tuple[Tensor, Tensor]]]  # every site's input and output in each call
    Slopes = dict[str, list[list[Tensor]]]  # at every site's output in each call, one for each drawn label

CHUNK = 64  # images at a time, at most
DRAWS = 4  # labels drawn for every image
AT_ONCE = 64  # options fitted in one pass: what they remember must fit in memory


class Damage(NamedTuple):
    """What an option does: its fits' mean relative error, and the divergence predicted, in nats."""

    relative_error: float
    divergence: float


class Damages(NamedTuple):
    """A `Damage` for every option, and what finding them out took, in forward passes over the images."""

    entries: tuple[Damage, ...]
    forward_passes: float


def damages(
    model: nn.Module,
    sites: Mapping[str, Site],
    options: Sequence[tuple[Method, tuple[str, ...]]],
    images: Tensor,
    *,
    seed: int = 0,
    on_done: Callable[[int], None] | None = None,
) -> Damages:
    """Return what every option, a method and the sites that it takes, does on images (N, C, H, W).

    Labels are drawn, so that a prediction has a spread of its own: some percent where images are few. What
    an option does that the images never reach is not a number. The model is left in eval mode. `on_done` is
    called with the number of options fitted so far.
    Raises: SourceError: the model is no classifier, or can't run on so many images. ValueError: activations
    or outputs are not finite.
    """
    model.eval()
    device = device_of(model)
    chunk = min(CHUNK, max(1, images_at_once(model, images) // (2 + 2 * DRAWS)))  # gradients stay alive, too
    parts = [part.to(device) for part in images.split(chunk)]
    with torch.no_grad():
        refuse_no_classes(run_once(model, parts[0]))  # the first is slower, and no unit
        started = _now(device)
        for part in parts:
            model(part)
    forward = _now(device) - started
    trials = [_Trial(model, sites, method, names) for method, names in options]
    done = 0
    for batch in _batches(trials):
        _fit(model, batch, parts)
        done += len(batch)
        if on_done is not None:
            on_done(done)
    modules = {name: model.get_submodule(name) for trial in trials for name in trial.operators}
    wanted = _learn_moments(model, trials, parts)
    chances = torch.rand(len(images), DRAWS, generator=torch.Generator().manual_seed(seed))
    sloped: set[str] = set()  # where the log-likelihoods were seen to depend on the outputs
    for part, chance in zip(parts, chances.split(chunk), strict=True):
        seen, slopes = _slopes(model, modules, part, chance)
        sloped |= {name for name in modules if any(one.any() for drawn in slopes[name] for one in drawn)}
        with torch.no_grad():
            for trial in trials:
                trial.take_in(seen, slopes, wanted)
    scale = 0.5 / (DRAWS * len(images))
    entries = []
    for trial in trials:
        divergence = scale * trial.squares
        if trial.relative_error > 0 and not sloped.issuperset(trial.operators):
            divergence = _true_divergence(model, trial, parts, wanted)
        entries.append(Damage(trial.relative_error, divergence))
    return Damages(tuple(entries), (_now(device) - started) / forward)


def _now(device: torch.device) -> float:
    """Return the time in seconds at which a device is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Trial:
    """An option's operators, beside the modules that they would replace.

    `moments`: those of the outputs that a norm follows, over all images.
    """

    def __init__(
        self, model: nn.Module, sites: Mapping[str, Site], method: Method, names: tuple[str, ...]
    ) -> None:
        self.method = method
        self.originals = {name: model.get_submodule(name) for name in names}
        self.operators = {name: method.build(sites[name].spec) for name in names}
        self.moments = {name: PooledMoments() for name in names if sites[name].norm is not None}
        for name, operator in self.operators.items():
            operator.to(next(self.originals[name].parameters())).eval()
        self.relative_error = self.squares = 0.0
        self.called: set[str] = set()

    def begin(self, stack: ExitStack) -> None:
        """Take the start's weights, and watch the originals until the stack closes."""
        ops = list(self.operators.values())
        self.method.tie_(ops)
        self.method.project_bank_(ops, list(self.originals.values()))
        self.statistics = {
            name: op.statistics(free_means=name in self.moments) for name, op in self.operators.items()
        }
        for name, module in self.originals.items():
            handle = module.register_forward_hook(self._watching(name))
            stack.callback(handle.remove)

    def finish(self) -> None:
        """Fit to what was seen, and forget it."""
        if len(self.called) < len(self.operators):
            self.relative_error = self.squares = math.nan
            del self.statistics
            return
        fits = self.method.fit_bank_(list(self.operators.values()), list(self.statistics.values()))
        errors = [fit.relative_error or 0.0 for fit in fits]
        self.relative_error = sum(errors) / len(errors)
        del self.statistics

    def take_in(self, seen: Seen, slopes: Slopes, wanted: Mapping[str, PooledMoments]) -> None:
        """Add the squares of what these images' log-likelihoods move by."""
        moved = [torch.zeros((), dtype=torch.float64)] * DRAWS
        for name in self.operators:
            for (x, y), drawn in zip(seen[name], slopes[name], strict=True):
                off = (self.output(name, x, wanted) - y).flatten(1)
                moved = [
                    total + (slope.flatten(1) * off).sum(1, dtype=torch.float64)
                    for total, slope in zip(moved, drawn, strict=True)
                ]
        self.squares += sum(float(total.square().sum()) for total in moved)

    def output(self, name: str, x: Tensor, wanted: Mapping[str, PooledMoments]) -> Tensor:
        """Return what the operator at a site gives, and what a norm that follows will make of it."""
        got = _run(self.operators[name], x)
        return _with_moments(got, self.moments[name], wanted[name]) if name in self.moments else got

    def _watching(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.statistics[name].add(inputs[0], output)
            self.called.add(name)

        return hook


def _run(operator: LowCostOp, x: Tensor) -> Tensor:
    """Run an operator alone, in its own precision, even where its host computes in another."""
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = operator(x.to(next(operator.parameters()).dtype))
    return y


def _batches(trials: Sequence[_Trial]) -> list[list[_Trial]]:
    """Return trials that are fitted in one pass together; banks and what keeps activations go alone."""
    large = [trial for trial in trials if trial.method.fits_slowly or trial.method.shares]
    small = [trial for trial in trials if trial not in large]
    batches = [small[i : i + AT_ONCE] for i in range(0, len(small), AT_ONCE)]
    return [*batches, *([trial] for trial in large)]


def _fit(model: nn.Module, trials: Sequence[_Trial], parts: Sequence[Tensor]) -> None:
    with torch.no_grad(), ExitStack() as stack:
        for trial in trials:
            trial.begin(stack)
        for part in parts:
            model(part)
    for trial in trials:
        trial.finish()


def _learn_moments(
    model: nn.Module, trials: Sequence[_Trial], parts: Sequence[Tensor]
) -> dict[str, PooledMoments]:
    """Learn the moments of what norms follow, over all images; return those of the modules themselves."""
    originals: dict[str, PooledMoments] = {}

    def watching(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            originals[name].add(output)
            for trial in trials:
                if name in trial.moments:
                    trial.moments[name].add(_run(trial.operators[name], inputs[0]))

        return hook

    with torch.no_grad(), ExitStack() as stack:
        for name in dict.fromkeys(name for trial in trials for name in trial.moments):
            originals[name] = PooledMoments()
            stack.callback(model.get_submodule(name).register_forward_hook(watching(name)).remove)
        for part in parts:
            model(part)
    return originals


@torch.enable_grad()
def _slopes(
    model: nn.Module, modules: Mapping[str, nn.Module], images: Tensor, chances: Tensor
) -> tuple[Seen, Slopes]:
    """Return every module's inputs and outputs, and the slopes at its outputs for each draw of labels.

    `chances` (N, DRAWS), even in [0, 1), draw the labels from the predictions.
    """
    seen: Seen = {name: [] for name in modules}
    outputs: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen[name].append((inputs[0].detach().clone(), output.detach().clone()))
            outputs.append((name, output if output.requires_grad else output.requires_grad_()))
            return output * 1  # what follows may work in place

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(keep(name)).remove)
        log_likelihoods = F.log_softmax(model(images), dim=1)
    if not log_likelihoods.isfinite().all():
        raise ValueError("the outputs are not finite")
    shares = log_likelihoods.detach().cpu().double().exp().cumsum(1)
    labels = torch.searchsorted(shares, chances.double() * shares[:, -1:], right=True)
    labels = labels.clamp(max=shares.shape[1] - 1).to(images.device)
    drawn: list[tuple[Tensor, ...]] = []
    for draw in range(DRAWS):
        if not log_likelihoods.requires_grad:  # all under torch.no_grad
            drawn.append(tuple(torch.zeros_like(y) for _, y in outputs))
            continue
        chosen = log_likelihoods.gather(1, labels[:, draw : draw + 1]).sum()
        more = draw < DRAWS - 1
        found = torch.autograd.grad(
            chosen, [y for _, y in outputs], retain_graph=more, allow_unused=True, materialize_grads=True
        )
        drawn.append(found)
    slopes: Slopes = {name: [] for name in modules}
    for (name, _), slope in zip(outputs, zip(*drawn, strict=True), strict=True):
        slopes[name].append(list(slope))
    return seen, slopes


@torch.no_grad()
def _true_divergence(
    model: nn.Module, trial: _Trial, parts: Sequence[Tensor], wanted: Mapping[str, PooledMoments]
) -> float:
    """Return the Kullback-Leibler divergence of the predictions, the option taken, from those that are."""

    def instead(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda _, inputs, __: trial.output(name, inputs[0], wanted)

    total = 0.0
    for part in parts:
        before = F.log_softmax(model(part).double(), dim=1)
        with ExitStack() as stack:
            for name, module in trial.originals.items():
                stack.callback(module.register_forward_hook(instead(name)).remove)
            after = F.log_softmax(model(part).double(), dim=1)
        total += float((before.exp() * (before - after)).sum())
    return total / sum(map(len, parts))


def refuse_no_classes(logits: object) -> None:
    """Raise SourceError if a network's output is not (N, classes), two classes at least."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        raise SourceError(
            "a planner needs a classifier, which gives (images, classes), two classes at least; decide by "
            "--method"
        )


def _with_moments(got: Tensor, now: PooledMoments, wanted: PooledMoments) -> Tensor:
    """Return `got`, of all of which the moments are `now`, shifted and scaled to those wanted."""
    scale = (wanted.variance / now.variance.clamp_min(1e-30)).sqrt()
    scale, mean, new_mean = (m.to(got.dtype)[:, None, None] for m in (scale, wanted.mean, now.mean))
    return (got - new_mean) * scale + mean
