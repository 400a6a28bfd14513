"""ONNX Runtime sessions with stated options, and nothing else: one device, no silent fallback, no chatter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnxruntime

from lcc.errors import RecipeError, SourceError, first_line

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Array = NDArray[Any]

Device = Literal["cpu", "cuda"]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# In the metadata of a file that lcc exported.
PRECISION_KEY, PREPROCESSING_KEY = "lcc.precision", "lcc.preprocessing"
FATAL = 4  # ONNX Runtime's log level: failures arrive as exceptions here, the log would say them twice


class Session:
    """A model in ONNX Runtime: numpy arrays in, numpy arrays out."""

    def __init__(self, model: Path | bytes, *, threads: int = 1, device: Device = "cpu") -> None:
        """Open a file, or a serialised model.

        Raises: SourceError: not a model that ONNX Runtime can run. RecipeError: the device can't be had.
        """
        onnxruntime.set_default_logger_severity(FATAL)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = FATAL
        providers = [CUDA, CPU] if device == "cuda" else [CPU]
        if providers[0] not in onnxruntime.get_available_providers():
            raise RecipeError(f"this ONNX Runtime has no {providers[0]}; use --device cpu")
        self.what = "the model" if isinstance(model, bytes) else str(model)
        try:
            source = model if isinstance(model, bytes) else str(model)
            self._session = onnxruntime.InferenceSession(source, options, providers=providers)
        except Exception as error:  # the binding raises its own kinds, with nothing but Exception in common
            raise SourceError(f"ONNX Runtime can't run {self.what}: {first_line(error)}") from error
        if self._session.get_providers()[0] != providers[0]:
            raise RecipeError(f"ONNX Runtime can't use {device} and would fall back; use --device cpu")
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    @property
    def batch(self) -> int | None:
        """How many images it takes at once; None: any number."""
        shapes = [value.shape for value in self._session.get_inputs()]
        return next((shape[0] for shape in shapes if shape and isinstance(shape[0], int)), None)

    @property
    def precision(self) -> str:
        """What it computes in, as the file says, else its inputs' type."""
        types = [value.type.removeprefix("tensor(").removesuffix(")") for value in self._session.get_inputs()]
        stated = {"float": "float32", "double": "float64"}
        return self.metadata.get(PRECISION_KEY, ", ".join(stated.get(kind, kind) for kind in types))

    def example(self, batch: int, seed: int = 0) -> dict[str, Array]:
        """Return normally distributed inputs for `batch` images.

        Raises: SourceError: the model fixes another batch, or leaves open more than the batch.
        """
        rng = np.random.default_rng(seed)
        return {
            value.name: rng.standard_normal(_shape(value.name, value.shape, batch)).astype(_dtype(value.type))
            for value in self._session.get_inputs()
        }

    def run(self, inputs: dict[str, Array]) -> list[Array]:
        """Return every output. Raises: SourceError: the model can't run on these inputs."""
        try:
            outputs: list[Array] = self._session.run(None, inputs)
        except Exception as error:  # as above
            raise SourceError(f"ONNX Runtime can't run {self.what}: {first_line(error)}") from error
        return outputs


def _shape(name: str, shape: list[int | str | None], batch: int) -> tuple[int, ...]:
    if not shape:
        raise SourceError(f"the model's input {name!r} is a single number, not images")
    first, *rest = shape
    if isinstance(first, int) and first != batch:
        raise SourceError(f"the model's input {name!r} has a fixed batch of {first}; use --batch {first}")
    if not all(isinstance(n, int) for n in rest):
        raise SourceError(f"the model's input {name!r} has open sizes {shape}; export it with fixed ones")
    return (batch, *(int(n) for n in rest if n is not None))


def _dtype(kind: str) -> np.dtype[Any]:
    dtypes = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
    if kind not in dtypes:
        raise SourceError(f"the model takes {kind}, not images in floating point")
    return np.dtype(dtypes[kind])
