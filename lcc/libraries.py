"""Where networks come from: torchvision, timm, the zoo, a user's code; and what each knows of its weights."""

from __future__ import annotations

import logging
import re
import sys
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_deprecated_models, get_pretrained_cfg
from torchvision import models as vision

from lcc import user_code
from lcc.errors import SourceError, one_line
from lcc.specs import Frozen
from lcc.weights import Shapes, align, load_into_, shapes
from lcc.zoo import OF_IMAGENET, ZOO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

WAY_OUT = "use --weights PATH, or --weights none for random ones"

# Ported from TensorFlow: they have branches for training alone, and warn unless told how to initialise.
PORTED = ("googlenet", "inception_v3")


class Preprocessing(Frozen):
    """How a network wants its images: resized to size / crop_pct, cropped to size, (pixels - mean) / std.

    image_size is (height, width); mean and std are for pixels in [0, 1]. The defaults are ImageNet's.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    image_size: tuple[int, int] = (224, 224)
    crop_pct: float = 0.875
    interpolation: str = "bilinear"

    def __str__(self) -> str:
        height, width = self.image_size
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{height}x{width} {self.interpolation}, crop {self.crop_pct:.3g}, mean {mean}, std {std}"


CIFAR = Preprocessing(image_size=(32, 32), crop_pct=1.0)


@dataclass(frozen=True)
class Architecture:
    """One network of one library.

    `build` gives it with fresh weights and downloads nothing; `pretrained` gives it with the library's, all
    but the last layer where another class count is asked for. Both take the class count, None for its own.
    `preprocessing` is what the weights named in `id` want, else the library's default ones; `class_names`
    what those named in `id` know. `default_id` names the default weights too; `published` maps the names
    of the library's weight files to the ids that name those weights.
    """

    id: str
    build: Callable[[int | None], nn.Module]
    pretrained: Callable[[int | None], nn.Module]
    preprocessing: Preprocessing
    default_id: str
    classes: int | None = None
    class_names: tuple[str, ...] | None = None
    published: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def find(text: str, *, trust_code: bool = False) -> Architecture:
    """Return the architecture that `torchvision:NAME[@WEIGHTS]`, `timm:NAME`, `zoo:NAME` or `py:...` means.

    Raises: SourceError: no such library or name, or a user's code without `trust_code`.
    """
    library, _, name = text.partition(":")
    if not names_library(text):
        raise SourceError(f"{text} is neither a network nor a file: {_did_you_mean(text)}")
    if library == "py" and not trust_code:
        raise SourceError(
            f"{text} is code to run: allow it with --trust-code, or give lcc.load(DIR, model=...) the network"
        )
    return LIBRARIES[library](name)


def names_library(text: str) -> bool:
    """Whether a source text begins with the name of a library, and so is no path."""
    library, colon, _ = text.partition(":")
    return bool(colon) and library in LIBRARIES


def candidates(path: Path) -> Iterator[tuple[str, Shapes]]:
    """Yield (source, shapes) of the networks that a file may be of, likely ones first.

    The zoo, torchvision's classifiers, and what of timm the name of the file or of its directory mentions.
    The zoo's largest, which take as long to build as all of its others, come last.
    """
    hint = f"{path.parent.name}/{path.name}"
    known = [*timm.list_models(include_tags=True), *timm.list_models()]
    mentioned = sorted((name for name in known if name in hint), key=len)[-4:]
    classifiers = sorted(
        vision.list_models(vision), key=lambda name: (name not in hint, "resnet" not in name)
    )
    yield from outlines(
        *(f"zoo:{name}" for name in ZOO if name not in OF_IMAGENET),
        *(f"timm:{name}" for name in mentioned if "." in name),
        *(f"torchvision:{name}" for name in classifiers),
        *(f"timm:{name}" for name in reversed(mentioned) if "." not in name),
        *(f"zoo:{name}" for name in ZOO if name in OF_IMAGENET),
    )


def outlines(*sources: str) -> Iterator[tuple[str, Shapes]]:
    """Yield (source, shapes) of those of the sources that exist, built without memory."""
    from accelerate import init_empty_weights

    for source in sources:
        with suppress(SourceError), init_empty_weights():
            yield source, shapes(find(source).build(None).state_dict())


def _torchvision(text: str) -> Architecture:
    name, _, wanted = text.partition("@")
    if name not in vision.list_models():
        raise _unknown("torchvision", name)
    module = vision.get_model_builder(name).__module__
    if ".detection." in module:
        raise SourceError(f"torchvision:{name} is a detection network; lcc takes image classifiers")
    if ".quantization." in module:
        raise SourceError(
            f"torchvision:{name} is quantized; use torchvision:{name.removeprefix('quantized_')}"
        )
    members = vision.get_model_weights(name).__members__
    if wanted and wanted not in members:
        raise SourceError(f"torchvision:{name} has no weights called {wanted}; it has {', '.join(members)}")
    weights = members[wanted or "DEFAULT"]
    categories = weights.meta.get("categories")
    default_id = f"torchvision:{name}@{weights.name}"
    return Architecture(
        id=default_id if wanted else f"torchvision:{name}",
        build=partial(_build_torchvision, name, weights if wanted else None),
        pretrained=partial(_pretrained_torchvision, name, weights),
        preprocessing=_torchvision_preprocessing(weights),
        default_id=default_id,
        classes=len(categories) if categories else None,
        class_names=tuple(categories) if wanted and categories else None,
        published={Path(one.url).name: f"torchvision:{name}@{one.name}" for one in members.values()},
    )


def _build_torchvision(name: str, weights: Any, num_classes: int | None = None) -> nn.Module:
    """Build as `weights` (a torchvision WeightsEnum) need it; None: as torchvision does without weights."""
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if "weights_backbone" in signature(vision.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # the default is a download
    if name in PORTED:
        options |= {"aux_logits": False, "init_weights": True, "transform_input": weights is not None}
    if weights is not None and name.startswith("vit_"):
        options["image_size"] = weights.meta["min_size"][0]
    try:
        network: nn.Module = vision.get_model(name, weights=None, **options)
    except TypeError as error:
        raise SourceError(f"torchvision:{name} can't be built with {options}: {one_line(error)}") from error
    return network


def _pretrained_torchvision(name: str, weights: Any, num_classes: int | None = None) -> nn.Module:
    source = f"torchvision:{name}@{weights.name}"
    with _downloading(source, weights.url):
        donor = vision.get_model(name, weights=weights)
    network = _build_torchvision(name, weights, num_classes)
    tensors, _ = align(donor.state_dict(), network.state_dict())
    comparison = load_into_(network, tensors)
    if comparison.classes:
        head = {name for name, _, _ in comparison.reshaped}
        comparison = load_into_(
            network, network.state_dict() | {k: t for k, t in tensors.items() if k not in head}
        )
    if not comparison.fits:
        raise SourceError(f"torchvision's weights do not fit {source}: {comparison}; {WAY_OUT}")
    return network


def _torchvision_preprocessing(weights: Any) -> Preprocessing:
    transform = weights.transforms()
    if not hasattr(transform, "crop_size"):  # not a classifier's
        return Preprocessing()
    size = transform.crop_size[0]
    return Preprocessing(
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        image_size=(size, size),
        crop_pct=size / transform.resize_size[0],
        interpolation=transform.interpolation.value,
    )


def _timm(name: str) -> Architecture:
    if ":" in name or "/" in name:
        raise SourceError(
            f"timm:{name} points outside timm; download its weights and use timm:NAME --weights PATH"
        )
    bare, _, tag = name.partition(".")
    renamed = get_deprecated_models()
    if bare in renamed:
        raise SourceError(
            f"timm no longer has {bare!r}" + (f"; use timm:{renamed[bare]}" if renamed[bare] else "")
        )
    if not timm.is_model(bare):
        raise _unknown("timm", bare)
    tagged = timm.list_models(bare, include_tags=True)
    if tag and name not in tagged:
        raise SourceError(f"timm:{bare} has no weights called {tag}; it has {', '.join(tagged)}")
    config = get_pretrained_cfg(name) or PretrainedCfg()
    source = f"timm:{bare}.{config.tag}" if config.tag else f"timm:{name}"
    return Architecture(
        id=f"timm:{name}",
        build=partial(_build_timm, name),
        pretrained=partial(_pretrained_timm, source, config),
        preprocessing=Preprocessing(
            mean=tuple(config.mean),
            std=tuple(config.std),
            image_size=config.input_size[1:],
            crop_pct=config.crop_pct,
            interpolation=config.interpolation,
        ),
        default_id=source,
        classes=config.num_classes,
        class_names=_timm_class_names(config) if tag else None,
        published={
            Path(one.url).name: f"timm:{key}"
            for key, one in get_arch_pretrained_cfgs(bare).items()
            if isinstance(one.url, str)
        },
        remarks=_timm_remarks(config),
    )


def _build_timm(name: str, num_classes: int | None = None, *, pretrained: bool = False) -> nn.Module:
    network: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    return network


def _pretrained_timm(source: str, config: PretrainedCfg, num_classes: int | None = None) -> nn.Module:
    if not config.has_weights:
        raise SourceError(f"timm has no trained weights for {source}; {WAY_OUT}")
    place = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else str(config.url)
    with _downloading(source, place):
        return _build_timm(source.removeprefix("timm:"), num_classes, pretrained=True)


def _timm_class_names(config: PretrainedCfg) -> tuple[str, ...] | None:
    if config.label_names:
        return tuple(config.label_names)
    subset = infer_imagenet_subset({"num_classes": config.num_classes})
    return tuple(ImageNetInfo(subset).label_descriptions()) if subset else None


def _timm_remarks(config: PretrainedCfg) -> tuple[str, ...]:
    if config.crop_mode == "center":
        return ()
    return (f"timm evaluates these weights in crop mode {config.crop_mode!r}; lcc crops the centre",)


def _zoo(name: str) -> Architecture:
    if name not in ZOO:
        raise _unknown("zoo", name)
    source, of_imagenet = f"zoo:{name}", name in OF_IMAGENET
    return Architecture(
        id=source,
        build=partial(_build_zoo, name),
        pretrained=partial(_no_weights, source),
        preprocessing=Preprocessing() if of_imagenet else CIFAR,
        default_id=source,
        classes=1000 if of_imagenet else 10,
    )


def _build_zoo(name: str, num_classes: int | None = None) -> nn.Module:
    return ZOO[name]() if num_classes is None else ZOO[name](num_classes=num_classes)


def _no_weights(source: str, num_classes: int | None = None) -> nn.Module:  # noqa: ARG001  # takes what others take
    raise SourceError(f"{source} comes without trained weights; {WAY_OUT}, or finetune --from-scratch")


def _users(text: str) -> Architecture:
    """Return the network that a user's factory makes, its weights being those the factory gives it."""
    module, _, factory = text.partition(":")
    if not module or not factory:
        raise SourceError(f"py:{text} is not py:MODULE:FACTORY, such as py:mypackage.networks:make_small")
    build = partial(user_code.build, module, factory)
    return Architecture(f"py:{text}", build, build, Preprocessing(), default_id=f"py:{text}")


