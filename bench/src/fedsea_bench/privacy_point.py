"""One point of the frontier: a model fine-tuned under a mechanism, what it is worth, and what is read of its sessions.

The training goes through a real block server, and so does the evaluation, each under the mechanism. Then the client
sends the task's validation texts, with the adapter, to a provider that keeps what it sees, and attacks read that.

What a point has to be better than is a client that sends nothing: its own blocks, fine-tuned with the middle left out.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fedsea.audit.attacks import get_attack
from fedsea.audit.limits import find_limits
from fedsea.audit.plan import Plan
from fedsea.audit.run import Auditor
from fedsea.audit.samples import TaskText
from fedsea.checkpoints import load_whole_model
from fedsea.client import SplitModelForCausalLM
from fedsea.errors import FedSEAError, NonFiniteError
from fedsea.partition import Partition
from fedsea.parts.cut_files import read_cut
from fedsea.privacy import GaussianNoise, Noise, parse_mechanism
from fedsea.server import ServerProcess
from fedsea.training.batches import Batches
from fedsea.training.folder import RunFolder
from fedsea.training.loop import FineTuning
from fedsea.training.recipe import Recipe
from fedsea_bench.privacy_case import first_tokens
from fedsea_bench.task_case import LAST_STEPS, TaskCase
from fedsea_bench.training_case import train_whole
from fedsea_bench.workbench import Workbench

ATTACKS = ("prior", "nearest", "search", "search-map", "read-out", "decoder")
FLOOR = "prior"
RANK = 8
ALONE = "alone"


@dataclass(frozen=True)
class Size:
    steps: int  # of the training, like the next two
    batch_size: int
    lr: float
    max_tokens: int  # of a text, in training and evaluation
    examples: int | None  # of the validation split that are scored; None for all
    texts: int  # of the validation split that are attacked
    tokens: int  # of each of them, after what all texts begin with
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # that have LoRA, in all three parts
    dtype: str = "bfloat16"  # what all parts compute in
    attacks: tuple[str, ...] = ATTACKS  # by attackers who know the public weights
    with_adapter: tuple[str, ...] = ()  # by attackers who have the client's adapter as well


@dataclass(frozen=True)
class Point:
    """What is measured: a mechanism as users write it, after so many input layers, once.

    The mechanism is empty for none, and `ALONE` for nothing sent at all. What is read of the text does not depend on
    the output layers: there is one for all that is attacked.
    """

    mechanism: str
    input_layers: int
    seed: int = 0
    output_layers: int = 1

    @property
    def partition(self) -> Partition:
        return Partition(self.input_layers, self.output_layers)

    @property
    def noise(self) -> Noise:
        return parse_mechanism(self.mechanism or "gaussian:std=0")

    def __str__(self) -> str:
        cuts = f"p = {self.input_layers}" + (f", q = {self.output_layers}" if self.mechanism == ALONE else "")
        return f"{self.mechanism or 'no noise'}, {cuts}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    metrics: dict[str, float] = field(default_factory=dict)  # the task's, and `answer_loss`
    majority: float = 0.0  # the main metric of always giving the most frequent label
    read: dict[str, float] = field(default_factory=dict)  # share of tokens that each attack names; none without noise
    read_with_adapter: dict[str, float] = field(default_factory=dict)
    bits: float = 0.0  # that a token's state carries at most: guaranteed of a mechanism that clips
    bound: float = 1.0  # share of such tokens that any attacker could name; 1 where nothing is ruled out
    first_loss: float = 0.0  # of the training's first step
    last_loss: float = 0.0  # the mean of its last
    seconds: float = 0.0
    error: str = ""  # why the training broke off

    @property
    def best(self) -> str:
        """The attack that reads most, among those that use what was observed."""
        return max((name for name in self.read if name != FLOOR), key=lambda name: self.read[name])

    @property
    def above_prior(self) -> float:
        """Points of token accuracy that it reads above `prior`."""
        return 100 * (self.read[self.best] - self.read[FLOOR])

    @property
    def above_prior_with_adapter(self) -> float | None:
        """The same of attackers who have the adapter; None where none attacked."""
        if not self.read_with_adapter:
            return None
        return 100 * (max(self.read_with_adapter.values()) - self.read[FLOOR])


def measure(bench: Workbench, case: TaskCase, point: Point, size: Size) -> Outcome:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fedsea-bench-") as scratch:
        folder = RunFolder(Path(scratch) / "run", _ignore)
        try:
            alone = point.mechanism == ALONE
            made = (
                _alone(case, point, size)
                if alone
                else _trained(bench.serve("--dtype", size.dtype), case, point, size, folder)
            )
        except NonFiniteError as error:
            made = Outcome(error=str(error))
        # Without a mechanism a search reads everything, and alone there is nothing to read: their scores are wanted.
        if not made.error and point.mechanism not in ("", ALONE):
            made = _attacked(case, point, size, folder.adapter, made)
    return replace(made, seconds=round(time.monotonic() - began, 1))


def _trained(server: ServerProcess, case: TaskCase, point: Point, size: Size, folder: RunFolder) -> Outcome:
    """The adapter, in the folder, and what the model is worth with it."""
    recipe, batches, lora = _recipe(case, point, size)
    losses: list[float] = []
    with SplitModelForCausalLM.from_pretrained(
        case.model, partition=point.partition, noise=point.noise, dtype=size.dtype, notice=_ignore, **server.connection
    ) as model:
        model.add_adapter(lora, run=folder.begin({"task": case.name}), seed=point.seed)
        training = FineTuning(model, batches, recipe, folder, lora=lora, base_model=None, notice=_ignore)
        training.run(lambda figures: losses.append(figures.loss))
        outcome = _scored(case, model, losses)
        model.adapter.end_run()
    return outcome


def _alone(case: TaskCase, point: Point, size: Size) -> Outcome:
    """What the client's blocks are worth by themselves: the first ones straight to the last, trained by PEFT."""
    recipe, batches, lora = _recipe(case, point, size)
    whole = load_whole_model(case.model, dtype=getattr(torch, size.dtype), device="cpu")
    torch.manual_seed(point.seed)
    model: Any = get_peft_model(without_middle(whole, point.partition), lora)
    return _scored(case, model, train_whole(model, batches, recipe))


