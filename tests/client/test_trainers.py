"""transformers' Trainer and TRL's SFTTrainer run on a split model as they are, with the whole model's numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from fedsea import Partition, SplitModelForCausalLM, load_tokenizer
from fedsea.checkpoints import load_whole_model
from fedsea.parts.adapter_files import read_adapter
from tests.conftest import RunningServer, StartServer, connect
from tests.support.comparing import assert_same_losses, assert_same_state, snapshot
from tests.support.raw_stream import prompt
from tests.support.split_training import Twins, adapted, lora, trl_settings, twins

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def texts(count: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in torch.randint(5, 12, (count,), generator=generator).tolist():
        ids = torch.randint(3, 256, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * length})
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    filling = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])
        for name, fill in filling.items()
    }


def trainer(model: Any, folder: Path, **more: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    arguments = TrainingArguments(**(settings | more))
    return Trainer(model=model, args=arguments, train_dataset=texts(32), eval_dataset=texts(4), data_collator=collate)


def logged(one: Trainer, *keys: str) -> list[float]:
    keys = keys or ("loss", "grad_norm")
    return [entry[key] for entry in one.state.log_history for key in keys if key in entry]


def test_trainer_gives_the_whole_models_losses_norms_and_evaluations(both: Twins, tmp_path: Path) -> None:
    numbers = []
    for name, one in zip(("split", "whole"), both, strict=True):
        run = trainer(one, tmp_path / name, eval_strategy="steps", eval_steps=2)
        run.train()
        numbers.append(logged(run, "loss", "grad_norm", "eval_loss"))
    assert len(numbers[0]) == 4 + 4 + 2
    assert_same_losses(*numbers)
    read, weights = read_adapter(tmp_path / "split" / "checkpoint-4")
    assert_same_state(weights, snapshot(both[0]))
    assert read.r == 4


def wrapped(server: RunningServer, seed: int, **more: Any) -> tuple[SplitModelForCausalLM, Any]:
    model = connect(server)
    torch.manual_seed(seed)
    return model, get_peft_model(model, lora(**more))


@pytest.mark.parametrize("more", [{}, {"lora_dropout": 0.2}, {"use_dora": True}], ids=["plain", "dropout", "DoRA"])
def test_a_peft_models_training_resumes_to_the_same_losses(
    tiny_server: RunningServer, tmp_path: Path, more: dict[str, Any]
) -> None:
    model, wrapping = wrapped(tiny_server, 5, **more)
    uninterrupted = trainer(wrapping, tmp_path)
    uninterrupted.train()
    other, again = wrapped(tiny_server, 6, **more)
    resumed = trainer(again, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed) == logged(uninterrupted)
    assert_same_state(snapshot(other), snapshot(model))
    loaded = PeftModel.from_pretrained(load_whole_model("random:tiny"), str(tmp_path / "checkpoint-4"))
    with torch.no_grad():
        reference = loaded(prompt()).logits
        torch.testing.assert_close(again.eval()(prompt()).logits, reference, atol=1e-4, rtol=0)
    model.close()
    other.close()


def test_a_peft_model_saves_loads_and_generates(tiny_server: RunningServer, tmp_path: Path) -> None:
    model, wrapping = wrapped(tiny_server, 5)
    run = trainer(wrapping, tmp_path, save_strategy="no")
    run.train()
    run.save_model(str(tmp_path / "saved"))
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    said = wrapping.eval().generate(input_ids=prompt(), **how)
    with connect(tiny_server, partition=Partition(2, 0)) as other:
        other.load_adapter(tmp_path / "saved", is_trainable=False)
        assert torch.equal(other.generate(prompt(), **how), said)
    with connect(tiny_server) as fresh:
        again = PeftModel.from_pretrained(fresh, str(tmp_path / "saved"))
        assert torch.equal(again.eval().generate(input_ids=prompt(), **how), said)
    model.close()


@pytest.fixture(scope="module")
def sentences() -> Any:
    from datasets import Dataset

    tokenizer = load_tokenizer("smollm2-135m")
    rows = [tokenizer(f"The quick brown fox jumps over the lazy dog number {number}.") for number in range(16)]
    return Dataset.from_dict({"input_ids": [[token % 250 for token in row["input_ids"]] for row in rows]})


def sft(model: Any, folder: Path, sentences: Any, **more: Any) -> list[float]:
    from trl import SFTConfig, SFTTrainer

    adapter = more.pop("peft_config", None)
    run = SFTTrainer(
        model=model,
        args=SFTConfig(**trl_settings(folder, **({"max_steps": 3, "learning_rate": 1e-2} | more))),
        train_dataset=sentences,
        processing_class=load_tokenizer("smollm2-135m"),
        peft_config=adapter,
    )
    run.train()
    run.save_model(str(folder / "saved"))
    return logged(run)


def test_sft_trainer_with_an_adapter_of_the_models_own(
    tiny_server: RunningServer, tmp_path: Path, sentences: Any
) -> None:
    config = lora(target_modules="all-linear", task_type="CAUSAL_LM")
    with twins(tiny_server, tmp_path / "start", config) as (model, whole):
        ours, theirs = sft(model, tmp_path / "split", sentences), sft(whole, tmp_path / "whole", sentences)
        assert_same_losses(ours, theirs, rtol=1e-4)
        assert_same_state(read_adapter(tmp_path / "split" / "saved")[1], snapshot(model))


def test_sft_trainer_with_a_peft_config_and_gradient_checkpointing(
    tiny_server: RunningServer, tmp_path: Path, sentences: Any
) -> None:
    losses = []
    for checkpointing in (False, True):
        with connect(tiny_server, partition=Partition(2, 1)) as model:
            torch.manual_seed(1)
            config = lora(task_type="CAUSAL_LM")
            folder = tmp_path / str(checkpointing)
            losses.append(sft(model, folder, sentences, peft_config=config, gradient_checkpointing=checkpointing))
            assert model.is_gradient_checkpointing == checkpointing
            weights = read_adapter(folder / "saved")[1]
            assert weights.keys() == model.adapter_state().keys()
    assert losses[0][-2] < losses[0][0] - 0.5
    assert_same_losses(*losses, rtol=1e-4)


def test_an_sft_trainer_of_a_float16_model_scales_its_gradients(
    serve: StartServer, tmp_path: Path, sentences: Any, tiny_server: RunningServer
) -> None:
    server = serve(dtype=torch.float16)
    with adapted(tiny_server) as exact, adapted(server, dtype="float16", wire_dtype=None) as half:
        expected, found = (sft(one, tmp_path / str(n), sentences) for n, one in enumerate((exact, half)))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-2, atol=0)
