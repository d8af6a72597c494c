"""What is asked before something is drawn: a library, which is an extra, and the name of a picture."""

import importlib.util
from pathlib import Path

from hqc.errors import EvaluationError, RuntimeMissingError
from hqc.storage import refuse_existing_file

__all__ = ["check_chart", "require_drawing", "require_picture"]


def require_drawing(library: str, where: str) -> None:
    """Refuses what draws with matplotlib or plotly where that is missing, before any long work.

    Raises:
        RuntimeMissingError: if the library is missing.
    """
    if importlib.util.find_spec(library) is None:
        raise RuntimeMissingError(where, f"{library} is not installed", "Run `pip install 'hqc[report]'`.")


def require_picture(chart: Path) -> None:
    """Refuses a chart that is no picture.

    Raises:
        EvaluationError: if its name ends in neither .png nor .svg.
    """
    if chart.suffix.lower() not in (".png", ".svg"):
        raise EvaluationError(f"--chart {chart}", "is neither .png nor .svg", "Give one of them.")


def check_chart(path: Path, *, force: bool) -> None:
    """Refuses another suffix than .png or .svg, a file that is there, and no matplotlib, before long work starts.

    Raises:
        EvaluationError: for the suffix. ArtefactError: for the file. RuntimeMissingError: for matplotlib.
    """
    require_picture(path)
    refuse_existing_file(path, force=force)
    require_drawing("matplotlib", "--chart")
