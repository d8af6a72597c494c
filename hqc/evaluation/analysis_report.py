"""An analysis as data: what was measured, a summary, JSON, and CSV with one row a site and timestep."""

import csv
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hqc.atomic import write_file
from hqc.evaluation.analysis import SiteAnalysis, SiteRow
from hqc.evaluation.sensitivity import Sensitivity

__all__ = ["CSV_COLUMNS", "Report", "csv_text", "plain_cell", "report_data", "summary", "write_text"]

CSV_COLUMNS = (
    *("site", "timestep", "values", "max_abs", "rms", "bits", "planned_block", "block"),
    *("max_over_rms", "kurtosis", "scale", "snr_db"),
    *("max_over_rms_rotated", "kurtosis_rotated", "scale_rotated", "snr_rotated_db"),
    *("program_scale", "program_snr_db"),
)


@dataclass(frozen=True)
class Report:
    """An analysis with its protocol.

    measured: program, bits, sampler, steps, images, seed: what the numbers are of. sensitivity is empty where it was
    not measured; `sensitivity_note` says how it was measured, or why not.
    """

    measured: Mapping[str, Any]
    sites: tuple[SiteAnalysis, ...]
    sensitivity: tuple[Sensitivity, ...] = ()
    sensitivity_note: str = ""
    all_sites_error: float | None = None

    def ranking(self) -> list[Sensitivity]:
        """Most sensitive first; ties in graph order."""
        return sorted(self.sensitivity, key=lambda s: -s.error)


_Number = Callable[[SiteRow], float | None]
NUMBERS: Mapping[str, tuple[_Number, _Number]] = {
    "max_over_rms": (lambda r: r.plain.max_over_rms, lambda r: r.rotated.max_over_rms if r.rotated else None),
    "kurtosis": (lambda r: r.plain.kurtosis, lambda r: r.rotated.kurtosis if r.rotated else None),
    "snr_db": (lambda r: r.plain.snr_db, lambda r: r.rotated.snr_db if r.rotated else None),
}
"""Each number of a row, before and after rotation."""


def summary(report: Report) -> dict[str, Any]:
    """Counts, and medians over the sites that the plan rotates of their medians over timesteps."""
    rotated = [site for site in report.sites if site.plan.block]
    data: dict[str, Any] = {
        "sites": len(report.sites),
        "quantised": sum(site.plan.quantised for site in report.sites),
        "rotated": len(rotated),
    }
    for name, (before, after) in NUMBERS.items():
        data[name] = {"before": _middle(rotated, before), "after": _middle(rotated, after)}
    data["snr_gain_db"] = _gain(rotated)
    data["weight_snr_db"] = _median([site.weight.snr_db for site in report.sites if site.plan.quantised])
    data["all_sites_error"] = report.all_sites_error
    data["most_sensitive"] = [{"site": s.site, "error": s.error} for s in report.ranking()[:3]]
    return data


def _gain(sites: list[SiteAnalysis]) -> dict[str, Any] | None:
    """What rotation adds to a site's SNR, in dB: the median, and the site that gains most."""
    gains = {}
    for site in sites:
        before, after = (site.median(number) for number in NUMBERS["snr_db"])
        if before is not None and after is not None:
            gains[site.plan.site] = after - before
    if not gains:
        return None
    best = max(gains, key=gains.__getitem__)
    return {"median": median(gains.values()), "most": gains[best], "most_site": best}


def _middle(sites: list[SiteAnalysis], value: _Number) -> float | None:
    return _median([site.median(value) for site in sites])


def _median(values: list[float | None]) -> float | None:
    found = [v for v in values if v is not None]
    return median(found) if found else None


def report_data(report: Report) -> dict[str, Any]:
    """The whole analysis as plain data for JSON; what is undefined is null."""
    return {
        "measured": dict(report.measured),
        "summary": summary(report),
        "sensitivity_note": report.sensitivity_note,
        "sensitivity": [asdict(s) for s in report.ranking()],
        "sites": [asdict(site) for site in report.sites],
    }


def csv_text(report: Report) -> str:
    """One row a site and timestep, in graph order; empty cells for what is undefined."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for site in report.sites:
        for row in site.rows:
            writer.writerow(_csv_row(site, row))
    return file.getvalue()


def _csv_row(site: SiteAnalysis, row: SiteRow) -> list[object]:
    bases = [row.plain, row.rotated]
    numbers = [[None] * 4 if b is None else [b.max_over_rms, b.kurtosis, b.scale, b.snr_db] for b in bases]
    head = [row.timestep, row.values, row.max_abs, row.rms, str(site.bits), site.plan.block, site.block]
    tail = [row.program_scale, row.program_snr_db]
    return [plain_cell(site.plan.site), *map(_cell, [*head, *numbers[0], *numbers[1], *tail])]


def _cell(value: object) -> object:
    return f"{value:.7g}" if isinstance(value, float) and math.isfinite(value) else "" if value is None else value


def plain_cell(text: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in tuple("=+-@\t\r") else text


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all.

    Raises:
        ArtefactError: if it cannot be written.
    """
    write_file(path, text.encode("utf-8", "backslashreplace"))
