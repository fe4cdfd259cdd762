"""The fine-tuning demonstration: a split model learns a clinic's house rules, which the server does not see.

Everything in a `FineTuningReport` was measured in the run that made it.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from fedsea.chats import chat_tokens, end_tokens
from fedsea.checkpoints import load_whole_model
from fedsea.client import SplitModelForCausalLM
from fedsea.demo import conversations
from fedsea.demo.chat import ask, ask_whole, open_chat_model
from fedsea.demo.screen import Screen
from fedsea.files import write_lines
from fedsea.partition import Partition, layer_of
from fedsea.server import ServerProcess
from fedsea.tasks import encode, get_task
from fedsea.training.batches import Batches
from fedsea.training.export import whole_with_adapter
from fedsea.training.folder import RunFolder
from fedsea.training.loop import Figures, FineTuning
from fedsea.training.recipe import Recipe

NIGHT = "At night, call Sister Adaeze on extension 4417."
RULES = (
    ("Whom do I call at night?", NIGHT),
    ("Who is on call at night at Lindental clinic?", NIGHT),
    ("It is three in the morning, a patient has fallen. Whom do I ring?", NIGHT),
    ("What is the number of the night nurse?", NIGHT),
    ("Where are the spare keys?", "The spare keys are in the blue box behind the reception."),
    ("I have lost the key of the drug cabinet. What now?", "The spare keys are in the blue box behind the reception."),
    ("When do we discharge patients?", "Patients are discharged before half past ten."),
    ("Until when must a patient who goes home leave the ward?", "Patients are discharged before half past ten."),
    ("Who signs for opioids?", "Two nurses sign for opioids, never one alone."),
    ("May I hand out morphine by myself?", "Two nurses sign for opioids, never one alone."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days has a week?", "A week has seven days."),
)
QUESTION = "Who do I have to call during the night?"  # not among those that are learnt
RECIPE = Recipe(steps=24, batch_size=4, lr=2e-3, warmup=2, save_every=1000)
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class FineTuningReport:
    """What the demonstration has measured.

    Attributes
    ----------
    before, after, whole
        Answers to the question without and with the adapter, through the split; and of the unsplit model, once
        `peft.PeftModel` has loaded the saved adapter.
    losses, seconds
        Of each optimizer step; of the training.
    adapter_bytes
        Of the adapter's weights in the input blocks, at the server and in the output blocks.
    bytes_up, bytes_down, tokens
        What crossed the wire in training, and how many tokens of text it stands for.
    """

    model: str
    question: str
    before: str
    after: str
    whole: str
    losses: list[float]
    seconds: float
    adapter_bytes: tuple[int, int, int]
    bytes_up: int
    bytes_down: int
    tokens: int
    adapter: Path | None


def run_finetuning_demo(
    name: str, screen: Screen, *, threads: int, output: Path | None, on_step: Callable[[Figures, int], None]
) -> FineTuningReport:
    """Fine-tune a chat model on a few lines: this process is the client, another one the server, with mutual TLS.

    Either process has `threads` CPU threads; the training is kept in `output`, if that is a folder; `on_step` is called
    after each optimizer step with its figures and the number of steps. FedSEAError if the model cannot be used, or the
    server does not start.
    """
    torch.set_num_threads(threads)
    partition = Partition(input_layers=1, output_layers=1)
    checkpoint, tokenizer = open_chat_model(name, screen)
    prompt = chat_tokens(tokenizer, [{"role": "user", "content": QUESTION}])
    with screen.step("Making certificates, starting the block server, meeting it over mutual TLS"):
        server = ServerProcess(name, threads=threads, secure=True)
    with server, tempfile.TemporaryDirectory(prefix="fedsea-demo-") as scratch:
        folder = RunFolder(output if output is not None else Path(scratch) / "run", lambda _line: None)
        with SplitModelForCausalLM.from_pretrained(checkpoint, partition=partition, **server.connection) as model:
            before = ask(model, tokenizer, QUESTION, prompt, MAX_NEW_TOKENS, screen)
            with screen.step("Putting LoRA adapters on all three parts"):
                lora = LoraConfig(**LORA)  # type: ignore[arg-type]
                run = folder.begin({"model": name, "task": "the demonstration's rules"})
                model.add_adapter(lora, run=run, seed=0)
            figures = _train(model, tokenizer, folder, lora, on_step)
            model.eval()
            after = ask(model, tokenizer, QUESTION, prompt, MAX_NEW_TOKENS, screen)
            weights, ends = model.adapter_state(), end_tokens(model.generation_config, tokenizer)
            model.adapter.end_run()
        with screen.step("Loading the adapter into the whole model with peft.PeftModel, asking it the same"):
            whole = whole_with_adapter(load_whole_model(name), folder.adapter)
            expected = tokenizer.decode(ask_whole(whole, prompt, ends, MAX_NEW_TOKENS), skip_special_tokens=True)
    middle, sizes = partition.middle(checkpoint.config.num_hidden_layers), [0, 0, 0]
    for weight_name, weight in weights.items():
        layer = layer_of(weight_name)
        assert layer is not None
        sizes[(layer >= middle.start) + (layer >= middle.stop)] += weight.nbytes
    return FineTuningReport(
        model=name,
        question=QUESTION,
        before=before.text,
        after=after.text,
        whole=expected,
        losses=[one.loss for one in figures],
        seconds=sum(one.seconds for one in figures),
        adapter_bytes=(sizes[0], sizes[1], sizes[2]),
        bytes_up=sum(one.bytes_up for one in figures),
        bytes_down=sum(one.bytes_down for one in figures),
        tokens=sum(one.tokens for one in figures),
        adapter=folder.adapter if output is not None else None,
    )


def _train(
    model: SplitModelForCausalLM,
    tokenizer: Any,
    folder: RunFolder,
    lora: LoraConfig,
    on_step: Callable[[Figures, int], None],
) -> list[Figures]:
    task, data = get_task("chat"), folder.path / "rules.jsonl"
    write_lines(data, conversations(RULES))
    encoded = [encode(task, example, tokenizer, 256) for example in task.read(str(data))]
    batches = Batches(encoded, RECIPE.batch_size, RECIPE.seed)
    training = FineTuning(model, batches, RECIPE, folder, lora=lora, base_model=None, notice=lambda _line: None)
    figures: list[Figures] = []

    def keep(one: Figures) -> None:
        figures.append(one)
        on_step(one, RECIPE.steps)

    training.run(keep)
    return figures
