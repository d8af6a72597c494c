"""Every metric against an independent numpy or scipy formula on small data."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import torch
from numpy.typing import NDArray

from hqc.errors import EvaluationError
from hqc.evaluation.metrics import Metrics, classifier_outputs, evaluate, fidelity

Array = NDArray[np.float64]
PSNR_TOLERANCE_DB = 1e-5  # torchmetrics holds the base of the logarithm in float32


def as_numpy(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy()


def numpy_fid(a: Array, b: Array) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(scipy.linalg.sqrtm(cov_a @ cov_b))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


def numpy_ssim(a: Array, b: Array) -> float:
    """SSIM of one channel, 11×11 Gaussian window, σ 1.5, K1 0.01, K2 0.03, borders reflected."""
    x = np.arange(-5, 6)
    window = np.exp(-(x**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def blur(image: Array) -> Array:
        return scipy.signal.convolve2d(np.pad(image, 5, mode="reflect"), window, mode="valid")

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return float((value / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def numpy_inception_score(logits: Array, order: Array, splits: int) -> tuple[float, float]:
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = (p / p.sum(1, keepdims=True))[order.astype(int)]
    scores = [
        np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()) for part in np.array_split(p, splits)
    ]
    return float(np.mean(scores)), float(np.std(scores, ddof=1))


def test_psnr_is_the_mean_of_images_and_the_pooled_one_is_not(samples_factory: Any) -> None:
    reference, samples = samples_factory(6), samples_factory(6, noise=0.1)
    worse = samples.images.clone()
    worse[0] = 1 - reference.images[0]  # one bad image pulls the two figures apart
    near = fidelity(dataclasses.replace(samples, images=worse), reference)
    mse = ((as_numpy(worse) - as_numpy(reference.images)) ** 2).mean((1, 2, 3))
    assert near.psnr_db == pytest.approx((10 * np.log10(1 / mse)).mean(), abs=PSNR_TOLERANCE_DB)
    assert near.psnr_pooled_db == pytest.approx(10 * np.log10(1 / mse.mean()), abs=PSNR_TOLERANCE_DB)
    assert near.psnr_db > near.psnr_pooled_db + 1
    assert near.identical_images == 0


def test_identical_images_are_counted_and_left_out_of_the_mean(samples_factory: Any) -> None:
    reference, samples = samples_factory(6), samples_factory(6, noise=0.1)
    images = samples.images.clone()
    images[2] = reference.images[2]
    near = fidelity(dataclasses.replace(samples, images=images), reference)
    mse = ((as_numpy(images) - as_numpy(reference.images)) ** 2).mean((1, 2, 3))
    assert near.identical_images == 1
    assert near.psnr_db == pytest.approx((10 * np.log10(1 / mse[mse > 0])).mean(), abs=PSNR_TOLERANCE_DB)
    assert near.psnr_pooled_db == pytest.approx(10 * np.log10(1 / mse.mean()), abs=PSNR_TOLERANCE_DB)


def test_ssim(samples_factory: Any) -> None:
    reference, samples = samples_factory(3), samples_factory(3, noise=0.2)
    pairs = zip(as_numpy(samples.images), as_numpy(reference.images), strict=True)
    expected = np.mean([numpy_ssim(a[0], b[0]) for a, b in pairs])
    value = fidelity(samples, reference).ssim
    assert value == pytest.approx(expected, abs=1e-6)  # torchmetrics sums in float32
    assert 0.1 < value < 0.99


def test_latent_cosine(samples_factory: Any) -> None:
    reference, samples = samples_factory(5), samples_factory(5, noise=0.8)
    a, b = as_numpy(samples.latents).reshape(5, -1), as_numpy(reference.latents).reshape(5, -1)
    expected = ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()
    value = fidelity(samples, reference).latent_cosine
    assert value == pytest.approx(expected, abs=1e-6)  # torchmetrics casts to float32
    assert 0.5 < value < 0.95


def test_fid_to_reference_and_to_real_images(samples_factory: Any, classifier: Any) -> None:
    reference, samples = samples_factory(40), samples_factory(40, noise=0.3)
    real, _ = classifier_outputs(classifier, samples_factory(30, seed=50).images)
    metrics = evaluate(samples, reference, classifier, train_features=real)
    ours, _ = classifier_outputs(classifier, samples.images)
    theirs, _ = classifier_outputs(classifier, reference.images)
    assert metrics.fid_reference == pytest.approx(numpy_fid(as_numpy(theirs), as_numpy(ours)), abs=1e-8)
    assert metrics.fid_real == pytest.approx(numpy_fid(as_numpy(real), as_numpy(ours)), abs=1e-8)
    assert metrics.fid_reference > 1e-4
    assert metrics.fid_real != pytest.approx(metrics.fid_reference, rel=0.1)
    assert metrics.protocol["num_real_images"] == 30


def test_inception_score_is_the_same_every_time(samples_factory: Any, classifier: Any) -> None:
    samples = samples_factory(40)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    metrics = evaluate(samples, samples, classifier, splits=4)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is as it was
    _, logits = classifier_outputs(classifier, samples.images)
    order = as_numpy(torch.randperm(40, generator=torch.Generator().manual_seed(0)))
    mean, std = numpy_inception_score(as_numpy(logits), order, 4)
    assert metrics.inception_score == pytest.approx(mean, abs=1e-9)
    assert metrics.inception_score_std == pytest.approx(std, abs=1e-9)
    assert metrics.inception_score > 1.0001


def test_very_sure_classifier_gives_a_finite_score(samples_factory: Any, classifier: Any) -> None:
    with torch.no_grad():
        classifier.head.weight.mul_(1e5)  # a plain softmax would underflow to 0, and its log give NaN
    samples = samples_factory(40)
    assert math.isfinite(evaluate(samples, samples, classifier).inception_score)


@pytest.mark.parametrize(("count", "splits", "used"), [(40, 10, 10), (42, 10, 9), (41, 2, 2)])
def test_protocol_states_the_splits_there_really_were(
    samples_factory: Any, classifier: Any, count: int, splits: int, used: int
) -> None:
    samples = samples_factory(count)
    assert evaluate(samples, samples, classifier, splits=splits).protocol["splits"] == used


def test_inception_score_is_judged_two_sided_and_at_gain_one(samples_factory: Any, classifier: Any) -> None:
    reference, samples, at_gain_one = (samples_factory(40, noise=noise) for noise in (0.0, 0.1, 0.3))
    metrics = evaluate(samples, reference, classifier, splits=2, at_gain_one=at_gain_one)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        order = torch.randperm(40).numpy()
    logits = [as_numpy(classifier_outputs(classifier, s.images)[1]) for s in (reference, samples, at_gain_one)]
    own, found, gain_1 = (numpy_inception_score(values, order, splits=2) for values in logits)
    assert metrics.inception_score_reference == pytest.approx(own[0], rel=1e-9)
    assert (metrics.inception_score_gain_1, metrics.inception_score_gain_1_std) == pytest.approx(gain_1, rel=1e-9)
    assert metrics.inception_score_deviation == pytest.approx(abs(found[0] / own[0] - 1), rel=1e-9)
    assert metrics.inception_score_gain_1_deviation == pytest.approx(abs(gain_1[0] / own[0] - 1), rel=1e-9)
    assert metrics.inception_score_deviation == pytest.approx(
        dataclasses.replace(metrics, inception_score=2 * own[0] - found[0]).inception_score_deviation, rel=1e-9
    )  # as far above as below


def test_without_images_at_gain_one_there_is_no_score_of_them(samples_factory: Any, classifier: Any) -> None:
    metrics = evaluate(samples_factory(20), samples_factory(20), classifier)
    assert metrics.inception_score_deviation == 0
    assert metrics.inception_score_gain_1 is metrics.inception_score_gain_1_deviation is None


def test_images_at_gain_one_have_to_pair_up_too(samples_factory: Any, classifier: Any) -> None:
    samples = samples_factory(20)
    other = dataclasses.replace(samples, seeds=(*range(19), 99))
    with pytest.raises(EvaluationError, match="seeds differ, first at image 19"):
        evaluate(samples, samples, classifier, at_gain_one=other)


def test_accuracy(samples_factory: Any, classifier: Any) -> None:
    samples = samples_factory(40)
    _, logits = classifier_outputs(classifier, samples.images)
    labels = tuple(int(label) if i % 4 else (int(label) + 1) % 10 for i, label in enumerate(logits.argmax(1)))
    labelled = dataclasses.replace(samples, labels=labels)
    assert evaluate(labelled, labelled, classifier).accuracy == pytest.approx(0.75, abs=1e-6)  # float32 mean


def test_classifier_gets_floats_in_minus_one_to_one_unrounded(samples_factory: Any, classifier: Any) -> None:
    samples = samples_factory(20)
    classifier.train()
    classifier_outputs(classifier, samples.images, batch_size=7)
    assert classifier.training  # as it was
    assert [len(part) for part in classifier.seen[:3]] == [7, 7, 6]
    torch.testing.assert_close(torch.cat(classifier.seen[:3]), 2 * samples.images - 1, rtol=0, atol=0)


def test_evaluation_does_not_round_images_to_bytes(samples_factory: Any, classifier: Any) -> None:
    samples = samples_factory(20)
    finer = dataclasses.replace(samples, images=(samples.images * 0.999))  # most pixels keep their byte
    assert evaluate(finer, samples, classifier).fid_reference > 0


def test_reference_against_itself(samples_factory: Any, classifier: Any) -> None:
    samples = samples_factory(20)
    metrics = evaluate(samples, samples, classifier)
    assert metrics.fidelity.psnr_db == math.inf
    assert metrics.fidelity.identical_images == 20
    assert metrics.fid_reference == pytest.approx(0, abs=1e-8)
    assert metrics.fid_real is None
    written = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert written["psnr_db"] is None
    assert written["psnr_pooled_db"] is None
    assert written["ssim"] == pytest.approx(1)


def test_to_dict_holds_every_figure_and_the_protocol(samples_factory: Any, classifier: Any) -> None:
    metrics = evaluate(samples_factory(40, noise=0.1), samples_factory(40), classifier)
    written = metrics.to_dict()
    names = {field.name for field in dataclasses.fields(Metrics)} - {"fidelity"}
    names |= {"inception_score_deviation", "inception_score_gain_1_deviation"}
    assert set(written) == names | {field.name for field in dataclasses.fields(metrics.fidelity)}
    assert written["protocol"] == {
        "sampler": "DDIMScheduler",
        "num_inference_steps": 20,
        "guidance_scale": 1.5,
        "eta": 0.0,
        "num_images": 40,
        "seeds": "0..39",
        "feature_extractor": "FakeClassifier, 4 features, 10 classes",
        "image_range": "[0, 1], float, no 8-bit rounding",
        "image_size": "16x16",
        "splits": 10,
        "num_real_images": None,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": (*range(19), 99)}, r"seeds differ, first at image 19 \(99, the reference 19\)"),
        ({"labels": (5,) * 20}, r"labels differ, first at image 0 \(5, the reference 0\)"),
        ({"latents": torch.zeros(20, 3, 8, 8)}, "latent size"),
        ({"images": torch.zeros(20, 1, 32, 32)}, "image size"),
    ],
    ids=["seeds", "labels", "latents", "images"],
)
def test_images_that_do_not_pair_up_are_refused(
    samples_factory: Any, classifier: Any, change: dict[str, Any], message: str
) -> None:
    reference = samples_factory(20)
    with pytest.raises(EvaluationError, match=message):
        evaluate(dataclasses.replace(reference, **change), reference, classifier)


def test_other_sampler_or_count_is_refused(samples_factory: Any) -> None:
    with pytest.raises(EvaluationError, match=r"sampler DDIMScheduler, 20 steps.*50 steps"):
        fidelity(samples_factory(20), samples_factory(20, steps=50))
    with pytest.raises(EvaluationError, match="number of images 20, the reference 30"):
        fidelity(samples_factory(20), samples_factory(30))


def test_too_few_images_for_fid_says_how_many(samples_factory: Any, classifier: Any) -> None:
    four, five = samples_factory(4), samples_factory(5)
    with pytest.raises(EvaluationError, match=r"at least 5 images.*fidelity\(\)"):
        evaluate(four, four, classifier, splits=2)
    assert evaluate(five, five, classifier, splits=2).num_images == 5


@pytest.mark.parametrize("splits", [1, 0, 11])
def test_splits_that_cannot_be(samples_factory: Any, classifier: Any, splits: int) -> None:
    samples = samples_factory(20)
    with pytest.raises(EvaluationError, match="splits"):
        evaluate(samples, samples, classifier, splits=splits)


@pytest.mark.parametrize(("shape", "message"), [((4, 4), "4 real images"), ((30, 5), r"\[30, 5\], expected \[M, 4\]")])
def test_real_features_that_do_not_fit(
    samples_factory: Any, classifier: Any, shape: tuple[int, int], message: str
) -> None:
    samples = samples_factory(20)
    with pytest.raises(EvaluationError, match=message):
        evaluate(samples, samples, classifier, train_features=torch.rand(shape))
