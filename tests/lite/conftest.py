"""Every kind of pipeline, exported once."""

from pathlib import Path

import pytest
from tiny_pipeline import saved_pipeline, traced_pipeline

from hqc.export.pipeline_folder import export_pipeline


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(source, export) by what a pipeline is asked with; nothing in them is to be changed."""
    work, found = tmp_path_factory.mktemp("exported"), {}
    names = {"classes": "classes", "labels": "dit", "prompts": "sd15", "encoders": "sdxl", "nothing": "nothing"}
    for kind, name in names.items():
        found[kind] = saved_pipeline(name), work / kind
        export_pipeline(traced_pipeline(name), "portable", work / kind, pipeline=saved_pipeline(name))
    return found
