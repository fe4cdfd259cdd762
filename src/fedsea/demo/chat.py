"""A chat model that is asked, split and whole: what the demonstrations of inference and fine-tuning share."""

from typing import Any

import torch

from fedsea.chats import require_chat_template
from fedsea.checkpoints import Checkpoint, open_checkpoint
from fedsea.checkpoints.packaged import opening
from fedsea.client import Answer, SplitModelForCausalLM
from fedsea.demo.screen import Screen


def open_chat_model(name: str, screen: Screen) -> tuple[Checkpoint, Any]:
    """A model's checkpoint and tokenizer."""
    with screen.step(opening(name)):
        checkpoint = open_checkpoint(name)
        tokenizer = checkpoint.tokenizer()
        require_chat_template(tokenizer)
    return checkpoint, tokenizer


def ask(
    model: SplitModelForCausalLM, tokenizer: Any, question: str, prompt: list[int], longest: int, screen: Screen
) -> Answer:
    """The split model's answer, shown as it comes."""
    answer = Answer(model, tokenizer, prompt, cache=model.new_cache(), max_new_tokens=longest)
    screen.answer(question, answer)
    return answer


def ask_whole(whole: Any, prompt: list[int], ends: frozenset[int], longest: int) -> list[int]:
    """What transformers' own `generate` answers with the whole model."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": sorted(ends), "pad_token_id": min(ends)}
    text = whole.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, **options)
    return text[0, len(prompt) :].tolist()  # type: ignore[no-any-return]
