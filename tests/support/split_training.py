"""Training a split model and the whole one side by side, from one adapter: what the tests of training share."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from fedsea import SplitModelForCausalLM
from fedsea.checkpoints import load_whole_model
from tests.conftest import Place, connect

LENGTHS = (12, 9, 4, 7)
Batch = dict[str, torch.Tensor]
Twins = tuple[SplitModelForCausalLM, Any]
"""A split model and PEFT's whole one, from one adapter, in training mode."""


def lora(**more: Any) -> LoraConfig:
    """A small adapter, with fields replaced."""
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | more))


def batch(seed: int = 0, lengths: Iterable[int] = LENGTHS, *, left: bool = False) -> Batch:
    """A padded batch with labels."""
    lengths = list(lengths)
    width = max(lengths)
    ids = torch.randint(3, 256, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
        if not left:
            mask[row] = mask[row].flip(0)
    # The first token of a row has nothing before it, but padding at the left: what that predicts means nothing.
    learnt = (mask.cumsum(1) > 1) & (mask == 1)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~learnt, -100)}


def batches(count: int, **how: Any) -> list[Batch]:
    """Batches with different texts."""
    return [batch(seed, **how) for seed in range(count)]


def adapted(server: Place | str, config: LoraConfig | None = None, **how: Any) -> SplitModelForCausalLM:
    """A split model with an adapter, in training mode."""
    more = {key: how.pop(key) for key in ("run", "take_up") if key in how}
    model = connect(server, **how)
    model.add_adapter(config if config is not None else lora(), seed=1, **more)
    model.train()
    model.micro_batches = 2
    return model


def whole_twin(model: SplitModelForCausalLM, folder: Path, name: str = "random:tiny") -> Any:
    """PEFT on the whole model, with the same adapter, in training mode."""
    model.save_adapter(folder)
    whole = load_whole_model(name, device=model.device)
    return PeftModel.from_pretrained(whole, str(folder), is_trainable=True).train()


@contextmanager
def twins(server: Place, folder: Path, *how: Any, name: str = "random:tiny", **more: Any) -> Iterator[Twins]:
    """Both models; arguments as `adapted` has them."""
    with adapted(server, *how, name=name, **more) as model:
        yield model, whole_twin(model, folder, name)


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# Adam divides a gradient by its own size, so one that is nothing but rounding moves a weight as far as any other. What
# is added to the size bounds that: gradients that are 1e-7 apart move weights by 5e-3 * 1e-7 / 1e-4 = 5e-6 apart.
EPS = 1e-4


def adamw(parameters: Any, **how: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **({"lr": 5e-3, "weight_decay": 0.01, "eps": EPS} | how))


def train(
    model: Any,
    data: list[Batch],
    *,
    make: Callable[[Any], torch.optim.Optimizer] = adamw,
    optimizer: torch.optim.Optimizer | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    set_to_none: bool = True,
) -> list[float]:
    """Train for as many steps as the data has batches; gives each batch's loss and each step's norm."""
    optimizer = make(trained(model)) if optimizer is None else optimizer
    rate = schedule(optimizer) if schedule is not None else None
    seen = []
    for number, one in enumerate(data, 1):
        loss = model(**one).loss
        (loss / accumulate).backward()
        seen.append(loss.detach().item())
        if number % accumulate == 0:
            if clip is not None:
                seen.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
            optimizer.step()
            if rate is not None:
                rate.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    return seen


def trl_settings(folder: Path, **more: Any) -> dict[str, Any]:
    """Arguments of a TRL configuration for a few steps on the CPU."""
    few: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "logging_steps": 1}
    plain: dict[str, Any] = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "seed": 0}
    kept: dict[str, Any] = {"output_dir": str(folder), "gradient_checkpointing": False, "save_strategy": "no"}
    return few | plain | kept | more
