"""Attacks on what a provider sees: exact without noise, no worse than a full search, and as strong as they claim."""

import dataclasses
from typing import Any

import pytest
import torch

from fedsea import GaussianNoise, Partition
from fedsea.audit.attack import Attack
from fedsea.audit.attacks import attack_names, get_attack
from fedsea.audit.attacks.average import Average
from fedsea.audit.attacks.search import Search
from fedsea.audit.attacks.search_map import SearchMap
from fedsea.audit.observation import Observation, Recovery
from fedsea.audit.provider import CuriousProvider
from fedsea.audit.shortlist import Shortlist
from fedsea.checkpoints import open_checkpoint
from fedsea.errors import UsageError
from fedsea.parts import InputBlocks, Rows
from fedsea.privacy import clipped_gaussian
from tests.conftest import connect
from tests.support.attacks import draw, knowledge_of, observe, right


@pytest.mark.parametrize("name", ["tiny", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"])
@pytest.mark.parametrize("p", [0, 1, 4])
def test_candidates_have_the_states_that_the_input_blocks_give_them(name: str, p: int) -> None:
    blocks = InputBlocks.from_checkpoint(open_checkpoint(f"random:{name}"), Partition(p, 1), dtype=torch.float32)
    knowledge = knowledge_of(p, name=f"random:{name}")
    text, tokens = draw(40), torch.arange(0, 256, 3)
    with torch.no_grad():
        for length in (0, 1, 40):  # 40 is more than the windows of mistral and qwen2
            prefix = knowledge.candidates.prefix(text[:length])
            assert prefix.length == length
            texts = torch.tensor([[*text[:length], token] for token in tokens.tolist()])
            states = blocks(texts.reshape(-1), Rows.uniform(len(texts), 0, length + 1), None)
            expected = states.view(*texts.shape, -1)[:, -1]
            for _ in range(2):  # candidates leave nothing behind
                torch.testing.assert_close(prefix.states(tokens), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("p", [0, 1, 3])
@pytest.mark.parametrize("attack", [Search(), Search(limit=None), SearchMap()], ids=lambda one: one.name)
def test_without_noise_every_token_is_read(p: int, attack: Attack) -> None:
    assert right(attack, knowledge_of(p), [draw(30), draw(17, 1)]) == 47


def test_a_mechanism_that_alters_states_is_followed() -> None:
    assert right(Search(), knowledge_of(1, clipped_gaussian(clip=0.5, std=0.0)), [draw(30)]) == 30


@pytest.mark.parametrize("level", [0.0, 1.5, 3.0])
def test_the_shortlist_finds_what_a_full_search_finds(small: str, level: float) -> None:
    """In a real vocabulary, a tenth of which is run at most."""
    knowledge = knowledge_of(2, name=small)
    with torch.no_grad():
        magnitude = float(knowledge.candidates.typical.abs().mean())
    knowledge = dataclasses.replace(knowledge, noise=GaussianNoise(level * magnitude))
    text = torch.randint(knowledge.vocabulary, (8,), generator=torch.Generator().manual_seed(0)).tolist()
    seen = observe(knowledge, text)
    prefix, shift = knowledge.candidates.prefix(), None
    short, full = (Shortlist(knowledge.candidates, limit, knowledge.noise_variance) for limit in (2048, None))
    with torch.no_grad():
        for token, state in zip(text, seen.sent, strict=True):
            (found,), (cost,), shift = short.best(prefix, state, shift)
            (best,), (least,), _ = full.best(prefix, state)
            assert found == best
            assert cost == pytest.approx(least, rel=1e-3, abs=1e-6)
            prefix.extend([token])
    assert short.run <= full.run / 10


def test_fresh_noise_can_be_averaged_away() -> None:
    knowledge, texts = knowledge_of(1, GaussianNoise(6.0)), [draw(40)]
    once = right(Search(), knowledge, texts, observations=16)
    assert once < 30
    assert right(Average(), knowledge, texts, observations=16) == 40


def test_the_language_model_helps_where_noise_hides(whole_tiny: Any) -> None:
    """On texts that the model finds likely: its own."""
    torch.manual_seed(0)
    rows = whole_tiny.generate(torch.tensor([[7]] * 4), max_new_tokens=39, do_sample=True, top_k=0, pad_token_id=0)
    texts = rows.tolist()
    knowledge = knowledge_of(1, GaussianNoise(6.0))
    plain = right(Search(), knowledge, texts)
    assert plain < 120
    assert right(SearchMap(), knowledge, texts) > plain + 30


def test_what_is_known_of_the_start_is_taken_as_given() -> None:
    text = draw(20)
    knowledge = knowledge_of(1, GaussianNoise(20.0), start=tuple(text[:6]))
    for name in ("search", "search-map", "prior"):
        (found,) = get_attack(name).run([[observe(knowledge, text)]], knowledge)
        assert list(found.tokens[:6]) == text[:6]
        assert len(found.tokens) == 20


def test_nearest_without_input_layers_is_search() -> None:
    knowledge = knowledge_of(0, GaussianNoise(0.5))
    seen = [[observe(knowledge, draw(50))]]
    assert get_attack("nearest").run(seen, knowledge) == Search(None).run(seen, knowledge)


@pytest.mark.parametrize("std", [0.0, 1.0])
def test_read_out_sees_what_the_client_sees(std: float) -> None:
    """Through a real session: without noise, it is the whole model's argmax at each position."""
    knowledge = knowledge_of(1, GaussianNoise(std))
    text = torch.tensor([draw(25)])
    with CuriousProvider(knowledge.shared.checkpoint) as provider:
        with connect(provider, partition=knowledge.shared.partition, noise=knowledge.noise) as model:
            client = model(text).logits[0].argmax(-1).tolist()
        ((seen,),) = provider.sessions()
    (found,) = get_attack("read-out").run([[seen]], knowledge)
    assert found.tokens == (None, *client[:-1])
    whole = knowledge.shared.whole(text).logits[0].argmax(-1).tolist()
    assert (found.tokens == (None, *whole[:-1])) == (std == 0)
    assert knowledge.shared.predicted_by_context(tuple(text[0].tolist()))[0] == Recovery((None, *whole[:-1]))
    with pytest.raises(UsageError, match="h_B"):
        get_attack("read-out").run([[Observation(seen.sent)]], knowledge)


def test_prior_is_the_models_own_text(whole_tiny: Any) -> None:
    start = draw(5)
    knowledge = knowledge_of(start=tuple(start))
    written = whole_tiny.generate(torch.tensor([start]), max_new_tokens=15, do_sample=False, pad_token_id=0)[0].tolist()
    found = get_attack("prior").run([[observe(knowledge, draw(20))], [observe(knowledge, draw(8))]], knowledge)
    assert found == [Recovery(tuple(written)), Recovery(tuple(written[:8]))]


def test_attacks_go_by_name() -> None:
    assert [get_attack(name).name for name in attack_names()] == attack_names()
    with pytest.raises(UsageError, match=r"no attack 'guess'; there are average, decoder"):
        get_attack("guess")
