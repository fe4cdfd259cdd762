"""FedSEA's own decode loop: one text, one round trip a token, or fewer where the text lets its next tokens be guessed.

transformers' `generate` works on the same model and can do more (beams, batches, assisted decoding), at the cost of
more work in Python for each token.
"""

from collections.abc import Collection, Generator
from itertools import takewhile

import torch
from torch import Tensor

from fedsea.client.cache import SplitCache
from fedsea.client.lookup import GuessCount, PromptLookup
from fedsea.client.model import SplitModelForCausalLM
from fedsea.client.sampling import GREEDY, Sampling
from fedsea.errors import UsageError


def stream_tokens(
    model: SplitModelForCausalLM,
    input_ids: Tensor,
    *,
    cache: SplitCache,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] = (),
    guesses: int = 0,
    count: GuessCount | None = None,
) -> Generator[int]:
    """Continue one text, token by token.

    Once the stream has ended or is closed, the cache holds the text up to the token before the one given last: the
    caller may stop at any token, close the stream, and go on with the cache later. Without guesses that is so between
    any two tokens; with guesses the cache may hold some that come after, until then.

    Guesses change no token: each is taken only if it is what the model's own logits, the processors and the same draws
    give at its place. A step with several tokens rounds differently from one with one token, though, as a prompt does,
    so where two tokens are all but equally likely, the other one may win.

    Parameters
    ----------
    input_ids
        The whole text so far, `[1, tokens]`, int64.
    cache
        From `model.new_cache()`. Holds a true prefix of the text (or nothing); only what comes after it is computed and
        sent.
    stop_ids
        Tokens that end the text. The one that did is given, as the last.
    guesses
        The most tokens to guess at a time from what the text has already, to be checked in the same step; 0 sends one
        token a step.
    count
        Counts the guesses, if given.

    Raises
    ------
    UsageError
        If there is no token to compute, or several rows, or the guesses are fewer than 0.
    FedSEAError
        What a step meets: a limit, a server that is gone.
    """
    held = cache.get_seq_length()
    if input_ids.numel() == 0:
        raise UsageError("the prompt is empty; the model needs at least one token")
    if input_ids.dim() != 2 or len(input_ids) != 1 or input_ids.shape[1] <= held:
        shape = tuple(input_ids.shape)
        raise UsageError(f"one text that goes on after the {held} tokens of the cache is needed; got the shape {shape}")
    if guesses < 0:
        raise UsageError(f"the guesses must be 0 or more; got {guesses}")
    processors, generator = sampling.processors(), sampling.generator(model.device)
    text = input_ids.to(model.device)
    new = text[:, held:]
    length = text.shape[1]
    end = length + max_new_tokens
    lookup = PromptLookup(text[0].tolist(), guesses, count) if guesses else None
    guess: list[int] = []
    while length < end:
        if guess:
            new = torch.cat([new, torch.tensor([guess], device=new.device)], dim=1)
            with torch.no_grad():
                logits = model(input_ids=new, past_key_values=cache).logits.float()
        else:
            logits = model.next_logits(new, cache).unsqueeze(1)
        right = 0
        try:
            for place in range(len(guess) + 1):
                scores: Tensor = processors(text, logits[:, place])  # type: ignore[arg-type]  # transformers names its dtype by an old class
                if generator is None:
                    new = scores.argmax(dim=-1, keepdim=True)
                else:
                    new = torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)
                token = int(new)
                length += 1
                hit = place < len(guess) and token == guess[place]
                right += hit
                yield token
                if token in stop_ids:
                    return
                if processors:
                    text = torch.cat([text, new], dim=1)
                if lookup is not None:
                    lookup.append(token)
                if not hit:
                    break
        finally:
            if lookup is not None and guess:
                cache.crop(length - 1)
                lookup.judge(len(guess), right)
        if lookup is not None:
            # A guess is worth its place only if a token after it can still be given: not at the end of the text, and
            # not what would end it.
            room = min(end, model.guess_limit(length)) - length - 1
            guess = list(takewhile(lambda token: token not in stop_ids, lookup.guess(room)))