LIBRARIES: dict[str, Callable[[str], Architecture]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "zoo": _zoo,
    "py": _users,
}


@contextmanager
def _downloading(source: str, place: str) -> Iterator[None]:
    """Turn whatever goes wrong between here and a hub into a way out; each library raises its own errors.

    What the libraries print on the way goes to stderr, and the hub's own log of its retries nowhere.
    """
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(sys.stderr):
            yield
    except Exception as error:
        raise SourceError(
            f"the weights of {source} can't be had ({type(error).__name__}: {one_line(error)}); "
            f"download them from {place} and use --weights PATH, or --weights none for random ones"
        ) from error
    finally:
        hub.setLevel(level)


def _names(library: str) -> list[str]:
    names = {"torchvision": vision.list_models, "timm": timm.list_models, "zoo": ZOO.keys}
    return list(names[library]())


def _unknown(library: str, name: str) -> SourceError:
    return SourceError(f"{library} has no network called {name}: {_did_you_mean(f'{library}:{name}')}")


def _did_you_mean(text: str) -> str:
    """Return in words where else the name is known, else what comes close, else what a source looks like."""
    library, colon, name = text.partition(":")
    name = name if colon else text
    places = {place: _names(place) for place in ("torchvision", "timm", "zoo")}
    found = [f"{place}:{name}" for place, names in places.items() if re.split("[.@]", name)[0] in names]
    near = {library: places[library]} if library in places else places
    found = found or get_close_matches(
        f"{library}:{name}",
        [f"{place}:{known}" for place, names in near.items() for known in names],
        cutoff=0.8,
    )
    if found:
        return f"did you mean {' or '.join(found)}?"
    if library == "zoo":
        return f"there are {', '.join(sorted(places['zoo']))}"
    return (
        "give torchvision:NAME, timm:NAME, zoo:NAME, py:MODULE:FACTORY, a checkpoint file or an lcc directory"
    )
