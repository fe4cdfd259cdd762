"""The whole model in one process: the independent reference of benches and tests."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedsea.checkpoints.base import Checkpoint
from fedsea.checkpoints.folder import FolderCheckpoint
from fedsea.checkpoints.quiet import quiet_transformers
from fedsea.errors import ModelNotFoundError


def whole_model(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """The whole model of a checkpoint as transformers' own module, in evaluation mode.

    Stored checkpoints go through transformers' `from_pretrained`, so that nothing of FedSEA's reading is involved.
    """
    if isinstance(checkpoint, FolderCheckpoint):
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.whole_folder(),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        model, report = loaded
        # transformers gives such weights random numbers and goes on.
        _require_none_missing(sorted(report["missing_keys"]), checkpoint.name)
        for name, stored, needed in sorted(report["mismatched_keys"]):
            raise ModelNotFoundError(
                f"{checkpoint.name}: weight {name} has shape {list(stored)}; "
                f"the model of its configuration needs {list(needed)}"
            )
        return model.to(device).eval()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(checkpoint.config, dtype=dtype)
    fill_computed(model, model, device)
    model.load_state_dict(
        dict(checkpoint.load(checkpoint.tensor_names(), dtype=dtype, device=device)), strict=False, assign=True
    )
    model.tie_weights()
    model.generation_config = checkpoint.generation_config
    tensors = [*model.named_parameters(), *model.named_buffers()]
    _require_none_missing([name for name, tensor in tensors if tensor.is_meta], checkpoint.name)
    return model.eval()


def fill_computed(model: PreTrainedModel, among: nn.Module, device: torch.device | str) -> None:
    """Give the buffers of some of a model's modules that no checkpoint stores their values: rotary frequencies.

    Weights that such a module has as well are set to a random start: they are loaded afterwards.
    """
    for module in among.modules():
        held = ((name, module._buffers[name]) for name in module._non_persistent_buffers_set)
        computed = {name: torch.zeros_like(one, device="cpu") for name, one in held if one is not None}
        module._buffers.update(computed)
        if computed:
            model._init_weights(module)
        filled = dict(module.named_buffers(recurse=False))
        module._buffers.update({name: filled[name].to(device) for name in computed})


def _require_none_missing(missing: list[str], name: str) -> None:
    if missing:
        raise ModelNotFoundError(f"{name} does not fill the model: it lacks {', '.join(missing[:3])}")
