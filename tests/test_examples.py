"""The scripts in examples/ run as they are."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import PeftModel

from fedsea.checkpoints import load_whole_model
from fedsea.server import ServerProcess

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def server(small: str) -> Iterator[ServerProcess]:
    with ServerProcess(small, threads=1, secure=True) as process:
        yield process


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda script: script.stem)
def test_an_example_trains_a_whole_adapter(script: Path, small: str, server: ServerProcess, tmp_path: Path) -> None:
    options = ["--model", small, "--server", server.address, "--credentials", server.connection["credentials"]]
    done = subprocess.run(
        [sys.executable, str(script), *options, "--steps", "2", "--output", "out"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    adapted = PeftModel.from_pretrained(load_whole_model(small), str(tmp_path / "out" / "adapter"))
    trained = [name for name, weight in adapted.named_parameters() if "lora_B" in name and bool(weight.any())]
    assert len(trained) == 4 * 4  # every layer's, A's, B's and C's
