"""Every kind of pipeline, exported once."""

from pathlib import Path

import pytest
from exported_pipelines import SOURCES, exported


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(source, export) by what a pipeline is asked with; nothing in them is to be changed."""
    work = tmp_path_factory.mktemp("exported")
    return {name: exported(name, work / name) for name in SOURCES}
