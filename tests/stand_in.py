"""An operator for tests of what comes after operators: a convolution with lowerings that a test chooses."""

import copy

from torch import nn

from lcc.methods import LowCostOp, Lowering
from lcc.methods.linear_mix import LinearMix
from lcc.specs import ConvSpec

SPEC = ConvSpec(in_channels=4, out_channels=4, kernel_size=(3, 3), padding=(1, 1))


class Scaled(nn.Module):
    """The convolution times a factor."""

    def __init__(self, conv, factor):
        super().__init__()
        self.conv, self.factor = copy.deepcopy(conv), factor

    def forward(self, x):
        return self.conv(x) * self.factor


class StandIn(LowCostOp):
    """`lowered` gives the modules to lower to, with what is said of them: (module, how, relative error)."""

    def __init__(self, lowered=None, spec=SPEC):
        super().__init__(LinearMix(), spec)
        self.conv = nn.Conv2d(spec.in_channels, spec.out_channels, 3, padding=1)
        self.lowered = lowered or (lambda op, size: [(copy.deepcopy(op.conv),)])

    def forward(self, x):
        return self.conv(x)

    def lowerings(self, size, tolerance):
        return tuple(Lowering(*one) for one in self.lowered(self, size))

    def project_(self, original):
        raise NotImplementedError

    def statistics(self, *, free_means):
        raise NotImplementedError

    def fit_(self, statistics):
        raise NotImplementedError


def approximating(*errors):
    """Lowerings that are off by these relative errors, and called "off by ..."."""
    return lambda op, size: [(Scaled(op.conv, 1 + error), f"off by {error}", error) for error in errors]
