"""Conversions of GGUF files in a cache of their own."""

from pathlib import Path

import pytest

from fedsea.checkpoints.convert import convert


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's conversions are."""
    monkeypatch.setenv("FEDSEA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def conversions(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files converted: in this process, where starting Python does not take most of the time."""
    done: list[Path] = []

    def run(source: Path, made: Path) -> None:
        done.append(source)
        convert(source, made)

    monkeypatch.setattr("fedsea.checkpoints.gguf._run_converter", run)
    return done
