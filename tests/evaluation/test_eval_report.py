"""The table in both renderings, exactly."""

import dataclasses
import math
from typing import Any

import pytest
from rich.console import Console

from hqc.evaluation.metrics import Fidelity, Metrics
from hqc.evaluation.report import ReportRow, markdown_report, terminal_report

PROTOCOL: dict[str, Any] = {
    "sampler": "DDIMScheduler",
    "num_inference_steps": 20,
    "guidance_scale": 1.5,
    "eta": 0.0,
    "num_images": 100,
    "seeds": "0..99",
    "feature_extractor": "DigitClassifier, 64 features, 10 classes",
    "image_range": "[0, 1]",
    "image_size": "32x32",
    "splits": 10,
    "num_real_images": None,
}
METRICS = Metrics(100, Fidelity(25.123, 24.0, 0, 0.91234, 0.98765), 8.765, 0.4321, 1.2345, None, 0.973, PROTOCOL)
FLOAT = dataclasses.replace(METRICS, fidelity=Fidelity(math.inf, math.inf, 100, 1.0, 1.0), fid_real=3.0)
PROTOCOL_LINE = (
    "Protocol: DDIMScheduler; 20 steps; guidance 1.5; η 0.0; 100 images of 32x32; seeds 0..99; "
    "features from DigitClassifier, 64 features, 10 classes; image range [0, 1]; IS over 10 splits."
)


def test_markdown() -> None:
    rows = [
        ReportRow("float", FLOAT, 15_600_000, 12.34),
        ReportRow("RTN | W4A4", METRICS),
        ReportRow("absent"),
    ]
    lines = markdown_report(rows).splitlines()
    assert lines[0].startswith("| Model | IS ↑ | FID to float ↓ | FID to real ↓ | PSNR (dB) ↑ |")
    assert lines[1] == "|---|" + "---:|" * 9
    assert lines[2] == "| float | 8.77 ± 0.43 | 1.23 | 3.00 | ∞ | 1.0000 | 1.0000 | 97.3 | 15.60 | 12.3 |"
    assert lines[3] == r"| RTN \| W4A4 | 8.77 ± 0.43 | 1.23 | – | 25.12 | 0.9123 | 0.9877 | 97.3 | – | – |"
    assert lines[4] == "| absent |" + " – |" * 9
    assert lines[5:] == ["", PROTOCOL_LINE]


def test_terminal_shows_the_same_cells_and_brackets_in_names() -> None:
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(terminal_report([ReportRow("hq-dm [w4a4]", METRICS, 2_000_000, 5.0)]))
    text = captured.get()
    for cell in ("hq-dm [w4a4]", "8.77 ± 0.43", "25.12", "0.9123", "97.3", "2.00", "5.0", "–"):
        assert cell in text
    assert " ".join(PROTOCOL_LINE.split()) in " ".join(text.split())


def test_no_figure_is_cut_in_a_terminal_of_80_characters() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(terminal_report([ReportRow("float", FLOAT, 15_600_000, 12.3), ReportRow("hq-dm w4a4", METRICS)]))
    text = captured.get()
    words = text.split()
    assert "…" not in text
    for word in ("float", "8.77", "0.43", "1.23", "3.00", "25.12", "0.9123", "97.3", "15.60", "12.3", "Latency"):
        assert word in words
    assert words.count("1.0000") == 2


def test_protocols_that_differ_name_their_models() -> None:
    other = dataclasses.replace(METRICS, protocol={**PROTOCOL, "eta": 1.0, "num_real_images": 1797})
    text = markdown_report([ReportRow("a", METRICS), ReportRow("b", other), ReportRow("c", METRICS)])
    assert "Protocol of a, c: DDIMScheduler; 20 steps; guidance 1.5; η 0.0;" in text
    assert "Protocol of b: DDIMScheduler; 20 steps; guidance 1.5; η 1.0;" in text
    assert "1797 real images." in text


def test_no_metrics_no_protocol() -> None:
    assert "Protocol" not in markdown_report([ReportRow("a")])


def test_nan_is_not_printed_as_a_figure() -> None:
    broken = dataclasses.replace(METRICS, fid_reference=math.nan)
    assert "nan" not in markdown_report([ReportRow("a", broken)])
    assert broken.to_dict()["fid_reference"] is None


@pytest.mark.parametrize("name", ["a", "b"])
def test_row_needs_no_more_than_a_name(name: str) -> None:
    assert ReportRow(name).metrics is None
