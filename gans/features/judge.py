"""The judge: a small classifier trained on one's own data, over whose features distances are measured.

No model of this package trains against it, so a generator cannot learn to please it, as one that trains against an
ImageNet network (a projected discriminator) may please measures over ImageNet networks. It learns the classes of
labelled data; of data without labels it learns by how many quarter turns an image was rotated (RotNet, Gidaris et al.
2018, arXiv 1803.07728), which needs no labels and makes it look at shapes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from gans.common.files import new_file, save_tensors, sha256
from gans.features.network import VectorNetwork, resize, with_channels

SMALLEST_MAP = 4


@dataclass(frozen=True)
class JudgeConfig:
    """A judge's architecture."""

    size: int = 32
    """Side of the images that it sees; others are resized to it."""
    channels: int = 3
    """Image channels, 1 or 3."""
    classes: int = 10
    """What it tells apart."""
    width: int = 32
    """Channels of the first layer; they double with every halving of the map, up to `features`."""
    features: int = 128
    """Channels of the last map, whose mean over the map are the features."""

    def __post_init__(self) -> None:
        if self.size < 2 * SMALLEST_MAP:
            raise ValueError(f"size is {self.size}; the judge needs at least {2 * SMALLEST_MAP} pixels")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; it must be 1 or 3")
        if self.classes < 2 or self.width < 1 or self.features < self.width:
            raise ValueError(
                f"classes ({self.classes}) must be at least 2 and width ({self.width}) in 1..features ({self.features})"
            )


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Sequential):
    """`x + layers(x)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Judge(nn.Module):
    """Images `(B, channels, size, size)` in [-1, 1] to scores `(B, classes)`; `features` gives `(B, features)`.

    3x3 convolutions with batch norm and ReLU, max pooling before each but the first down to a map of about 4x4, a
    residual pair there, the mean over the map, and a linear layer.
    """

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        width, side = min(config.width, config.features), config.size
        layers = [_conv(config.channels, width)]
        while side >= 2 * SMALLEST_MAP:
            side //= 2
            wider = config.features if side < 2 * SMALLEST_MAP else min(2 * width, config.features)
            layers += [nn.Sequential(nn.MaxPool2d(2), _conv(width, wider))]
            width = wider
        self.layers = nn.Sequential(*layers, Residual(_conv(width, width), _conv(width, width)))
        self.head = nn.Linear(width, config.classes)

    def features(self, images: Tensor) -> Tensor:
        return self.layers(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@dataclass(frozen=True)
class Schedule:
    """How a judge is trained: AdamW under a one-cycle schedule, random flips and shifts by up to an eighth."""

    epochs: int = 10
    """Passes over the training images."""
    batch: int = 128
    """Images in a step."""
    lr: float = 3e-3
    """Highest learning rate."""
    weight_decay: float = 0.05
    """AdamW's weight decay."""
    held_out: float = 0.1
    """Share of the images that is not trained on and gives the accuracy."""
    seed: int = 0
    """Decides initial weights, order and augmentation."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2 or not 0 < self.held_out < 1:
            raise ValueError(
                f"epochs ({self.epochs}) must be at least 1, batch ({self.batch}) at least 2 and held_out "
                f"({self.held_out}) between 0 and 1"
            )
        if not 0 < self.lr < math.inf or not 0 <= self.weight_decay < math.inf:  # nor NaN
            raise ValueError(
                f"lr ({self.lr}) must be positive and weight_decay ({self.weight_decay}) not negative, both finite"
            )


def rotate(images: Tensor, turns: Tensor) -> Tensor:
    """Each image `(B, C, S, S)` turned by its number of quarter turns `(B,)`."""
    turned = torch.stack([images.rot90(k, (2, 3)) for k in range(4)])
    return turned[turns, torch.arange(len(images), device=images.device)]


def augment(images: Tensor) -> Tensor:
    """Mirrors each image with probability 1/2 and shifts each by up to an eighth of its side, edges repeated."""
    count, _, side, _ = images.shape
    device = images.device
    flips = torch.rand(count, 1, 1, 1, device=device) < 0.5
    images = torch.where(flips, images.flip(3), images)
    reach = side // 8
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    y, x = (torch.randint(2 * reach + 1, (count, 1), device=device) + torch.arange(side, device=device) for _ in "yx")
    rows = torch.arange(count, device=device)[:, None, None]
    return padded[rows, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def train_judge(
    config: JudgeConfig,
    schedule: Schedule,
    images: Tensor,
    labels: Tensor | None,
    *,
    device: torch.device,
    report: Callable[[int, float, float], None] = lambda epoch, loss, accuracy: None,
) -> tuple[Judge, float]:
    """A trained judge in evaluation mode, and its accuracy on the held-out images.

    Args:
        images: uint8 `(N, channels, size, size)`.
        labels: int64 `(N,)` in 0..classes-1, or None to learn rotations (with `config.classes` 4).
        report: called after each epoch, counted from 1, with the mean loss and the held-out accuracy.
    """
    held = round(schedule.held_out * len(images))
    if held < 1 or len(images) - held < schedule.batch:
        raise ValueError(
            f"{len(images)} images are too few: {held} held out, of which there must be one, and the rest must fill a "
            f"batch of {schedule.batch}"
        )
    shuffler = torch.Generator().manual_seed(schedule.seed)
    order = torch.randperm(len(images), generator=shuffler)
    held_out, training = order[:held], order[held:]

    def inputs(rows: Tensor, turns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = images[rows].to(device).float().div_(127.5).sub_(1)
        if labels is not None:
            return x, labels[rows].to(device)
        turns = torch.randint(4, (len(rows),)) if turns is None else turns
        return rotate(x, turns.to(device)), turns.to(device)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(schedule.seed)
        judge = Judge(config).to(device)
        steps = len(training) // schedule.batch
        optimizer = torch.optim.AdamW(judge.parameters(), schedule.lr, weight_decay=schedule.weight_decay)
        total = schedule.epochs * steps + 1
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.lr, total_steps=total)
        for epoch in range(1, schedule.epochs + 1):
            judge.train()
            losses = []
            shuffled = training[torch.randperm(len(training), generator=shuffler)]
            for rows in shuffled[: steps * schedule.batch].split(schedule.batch):
                x, target = inputs(rows)
                loss = F.cross_entropy(judge(augment(x)), target)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                cycle.step()
                losses.append(loss.detach())
            mean = float(torch.stack(losses).mean())
            if not math.isfinite(mean) or not all(weights.isfinite().all() for weights in judge.parameters()):
                raise ValueError(
                    f"epoch {epoch} led to numbers that are not finite (loss {mean}): lr is {schedule.lr} and "
                    f"weight_decay {schedule.weight_decay}; lower them"
                )
            judge.eval()
            with torch.no_grad():
                right = 0
                for start in range(0, held, 500):
                    rows = held_out[start : start + 500]
                    x, target = inputs(rows, torch.arange(start, start + len(rows)) % 4)
                    right += int((judge(x).argmax(1) == target).sum())
            accuracy = right / held
            report(epoch, mean, accuracy)
    return judge.requires_grad_(False), accuracy


def save_judge(judge: Judge, path: Path, about: dict[str, Any]) -> None:
    """Writes a judge as safetensors; its configuration and `about` (JSON values) are in the file's metadata."""
    content = {"config": dataclasses.asdict(judge.config), "about": about}
    state = {name: value.cpu().contiguous() for name, value in judge.state_dict().items()}
    with new_file(path) as partial:
        save_tensors(state, partial, metadata={"judge": json.dumps(content)})


def load_judge(path: Path) -> tuple[Judge, dict[str, Any]]:
    """A judge in evaluation mode without gradients, and what was written about it; ValueError for another file."""
    if not path.is_file():
        raise FileNotFoundError(f"judge {str(path)!r} is not a file; make one with python -m gans train-judge")
    try:
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {})["judge"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no mapping
        judge = Judge(JudgeConfig(**content["config"]))
        judge.load_state_dict(state)
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"judge {str(path)!r} is not a file of train-judge: {error}") from error
    return judge.eval().requires_grad_(False), content["about"]


class JudgeVectors(VectorNetwork):
    """A classifier of `train-judge`: the layer before the scores."""

    name = "judge"

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.judge, about = load_judge(weights)
        self.num_features = self.judge.config.features
        self.fingerprint = sha256(weights)
        self.about = (
            f"{about['task']} of {about['data']}, {self.judge.config.size} px, "
            f"{100 * about['accuracy']:.1f} % right of {about['held_out']} held out"
        )

    def forward(self, images: Tensor) -> Tensor:
        config = self.judge.config
        return self.judge.features(with_channels(resize(images, config.size), config.channels))
