"""TRL's trainers on a split model: the whole model's numbers, or one line when they are made."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model

from fedsea import SplitModelForCausalLM, load_tokenizer
from fedsea.checkpoints import load_whole_model
from fedsea.errors import UsageError
from tests.conftest import connect
from tests.support.comparing import assert_same_losses
from tests.support.refused import refused
from tests.support.split_training import lora, trl_settings, twins

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

PLAIN = [{"text": f"Locker {number} belongs to ward {number % 7}. " * (1 + number % 4)} for number in range(8)]
PREFERRED = [
    {"prompt": f"Whose is locker {number}?", "chosen": f" Ward {number}.", "rejected": f" I do not know {number}."}
    for number in range(8)
]
ASKED = [{"prompt": row["prompt"]} for row in PREFERRED]
NUMBERS = ("loss", "grad_norm", "kl", "rewards/margins", "eval_loss")


def logged(trainer: Any) -> list[float]:
    torch.manual_seed(0)
    trainer.train()
    return [entry[key] for entry in trainer.state.log_history for key in NUMBERS if key in entry]


def sft(model: Any, folder: Path, **more: Any) -> Any:
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**trl_settings(folder, **more)),
        train_dataset=Dataset.from_list(PLAIN),
        eval_dataset=Dataset.from_list(PLAIN[:4]) if "eval_steps" in more else None,
        processing_class=load_tokenizer("smollm2-135m"),
    )


def dpo(model: Any, folder: Path, ref_model: Any = None, peft_config: Any = None, **_more: Any) -> Any:
    return trl.DPOTrainer(
        model=model,
        ref_model=ref_model,
        args=trl.DPOConfig(**trl_settings(folder)),
        train_dataset=Dataset.from_list(PREFERRED),
        processing_class=load_tokenizer("smollm2-135m"),
        peft_config=peft_config,
    )


def many_letters(completions: list[str], **_more: Any) -> list[float]:
    return [len(set(text)) / 10 for text in completions]


def with_rewards(kind: str) -> Callable[..., Any]:
    def make(model: Any, folder: Path, peft_config: Any = None, beta: float = 0.5) -> Any:
        how = trl_settings(folder, num_generations=2, max_completion_length=5, beta=beta)
        return getattr(trl, f"{kind}Trainer")(
            model=model,
            reward_funcs=many_letters,
            args=getattr(trl, f"{kind}Config")(**how),
            train_dataset=Dataset.from_list(ASKED),
            processing_class=load_tokenizer("smollm2-135m"),
            peft_config=peft_config,
        )

    return make


def kto(model: Any, folder: Path, peft_config: Any = None) -> Any:
    judged = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": bool(number % 2)}
        for number, row in enumerate(PREFERRED)
    ]
    return trl.KTOTrainer(
        model=model,
        args=trl.KTOConfig(**trl_settings(folder)),
        train_dataset=Dataset.from_list(judged),
        processing_class=load_tokenizer("smollm2-135m"),
        peft_config=peft_config,
    )


OTHERS = {"DPO": dpo, "KTO": kto, "GRPO": with_rewards("GRPO"), "RLOO": with_rewards("RLOO")}


@pytest.fixture
def split(start_server: Any, small: str) -> Iterator[SplitModelForCausalLM]:
    with connect(start_server(small), small) as model:
        yield model


def whole_with(model: SplitModelForCausalLM, folder: Path, name: str) -> Any:
    model.save_adapter(folder)
    return PeftModel.from_pretrained(load_whole_model(name), str(folder), is_trainable=True)


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "packing_strategy": "wrapped", "max_length": 32},
        {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
        {"packing": True, "max_length": 48, "eval_strategy": "steps", "eval_steps": 1, "loss_type": "chunked_nll"},
    ],
    ids=["packing wrapped", "padding_free to a multiple", "packing, chunked and evaluated"],
)
def test_packed_rows_train_as_the_whole_model_does(
    start_server: Any, small: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    with twins(start_server(small), tmp_path / "start", name=small) as both:
        ours, theirs = (logged(sft(one, tmp_path / "out", **options)) for one in both)
        assert len(ours) >= 4
        assert_same_losses(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_trainer_with_a_reference_compares_with_the_model_without_its_adapter(
    split: SplitModelForCausalLM, small: str, tmp_path: Path, kind: str
) -> None:
    make = OTHERS[kind]
    trainer = make(split, tmp_path / "split", peft_config=lora(task_type="CAUSAL_LM"))
    whole = whole_with(split, tmp_path / "start", small)
    ours, theirs = logged(trainer), logged(make(whole, tmp_path / "whole"))
    assert len(ours) >= 6
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_reference_that_is_another_adapter_is_refused_when_the_trainer_is_made(
    split: SplitModelForCausalLM, tmp_path: Path, kind: str
) -> None:
    wrapped = get_peft_model(split, lora(task_type="CAUSAL_LM"))
    before = split.traffic.bytes_up
    with refused(UsageError, "one adapter"):
        OTHERS[kind](wrapped, tmp_path)
    assert split.traffic.bytes_up == before
    assert list(wrapped.peft_config) == ["default"]


def test_dpo_compares_with_a_second_split_model(
    split: SplitModelForCausalLM, start_server: Any, small: str, tmp_path: Path
) -> None:
    wrapped = get_peft_model(split, lora(task_type="CAUSAL_LM"))
    whole = whole_with(split, tmp_path / "start", small)
    with connect(start_server(small), small) as reference:
        ours = logged(dpo(wrapped, tmp_path / "split", ref_model=reference))
    theirs = logged(dpo(whole, tmp_path / "whole", ref_model=load_whole_model(small)))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-3, atol=1e-5)


def test_grpo_without_a_reference_trains_a_peft_model(split: SplitModelForCausalLM, small: str, tmp_path: Path) -> None:
    make = with_rewards("GRPO")
    wrapped = get_peft_model(split, lora(task_type="CAUSAL_LM"))
    whole = whole_with(split, tmp_path / "start", small)
    ours, theirs = (logged(make(one, tmp_path / "out", beta=0.0)) for one in (wrapped, whole))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-3, atol=1e-5)
