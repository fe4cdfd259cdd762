"""One point of the frontier: a model fine-tuned under a mechanism, what it is worth, and what is read of its sessions.

The training goes through a real block server, and so does the evaluation, each under the mechanism. Then the client
sends the task's validation texts, with the adapter, to a provider that keeps what it sees, and attacks read that.

What a point has to be better than is a client that asks nobody: its own blocks, fine-tuned with the middle left out.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fedsea.audit.attacks import get_attack
from fedsea.audit.knowledge import Knowledge, KnownAdapter, SharedKnowledge
from fedsea.audit.limits import Limit, find_limits
from fedsea.audit.observation import Observation, Subject
from fedsea.audit.observe import observe_sessions
from fedsea.audit.plan import Plan
from fedsea.audit.scores import score
from fedsea.checkpoints import load_tokenizer, load_whole_model, open_checkpoint
from fedsea.client.model import SplitModelForCausalLM
from fedsea.errors import FedSEAError, NonFiniteError
from fedsea.partition import PROJECT, Partition
from fedsea.parts.cut_files import read_cut
from fedsea.privacy import GaussianNoise, Noise, parse_mechanism
from fedsea.server.process import ServerProcess
from fedsea.tasks import Example, encode, evaluate
from fedsea.tasks.base import LabelTask
from fedsea.tasks.encoding import encode_prompt
from fedsea.training.batches import Batches
from fedsea.training.folder import RunFolder
from fedsea.training.loop import FineTuning
from fedsea.training.recipe import Recipe
from fedsea_bench.quality import train_whole
from fedsea_bench.workbench import Workbench

ATTACKS = ("prior", "nearest", "search", "search-map", "read-out", "decoder")
FLOOR = "prior"
RANK = 8
ALONE = "alone"
LAST_STEPS = 10  # over which the loss at a training's end is averaged


@dataclass(frozen=True)
class Size:
    """How much is done for a point.

    Attributes
    ----------
    steps, batch_size, lr
        Of the training.
    max_tokens
        Longest text, in training and evaluation.
    examples
        Of the validation split that are scored; None for all.
    texts, tokens
        Of the validation split that are attacked, and how many tokens of each: those after what all texts begin with.
    modules, dtype
        The linear modules that have LoRA, in all three parts, and what all parts compute in.
    attacks, with_adapter
        By attackers who know the public weights, and by such who have the client's adapter as well.
    """

    steps: int
    batch_size: int
    lr: float
    max_tokens: int
    examples: int | None
    texts: int
    tokens: int
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    dtype: str = "bfloat16"
    attacks: tuple[str, ...] = ATTACKS
    with_adapter: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """What is measured: a mechanism as users write it, after so many input layers, once.

    Attributes
    ----------
    mechanism
        Empty for none; `ALONE` for nothing sent at all.
    output_layers
        One for all that is attacked: what is read of the text does not depend on it.
    """

    mechanism: str
    input_layers: int
    seed: int = 0
    output_layers: int = 1

    @property
    def partition(self) -> Partition:
        """Where the model is cut."""
        return Partition(self.input_layers, self.output_layers)

    @property
    def noise(self) -> Noise:
        """The mechanism, not calibrated."""
        return parse_mechanism(self.mechanism or "gaussian:std=0")

    def __str__(self) -> str:
        cuts = f"p = {self.input_layers}" + (f", q = {self.output_layers}" if self.mechanism == ALONE else "")
        return f"{self.mechanism or 'no noise'}, {cuts}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What came of a point.

    Attributes
    ----------
    metrics
        The task's, and `answer_loss`.
    majority
        The main metric of always giving the most frequent label.
    read, read_with_adapter
        Share of tokens that each attack names; empty without a mechanism.
    bits, bound
        What a token's state carries at most, and the share of such tokens that anybody could name then; of a mechanism
        that clips, the bits are a guarantee. `bound` is 1 where nothing is ruled out.
    first_loss, last_loss
        Of the training: of its first step, and the mean of its last.
    seconds
        It took.
    error
        Why the training broke off; empty if it did not.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    majority: float = 0.0
    read: dict[str, float] = field(default_factory=dict)
    read_with_adapter: dict[str, float] = field(default_factory=dict)
    bits: float = 0.0
    bound: float = 1.0
    first_loss: float = 0.0
    last_loss: float = 0.0
    seconds: float = 0.0
    error: str = ""

    @property
    def best(self) -> str:
        """The attack that reads most, among those that look."""
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


def measure(bench: Workbench, server: ServerProcess, task: LabelTask, data: Path, point: Point, size: Size) -> Outcome:
    """Fine-tune, evaluate, attack.

    Raises
    ------
    FedSEAError
        Whatever is wrong with the model, the task's files or the server.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fedsea-bench-") as scratch:
        folder = RunFolder(Path(scratch) / "run", _unheard)
        try:
            if point.mechanism == ALONE:
                made = _alone(bench, task, data, point, size)
            else:
                made = _trained(bench, server, task, data, point, size, folder)
        except NonFiniteError as error:
            return Outcome(error=str(error), seconds=round(time.monotonic() - began, 1))
        # Without a mechanism a search reads everything, and alone there is nothing to read: their scores are wanted.
        bare = point.mechanism in ("", ALONE)
        attacked = {} if bare else _attacked(bench, task, data, point, size, folder.adapter)
    return replace(made, **attacked, seconds=round(time.monotonic() - began, 1))


