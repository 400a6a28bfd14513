"""The accuracy of an ONNX file, in ONNX Runtime: of what is shipped, in float16 or in the end not by lcc."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lcc.batches import eval_batches
from lcc.errors import RecipeError, SourceError
from lcc.evaluation import Accuracy, evaluate
from lcc.models import Preprocessing, adjusted
from lcc.onnx_runtime import PREPROCESSING_KEY, Session
from lcc.recipe import PREPARATION

if TYPE_CHECKING:
    from lcc.data import Split
    from lcc.recipe import ModelPart
    from lcc.settings import Settings

FOR_CHECKPOINTS = ("arch", "weights", "num_classes")


def accuracy_of_file(part: ModelPart, split: Split, settings: Settings, *, batch_size: int) -> Accuracy:
    """Return the accuracy on some images of the ONNX file that `part` names.

    Images are prepared as the file's metadata say, but for what `part` gives. A batch that the file fixes
    goes before `batch_size`.
    Raises: SourceError: it takes no RGB images, or ONNX Runtime can't run it. RecipeError: the device, or an
    option that is not about files. DataError: a damaged image, no classifier, or one of other classes.
    """
    path = Path(part.source)
    if not path.is_file():
        raise SourceError(f"{path} is not there; `lcc export` makes one")
    if named := next((name for name in FOR_CHECKPOINTS if getattr(part, name) is not None), None):
        raise RecipeError(f"{path} is a whole network; leave out --{named.replace('_', '-')}")
    if settings.device not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"--device {settings.device}: ONNX files are run on cpu or cuda")
    classifier = _Classifier(Session(path, threads=settings.threads or 0, device=settings.bench_device))
    preprocessing = _preprocessing(part, classifier, settings)
    batches = eval_batches(split, preprocessing, batch_size=classifier.batch or batch_size)
    return evaluate(classifier, batches, device="cpu", shown=None)


class _Classifier(nn.Module):
    """A session as a network: images (N, C, H, W) in, what its first output is out.

    `batch` is how many images it takes at once, None: any number; fewer are filled up.
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.batch = session.batch
        example = session.example(self.batch or 1)
        if len(example) != 1 or next(iter(example.values())).shape[1:-2] != (3,):
            shapes = ", ".join(f"{name} {array.shape}" for name, array in example.items())
            raise SourceError(f"{session.what} takes {shapes}, not RGB images (N, 3, height, width)")
        ((self.input, array),) = example.items()
        self.image_size: tuple[int, int] = array.shape[-2:]
        self.dtype = array.dtype

    def forward(self, x: Tensor) -> Tensor:
        missing = (self.batch or len(x)) - len(x)
        images = np.pad(x.numpy(), ((0, missing), (0, 0), (0, 0), (0, 0)))
        outputs = self.session.run({self.input: images.astype(self.dtype)})
        return torch.from_numpy(outputs[0][: len(x)].astype(np.float32))


def _preprocessing(part: ModelPart, classifier: _Classifier, settings: Settings) -> Preprocessing:
    """Return how the file wants its images, but for what the user gives."""
    given = {name: value for name in PREPARATION if (value := getattr(part, name)) is not None}
    stated = classifier.session.metadata.get(PREPROCESSING_KEY)
    try:
        named = Preprocessing() if stated is None else Preprocessing.model_validate_json(stated)
    except ValidationError as error:
        raise SourceError(f"{part.source}: its {PREPROCESSING_KEY} is damaged; export it again") from error
    if given.get("image_size", classifier.image_size) != classifier.image_size:
        height, width = classifier.image_size
        raise SourceError(f"{part.source} takes {height}x{width} images; leave out --image-size")
    preprocessing = adjusted(named, {**given, "image_size": classifier.image_size})
    if stated is None and not {"mean", "std", "crop_pct"} <= given.keys():
        settings.say(
            f"note: {part.source} does not say how its images are prepared; taken: {preprocessing}; "
            "--mean, --std and --crop-pct change that"
        )
    return preprocessing
