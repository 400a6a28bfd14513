"""Networks that a user's own factory makes, and what lcc needs of them."""

from __future__ import annotations

import copy
import importlib

import torch
from torch import nn

from lcc.errors import SourceError, first_line, one_line
from lcc.weight_files import code_from_here


def build(module: str, factory: str, num_classes: int | None = None) -> nn.Module:
    """Return what a factory gives, without torch.compile, of which what it made can't be changed.

    Raises: SourceError: it can't be found, fails, or gives what lcc can't work on.
    """
    source = f"py:{module}:{factory}"
    options = {} if num_classes is None else {"num_classes": num_classes}
    with code_from_here():
        try:
            network = getattr(importlib.import_module(module), factory)(**options)
        except ModuleNotFoundError as error:
            raise SourceError(
                f"{source}: {one_line(error)}; run lcc in the directory that holds it, or install it"
            ) from error
        except Exception as error:
            raise SourceError(
                f"{source} failed: {type(error).__name__}: {one_line(error)}; --debug shows where"
            ) from error
        if not isinstance(network, nn.Module):
            raise SourceError(f"{source} gave a {type(network).__name__}; it must return a torch.nn.Module")
        _refuse_script(network, source)
        network = _not_compiled(network)
        _refuse_unworkable(network, source)
    return network


def _not_compiled(network: nn.Module) -> nn.Module:
    """Return the network with every part that torch.compile wraps as it was before."""
    network = getattr(network, "_orig_mod", network)  # its only name
    for parent in network.modules():
        parent._compiled_call_impl = None  # noqa: SLF001  # what Module.compile() sets
        for name, child in parent._modules.items():  # noqa: SLF001  # the documented container has no setter
            if child is not None and hasattr(child, "_orig_mod"):
                parent._modules[name] = _not_compiled(child)  # noqa: SLF001
    return network


def _refuse_script(network: nn.Module, source: str) -> None:
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"{name} of {source}" if name else source
            raise SourceError(f"{where} is TorchScript, which can't be changed; give the Python modules")


def _refuse_unworkable(network: nn.Module, source: str) -> None:
    """Raise SourceError for a network that can't be copied, put into eval mode, or stored."""
    try:
        copy.deepcopy(network.eval())
    except Exception as error:
        raise SourceError(
            f"lcc works on copies in eval mode, and {source} can't be had so: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    for name, value in network.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise SourceError(
                f"{source}: {name} in its state_dict is a {type(value).__name__}, and lcc stores tensors "
                "alone; keep it elsewhere"
            )
