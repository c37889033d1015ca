"""Adaptive augmentation (ADA): what the discriminator sees is augmented the more, the more it knows the data by heart.

Source: "Training Generative Adversarial Networks with Limited Data", Karras et al. 2020, arXiv 2006.06676. The
operations are those of `gans.models.augment`, not the paper's; it stands beside a discriminator's own DiffAug, which
stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gans.models.augment import augment_alike, check_policy


@dataclass(frozen=True)
class ADAConfig:
    """How augmentation adapts; the defaults are the paper's, but switched off."""

    target: float = 0.0
    """The mean sign of the scores of real images that is aimed at (paper: 0.6); 0 for no adaptive augmentation."""
    images: int = 500_000
    """Real images over which the probability goes from 0 to 1 at most."""
    policy: tuple[str, ...] = ("translation_0.125", "scaling", "color")
    """Augmentations, each of which happens to an image with the probability."""

    def __post_init__(self) -> None:
        if not 0 <= self.target < 1:
            raise ValueError(f"ada.target is {self.target}; it must be in [0, 1)")
        if self.images < 1:
            raise ValueError(f"ada.images is {self.images}; it must be at least 1")
        check_policy(self.policy)


class ADA:
    """The probability of augmentation, and what moves it."""

    def __init__(self, config: ADAConfig, *, relativistic: bool) -> None:
        self.config = config
        self.relativistic = relativistic
        """A relativistic loss knows differences only: the sign is then that of D(real) - D(generated)."""
        self.probability = 0.0
        self.signs: list[Tensor] = []
        """The mean sign of each part of the batch since the last `move`."""

    def watch(self, discriminator: Any, real: Tensor | None = None, fake: Tensor | None = None) -> Watched:
        """The discriminator with augmentation; given real and generated images, it notes the signs of their scores."""
        return Watched(self, discriminator, real, fake)

    def note(self, real: Tensor, fake: Tensor) -> None:
        """Takes the scores of a part of a batch, `(B,)` or `(B, logits)`."""
        real, fake = (scores.detach().reshape(len(scores), -1).mean(1) for scores in (real, fake))
        self.signs.append((real - fake if self.relativistic else real).sign().mean())

    def take_sign(self) -> Tensor:
        """The mean of the noted signs, which are forgotten."""
        sign = torch.stack(self.signs).mean()
        self.signs.clear()
        return sign

    def move(self, sign: float, batch: int) -> None:
        """Moves the probability, after an update with so many real images, to bring the sign to its target."""
        step = batch / self.config.images
        self.probability = min(max(self.probability + (step if sign > self.config.target else -step), 0.0), 1.0)


class Watched:
    """A discriminator whose images are augmented first; called and asked as the discriminator itself."""

    def __init__(self, ada: ADA, discriminator: Any, real: Tensor | None, fake: Tensor | None) -> None:
        self._ada, self._discriminator = ada, discriminator
        self._images = (real, fake)
        self._scores: list[Tensor | None] = [None, None]

    def __call__(self, images: Tensor, **options: Any) -> Tensor:
        scores = self._discriminator(self._augmented(images) if options.get("augment", True) else images, **options)
        for i, own in enumerate(self._images):
            if images is own and self._scores[i] is None:
                self._scores[i] = scores
                if None not in self._scores:
                    self._ada.note(*self._scores)
        return scores

    def _augmented(self, images: Tensor) -> Tensor:
        ada = self._ada
        if not ada.probability:
            return images
        levels = images.split(self._discriminator.config.channels, dim=1)
        return torch.cat(augment_alike(levels, ada.config.policy, ada.probability), dim=1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._discriminator, name)
