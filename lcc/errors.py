"""What can go wrong, as a tree; every kind has a stable exit code.

LccError                  2   your input: one line says what, where, what to do next
├── SourceError               a model source or checkpoint that can't be used
├── DataError                 a data set that can't be read
├── RecipeError               a recipe, rule or option that can't be followed
│   └── InfeasibleError           a budget that no network within reach keeps
├── NothingToConvertError     no site that the plan could convert
├── ArtifactError             an lcc directory that is damaged, foreign or can't be written
├── TrainingError             fine-tuning that can't go on (NaN loss, no memory)
├── CheckFailedError      3   the result failed its own check, and was not kept
└── InterruptedRunError   130 training stopped by Ctrl-C, after a checkpoint
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence


class LccError(Exception):
    """A failure the user can act on; its text is one line."""

    exit_code: ClassVar[int] = 2


class SourceError(LccError):
    """A model source or checkpoint that can't be used."""


class DataError(LccError):
    """A data set that can't be read."""


class RecipeError(LccError):
    """A recipe, rule or option that can't be followed."""


class InfeasibleError(RecipeError):
    """A budget that no network within reach keeps."""


class NothingToConvertError(LccError):
    """No site that the plan could convert."""


class ArtifactError(LccError):
    """An lcc directory that is damaged, foreign or can't be written."""


class TrainingError(LccError):
    """Fine-tuning that can't go on."""


class CheckFailedError(LccError):
    """A result that failed its own check and was not kept."""

    exit_code = 3


class InterruptedRunError(LccError):
    """Training stopped by Ctrl-C, after it wrote a checkpoint."""

    exit_code = 130


def one_line(error: object) -> str:
    """Return another's error in its own words, shortened to a clause."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def cannot_run(shape: Sequence[int], error: BaseException) -> SourceError:
    """Return the refusal of a network that another error says can't run on an input of a shape."""
    size = "x".join(map(str, shape))
    mend = "it has to take several images at once" if shape[0] > 1 else "give it another --image-size"
    return SourceError(f"the network can't run on a {size} input ({first_line(error)}); {mend}")


def first_cause(error: BaseException) -> BaseException:
    """Return the error that all the others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """Return the first line of another's error: of torch's and ONNX Runtime's, what matters."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
