"""Fixtures for every test: the shared real data and model, where they are."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and a small pretrained model: $ASTRA_SHARED, or shared/ beside the checkout."""
    folder = Path(os.environ.get("ASTRA_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "models" / "stories260K").is_dir():
        pytest.skip("the shared real data and model are not here; set ASTRA_SHARED to their folder")
    return folder