def without_middle(model: Any, partition: Partition) -> Any:
    """Take the middle blocks out of a whole model: what is left is the client's."""
    layers, config = model.model.layers, model.config
    kept = [*range(partition.input_layers), *range(len(layers) - partition.output_layers, len(layers))]
    model.model.layers = nn.ModuleList(layers[number] for number in kept)
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place  # of its keys and values in a cache
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in kept]
    config.num_hidden_layers = len(kept)
    return model


def _recipe(case: TaskCase, point: Point, size: Size) -> tuple[Recipe, Batches, LoraConfig]:
    recipe = Recipe(size.steps, size.batch_size, lr=size.lr, warmup=size.steps // 10, seed=point.seed)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(size.modules))
    return recipe, case.batches(size.batch_size, point.seed), lora


def _scored(case: TaskCase, model: Any, losses: Sequence[float]) -> Outcome:
    """A trained model's scores, beside how its training went."""
    found = case.evaluation(model)
    assert found.majority is not None
    majority = found.majority[1][case.task.metrics[0]]
    last = statistics.mean(losses[-LAST_STEPS:])
    return Outcome(metrics=found.metrics, majority=majority, first_loss=losses[0], last_loss=last)


def _attacked(case: TaskCase, point: Point, size: Size, adapter: Path, made: Outcome) -> Outcome:
    """With what is read of the validation texts' sessions, and what could be."""
    # An adapter with a cut brings its mechanism, at the strengths of its training.
    noise = GaussianNoise(0.0) if read_cut(adapter) is not None else point.noise
    texts = [TaskText(case.task, example) for example in case.read("validation")[: size.texts]]
    plan = Plan(texts, partition=point.partition, tokens=size.max_tokens, adapter=adapter)
    auditor = Auditor(case.model, plan)
    whole = auditor.observe(noise)
    prompts = [one.tokens for one in whole.subjects]
    # What all texts of the task begin with is public, their question's words included.
    start, end = _common(prompts), len(_common([ids[::-1] for ids in prompts]))
    knowledge = replace(whole.knowledge, start=start)
    # States depend on what is before them only, so a text may be attacked as far as one likes.
    subjects = [first_tokens(one, min(len(start) + size.tokens, len(one.tokens) - end)) for one in whole.subjects]
    observed = replace(whole, subjects=subjects, knowledge=knowledge)

    def share_read(name: str) -> float:
        return auditor.attack(get_attack(name), observed).prompt["tokens"].mean

    read = {name: share_read(name) for name in size.attacks}
    limits = find_limits(knowledge, [one.tokens for one in subjects], known=max(len(start), 1)).limits
    of_text = [limit for limit in limits if limit.guessable]
    if not of_text:
        raise FedSEAError("the texts are too short to estimate what any attacker could read of them")
    # By the clip if there is one, else by the estimate.
    limit = next((limit for limit in of_text if limit.bits_guaranteed), of_text[-1])
    if size.with_adapter:
        having = Auditor(auditor.checkpoint, replace(plan, attacker_has_adapter=True)).shared
        observed = replace(observed, knowledge=replace(knowledge, shared=having))
    stronger = {name: share_read(name) for name in size.with_adapter}
    return replace(made, read=read, read_with_adapter=stronger, bits=limit.bits, bound=limit.accuracy)


def _common(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What all rows begin with, at most all but one token of the shortest."""
    shortest = min(map(len, rows)) - 1
    places = takewhile(lambda place: len({row[place] for row in rows}) == 1, range(shortest))
    return tuple(rows[0][place] for place in places)


def _ignore(_message: str) -> None:
    pass
