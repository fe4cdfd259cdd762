"""Adapters on disk: standard PEFT folders of the whole model, whatever the partition they were trained in."""

import copy
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsea.checkpoints.names import ADAPTER_FILES, check_adapter
from fedsea.errors import ModelNotFoundError, UsageError
from fedsea.files import make_private, parse_json, replace_folder
from fedsea.partition import LIFT, PROJECT
from fedsea.parts.cut_files import CutRecord, read_cut, save_cut

(CONFIG, WEIGHTS), CARD = ADAPTER_FILES, "README.md"
PREFIX = "base_model.model."
HAS_CUT = "narrow_cut"  # in the metadata of an adapter's file: the adapter alone is not the model
MAGNITUDE = ".lora_magnitude_vector"  # DoRA's: PEFT's files leave the `.weight` behind it out


def save_adapter(
    folder: str | Path,
    lora: LoraConfig,
    weights: Mapping[str, Tensor],
    base_model: str | None,
    cut: CutRecord | None = None,
) -> None:
    """Write a PEFT adapter of the whole model, and the narrow cut that it was trained with beside it.

    Parameters
    ----------
    folder
        Made if it is not there.
    weights
        Of all layers, by names as `adapter_parameters` gives them; those of the cut among them.
    base_model
        The name under which the base model is found.

    Raises
    ------
    UsageError
        If the folder cannot be written.
    """
    config = copy.deepcopy(lora)
    config.base_model_name_or_path, config.inference_mode, config.task_type = base_model, True, "CAUSAL_LM"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        tensors = {
            PREFIX + (name.removesuffix(".weight") if MAGNITUDE in name else name): tensor.detach().cpu().contiguous()
            for name, tensor in weights.items()
            if name not in (PROJECT, LIFT)
        }
        more = {HAS_CUT: str(cut.rank)} if cut is not None else {}
        save_file(tensors, Path(folder) / WEIGHTS, metadata={"format": "pt", **more})
        save_cut(Path(folder), weights, cut)
        make_private(Path(folder))
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot write the adapter to {folder}: {error}") from None


def replace_adapter(folder: Path, lora: LoraConfig, weights: Mapping[str, Tensor], base_model: str | None) -> None:
    """`save_adapter` in place of the adapter that is there, which stays if that fails."""
    partial = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(partial, lora, weights, base_model)
    try:
        replace_folder(partial, folder)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}") from None


def write_card(
    folder: str | Path, lora: LoraConfig, base: str | None, partition: str | None = None, *, has_cut: bool = False
) -> None:
    """Write the model card of an adapter that is given away: its base model, what it is, how it is loaded."""
    known = base or "the base model that it was trained on, which has no name at a hub"
    chosen = lora.target_modules or ()
    targets = chosen if isinstance(chosen, str) else ", ".join(sorted(chosen))
    loads = f'AutoModelForCausalLM.from_pretrained("{base or "BASE-MODEL"}")'
    front = ["---", *([f"base_model: {base}"] if base else []), "library_name: peft", "tags: [lora, fedsea]", "---"]
    where = [f"- Trained through FedSEA with {partition}; it fits every other partition and the whole model."]
    use = ["```python", "from peft import PeftModel", "from transformers import AutoModelForCausalLM", ""]
    use += [f'model = PeftModel.from_pretrained({loads}, "THIS-FOLDER")', "```"]
    if has_cut:
        use = ["Its narrow cut lies beside it, so that PEFT alone does not make the trained model of it:", ""]
        use += ["`fedsea chat MODEL --server HOST:PORT --credentials DIR --adapter THIS-FOLDER`"]
    facts = [
        f"- Base model: {known}.",
        f"- LoRA: rank {lora.r}, alpha {lora.lora_alpha:g}, on {targets or 'no module'}.",
    ]
    lines = [*front, "", "# LoRA adapter", "", *facts, *(where if partition else []), "", "## Load it", "", *use, ""]
    try:
        (Path(folder) / CARD).write_text("\n".join(lines), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from None


def read_adapter(folder: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read a PEFT LoRA adapter; names are as `adapter_parameters` gives them. Those of a narrow cut are among them.

    Raises
    ------
    ModelNotFoundError
        If the folder is no PEFT adapter, or its files are damaged.
    UsageError
        If it is one of another kind than LoRA.
    """
    path = Path(folder)
    check_adapter(path)
    try:
        settings = parse_json((path / CONFIG).read_bytes())
        if not isinstance(settings, dict):
            raise ValueError(f"{CONFIG} is not an object")
        kind = settings.get("peft_type")
        if kind != "LORA":
            raise UsageError(f"{path} is a PEFT adapter of the kind {kind}; FedSEA takes LORA")
        config = LoraConfig.from_pretrained(str(path))
        tensors = load_file(path / WEIGHTS)
        with safe_open(path / WEIGHTS, "pt") as file:
            has_cut = HAS_CUT in (file.metadata() or {})
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ModelNotFoundError(f"the adapter in {path} cannot be read: {error}") from None
    cut = read_cut(path)
    if has_cut and cut is None:
        raise ModelNotFoundError(f"the adapter in {path} was trained with a narrow cut, whose files are not there")
    return config, (cut[1] if cut is not None else {}) | {
        name.removeprefix(PREFIX) + (".weight" if name.endswith(MAGNITUDE) else ""): tensor
        for name, tensor in tensors.items()
    }
