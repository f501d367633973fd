"""Files that are written whole or not at all."""

import os
from pathlib import Path

import pytest

from megatron_router_upcycling import files


@pytest.mark.parametrize("content", ["ä\n", b"\xc3\xa4\n"], ids=["text", "bytes"])
def test_a_file_takes_the_place_of_another(tmp_path: Path, content: str | bytes) -> None:
    (path := tmp_path / "file").write_text("before")
    files.write_whole(path, content)
    assert path.read_bytes() == b"\xc3\xa4\n" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (path := tmp_path / "file").write_text("before")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space"):
        files.write_whole(path, "after")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_versions() -> None:
    assert set(files.versions()) == {"python", "torch", "megatron-core", "megatron-router-upcycling"}
    assert files.versions("torch", "no-such-package")["no-such-package"] == "not installed"
