"""Texts go through a real session, or a real training, with a provider that keeps what it sees."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from torch.nn.utils.rnn import pad_sequence

from fedsea.audit.observation import Observation, Subject
from fedsea.audit.plan import Plan
from fedsea.audit.provider import CuriousProvider
from fedsea.checkpoints import Checkpoint
from fedsea.client import SplitModelForCausalLM
from fedsea.privacy import Noise
from fedsea.training.examples import IGNORED, Encoded

RANK = 8  # of the adapter that is trained, on all linear modules
LEARNING_RATE = 5e-4

Progress = Callable[[str, int, int], None]


def observe_sessions(
    plan: Plan, checkpoint: Checkpoint, noise: Noise, prompts: Sequence[list[int]], progress: Progress
) -> tuple[list[Subject], Noise]:
    """Send texts through real sessions; what the provider saw of each, and the mechanism as it was calibrated."""
    texts: list[list[int]] = []
    seen: list[list[Observation]] = [[] for _ in prompts]
    with CuriousProvider(checkpoint) as provider:
        for done in range(0, plan.observations * len(prompts), len(prompts)):
            with _client(plan, checkpoint, provider, noise, trainable=False) as model:
                for place, ids in enumerate(prompts):
                    progress("sending the texts", done + place, plan.observations * len(prompts))
                    provider.forget()
                    if done:  # the same text again, with the answer that it had
                        _send(model, texts[place], 0)
                    else:
                        texts.append(_send(model, ids, plan.answer_tokens))
                    ((observation,),) = provider.sessions()
                    seen[place].append(observation)
                calibrated = model.noise
    subjects = [
        Subject(tuple(observations), tuple(tokens), len(ids))
        for observations, tokens, ids in zip(seen, texts, prompts, strict=True)
    ]
    return subjects, calibrated


def observe_training(
    plan: Plan, checkpoint: Checkpoint, noise: Noise, texts: Sequence[tuple[Encoded, int]], progress: Progress
) -> tuple[list[Subject], Noise]:
    """Train a LoRA adapter on texts, in turn, and give what the provider saw of each text that was reached.

    Each text comes with the number of its tokens that are its prompt.
    """
    size = min(plan.batch_size, len(texts))
    turns = [[(step * size + row) % len(texts) for row in range(size)] for step in range(plan.train_steps)]
    with CuriousProvider(checkpoint) as provider:
        with _client(plan, checkpoint, provider, noise, trainable=True) as model:
            if plan.adapter is None:
                model.add_adapter(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
            model.train()
            optimizer = model.create_optimizer(lr=LEARNING_RATE)
            for step, turn in enumerate(turns):
                progress("training on the texts", step, len(turns))
                _loss(model, [texts[place][0] for place in turn]).backward()
                model.clip_grad_norm_(1.0)
                optimizer.step()
                optimizer.zero_grad()
            calibrated = model.noise
        (observations,) = provider.runs()
    seen: list[list[Observation]] = [[] for _ in texts]
    for place, observation in zip([place for turn in turns for place in turn], observations, strict=True):
        seen[place].append(observation)
    subjects = [
        Subject(tuple(observed), text.input_ids, prompt, text.labels)
        for observed, (text, prompt) in zip(seen, texts, strict=True)
        if observed
    ]
    return subjects, calibrated


@contextmanager
def _client(
    plan: Plan, checkpoint: Checkpoint, provider: CuriousProvider, noise: Noise, *, trainable: bool
) -> Iterator[SplitModelForCausalLM]:
    with SplitModelForCausalLM.from_pretrained(
        checkpoint,
        server=provider.address,
        insecure=True,
        partition=plan.partition,
        noise=noise,
        wire_dtype=plan.wire_dtype,
    ) as model:
        if plan.adapter is not None:
            model.load_adapter(plan.adapter, is_trainable=trainable)
        yield model


def _send(model: Any, ids: list[int], answer: int) -> list[int]:
    """Send a text, and let the model go on for some tokens: what went over the wire, in tokens."""
    prompt = torch.tensor([ids])
    with torch.no_grad():
        if not answer:
            model(prompt, logits_to_keep=1)
            return ids
        # One more, for the last one that is chosen is never sent.
        whole = model.generate(prompt, max_new_tokens=answer + 1, do_sample=False, pad_token_id=0)
    return list(map(int, whole[0, :-1]))


def _loss(model: SplitModelForCausalLM, rows: Sequence[Encoded]) -> torch.Tensor:
    def padded(values: Sequence[Sequence[int]], filling: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=filling)

    labels = padded([row.labels for row in rows], IGNORED)
    mask = padded([[1] * len(row.labels) for row in rows], 0)
    items = int((labels[:, 1:] != IGNORED).sum())
    return model.answer_loss(padded([row.input_ids for row in rows], 0), mask, labels, items)
