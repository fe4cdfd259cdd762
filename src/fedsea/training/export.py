"""From a training to what others can use: a PEFT adapter, or the whole model with the adapter merged in.

A narrow cut goes with its adapter, and can neither be merged nor be loaded by PEFT: `with_cut` runs a whole model
through one.
"""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedsea.checkpoints import load_whole_model, open_checkpoint
from fedsea.checkpoints.quiet import quiet_transformers
from fedsea.errors import ModelMismatchError, UsageError
from fedsea.partition import LIFT, PROJECT
from fedsea.parts.adapter_files import CONFIG, WEIGHTS, read_adapter, save_adapter, write_card
from fedsea.parts.cut_files import CUT, CUT_WEIGHTS, read_cut
from fedsea.parts.narrow import project
from fedsea.parts.structure import structure_of
from fedsea.text import one_line
from fedsea.training.folder import RUN, RunFolder


def find_adapter(source: Path) -> Path:
    """The adapter of a training's output folder (of its last checkpoint, if it is not done), or the folder itself."""
    if (source / RUN).is_file():
        folder = RunFolder(source, lambda _line: None)
        if (folder.adapter / WEIGHTS).is_file():
            return folder.adapter
        if (last := folder.checkpoints.latest()) is not None:
            return last
        raise UsageError(f"the training in {source} has no checkpoint yet")
    if (source / CONFIG).is_file():
        return source
    raise UsageError(f"{source} is neither a training's output folder nor an adapter")


def export_adapter(source: Path, out: Path, ends: Mapping[str, Tensor] | None = None) -> bool:
    """Write a training's adapter as a standard PEFT adapter of the whole model, and a narrow cut beside it.

    Returns whether there is a narrow cut: PEFT alone does not make the trained model of it then.

    Parameters
    ----------
    ends
        Weights by names of the whole model that take the place of the adapter's own.

    Raises
    ------
    UsageError, ModelMismatchError
        If there is no adapter, it has no such weights, or `out` cannot be written or is taken.
    """
    adapter = find_adapter(source)
    lora, weights = read_adapter(adapter)  # a damaged one is not passed on
    if ends is not None:
        for name, weight in ends.items():
            if name not in weights or weights[name].shape != weight.shape:
                raise ModelMismatchError(f"the ends do not belong to the adapter in {adapter}: {name} does not fit")
        save_adapter(_make(out), lora, {**weights, **ends}, lora.base_model_name_or_path)
        write_card(out, lora, lora.base_model_name_or_path)
        return False
    has_cut = read_cut(adapter) is not None
    _make(out)
    try:
        for name in (CONFIG, WEIGHTS, *([CUT, CUT_WEIGHTS] if has_cut else [])):
            shutil.copyfile(adapter / name, out / name)
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror}") from None
    write_card(out, lora, lora.base_model_name_or_path, has_cut=has_cut)
    return has_cut


def merge_adapter(source: Path, model: str, out: Path, *, dtype: torch.dtype, device: str = "cpu") -> None:
    """Write the whole model with a training's adapter merged into its weights, for users who may hold all of them.

    Raises
    ------
    ModelMismatchError, UsageError, ModelNotFoundError
        If the adapter is of another model, there is none, or it has a narrow cut; if the model has no weights; if `out`
        cannot be written or is taken.
    """
    adapter = find_adapter(source)
    read_adapter(adapter)
    if read_cut(adapter) is not None:
        raise UsageError(
            f"the adapter in {adapter} has a narrow cut, which no merged model can hold; use it as it is, by --adapter"
        )
    _make(out)
    whole = load_whole_model(model, dtype=dtype, device=device)
    merged = whole_with_adapter(whole, adapter, model).merge_and_unload()
    with quiet_transformers():
        merged.save_pretrained(str(out))
    open_checkpoint(model).tokenizer().save_pretrained(str(out))


def whole_with_adapter(whole: Any, adapter: Path, name: str = "the model", *, through_cut: bool = True) -> Any:
    """A whole model with an adapter, as PEFT loads it, and its narrow cut if it has one, in evaluation mode.

    Without `through_cut` only the adapter is on it, and `unload()` gives the model as it was.

    Raises
    ------
    ModelMismatchError
        If PEFT cannot load it, or adapter and model do not have the same weights; the message has the model's `name`.
    """
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing weights are an error below; deprecations are not the user's
            adapted: Any = PeftModel.from_pretrained(whole, str(adapter)).eval()
        with safe_open(adapter / WEIGHTS, "pt") as file:
            different = set(file.keys()) ^ set(get_peft_model_state_dict(adapted))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = one_line(str(error))
    else:
        if not different:
            if through_cut:
                with_cut(whole, adapter)
            return adapted
        reason = f"{len(different)} weights are only in one of them, such as {min(different)}"
    shown = reason if len(reason) <= 200 else reason[:200] + " …"
    raise ModelMismatchError(f"the adapter in {adapter} does not fit {name}: {shown}")


def with_cut(whole: Any, adapter: Path) -> None:
    """Have transformers' whole model go through the narrow cut beside an adapter, if there is one, without noise."""
    if (found := read_cut(adapter)) is None:
        return
    cut, weights = found

    def narrowed(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        down, up = (weights[name].to(inputs[0].device) for name in (PROJECT, LIFT))
        return project(project(inputs[0], down), up), *inputs[1:]

    layers: Any = whole.get_submodule(structure_of(whole.config).layers)
    layers[cut.input_layers].register_forward_pre_hook(narrowed)


def _make(out: Path) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already; choose another place")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror}") from None
    return out
