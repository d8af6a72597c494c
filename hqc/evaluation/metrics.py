"""Fidelity of a model's images to the float model's, and quality by a stated feature extractor.

Every figure comes out of torchmetrics. Its FID and IS are fed `[N, F]` features that were computed here once,
through an extractor that passes them on; so no image is rounded to 8 bits on its way to the classifier.
(Given images, `FrechetInceptionDistance(normalize=True)` passes them unchanged to a custom extractor, but
`InceptionScore(normalize=True)` makes bytes of them even then; see `update` in both.)
"""

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchmetrics import CosineSimilarity
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from hqc.errors import EvaluationError
from hqc.evaluation.sampling import Samples, describe_prompts, describe_seeds

__all__ = [
    "Classifier",
    "Fidelity",
    "Metrics",
    "check_enough",
    "classifier_outputs",
    "evaluate",
    "fidelity",
    "fidelity_figures",
    "least_images",
]

JsonValue = str | int | float | None
IS_SPLITS = 10
SSIM_WINDOW = 11  # pixels


class Classifier(Protocol):
    """A classifier of images in [-1, 1]: `features` gives `[N, F]`, a call gives logits `[N, K]`."""

    training: bool

    def features(self, images: Tensor) -> Tensor: ...
    def __call__(self, images: Tensor) -> Tensor: ...
    def train(self, mode: bool = True) -> Any: ...


@dataclass(frozen=True)
class Fidelity:
    """How near a model's images are to the reference's for the same seeds and labels.

    Args:
        psnr_db: mean of 10·log10(1 / MSE_i) over the images whose MSE_i > 0, data range 1; ∞ when all images
            are identical to the reference's.
        psnr_pooled_db: 10·log10(1 / mean_i MSE_i) over all images; ∞ when all are identical.
        identical_images: how many images equal the reference's in every value (left out of `psnr_db` only).
        ssim: mean structural similarity, 11×11 Gaussian window with σ = 1.5, data range 1; None for images that are
            smaller than the window.
        latent_cosine: mean over images of ⟨z_i, z'_i⟩ / (‖z_i‖·‖z'_i‖) with the latents as vectors; None where the
            pipeline does not show its latents.
    """

    psnr_db: float
    psnr_pooled_db: float
    identical_images: int
    ssim: float | None
    latent_cosine: float | None