def _trained(
    bench: Workbench, server: ServerProcess, task: LabelTask, data: Path, point: Point, size: Size, folder: RunFolder
) -> Outcome:
    """The adapter, in the folder, and what the model is worth with it."""
    recipe, batches, lora = _recipe(bench, task, data, point, size)
    losses: list[float] = []
    with SplitModelForCausalLM.from_pretrained(
        bench.settings.model,
        partition=point.partition,
        noise=point.noise,
        dtype=size.dtype,
        notice=_unheard,
        **server.connection,
    ) as model:
        model.add_adapter(lora, run=folder.begin({"task": task.name}), seed=point.seed)
        training = FineTuning(model, batches, recipe, folder, lora=lora, base_model=None, notice=_unheard)
        training.run(lambda figures: losses.append(figures.loss))
        outcome = _scored(bench, model, task, data, size, losses)
        model.end_run()
    return outcome


def _alone(bench: Workbench, task: LabelTask, data: Path, point: Point, size: Size) -> Outcome:
    """What the client's blocks are worth by themselves: the first ones straight to the last, trained by PEFT."""
    recipe, batches, lora = _recipe(bench, task, data, point, size)
    whole = load_whole_model(bench.settings.model, dtype=getattr(torch, size.dtype), device="cpu")
    torch.manual_seed(point.seed)
    model: Any = get_peft_model(without_middle(whole, point.partition), lora)
    losses = train_whole(model, batches, recipe)
    model.eval()
    return _scored(bench, model, task, data, size, losses)


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


