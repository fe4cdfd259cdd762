"""One data owner's part in a federation: its model and data, kept ready between rounds."""

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor

from fedsea.checkpoints import Fingerprint, longest_text, open_checkpoint
from fedsea.client import SplitModelForCausalLM
from fedsea.errors import FedSEAError, ModelMismatchError, NonFiniteError, ProtocolError, TermsError
from fedsea.federation.arrays import Arrays
from fedsea.federation.owner.data import Texts, task_schema, tokenizer_of
from fedsea.federation.owner.participant_options import ParticipantOptions
from fedsea.federation.owner.prepared_models import NO_NOISE, PreparedModels
from fedsea.federation.owner.private_adapter import PrivateAdapter
from fedsea.federation.owner.shards import Sharding
from fedsea.federation.recipe import RECIPE_BOUNDS, LocalRecipe, lora_config
from fedsea.parts.adapter_files import replace_adapter
from fedsea.parts.adapters import AdapterSpec, adapter_parameters, misfit
from fedsea.privacy import LookLedger, parse_mechanism
from fedsea.tasks import evaluate, get_task
from fedsea.training.batches import Batches
from fedsea.training.loop import backpropagate
from fedsea.wire.rounds import Ticket


class Participant:
    """Reads its data once, loads its model at its first ticket, keeps both. One request at a time.

    Whatever a request holds is a coordinator's word, and checked. `on_step` gets each optimizer step's number in the
    round, from 1, and its loss; what it raises ends the round's training. Simulated clients share prepared `models`.
    """

    on_step: Callable[[int, float], None] | None = None

    def __init__(self, options: ParticipantOptions, models: PreparedModels | None = None) -> None:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.options = options
        self._ledger = LookLedger(options.looks, options.max_looks) if options.looks else None
        self._models = models if models is not None else PreparedModels(1)
        self._lock = threading.Lock()
        self._next_batch = 0
        parse_mechanism(options.noise or NO_NOISE)  # what is wrong with it shows before anything is loaded
        config, self._fingerprint = _model_facts(options.model)
        options.partition.middle(config.num_hidden_layers)
        self._task = get_task(options.task)
        sharding = Sharding.parse(options.shard, options.shard_seed) if options.shard else None
        tokens = min(options.max_tokens, longest_text(config))
        self._texts = Texts(self._task, options.data, sharding, options.name, options.model, tokens)
        Batches(self._texts.train, 1, 0)  # something to learn is there

    def describe(self) -> dict[str, Any]:
        """What the coordinator compares clients by: JSON. No text and no label is in it."""
        return {
            "name": self.options.name,
            "partition": [self.options.partition.input_layers, self.options.partition.output_layers],
            "examples": len(self._texts.train),
            "fingerprint": self._fingerprint.to_json(),
            "task": self._task.name,
            "schema": task_schema(self._task),
            "lora": dict(self.options.lora) if self.options.lora is not None else None,
        }

    def train(self, body: Mapping[str, Any], weights: Arrays) -> tuple[dict[str, Any], Arrays]:
        """Take part in a round; at an error the seat is given up.

        Parameters
        ----------
        body
            `ticket`, `lora`, `recipe`; `proximal-mu`, and `first-batch`, where the last round ended, if given. With
            `private-ends`, the federation's name, A's and C's adapter stays here; `round` 1 begins it.
        weights
            A's and C's adapter at the start, by names of the whole model, float32.

        Returns
        -------
        metrics
            `num-examples` (that the client has), `train-loss` (mean over the round's learnt tokens), `steps`, `tokens`,
            `bytes-up`, `bytes-down`, `seconds`, `next-batch`.
        weights
            A's and C's adapter, trained: float32. None of it where it stays with its owner.
        """
        with self._lock:
            recipe = LocalRecipe.from_body(body.get("recipe"), body.get("proximal-mu", 0.0))
            first = body.get("first-batch", self._next_batch)
            if not isinstance(first, int) or first < 0:
                raise ProtocolError("the round's first batch must be a number, 0 or more")
            began = time.perf_counter()
            own = self._private_adapter(body)
            with self._joined(body, _start(own, body, _tensors(weights))) as model:
                before = model.traffic.copy()
                figures = self._steps(model, recipe, first)
                model.adapter.finish_round()
                trained = model.adapter.local_state()
            _check_finite(trained, "the adapter is not finite after the round; a lower learning rate may help")
            if own is not None:
                own.save(trained)
                trained = {}
            moved = model.traffic.since(before)
            self._next_batch = first + recipe.local_steps * recipe.accumulation
            return {
                "num-examples": len(self._texts.train),
                **figures,
                "bytes-up": moved.bytes_up,
                "bytes-down": moved.bytes_down,
                "seconds": round(time.perf_counter() - began, 3),
                "next-batch": self._next_batch,
            }, {name: weight.numpy() for name, weight in trained.items()}

    def evaluate(self, body: Mapping[str, Any], weights: Arrays) -> dict[str, Any]:
        """Evaluate a round's adapter on the client's validation split (UsageError if there is none).

        `body` has `ticket`, `lora` and `evaluation`; weights and errors are those of `train`. Returns the task's
        metrics and `answer_loss`, those that are finite, and `num-examples`: of how many.
        """
        with self._lock:
            match body.get("evaluation"):
                case {"examples": int(limit), "batch_size": int(batch_size)} if limit >= 0 and batch_size > 0:
                    if batch_size > RECIPE_BOUNDS["eval_batch_size"][1]:
                        raise ProtocolError(f"an evaluation of batches of {batch_size} examples is too much")
                    examples = self._texts.validation(limit)
                case _:
                    raise ProtocolError("how to evaluate cannot be read")
            with self._joined(body, _start(self._private_adapter(body), {}, _tensors(weights))) as model:
                result = evaluate(
                    model,
                    tokenizer_of(self.options.model),
                    self._task,
                    examples,
                    batch_size=batch_size,
                    max_tokens=self._texts.max_tokens,
                    answer_loss=True,
                )
                model.adapter.finish_round()
            metrics = {name: value for name, value in result.metrics.items() if math.isfinite(value)}
            return {"num-examples": result.count, **metrics}

    def finish(self, body: Mapping[str, Any], weights: Arrays) -> dict[str, Any]:
        """The federation is over: keep its adapter, with the ends that this client has kept to itself, as PEFT's.

        `body` has `lora`, and `private-ends` as for `train`; `weights` is the whole adapter. Returns nothing: where it
        is kept is its owner's matter. What is not this model's adapter, or not finite, is not written.
        """
        with self._lock:
            if not self.options.output:
                raise TermsError("this client has no place to keep the adapter")
            config, lora = open_checkpoint(self.options.model).config, self._agreed(body.get("lora"))
            shapes = AdapterSpec.from_config(lora, config).shapes_in(config, range(config.num_hidden_layers))
            kept = self._private_adapter(body)
            whole = _tensors(weights) | ((kept.load() if kept is not None else None) or {})
            if wrong := misfit(whole, shapes):
                raise ModelMismatchError(f"the federation's adapter does not fit this model: {wrong}")
            _check_finite(whole, "the federation's adapter is not finite")
            replace_adapter(Path(self.options.output), lora, whole, config.name_or_path or self.options.model)
            return {}

    def close(self) -> None:
        """Leave the block server."""
        self._models.close()

    def _private_adapter(self, body: Mapping[str, Any]) -> PrivateAdapter | None:
        federation = body.get("private-ends", "")
        if not isinstance(federation, str):
            raise ProtocolError("whose ends these are cannot be read")
        if not federation:
            if self.options.insist_private:
                raise TermsError("this client keeps the adapter of its own blocks; this federation asks for it")
            return None
        if not self.options.private_ends:
            raise TermsError("this federation leaves each client its ends, and this client has no place to keep them")
        return PrivateAdapter(Path(self.options.private_ends), federation)

    def _agreed(self, lora: Any) -> LoraConfig:
        """The adapter that came, if its owner takes part with such a one."""
        config = lora_config(lora)
        for name, wanted in (self.options.lora or {}).items():
            if lora.get(name) != wanted:
                raise TermsError(
                    f"this client takes part with {name}={wanted!r} only; the round has {lora.get(name)!r}"
                )
        return config

    @contextmanager
    def _joined(self, body: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Iterator[SplitModelForCausalLM]:
        """The model with its seat in the round and the adapter that came; the seat is given up at an exception."""
        ticket, lora = Ticket.from_body(body.get("ticket")), body.get("lora")
        config = self._agreed(lora)
        assert isinstance(lora, dict)
        if self.options.servers and ticket.server not in self.options.servers:
            raise TermsError(f"the ticket is for {ticket.server}, which is none of this federation's block servers")
        _check_finite(weights, "the adapter that came is not finite")
        model = self._models.get(self.options, ticket.server, lora)
        model.look_ledger = self._ledger
        if self._ledger is not None and model.max_tokens < self._texts.max_tokens:
            # Or else a server decides where texts are cut, and one that is cut elsewhere is another one to the ledger.
            raise TermsError(
                f"the block server takes texts of {model.max_tokens} tokens, this client's have up to "
                f"{self._texts.max_tokens}: it has to join with --max-tokens {model.max_tokens}"
            )
        try:
            model.adapter.join_round(ticket, config)
            extra = weights.keys() - adapter_parameters(model).keys()
            if extra:
                raise ModelMismatchError(f"the adapter that came has {min(extra)}, which this client does not train")
            model.adapter.set_local(weights)
            yield model
        except BaseException as error:
            model.adapter.leave_round()
            if not isinstance(error, FedSEAError):
                self._models.forget(model)  # whatever has happened to it, the next round gets a new one
            raise

    def _steps(self, model: SplitModelForCausalLM, recipe: LocalRecipe, first: int) -> dict[str, float | int]:
        batches = Batches(self._texts.train, recipe.batch_size, recipe.seed)
        optimizer = model.create_optimizer(lr=recipe.lr, weight_decay=recipe.weight_decay)
        start = {name: weight.detach().clone() for name, weight in adapter_parameters(model).items()}
        losses = learnt = tokens = 0.0
        model.train()
        torch.manual_seed(_draws_of(recipe.seed, self.options.name, first))
        for step in range(1, recipe.local_steps + 1):
            chosen = [batches[first + index] for index in range(recipe.accumulation)]
            first += recipe.accumulation
            loss, items = backpropagate(model, chosen), sum(batch.learnt for batch in chosen)
            if recipe.proximal_mu:
                for name, weight in adapter_parameters(model).items():
                    if weight.grad is not None:
                        weight.grad.add_(weight.detach() - start[name], alpha=recipe.proximal_mu)
            model.clip_grad_norm_(recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if not math.isfinite(loss):
                raise NonFiniteError(f"the loss of step {step} is not finite; a lower learning rate may help")
            losses, learnt = losses + loss * items, learnt + items
            tokens += sum(batch.tokens for batch in chosen)
            if self.on_step is not None:
                self.on_step(step, loss)
        return {"train-loss": losses / max(1.0, learnt), "steps": recipe.local_steps, "tokens": int(tokens)}


def _tensors(weights: Arrays) -> dict[str, Tensor]:
    return {name: torch.as_tensor(np.array(array, dtype=np.float32)) for name, array in weights.items()}


def _check_finite(weights: Mapping[str, Tensor], problem: str) -> None:
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"{problem}: {name}")


def _draws_of(seed: int, name: str, first: int) -> int:
    """The seed of a round's dropout: the same for a client that was restarted since the round before."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {first} {name}".encode(), digest_size=7).digest())


def _start(own: PrivateAdapter | None, body: Mapping[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What A's and C's adapter is at the start of a round: what came, or what this client has kept since the first."""
    if own is None or (kept := own.load()) is None:
        return weights
    if body.get("round") != 1:
        return kept
    own.set_aside()  # that it begins anew is the coordinator's word, and these weights are the owner's only copy
    return weights


@lru_cache(maxsize=4)
def _model_facts(model: str) -> tuple[Any, Fingerprint]:
    checkpoint = open_checkpoint(model)
    return checkpoint.config, checkpoint.fingerprint()
