"""What options save of a network's latency: each measured alone, and their sum put right by whole networks.

Alone, a layer has nothing to fuse with and pays for its own memory layout. So a few converted networks are
timed beside the original, and what single layers save is scaled to what they save together.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lcc import models, surgery
from lcc.budget import floor
from lcc.candidates import rules_of
from lcc.comparison import exported
from lcc.hashing import hash_of_weights
from lcc.latency_table import Place, conditions_of, measure_latencies, missing, reasons
from lcc.measure import Conditions, bench_onnx, bench_torch
from lcc.measurements import Store, cache_folder, code_of
from lcc.methods import LowCostOp
from lcc.plan import Rule, make_plan
from lcc.plan_report import Alone, Compared
from lcc.specs import Frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lcc.budget import Costs, Option
    from lcc.latency_table import LatencyTable, Timing
    from lcc.methods import Method
    from lcc.network import Network
    from lcc.plan import Site

BEFORE, AFTER = "dense", "converted"


class Whole(Frozen):
    """A converted network timed beside its original: the original's time, and the ratio within the rounds."""

    rules: tuple[Rule, ...]
    before_ms: float
    ratio: float
    noisy: bool
    conditions: Conditions


class Clock:
    """Times options and whole networks; `now_ms` is the original's time, `noisy`: one was not steady.

    `conditions` says in words under which they were timed, "" before any was.
    """

    def __init__(self, network: Network, sites: tuple[Site, ...], timing: Timing) -> None:
        self.network, self.sites, self.timing = network, sites, timing
        self._compared: dict[tuple[Rule, ...], Compared] = {}
        self.noisy = False
        self.now_ms = 0.0
        self._table: LatencyTable = {}
        self._scale = 1.0
        loaded = network.loaded
        kinds = [site.model_dump_json() for site in sites]
        structure = f"{loaded.source.id}{loaded.model}{loaded.preprocessing.image_size}{kinds}"
        structure += code_of(loaded.model) + network.plan.model_dump_json()
        if network.plan.groups:  # weights may decide how long a lowered operator is
            structure += hash_of_weights(loaded.model)
        self.conditions = ""
        conditions = {**conditions_of(timing), "network": hashlib.sha256(structure.encode()).hexdigest()}
        self._store = Store(cache_folder(), "networks", conditions, Whole)
        self._known = {whole.rules: whole for whole in reversed(self._store.read())}  # the first of several
        self._original_file: bytes | None = None

    def time_original(self) -> float:
        """Return how long the network takes as it is, in ms, kept from the first time on."""
        whole = self._whole(())
        self.now_ms, self.conditions = whole.before_ms, str(whole.conditions)
        self.noisy = self.noisy or whole.noisy
        return self.now_ms

    def price(self, options: Sequence[Option], say: Callable[[str], None]) -> list[Option]:
        """Return the options that are not slower than what they replace, with the time that each saves alone.

        Measures the network that would be fastest, which gives `now_ms` and the scale of savings. `say` takes
        notes.
        Raises: RecipeError: the device. ArtifactError: the cache. CheckFailedError: the export.
        """
        wanted: dict[Place, list[Method]] = {}
        for option in options:
            for place in self._timed_places(option):
                wanted.setdefault(place, []).append(option.method)
        if count := missing(wanted, self.timing, cache=cache_folder()):
            if self.timing.runtime == "onnx":
                self._original()  # what can't be exported is told before hours of timing
            say(f"timing {count} operators and dense convolutions, each alone; kept in {cache_folder()}")
        self._table = measure_latencies(wanted, self.timing, cache=cache_folder())
        untimed: dict[str, list[str]] = {}
        for (place, method), reason in reasons(self.timing, cache=cache_folder()).items():
            if place in wanted and (method is None or method in wanted[place]):
                untimed.setdefault(str(method or "dense"), []).append(f"{place}: {reason}")
        for name, where in untimed.items():
            more = f" (and at {len(where) - 1} more places)" if len(where) > 1 else ""
            say(
                f"note: {name} can't be timed and is left out at {where[0]}{more}; that is kept: to try "
                f"again, remove {cache_folder()}"
            )
        priced = []
        for option in options:
            saved = self._saved_ms(option)
            if saved is not None and (saved > 0 or not self._timed_places(option)):
                priced.append(option.model_copy(update={"saved": {**option.saved, "latency": saved}}))
        self.learn(self.measure(floor(priced, {"latency": 1.0}, "latency").taken))
        return priced

    def scaled(self, options: Sequence[Option]) -> list[Option]:
        """Return priced options with what they save in company."""
        return [
            option.model_copy(
                update={"saved": {**option.saved, "latency": self._scale * option.saved["latency"]}}
            )
            for option in options
        ]

    def measure(self, taken: Sequence[Option]) -> Compared:
        """Return how long the network with priced options taken takes, beside what was predicted at first."""
        rules = rules_of(taken)
        if rules in self._compared:
            return self._compared[rules]
        whole = self._whole(rules)
        self.now_ms = self.now_ms or whole.before_ms
        self.noisy = self.noisy or whole.noisy
        self.conditions = str(whole.conditions)
        saved = sum(option.saved["latency"] for option in taken)
        self._compared[rules] = Compared(
            by_parts_ms=self.now_ms - saved,
            predicted_ms=self.now_ms - self._scale * saved,
            measured_ms=self.now_ms * whole.ratio,
        )
        return self._compared[rules]

    @property
    def compared(self) -> tuple[Compared, ...]:
        """The networks that were measured; the chosen one last."""
        return tuple(self._compared.values())

    def learn(self, found: Compared) -> None:
        """Scale what layers save alone so that it is right for this network."""
        alone, together = (self.now_ms - ms for ms in (found.by_parts_ms, found.measured_ms))
        if alone > 0:
            self._scale = max(together, 0.0) / alone

    def together(self, costs: Costs) -> Costs:
        """Return costs with a latency between those of the networks that were measured.

        `costs` are of options as `scaled` returns them, right for the network learnt from alone.
        """
        pairs = {(self.now_ms - one.by_parts_ms, self.now_ms - one.measured_ms) for one in self.compared}
        alone, saved = zip(*sorted({(0.0, 0.0), *pairs}), strict=True)
        by_parts = (self.now_ms - costs["latency"]) / (self._scale or 1.0)
        less = float(np.interp(by_parts, alone, np.maximum.accumulate(saved)))
        return {**costs, "latency": self.now_ms - less}

    def choose(self, found: Compared) -> None:
        """Take this network for the one that is chosen: learn from it, and list it last."""
        rules = next(rules for rules, one in self._compared.items() if one is found)
        self._compared[rules] = self._compared.pop(rules)
        self.learn(found)

    def alone(self, option: Option) -> Alone | None:
        """Return what an option's sites take, each alone, before and after; None: it changes no time."""
        timed = [self._table[place] for place in self._timed_places(option)]
        if not timed:
            return None
        before, after = [one[None] for one in timed], [one[option.method] for one in timed]
        return Alone(
            before_ms=sum(one.median_ms for one in before),
            after_ms=sum(one.median_ms for one in after),
            noisy=any(one.noisy for one in (*before, *after)),
        )

    def _timed_places(self, option: Option) -> list[Place]:
        """Return where an option's sites run, a place for each call; none, where it changes no time."""
        taken = [site for site in self.sites if site.name in option.sites]
        folded = self.timing.runtime == "onnx" and all(site.norm is not None for site in taken)
        if option.method.runs_as_dense(folded=folded):
            return []
        return [Place(spec=site.spec, size=size) for site in taken for size in site.sizes]

    def _saved_ms(self, option: Option) -> float | None:
        timed = [self._table[place] for place in self._timed_places(option)]
        if not all(option.method in rivals and None in rivals for rivals in timed):
            return None
        alone = self.alone(option)
        return alone.before_ms - alone.after_ms if alone else 0.0

    def _whole(self, rules: tuple[Rule, ...]) -> Whole:
        if rules not in self._known:
            whole = self._timed(rules)
            self._store.keep([whole])
            self._known[rules] = whole
        return self._known[rules]

    def _original(self) -> bytes:
        """Return the original as an ONNX file. Raises: CheckFailedError: it can't be one."""
        if self._original_file is None:
            self._original_file = exported(self.network)
        return self._original_file

    def _timed(self, rules: tuple[Rule, ...]) -> Whole:
        """Time the network with fresh operators beside the original."""
        loaded = self.network.loaded
        model = copy.deepcopy(loaded.model).eval()
        if rules:
            plan = make_plan(self.sites, rules)
            with models.seeded(0):
                surgery.replace_(model, plan)
            for name in plan.methods():
                operator = model.get_submodule(name)
                if isinstance(operator, LowCostOp):
                    operator.at_its_slowest_()
        timing = self.timing
        if timing.runtime == "torch":
            example = self.network.example.expand(timing.batch, -1, -1, -1).contiguous()
            bench = bench_torch(
                {BEFORE: loaded.model, AFTER: model},
                example,
                threads=timing.threads,
                device=timing.device,
                rounds=timing.rounds,
            )
        else:
            converted = exported(self.network.but(loaded=replace(loaded, model=model)))
            bench = bench_onnx(
                {BEFORE: self._original(), AFTER: converted},
                batch=timing.batch,
                threads=timing.threads,
                device=timing.device,
                rounds=timing.rounds,
            )
        return Whole(
            rules=rules,
            before_ms=bench.latencies[BEFORE].median_ms,
            ratio=1 / bench.speedups[AFTER].median,
            noisy=any(latency.noisy for latency in bench.latencies.values()),
            conditions=bench.conditions,
        )
