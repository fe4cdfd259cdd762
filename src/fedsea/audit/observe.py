"""Texts go through a real session, or a real training, with a provider that keeps what it sees."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig

from fedsea.audit.observation import Observation, Subject
from fedsea.audit.plan import Plan
from fedsea.audit.provider import CuriousProvider
from fedsea.checkpoints import Checkpoint
from fedsea.client import SplitModelForCausalLM
from fedsea.privacy import Noise
from fedsea.training.batches import Batch
from fedsea.training.examples import Encoded

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
    sent = zip(seen, texts, prompts, strict=True)
    return [Subject(tuple(found), tuple(tokens), len(ids)) for found, tokens, ids in sent], model.noise


def observe_training(
    plan: Plan, checkpoint: Checkpoint, noise: Noise, texts: Sequence[tuple[Encoded, int]], progress: Progress
) -> tuple[list[Subject], Noise]:
    """Train on texts, in turn, through a real run; what the provider saw of those that were reached.

    A text comes with how many of its tokens are the prompt. Each epoch is one observation of it.
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
                batch = Batch.of([texts[place][0] for place in turn])
                model.answer_loss(batch.input_ids, batch.attention_mask, batch.labels, batch.learnt).backward()
                model.clip_grad_norm_(1.0)
                optimizer.step()
                optimizer.zero_grad()
        (observations,) = provider.runs()
    seen: list[list[Observation]] = [[] for _ in texts]
    for place, observation in zip([place for turn in turns for place in turn], observations, strict=True):
        seen[place].append(observation)
    pairs = zip(seen, texts, strict=True)
    subjects = [Subject(tuple(one), text.input_ids, prompt, text.labels) for one, (text, prompt) in pairs if one]
    return subjects, model.noise


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