def _recipe(
    bench: Workbench, task: LabelTask, data: Path, point: Point, size: Size
) -> tuple[Recipe, Batches, LoraConfig]:
    tokenizer = load_tokenizer(bench.settings.model)
    encoded = [encode(task, example, tokenizer, size.max_tokens) for example in task.read(str(data), "train")]
    recipe = Recipe(size.steps, size.batch_size, lr=size.lr, warmup=size.steps // 10, seed=point.seed)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(size.modules))
    return recipe, Batches(encoded, size.batch_size, point.seed), lora


def _scored(bench: Workbench, model: Any, task: LabelTask, data: Path, size: Size, losses: Sequence[float]) -> Outcome:
    """A trained model's scores, beside how its training went."""
    tokenizer, examples = load_tokenizer(bench.settings.model), _validation(task, data, size)
    found = evaluate(model, tokenizer, task, examples, max_tokens=size.max_tokens, answer_loss=True)
    assert found.majority is not None
    return Outcome(
        metrics=found.metrics,
        majority=found.majority[1][task.metrics[0]],
        first_loss=losses[0],
        last_loss=statistics.mean(losses[-LAST_STEPS:]),
    )


def _attacked(
    bench: Workbench, task: LabelTask, data: Path, point: Point, size: Size, adapter: Path
) -> Mapping[str, Any]:
    """What is read of the validation texts' sessions, and what could be."""
    checkpoint = open_checkpoint(bench.settings.model)
    tokenizer = checkpoint.tokenizer()
    examples = _validation(task, data, size)[: size.texts]
    prompts = [list(encode_prompt(task, example, tokenizer, size.max_tokens).input_ids) for example in examples]
    start, end = _shared(prompts), len(_shared([ids[::-1] for ids in prompts]))
    cut = read_cut(adapter)
    plan = Plan(
        checkpoint,
        [tokenizer.decode(ids) for ids in prompts],
        partition=point.partition,
        # An adapter with a cut brings its mechanism, at the strengths of its training.
        noise=GaussianNoise(0.0) if cut is not None else point.noise,
        adapter=adapter,
    )
    whole, noise = observe_sessions(plan, checkpoint, prompts, lambda *_progress: None)
    # States depend on what is before them only, so a text may be attacked as far as one likes.
    subjects = [_first(one, min(len(start) + size.tokens, len(one.tokens) - end)) for one in whole]
    projection = cut[1][PROJECT] if cut is not None else None
    knowledge = Knowledge(
        SharedKnowledge(checkpoint, point.partition, tokenizer, projection=projection), noise, start=start
    )
    read = {name: _tokens_read(name, subjects, knowledge) for name in size.attacks}
    limit = _limit(subjects, knowledge)
    stronger: dict[str, float] = {}
    if size.with_adapter:
        known = KnownAdapter.read(adapter, checkpoint.config)
        shared = SharedKnowledge(checkpoint, point.partition, tokenizer, adapter=known, projection=projection)
        having = replace(knowledge, shared=shared)
        stronger = {name: _tokens_read(name, subjects, having) for name in size.with_adapter}
    return {"read": read, "read_with_adapter": stronger, "bits": limit.bits, "bound": limit.accuracy}


def _validation(task: LabelTask, data: Path, size: Size) -> list[Example]:
    return task.read(str(data), "validation")[: size.examples]


def _shared(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What all rows begin with, at most all but one token of the shortest: a chat template, a question's words."""
    shortest = min(map(len, rows)) - 1
    places = takewhile(lambda place: len({row[place] for row in rows}) == 1, range(shortest))
    return tuple(rows[0][place] for place in places)


def _first(subject: Subject, count: int) -> Subject:
    """A text's first tokens, as the provider sees them."""
    observations = tuple(
        Observation(one.sent[:count], one.returned[:count] if one.returned is not None else None)
        for one in subject.observations
    )
    return Subject(observations, subject.tokens[:count], count)


def _tokens_read(name: str, subjects: Sequence[Subject], knowledge: Knowledge) -> float:
    recoveries = get_attack(name).run([subject.observations for subject in subjects], knowledge)
    masks = [[place >= len(knowledge.start) for place in range(len(subject.tokens))] for subject in subjects]
    return score([subject.tokens for subject in subjects], recoveries, masks=masks)["tokens"].mean


def _limit(subjects: Sequence[Subject], knowledge: Knowledge) -> Limit:
    """The bound for texts like these after what all begin with: by the clip if there is one, else by the estimate."""
    known = max(len(knowledge.start), 1)
    limits = find_limits(knowledge, [subject.tokens for subject in subjects], known=known).limits
    of_text = [limit for limit in limits if limit.guessable]
    if not of_text:
        raise FedSEAError("the texts are too short to estimate what any attacker could read of them")
    return next((limit for limit in of_text if limit.bits_guaranteed), of_text[-1])


def _unheard(_message: str) -> None:
    pass