@dataclass(frozen=True)
class Metrics:
    """The figures of one model, with the protocol they were measured under.

    Args:
        num_images: images of the model, and as many of the reference.
        fidelity: nearness to the reference, image by image.
        inception_score: exp(mean_x KL(p(y|x) ‖ p(y))) with the classifier's p, mean over the splits.
        inception_score_std: its sample standard deviation over the splits.
        fid_reference: ‖μ−μ'‖² + tr(Σ + Σ' − 2(ΣΣ')^½) between classifier features, to the
            reference model's images.
        fid_real: the same to real images; None when no real features were given.
        accuracy: part of the images that the classifier puts in the class they were asked for, 0…1.
        protocol: what has to be equal for two models' figures to be comparable.
        inception_score_reference: the reference's own.
        inception_score_gain_1: of images sampled with ε̂/k, k the gain at each timestep (`hqc.evaluation.gain`);
            None when there were none.
        inception_score_gain_1_std: as above.
    """

    num_images: int
    fidelity: Fidelity
    inception_score: float
    inception_score_std: float
    fid_reference: float
    fid_real: float | None
    accuracy: float
    protocol: dict[str, JsonValue]
    inception_score_reference: float | None = None
    inception_score_gain_1: float | None = None
    inception_score_gain_1_std: float | None = None

    @property
    def inception_score_deviation(self) -> float | None:
        """|IS/IS_reference − 1|: a score above the float model's is as wrong as one below it."""
        return self._deviation(self.inception_score)

    @property
    def inception_score_gain_1_deviation(self) -> float | None:
        """The same of the images at gain 1."""
        return self._deviation(self.inception_score_gain_1)

    def _deviation(self, score: float | None) -> float | None:
        if score is None or self.inception_score_reference is None:
            return None
        return abs(score / self.inception_score_reference - 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready and flat but for `protocol`; infinite PSNR (identical images) becomes null."""
        values = asdict(self)
        deviations = {
            "inception_score_deviation": self.inception_score_deviation,
            "inception_score_gain_1_deviation": self.inception_score_gain_1_deviation,
        }
        flat = {**values.pop("fidelity"), **values, **deviations}
        return {key: _json_number(value) for key, value in flat.items()}


def evaluate(
    samples: Samples,
    reference: Samples,
    classifier: Classifier,
    *,
    train_features: Tensor | None = None,
    splits: int = IS_SPLITS,
    at_gain_one: Samples | None = None,
) -> Metrics:
    """Measure a model's samples against the float model's samples of the same seeds, labels and sampler.

    Args:
        samples: the model's images, N of them.
        reference: the float model's images.
        classifier: gives features `[N, F]` for FID, and logits `[N, K]` for IS and accuracy.
        train_features: `[M, F]` features of real images, from `classifier_outputs`; adds `fid_real`.
        splits: parts that the Inception Score is averaged over, drawn with a fixed seed. Where N does not
            divide there may be fewer; the protocol states how many there were.
        at_gain_one: the model's images once more, sampled inside `hqc.evaluation.gain.at_gain_one`.

    Raises:
        EvaluationError: seeds, labels, sizes or sampler differ, or there are too few images for the splits or
            for a covariance of full rank (N > F, and M > F).
    """
    _check_comparable(samples, reference)
    if at_gain_one is not None:
        _check_comparable(at_gain_one, reference)
    near = fidelity(samples, reference)
    features, logits = classifier_outputs(classifier, samples.images)
    reference_features, reference_logits = classifier_outputs(classifier, reference.images)
    check_enough(len(samples), features.shape[1], splits, train_features)
    score, score_std, used_splits = _inception_score(logits, splits)
    gain_1 = None if at_gain_one is None else classifier_outputs(classifier, at_gain_one.images)[1]
    score_gain_1, score_gain_1_std = (None, None) if gain_1 is None else _inception_score(gain_1, splits)[:2]
    return Metrics(
        num_images=len(samples),
        fidelity=near,
        inception_score=score,
        inception_score_std=score_std,
        fid_reference=_fid(reference_features, features),
        fid_real=None if train_features is None else _fid(train_features, features),
        accuracy=_accuracy(logits, samples.labels),
        protocol=_protocol(samples, classifier, features, logits, train_features, used_splits),
        inception_score_reference=_inception_score(reference_logits, splits)[0],
        inception_score_gain_1=score_gain_1,
        inception_score_gain_1_std=score_gain_1_std,
    )


def fidelity(samples: Samples, reference: Samples) -> Fidelity:
    """The part of `evaluate` that needs no classifier and works from one image on.

    Raises:
        EvaluationError: seeds, labels, sizes or sampler differ.
    """
    _check_comparable(samples, reference)
    images, targets = samples.images.double(), reference.images.double()
    per_image = PeakSignalNoiseRatio(data_range=1.0, reduction="none", dim=(1, 2, 3))
    pooled = PeakSignalNoiseRatio(data_range=1.0)
    ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
    psnr_db = per_image(images, targets)  # [N]
    differing = psnr_db[torch.isfinite(psnr_db)]
    return Fidelity(
        psnr_db=float(differing.mean()) if len(differing) else math.inf,
        psnr_pooled_db=float(pooled(images, targets)),
        identical_images=len(psnr_db) - len(differing),
        ssim=float(ssim(images, targets)) if min(images.shape[2:]) >= SSIM_WINDOW else None,
        latent_cosine=_latent_cosine(samples.latents, reference.latents),
    )


def fidelity_figures(samples: Samples, reference: Samples) -> dict[str, Any]:
    """`fidelity` with its protocol, JSON-ready: what can be said of any model's images.

    Raises:
        EvaluationError: see `fidelity`.
    """
    near = {key: _json_number(value) for key, value in asdict(fidelity(samples, reference)).items()}
    return {"num_images": len(samples), **near, "protocol": _sampling_protocol(samples)}


def classifier_outputs(classifier: Classifier, images: Tensor, *, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Features `[N, F]` and logits `[N, K]`, float64, of images `[N, C, H, W]` in [0, 1].

    The images go in as 2·x − 1, as floats; the classifier is in evaluation mode meanwhile.
    """
    was_training = classifier.training
    classifier.train(False)
    try:
        with torch.no_grad():
            parts = [2 * part - 1 for part in torch.split(images, batch_size)]
            features = torch.cat([classifier.features(part) for part in parts])
            logits = torch.cat([classifier(part) for part in parts])
    finally:
        classifier.train(was_training)
    return features.double(), logits.double()


class _PassThrough(nn.Module):
    """An extractor for torchmetrics that is handed the features themselves."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _fid(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance of features `[M, F]` and `[N, F]`; rounding below 0 is cut off."""
    metric = FrechetInceptionDistance(feature=_PassThrough(fake.shape[1]), normalize=True)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return max(0.0, float(metric.compute()))


def _inception_score(logits: Tensor, splits: int) -> tuple[float, float, int]:
    """Mean, standard deviation, and the number of splits that N images in equal parts really give."""
    used = math.ceil(len(logits) / math.ceil(len(logits) / splits))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `InceptionScore` will save all")
        metric = InceptionScore(feature=_PassThrough(logits.shape[1]), splits=splits)
    relative = logits.double() - logits.double().amax(dim=1, keepdim=True)
    metric.update(relative.clamp(min=-700))  # e^-700 is still above 0 in float64; the log of 0 would give NaN
    with torch.random.fork_rng(devices=[]):  # torchmetrics shuffles with the global generator
        torch.manual_seed(0)
        mean, std = metric.compute()
    return float(mean), float(std), used


def _accuracy(logits: Tensor, labels: tuple[int, ...]) -> float:
    metric = MulticlassAccuracy(num_classes=logits.shape[1], average="micro")
    return float(metric(logits, torch.tensor(labels)))


def _protocol(
    samples: Samples,
    classifier: Classifier,
    features: Tensor,
    logits: Tensor,
    train_features: Tensor | None,
    splits: int,
) -> dict[str, JsonValue]:
    return {
        **_sampling_protocol(samples),
        "feature_extractor": _extractor_name(classifier, features, logits),
        "splits": splits,
        "num_real_images": None if train_features is None else len(train_features),
    }


def _sampling_protocol(samples: Samples) -> dict[str, JsonValue]:
    asked = {"prompts": describe_prompts(samples.prompts)} if samples.prompts else {}
    protocol = asdict(samples.protocol)
    if not samples.protocol.negative_prompt:
        del protocol["negative_prompt"]
    return {
        **protocol,
        **asked,
        "num_images": len(samples),
        "seeds": describe_seeds(samples.seeds),
        "image_range": "[0, 1], float, no 8-bit rounding",
        "image_size": f"{samples.images.shape[3]}x{samples.images.shape[2]}",
    }


def _extractor_name(classifier: Classifier, features: Tensor, logits: Tensor) -> str:
    return f"{type(classifier).__name__}, {features.shape[1]} features, {logits.shape[1]} classes"


def _latent_cosine(latents: Tensor | None, reference: Tensor | None) -> float | None:
    if latents is None or reference is None:
        return None
    vectors = (found.double().flatten(1) for found in (latents, reference))  # [N, c·h·w]
    return float(CosineSimilarity(reduction="mean")(*vectors))


def _check_comparable(samples: Samples, reference: Samples) -> None:
    pairs = {
        "number of images": (len(samples), len(reference)),
        "image size": (list(samples.images.shape[1:]), list(reference.images.shape[1:])),
        "latent size": (_shape(samples.latents), _shape(reference.latents)),
        "prompts": (samples.prompts, reference.prompts),
        "seeds": (samples.seeds, reference.seeds),
        "labels": (samples.labels, reference.labels),
        "sampler": (samples.protocol.describe(), reference.protocol.describe()),
    }
    wrong = [_difference(name, *pair) for name, pair in pairs.items() if pair[0] != pair[1]]
    if wrong:
        raise EvaluationError(
            "evaluate",
            f"the images do not pair up with the reference's: {'; '.join(wrong)}",
            "Sample both models with equal labels, seeds, steps, guidance and eta.",
        )


def _shape(latents: Tensor | None) -> list[int]:
    return [] if latents is None else list(latents.shape[1:])


def _difference(name: str, ours: Any, theirs: Any) -> str:
    if isinstance(ours, tuple):
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if first is None:
            return f"{len(ours)} {name}, the reference {len(theirs)}"
        return f"{name} differ, first at image {first} ({ours[first]}, the reference {theirs[first]})"
    return f"{name} {ours}, the reference {theirs}"


def least_images(num_features: int, splits: int = IS_SPLITS) -> int:
    """How many images all the scores need."""
    return max(2 * splits, num_features + 1)


def check_enough(
    num_images: int, num_features: int, splits: int = IS_SPLITS, train_features: Tensor | None = None
) -> None:
    """Whether there are enough images for the scores, known before any is sampled.

    Raises:
        EvaluationError: if there are too few for the splits, or for a covariance of full rank.
    """
    if splits < 2 or num_images < 2 * splits:
        raise EvaluationError(
            "evaluate",
            f"{num_images} images in {splits} splits, expected at least 2 splits of at least 2 images",
            f"Sample {2 * max(splits, 2)} images or more, or lower the number of splits.",
        )
    counts = {"images": num_images}
    if train_features is not None:
        counts["real images"] = len(train_features)
        if train_features.ndim != 2 or train_features.shape[1] != num_features:
            raise EvaluationError(
                "evaluate",
                f"train_features has shape {list(train_features.shape)}, expected [M, {num_features}]",
                "Compute it with classifier_outputs and the same classifier.",
            )
    for name, count in counts.items():
        if count <= num_features:
            raise EvaluationError(
                "evaluate",
                f"{count} {name} for {num_features} features: FID needs a covariance of full rank, "
                f"so at least {num_features + 1} {name}",
                f"Take {num_features + 1} {name} or more, or call fidelity(), which needs no FID.",
            )


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
