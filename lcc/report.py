"""What is known about a set of networks, as one value; `tables` shows it, JSON and CSV keep it.

What was not measured is None, never zero.
"""

from __future__ import annotations

import csv
from io import StringIO
from typing import TYPE_CHECKING

from lcc.evaluation import Accuracy
from lcc.measure import Conditions, LayerLatency
from lcc.methods import Fit
from lcc.specs import ConvSpec, Cost, Frozen, Size, StepSpec
from lcc.timing import Latency, Speedup

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class LayerRow(Frozen):
    """A converted site: what it was, what took its place, and what that changed.

    Costs are for all calls in one forward pass; latencies for the layer alone, at `size`. `shares_with` is
    the site that counts what they share.
    """

    site: str
    spec: ConvSpec | StepSpec
    size: Size
    method: str
    before: Cost
    after: Cost
    shares_with: str | None = None
    fit: Fit | None = None
    torch: LayerLatency | None = None
    onnx: LayerLatency | None = None

    @property
    def slower(self) -> bool:
        """Whether any runtime measured the operator to be slower than the convolution it replaced."""
        return any(latency is not None and latency.slower for latency in (self.torch, self.onnx))


class ModelRow(Frozen):
    """A network: where its weights are from, what it costs, how good and how fast it is.

    `norm_params` of `params` are those of BatchNorm and other norms, which papers often leave out.
    `macs`, and `flops`, two per MAC, are for one image; `uncounted` names modules whose MACs are not in them.
    Speed-ups are over the report's first model. `history` says in lines what was done to it.
    """

    name: str
    source: str
    random_weights: bool
    params: int
    norm_params: int
    macs: int
    flops: int
    uncounted: tuple[str, ...] = ()
    size_bytes: int | None = None
    accuracy: Accuracy | None = None
    data: str | None = None
    torch: Latency | None = None
    torch_speedup: Speedup | None = None
    onnx: Latency | None = None
    onnx_speedup: Speedup | None = None
    converted: int | None = None
    kept: int | None = None
    history: tuple[str, ...] = ()
    layers: tuple[LayerRow, ...] = ()


class Report(Frozen):
    """Networks side by side, the first one being what the others are compared with."""

    models: tuple[ModelRow, ...]
    conditions: tuple[Conditions, ...] = ()
    notes: tuple[str, ...] = ()
    versions: dict[str, str]
    date: str


def to_json(report: Report) -> str:
    """Return the report as JSON, which `Report.model_validate_json` reads back."""
    return report.model_dump_json(indent=2)


def to_csv(report: Report) -> str:
    """Return one line per model; an empty field is not known."""
    return csv_text(
        {
            "model": model.name,
            "source": model.source,
            "random_weights": model.random_weights,
            "params": model.params,
            "norm_params": model.norm_params,
            "macs": model.macs,
            "flops": model.flops,
            "uncounted": " ".join(model.uncounted),
            "size_bytes": model.size_bytes,
            "top1_percent": model.accuracy and model.accuracy.top1,
            "top5_percent": model.accuracy and model.accuracy.top5,
            "images": model.accuracy and model.accuracy.images,
            "data": model.data,
            **_timed("torch", model.torch, model.torch_speedup),
            **_timed("onnxruntime", model.onnx, model.onnx_speedup),
            "sites_converted": model.converted,
            "sites_kept": model.kept,
            "history": "; ".join(model.history),
        }
        for model in report.models
    )


def layers_to_csv(report: Report) -> str:
    """Return one line per converted site of every model; an empty field is not known."""
    return csv_text(
        {
            "model": model.name,
            "site": row.site,
            "shape": row.spec,
            "input_size": row.size,
            "method": row.method,
            "shares_with": row.shares_with,
            "params_before": row.before.params,
            "params_after": row.after.params,
            "macs_before": row.before.macs,
            "macs_after": row.after.macs,
            "kernel_error": row.fit and row.fit.kernel_error,
            "output_error_before": row.fit and row.fit.start_error,
            "output_error_after": row.fit and row.fit.relative_error,
            **_layer_timed("torch", row.torch),
            **_layer_timed("onnxruntime", row.onnx),
            "slower": row.slower if row.torch or row.onnx else None,
        }
        for model in report.models
        for row in model.layers
    )


def _timed(runtime: str, latency: Latency | None, speedup: Speedup | None) -> dict[str, object]:
    return {
        f"{runtime}_median_ms": latency and latency.median_ms,
        f"{runtime}_p10_ms": latency and latency.p10_ms,
        f"{runtime}_p90_ms": latency and latency.p90_ms,
        f"{runtime}_noisy": latency and latency.noisy,
        f"{runtime}_speedup": speedup and speedup.median,
    }


def _layer_timed(runtime: str, latency: LayerLatency | None) -> dict[str, object]:
    return {
        f"{runtime}_before_ms": latency and latency.before.median_ms,
        f"{runtime}_after_ms": latency and latency.after.median_ms,
    }


def csv_text(rows: Iterable[Mapping[str, object]]) -> str:
    """Return rows as CSV, under the names that the first one has; None is an empty field."""
    records = list(rows)
    text = StringIO()
    if records:
        writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    return text.getvalue()
