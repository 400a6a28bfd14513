"""BatchNorms as they are after training, and as they are computed by hand."""

from __future__ import annotations

from torch import nn


def lived_in(network: nn.Module) -> nn.Module:
    """Give the norms statistics and scales that no start has."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.uniform_(0.5, 1.5)
    return network.eval()


def normalised(state, name, x):
    """Return x after the BatchNorm that is called `name` in a state_dict."""
    mean, var, weight, bias = (
        state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias
