"""Reading and comparing weights, for the tests of checkpoints."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from fedsea.checkpoints import Checkpoint

WEIGHTS = "model.safetensors"
Weights = dict[str, torch.Tensor]


def run_python(script: str, *arguments: str) -> str:
    """What `script` prints in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def load_all(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Weights:
    return dict(checkpoint.load(checkpoint.tensor_names(), dtype=dtype))


def reference_weights(model: PreTrainedModel) -> Weights:
    """The weights of transformers' model, without the second name of a tied head."""
    stored = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: one for name, one in model.named_buffers() if name in stored}


def assert_same_weights(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    """Change the weights of a folder that has them in one file."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})
