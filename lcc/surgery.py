"""Sites in a module tree, and their replacement: the only module that walks or edits one.

Replacing keeps every shape, so the model is not traced: a module is found by name and swapped in its parent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lcc.anatomy import has_hooks
from lcc.calls import Calls, record_calls, sole_norms
from lcc.convolutions import conv_spec
from lcc.errors import RecipeError, first_line
from lcc.methods import LowCostOp
from lcc.plan import Plan, Site, other_kind
from lcc.residuals import blocks_among, residual_step
from lcc.skips import shortcut_convs
from lcc.specs import ConvSpec, Size, StepSpec, kind_of
from lcc.tracing import evaluating

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lcc.methods import Method

ODD_SUBCLASSES = {
    "Conv2dSame": "pads as its input's size demands",
    "Conv2dSameExport": "pads as its input's size demands",
    "StdConv2d": "standardises its weights in every call",
    "StdConv2dSame": "standardises its weights in every call",
    "ScaledStdConv2d": "standardises its weights in every call",
    "ScaledStdConv2dSame": "standardises its weights in every call",
}
OTHER_BATCH = "not given one map for each image, since its host cuts images up or repeats them"


def find_sites(model: nn.Module, example: Tensor) -> tuple[Site, ...]:
    """Return every convolution, residual step and stage-changing block of the model, in order of first call.

    A block comes before the convolutions inside it; what is never called comes last. `example` is
    (N, C, H, W); the model runs on it a few times in eval mode and is left as it was.
    Raises: SourceError: the model can't run on the example.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in _outside_operators(model):
        names.setdefault(module, []).append(name)
    layers = [module for module in names if isinstance(module, nn.Conv2d | LowCostOp)]
    # Before the passes below put hooks on them.
    steps = blocks_among(names)
    skips = {conv for module in names for conv in shortcut_convs(module)}
    calls = record_calls(model, layers, {block: step.spec for block, step in steps.items()}, example)
    norms = sole_norms(model, {layer: calls[layer] for layer in layers}, example)
    found = [module for module in names if module in calls]
    tied = _tied_parameters(model, {module: names[module] for module in found})
    sites = []
    for module in sorted(found, key=lambda module: calls[module].first):
        if (step := steps.get(module)) is None:
            spec, obstacle = _layer_spec(module), _obstacle(module, calls[module], tied_to=tied.get(module))
        else:
            spec = step.spec
            obstacle = step.obstacle or _step_obstacle(module, calls, tied_to=tied.get(module))
        sites.append(
            Site(
                name=names[module][0],
                kind=kind_of(spec),
                spec=spec,
                sizes=_sizes(calls[module], spec),
                aliases=tuple(names[module][1:]),
                norm=norms.get(module),
                shortcut=module in skips,
                obstacle=obstacle,
            )
        )
    return tuple(sites)


def replace_(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Replace, in place, every site of the plan by a freshly initialised operator; return the originals.

    A module registered under two parents becomes one operator under both. The operator takes over dtype,
    device, memory format, train/eval mode and requires_grad.
    Raises: RecipeError: the plan names a site that this model does not have, or can't be replaced.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    originals: dict[str, nn.Module] = {}
    replacements: dict[nn.Module, LowCostOp] = {}
    for group in plan.groups:
        method = group.method
        bank: dict[nn.Module, LowCostOp] = {}
        for site in group.sites:
            original, spec = _replaceable(site, modules.get(site), plan.steps.get(site))
            reason = other_kind(method, kind_of(spec)) or method.why_not(spec)
            if reason is not None:
                raise RecipeError(f"the plan converts {site!r} by {method}, which can't take it: {reason}")
            bank[original] = operator = method.build(spec)
            _match(operator, original)
            originals[site] = original
        if method.shares:
            _tie_(method, list(bank.values()), group.sites)
        replacements |= bank
    for site, original in originals.items():
        if any(inner in replacements for inner in original.modules() if inner is not original):
            raise RecipeError(f"the plan converts {site!r} and something inside it; make a new plan")
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):  # noqa: SLF001  # the documented container has no setter
            if child in replacements:
                parent._modules[key] = replacements[child]  # noqa: SLF001
    return originals


def check_reached(model: nn.Module, sites: Sequence[Site], example: Tensor) -> None:
    """Make sure that the model calls the operators at `sites`, those that it called before.

    Raises: RecipeError: it holds what was there elsewhere too, or looks at its type.
    """
    if missed := not_reached(model, sites, example):
        raise RecipeError(
            f"{missed[0]} was replaced and is not called any more: the network's code holds it twice, such "
            f"as in a list, or looks at its type; leave it out, --exclude {missed[0]}"
        )


