"""The table in both renderings, exactly."""

import dataclasses
import math
from typing import Any

import pytest
from rich.console import Console

from hqc.evaluation.gain import Gain
from hqc.evaluation.metrics import Fidelity, Metrics
from hqc.evaluation.report import ReportRow, markdown_report, terminal_report, terminal_trajectories
from hqc.evaluation.trajectory_fidelity import TrajectoryFidelity

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

SCORED = dataclasses.replace(
    METRICS, inception_score_reference=8.0, inception_score_gain_1=7.9, inception_score_gain_1_std=0.4
)
NEAR = TrajectoryFidelity(Gain((51.0, 1.0), (1.0123, 0.98), 1.01), (0.999, 0.95), 16, "0..15")
FAR = TrajectoryFidelity(Gain((51.0, 1.0), (math.nan, 0.5), 0.5), (0.9, 0.8), 16, "0..15")


def test_markdown() -> None:
    rows = [
        ReportRow("float", FLOAT, 15_600_000, 12.34),
        ReportRow("RTN | W4A4", METRICS),
        ReportRow("absent"),
    ]
    lines = markdown_report(rows).splitlines()
    assert lines[0].startswith("| Model | IS | FID to float ↓ | FID to real ↓ | PSNR (dB) ↑ |")
    assert lines[1] == "|---|" + "---:|" * 9
    assert lines[2] == "| float | 8.77 ± 0.43 | 1.23 | 3.00 | ∞ | 1.0000 | 1.0000 | 97.3 | 15.60 | 12.3 |"
    assert lines[3] == r"| RTN \| W4A4 | 8.77 ± 0.43 | 1.23 | – | 25.12 | 0.9123 | 0.9877 | 97.3 | – | – |"
    assert lines[4] == "| absent |" + " – |" * 9
    assert lines[5:] == ["", PROTOCOL_LINE]


def test_markdown_of_trajectories() -> None:
    rows = [ReportRow("float", FLOAT), ReportRow("a|b", SCORED, trajectory=NEAR), ReportRow("far", trajectory=FAR)]
    lines = markdown_report(rows).splitlines()
    start = lines.index("") + 1
    assert lines[start].startswith(r"| Model | IS of float | \|IS/float − 1\| ↓ | ε gain (1) | IS at gain 1 |")
    assert lines[start + 1] == "|---|" + "---:|" * 8
    assert lines[start + 2] == "| float |" + " – |" * 8
    assert lines[start + 3] == r"| a\|b | 8.00 | 0.0956 | 1.0100 | 7.90 ± 0.40 | 0.0125 | 0.9745 | 0.9500 | yes |"
    assert lines[start + 4] == "| far | – | – | 0.5000 | – | – | 0.8500 | 0.8000 | no |"
    assert lines[start + 5 : start + 8] == ["", lines[start + 6], ""]
    assert lines[start + 6].startswith("IS rises with the gain of ε")
    assert lines[start + 8 : start + 12] == [
        r"| t | a\|b | far |",
        "|---|---:|---:|",
        "| 51 | 1.0123 · 0.9990 | – · 0.9000 |",
        "| 1 | 0.9800 · 0.9500 | 0.5000 · 0.8000 |",
    ]
    assert lines[start + 13].endswith("16 images, seeds 0..15.")
    assert lines[-1].startswith("Protocol: ")


def test_models_of_other_samplers_have_a_table_of_their_own() -> None:
    other = dataclasses.replace(NEAR, gain=Gain((80.0, 40.0), (1.0, 1.0), 1.0))
    text = markdown_report([ReportRow("a", trajectory=NEAR), ReportRow("b", trajectory=other)])
    assert "| t | a |" in text
    assert "| t | b |" in text


def test_trajectories_without_scores_have_no_columns_of_scores() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(terminal_trajectories([ReportRow("a [b]", trajectory=NEAR)]))
    words = captured.get().split()
    assert "IS" not in words
    assert {"[b]", "1.0100", "0.9745", "1.0123", "·", "0.9990"} <= set(words)


def test_nothing_of_trajectories_where_nothing_was_measured() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(terminal_trajectories([ReportRow("a", METRICS)]))
    assert captured.get().strip() == ""


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
        rows = [ReportRow("float", FLOAT, 15_600_000, 12.3), ReportRow("hq-dm w4a4", SCORED, trajectory=NEAR)]
        console.print(terminal_report(rows))
    text = captured.get()
    words = text.split()
    assert "…" not in text
    for word in ("float", "8.77", "0.43", "1.23", "3.00", "25.12", "0.9123", "97.3", "15.60", "12.3", "Latency"):
        assert word in words
    for word in ("8.00", "0.0956", "1.0100", "7.90", "0.40", "0.0125", "0.9745", "0.9500", "1.0123"):
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
