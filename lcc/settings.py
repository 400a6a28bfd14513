"""What every command takes: where to run, how much to trust, and where notes go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lcc import progress
from lcc.errors import RecipeError
from lcc.methods import LowCostOp
from lcc.network import Network, open_network

if TYPE_CHECKING:
    from lcc.onnx_runtime import Device
    from lcc.recipe import ModelPart

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What every command takes: where to run, how much to trust, and where notes go."""

    device: str = "auto"
    threads: int | None = None
    trust_pickle: bool = False
    trust_code: bool = False
    force: bool = False
    say: Say = progress.say

    @property
    def bench_device(self) -> Device:
        """Where latency is measured: on the CPU, unless a GPU is asked for by name."""
        return "cuda" if self.device.startswith("cuda") else "cpu"

    def check_bench_device(self) -> None:
        """Make sure, where latency is what is asked for, that it is measured there. Raises: RecipeError."""
        if self.device not in ("auto", "cpu", "cuda"):
            raise RecipeError(f"--device {self.device}: latency is measured on cpu or cuda")

    def open(self, part: ModelPart, *, name: str | None = None) -> Network:
        """Return a network and tell its notes."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        network = open_network(part, trust_pickle=self.trust_pickle, trust_code=self.trust_code, name=name)
        for note in network.loaded.notes:
            self.say(f"note: {note}")
        self.warn_of(network)
        return network

    def warn_of(self, network: Network) -> None:
        """Tell what the operators of a network have to say of their weights, one line for all."""
        warnings = {
            name: text
            for name, module in network.loaded.model.named_modules()
            if isinstance(module, LowCostOp) and (text := module.warning()) is not None
        }
        for name, text in list(warnings.items())[:1]:
            others = f" (and {len(warnings) - 1} more sites)" if len(warnings) > 1 else ""
            self.say(f"warning: {name}{others}: {text}")
