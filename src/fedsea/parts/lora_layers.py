"""PEFT's own LoRA modules: which linear modules a `LoraConfig` picks, and how they are put on."""

import copy
import re
import warnings
from collections.abc import Mapping

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fedsea.errors import UsageError
from fedsea.partition import layer_of

Targets = Mapping[str, tuple[int, float]]
"""Rank and alpha of each adapted linear module, by the module's name in the whole model."""

_FIELDS = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"}
_FIELDS |= {"layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights"}
# Say nothing about the weights: bookkeeping, and how a given target runs.
_FIELDS |= {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_FIELDS |= {"inference_mode", "megatron_core", "runtime_config", "ensure_weight_tying", "qalora_group_size"}
_FIELDS |= {"fan_in_fan_out"}  # PEFT sets it by the kind of the module


def find_targets(lora: LoraConfig, config: PreTrainedConfig, *, fresh: bool) -> Targets:
    """What a `LoraConfig` means for a model: PEFT itself picks the targets, on a model without weights.

    An adapter that is not `fresh` has weights already, and how they once began does not matter. A UsageError if the
    configuration, which may come from a stranger's file, asks for what cannot be trained through the split.
    """
    if not isinstance(lora, LoraConfig):
        raise UsageError(f"the adapter must be a peft.LoraConfig; got {type(lora).__name__}")
    _refuse_unsupported(lora, fresh=fresh)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    try:
        # Not by PEFT's low_cpu_mem_usage: it patches torch for all threads, and others may be building modules.
        with torch.device("meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(copy.deepcopy(lora), whole, "default")
        targets = {
            name: (module.r["default"], float(module.lora_alpha["default"]))
            for name, module in whole.named_modules()
            if hasattr(module, "lora_A") and "default" in getattr(module, "r", {})
        }
    except Exception as error:  # of any kind
        raise UsageError(f"PEFT refuses the adapter's configuration: {error}") from None
    outside = [name for name in targets if layer_of(name) is None]
    if outside:
        raise UsageError(f"adapters go on the linear modules of decoder layers; leave out {', '.join(sorted(outside))}")
    return targets


def inject(module: nn.Module, targets: Targets, adapter: str, **options: float) -> None:
    """Put PEFT's modules on linear modules of a part; only they are trainable. `options` are a `LoraConfig`'s."""
    lora = LoraConfig(
        r=1,
        target_modules=sorted(targets),
        rank_pattern={re.escape(name): rank for name, (rank, _) in targets.items()},
        alpha_pattern={re.escape(name): alpha for name, (_, alpha) in targets.items()},
        **options,  # type: ignore[arg-type]
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(lora, module, adapter)
    module.train(module.training)  # PEFT's new modules think they are in training


def _refuse_unsupported(lora: LoraConfig, *, fresh: bool) -> None:
    default = LoraConfig()
    for name, value in vars(lora).items():
        if name not in _FIELDS and (value or None) != (getattr(default, name, None) or None):
            raise UsageError(f"{name}={value!r} is not supported by a split model; leave it out of the LoraConfig")
    # Other starts than these change the base weights, and the adapter means nothing without that.
    if lora.init_lora_weights not in (True, "gaussian") and (fresh or lora.init_lora_weights is not False):
        raise UsageError(
            f"init_lora_weights={lora.init_lora_weights!r} is not supported by a split model; use True or 'gaussian'"
        )
