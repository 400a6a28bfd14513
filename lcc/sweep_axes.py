"""What a sweep goes along: the shapes of convolutions and blocks, and how a command line names them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from lcc.errors import RecipeError
from lcc.specs import ConvSpec, Frozen, Size, StepSpec

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from lcc.methods import Method

Axis = Literal["channels", "size", "kernel"]

PAPER: dict[Axis, tuple[int, ...]] = {
    "channels": (64, 128, 256, 512, 1024),
    "size": (16, 32, 64, 128, 256),
    "kernel": (3, 5, 7, 9, 11),
}
LABELS: dict[Axis, str] = {"channels": "channels", "size": "image size", "kernel": "kernel size"}
SECONDS = 180.0
ALONE = "saves by sharing among several convolutions, and this is one"


class Shape(Frozen):
    """What is convolved: `channels` in and out, size x size pixels, kernel x kernel taps.

    The defaults are those of arXiv:1805.07821, Fig. 1.
    """

    channels: int = 256
    size: int = 64
    kernel: int = 3

    def at(self, axis: Axis, value: int) -> Shape:
        """Return the shape with one of its numbers changed."""
        return self.model_copy(update={axis: value})

    @property
    def spec(self) -> ConvSpec:
        """The dense convolution, stride 1, that keeps the image size."""
        return ConvSpec(
            in_channels=self.channels,
            out_channels=self.channels,
            kernel_size=(self.kernel, self.kernel),
            padding=(self.kernel // 2, self.kernel // 2),
        )

    @property
    def block(self) -> StepSpec:
        """A ResNet's basic block of two such convolutions, a BatchNorm after each."""
        return StepSpec(
            channels=self.channels,
            convs=(self.spec, self.spec),
            norm_params=4 * self.channels,
            post="relu",
        )

    @property
    def image(self) -> Size:
        """Height and width."""
        return Size(height=self.size, width=self.size)

    def __str__(self) -> str:
        return f"{self.spec} at {self.image}"


@dataclass(frozen=True)
class SweepOptions:
    """What is swept and with which methods; `fixed` gives the numbers that are not swept.

    `seconds`: the longest time for one point in one runtime. It lowers the number of rounds; what would still
    take longer is left out. `costs`: parameters and MACs are counted instead, and nothing is timed.
    """

    axes: Mapping[Axis, tuple[int, ...]]
    methods: tuple[Method, ...]
    fixed: Shape = field(default_factory=Shape)
    seconds: float = SECONDS
    costs: bool = False


def axes_from_text(texts: Iterable[str]) -> dict[Axis, tuple[int, ...]]:
    """Return the values along each axis named by "channels", "channels=64,128" or "all".

    Raises: RecipeError: no such axis, or no such value.
    """
    axes: dict[Axis, tuple[int, ...]] = {}
    for text in texts:
        if text == "all":
            axes |= PAPER
            continue
        where = f"--sweep {text}"
        name, equals, values = text.partition("=")
        axis = _axis(name, where)
        axes[axis] = _numbers(axis, values, where) if equals else PAPER[axis]
    return axes


def shape_from_text(text: str) -> Shape:
    """Return the shape that "channels=256,size=64,kernel=3" or less of it names.

    Raises: RecipeError: no such axis, or no such value.
    """
    shape, where = Shape(), f"--fixed {text}"
    for part in text.split(","):
        name, _, value = part.partition("=")
        axis = _axis(name, where)
        shape = shape.at(axis, _number(axis, value, where))
    return shape


def fixed_in_words(fixed: Shape, swept: Collection[Axis]) -> str:
    """Return what is not swept, as "image size 64, kernel size 3"."""
    return ", ".join(f"{label} {getattr(fixed, axis)}" for axis, label in LABELS.items() if axis not in swept)


def _axis(text: str, where: str) -> Axis:
    found: dict[str, Axis] = {axis: axis for axis in get_args(Axis)}
    if text.strip() not in found:
        raise RecipeError(f"{where}: {text.strip()!r} can't be swept; known: {', '.join(found)}")
    return found[text.strip()]


def _numbers(axis: Axis, text: str, where: str) -> tuple[int, ...]:
    return tuple(sorted({_number(axis, part, where) for part in text.split(",")}))


def _number(axis: Axis, text: str, where: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise RecipeError(f"{where}: {text.strip()!r} is no whole number from 1 up; write {axis}=N")
    if axis == "kernel" and int(text) % 2 == 0:
        raise RecipeError(f"{where}: an even kernel changes the image size; give odd ones, such as 3,5,7")
    return int(text)
