"""Digits by a convolutional net with BatchNorm, each image moved a little every epoch. trainer train recipe=conv"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from trainer.recipes.digits import images

from trainer.data import Split, mixed
from trainer.errors import ConfigError


class Moved(Dataset[tuple[Tensor, Tensor]]):
    """Images of shape (rows, 1, 8, 8), each moved by up to `most` pixels in both directions, with its class.

    How far follows from (seed, epoch, row) alone: a run that was stopped, or has other workers, sees the same images.
    """

    def __init__(self, images: Tensor, classes: Tensor, most: int, seed: int = 0, epoch: int = 0) -> None:
        self.images, self.classes, self.most = images, classes, most
        self.seed, self.epoch = seed, epoch

    def for_epoch(self, seed: int, epoch: int) -> "Moved":
        """The trainer asks for this before every epoch, with the run's seed."""
        return Moved(self.images, self.classes, self.most, seed, epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(mixed(self.seed, self.epoch, row))
        down, right = torch.randint(0, 2 * self.most + 1, (2,), generator=generator).tolist()
        padded = functional.pad(self.images[row], [self.most] * 4)
        return padded[:, down : down + 8, right : right + 8], self.classes[row]


def moved_images(held_out: int = 360, seed: int = 0, most: int = 1) -> Split:
    """The digits as images, the training rows moved by up to `most` pixels. Held-out rows stay where they are."""
    if not 0 <= most < 8:
        raise ConfigError(f"data.source.most={most} is not possible: an image has 8 pixels, so choose 0 to 7.")
    split = images(held_out, seed)
    (train, train_classes), (test, test_classes) = split.train, split.evaluation
    return Split(
        train=Moved(train.reshape(-1, 1, 8, 8), train_classes, most),
        evaluation=(test.reshape(-1, 1, 8, 8), test_classes),
    )


def net(width: int = 16) -> nn.Sequential:
    """Images of shape (rows, 1, 8, 8) to ten logits, by convolutions to `width`, 2 and 4 times `width` planes."""
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()),
        nn.MaxPool2d(2),
        *(nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False), nn.BatchNorm2d(4 * width), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width * 4, 10),
    )
