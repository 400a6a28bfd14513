"""Recipes: what to do, as data. `Finetune` holds every training option."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lcc.specs import Frozen

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Finetune(Frozen):
    """How to train. The defaults suit about ten epochs of SGD on small images.

    Optimisation: `optimizer` and `schedule` are timm's names ("sgd" has Nesterov momentum); `lr` is the peak;
    `warmup` is the share of all steps spent rising to it; `decay_norms`: weight decay also on biases and norms;
    `ema` is the decay of an exponential moving average of the weights, which then is the result.
    Distillation: the loss is (1 - distill) * labels + distill * KL to the teacher at `temperature`.
    Augmentation: `crop` "pad" is a shifted crop after padding by 4 pixels, "resize" a random resized crop with
    areas in `crop_scale`, "auto" the first up to 64 pixels and the second above; `auto_augment` is timm's policy
    string; `mixup` and `cutmix` are the alphas of their beta distributions.
    Evaluation: on val/, else test/; with `val_split`, on that share of train/, chosen by `seed`.
    Checkpoints: every `checkpoint_every` steps, else at the end of every epoch.
    """

    data: str
    val_split: Annotated[float, Field(ge=0, lt=1)] = 0.0
    epochs: Count = 10
    batch_size: Annotated[int, Field(ge=2)] = 128
    optimizer: str = "sgd"
    lr: Positive = 0.1
    momentum: Share = 0.9
    weight_decay: NotNegative = 5e-4
    decay_norms: bool = False
    schedule: Literal["cosine", "constant", "tanh", "poly"] = "cosine"
    warmup: Share = 0.05
    clip_norm: Positive | None = None
    ema: Share | None = None
    distill: Share = 0.5
    temperature: Positive = 4.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    crop: Literal["auto", "pad", "resize", "none"] = "auto"
    crop_scale: tuple[Share, Share] = (0.08, 1.0)
    hflip: Share = 0.5
    color_jitter: NotNegative = 0.0
    auto_augment: str | None = None
    random_erase: Share = 0.0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    checkpoint_every: Count | None = None
