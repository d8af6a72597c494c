"""Shared fixtures: the bundled pipeline in float32, the digits, the classifier."""

import pytest

from hqc.models import digits_path
from hqc.models.classifier import DigitClassifier, load_digit_classifier
from hqc.models.digits_data import DigitSplit, load_digit_split
from hqc.models.ldm import ClassConditionalLDMPipeline


@pytest.fixture(scope="session")
def bundled() -> ClassConditionalLDMPipeline:
    pipeline = ClassConditionalLDMPipeline.from_pretrained(digits_path())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(bundled: ClassConditionalLDMPipeline) -> ClassConditionalLDMPipeline:
    """The bundled components in a fresh pipeline, so that a test may replace one of them."""
    fresh = ClassConditionalLDMPipeline(**bundled.components)
    fresh.set_progress_bar_config(disable=True)
    return fresh


@pytest.fixture(scope="session")
def digits() -> DigitSplit:
    pytest.importorskip("sklearn")
    return load_digit_split()


@pytest.fixture(scope="session")
def classifier() -> DigitClassifier:
    return load_digit_classifier()