def not_reached(model: nn.Module, sites: Sequence[Site], example: Tensor) -> tuple[str, ...]:
    """Return at which of the sites, called before, the model does not call what is there now.

    Raises: RecipeError: it can't run.
    """
    operators = {site.name: model.get_submodule(site.name) for site in sites if site.sizes}
    called: set[nn.Module] = set()

    def note(module: nn.Module, _inputs: object, _output: object) -> None:
        called.add(module)

    handles = [operator.register_forward_hook(note) for operator in operators.values()]
    try:
        with evaluating(model), torch.random.fork_rng(devices=[]):
            model(example)
    except Exception as error:  # the network's own
        raise RecipeError(f"the network can't run with operators in it: {first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    return tuple(name for name, operator in operators.items() if operator not in called)


def _tie_(method: Method, operators: list[LowCostOp], sites: tuple[str, ...]) -> None:
    """Let a bank hold its weights once, trained if one of its sites was.

    Raises: RecipeError: its convolutions are not all of one shape.
    """
    odd = next((i for i, operator in enumerate(operators) if operator.spec != operators[0].spec), None)
    if odd is not None:
        raise RecipeError(f"the plan shares one kernel between {sites[0]!r} and {sites[odd]!r}, which differ")
    trained = any(parameter.requires_grad for op in operators for parameter in op.parameters())
    method.tie_(operators)
    for parameter in set(operators[0].parameters()) & set(operators[-1].parameters()):
        parameter.requires_grad_(trained)


def _replaceable(
    site: str, module: nn.Module | None, known: StepSpec | None
) -> tuple[nn.Module, ConvSpec | StepSpec]:
    """Return a convolution or a residual step, and its description. Raises: RecipeError: it is neither."""
    if type(module) is nn.Conv2d:
        return module, conv_spec(module)
    if module is not None and known is not None:
        return module, known
    step = None if module is None else residual_step(module)
    if module is None or step is None:
        what = "no module" if module is None else f"a {type(module).__name__}"
        raise RecipeError(f"the plan converts {site!r}, but this network has {what} there; make a new plan")
    if step.obstacle is not None:
        raise RecipeError(f"the plan converts {site!r}, but nothing can take it: {step.obstacle}")
    return module, step.spec


def _outside_operators(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every (name, module), shared ones under each name, without looking inside operators."""
    for key, child in module._modules.items():  # noqa: SLF001  # named_children drops duplicates
        if child is None:
            continue
        name = f"{prefix}{key}"
        yield name, child
        if not isinstance(child, LowCostOp):
            yield from _outside_operators(child, f"{name}.")


def _layer_spec(layer: nn.Module) -> ConvSpec | StepSpec:
    if isinstance(layer, LowCostOp):
        return layer.spec
    assert isinstance(layer, nn.Conv2d)
    return conv_spec(layer)


def _sizes(calls: Calls, spec: ConvSpec | StepSpec) -> tuple[Size, ...]:
    """Return the size of every input, as often as it comes for one image.

    Of a block that can't be taken, only of those that are feature maps.
    """
    maps = calls.shapes
    if isinstance(spec, StepSpec):
        maps = [shape for shape in maps if len(shape) == 4 and shape[1] == spec.channels_in]
    return tuple(
        Size(height=height, width=width)
        for *others, height, width in maps
        for _ in range(others[0] // calls.batch if len(others) == 2 else 1)
    )


def _tied_parameters(model: nn.Module, names: dict[nn.Module, list[str]]) -> dict[nn.Module, str]:
    """Return, for modules that share a parameter with one outside them, the other's name."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return {
        module: owner
        for module, own in names.items()
        for parameter in module.parameters()
        for owner in owners[id(parameter)]
        if not any(owner == name or owner.startswith(f"{name}.") for name in own)
    }


def _obstacle(layer: nn.Module, calls: Calls, *, tied_to: str | None) -> str | None:
    """Return in words why nothing can replace a convolution; None if something may."""
    kind = type(layer).__name__
    if isinstance(layer, LowCostOp):
        return "converted already"
    if type(layer) is not nn.Conv2d:
        return f"a {kind}, which {ODD_SUBCLASSES.get(kind, 'computes something else than nn.Conv2d')}"
    if not calls.shapes:
        return "never called in a forward pass (its host may read its weights itself)"
    if tied_to is not None:
        return f"shares a parameter with {tied_to}"
    if has_hooks(layer):
        return "carries hooks that a replacement would lose"
    if calls.weight_read:
        return "its host reads its weight itself, and a replacement has no such one"
    if calls.by_keyword:
        return "called with its input as a keyword, which a replacement does not take"
    return OTHER_BATCH if calls.other_batch else None


def _step_obstacle(block: nn.Module, calls: dict[nn.Module, Calls], *, tied_to: str | None) -> str | None:
    """Return in words why nothing can replace a block, told from its calls; None if something may."""
    if not calls[block].shapes:
        return "never called in a forward pass"
    if tied_to is not None:
        return f"shares a parameter with {tied_to}"
    if any(calls[inner].weight_read for inner in block.modules() if inner in calls):
        return "a weight inside it is read from outside its layer, and a replacement has no such one"
    if calls[block].by_keyword:
        return "called with its input as a keyword, which a replacement does not take"
    return calls[block].oddity or (OTHER_BATCH if calls[block].other_batch else None)


def _match(operator: LowCostOp, original: nn.Module) -> None:
    """Give the operator the dtype, device, memory format, mode and requires_grad of what it replaces."""
    weights = [module.weight for module in original.modules() if isinstance(module, nn.Conv2d)]
    operator.to(device=weights[0].device, dtype=weights[0].dtype)
    channels_last = torch.channels_last
    if any(w.is_contiguous(memory_format=channels_last) and not w.is_contiguous() for w in weights):
        operator.to(memory_format=channels_last)
    operator.train(original.training)
    operator.requires_grad_(any(weight.requires_grad for weight in weights))
    bias = getattr(operator, "bias", None)
    if bias is not None and isinstance(original, nn.Conv2d) and original.bias is not None:
        bias.requires_grad_(original.bias.requires_grad)
