"""Hugging Face folders that several files of tests read."""

from pathlib import Path

import pytest

from tests import hf_models


@pytest.fixture(scope="package")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Hugging Face folder for each family, in float32."""
    folder = tmp_path_factory.mktemp("models")
    for family in (*hf_models.FAMILIES, *hf_models.MOES):
        hf_models.make(family, folder / family)
    return folder
