"""A small convolutional classifier of 32×32 digits: the judge of generated images, and a feature space."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from hqc.errors import ArtefactError
from hqc.models import digits_classifier_path
from hqc.paths import StrPath

__all__ = ["DIGIT_SHAPE", "FEATURE_DIM", "DigitClassifier", "load_digit_classifier"]

FEATURE_DIM = 64
NUM_CLASSES = 10
DIGIT_SHAPE = (1, 32, 32)  # of the images that the classifier takes


class DigitClassifier(nn.Module):
    """Four convolutions, one hidden layer: images `[N, 1, 32, 32]` in [-1, 1] → logits `[N, 10]`.

    The images are in the space of the autoencoder's output. There is no dropout and no batch statistic, so
    that the result for an image does not depend on its batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv_block(1, 16),
            nn.MaxPool2d(2),  # [N, 16, 16, 16]
            *_conv_block(16, 32),
            *_conv_block(32, 32),
            nn.MaxPool2d(2),  # [N, 32, 8, 8]
            *_conv_block(32, 64),
            nn.MaxPool2d(2),  # [N, 64, 4, 4]
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, FEATURE_DIM),
            nn.SiLU(),
        )
        self.head = nn.Linear(FEATURE_DIM, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations `[N, 64]`, a feature space for distances between sets of digits."""
        feature: Tensor = self.body(images)
        return feature

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[N, 10]`."""
        logits: Tensor = self.head(self.features(images))
        return logits


def load_digit_classifier(path: StrPath | None = None) -> DigitClassifier:
    """The shipped classifier in float32, in evaluation mode, without gradients.

    Args:
        path: safetensors file; the bundled one where it is None.

    Raises:
        ArtefactError: the file is missing.
    """
    path = digits_classifier_path() if path is None else Path(path)
    if not path.is_file():
        raise ArtefactError(
            f"digit classifier {path}",
            "found no such file, expected safetensors weights",
            "Reinstall hqc, or run examples/digits/train.py.",
        )
    classifier = DigitClassifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return classifier.eval().requires_grad_(False)


def _conv_block(channels_in: int, channels_out: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    conv = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1)
    return conv, nn.GroupNorm(8, channels_out), nn.SiLU()
