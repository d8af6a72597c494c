"""The real handwritten digits behind the bundled model, from scikit-learn, in the decoder's image space."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from hqc.errors import RuntimeMissingError

__all__ = ["IMAGE_SIZE", "SPLIT_SEED", "DigitSplit", "load_digit_split"]

IMAGE_SIZE = 32
SPLIT_SEED = 0


@dataclass(frozen=True)
class DigitSplit:
    """A stratified split: images `[N, 1, 32, 32]` float32 in [-1, 1] and labels `[N]` int64 in 0…9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digit_split(seed: int = SPLIT_SEED) -> DigitSplit:
    """1 797 images of 8×8 and 17 grey levels, upsampled to 32×32 (bicubic), 80 % train and 20 % test.

    Raises:
        RuntimeMissingError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise RuntimeMissingError(
            "handwritten digits", "scikit-learn is not installed", "Run: pip install 'hqc[train]'."
        ) from error
    source = load_digits()
    pixels = torch.tensor(source.images, dtype=torch.float32)[:, None] / 16.0  # [N, 1, 8, 8] in [0, 1]
    size = (IMAGE_SIZE, IMAGE_SIZE)
    images = interpolate(pixels, size=size, mode="bicubic", align_corners=False).clamp(0, 1) * 2 - 1
    labels = torch.tensor(source.target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=seed, stratify=source.target)
    return DigitSplit(images[train], labels[train], images[test], labels[test])
