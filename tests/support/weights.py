"""Reading and comparing weights, for the tests of checkpoints."""

import os
import subprocess
import sys

import torch
from transformers import PreTrainedModel

from fedsea.checkpoints import Checkpoint


def run_python(script: str, *arguments: str) -> str:
    """What `script` prints in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def load_all(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return dict(checkpoint.load(checkpoint.tensor_names(), dtype=dtype))


def reference_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of transformers' model, without the second name of a tied head."""
    return dict(model.named_parameters())


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
