"""What a curious provider keeps: exactly what the client sent, what it got, and nothing that was rolled back."""

from collections.abc import Iterator

import pytest
import torch

from fedsea import GaussianNoise, Partition
from fedsea.audit.provider import CuriousProvider
from fedsea.checkpoints import open_checkpoint
from fedsea.errors import UsageError
from fedsea.parts import InputBlocks, OutputBlocks, Rows
from fedsea.server import BackgroundServer, ServerOptions
from tests.conftest import connect
from tests.support.attacks import draw
from tests.support.sent_states import capture
from tests.support.split_training import adamw, adapted, batch, trained

PARTITION = Partition(1, 1)


@pytest.fixture(scope="module")
def provider() -> Iterator[CuriousProvider]:
    with CuriousProvider(open_checkpoint("random:tiny")) as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_kept(provider: CuriousProvider) -> None:
    provider.forget()


@pytest.fixture(scope="module")
def blocks() -> InputBlocks:
    return InputBlocks.from_checkpoint(open_checkpoint("random:tiny"), PARTITION, dtype=torch.float32)


def one(width: int) -> torch.Tensor:
    """One random text as a model takes it, `[1, width]`."""
    return torch.tensor([draw(width)])


def assert_states_of(blocks: InputBlocks, tokens: list[int], sent: torch.Tensor) -> None:
    expected = blocks(torch.tensor(tokens), Rows.uniform(1, 0, len(tokens)), None)
    torch.testing.assert_close(sent, expected, atol=1e-5, rtol=1e-5)


def test_a_generation_is_seen_as_the_inputs_own_states(provider: CuriousProvider, blocks: InputBlocks) -> None:
    with connect(provider) as model:
        ids = one(11)
        text = model.generate(ids, max_new_tokens=6, pad_token_id=0, do_sample=False)[0].tolist()
    ((seen,),) = provider.sessions()
    assert seen.length == 16  # the last token is never sent
    assert_states_of(blocks, text[:-1], seen.sent)
    assert seen.returned is not None
    assert seen.returned.shape == seen.sent.shape
    assert seen.gradient is None


def test_rows_of_different_lengths_are_seen_each_by_itself(provider: CuriousProvider, blocks: InputBlocks) -> None:
    given = batch()
    with connect(provider) as model:
        model(given["input_ids"], attention_mask=given["attention_mask"])
    (rows,) = provider.sessions()
    texts = [ids[mask == 1].tolist() for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True)]
    assert [row.length for row in rows] == [len(text) for text in texts]
    for row, text in zip(rows, texts, strict=True):
        assert_states_of(blocks, text, row.sent)


def test_what_is_rolled_back_is_not_part_of_the_text(provider: CuriousProvider, blocks: InputBlocks) -> None:
    ids = one(12)
    with connect(provider) as model:
        cache = model.new_cache()
        model(ids[:, :8], past_key_values=cache)
        cache.crop(5)
        model(ids[:, 8:], past_key_values=cache)
    ((seen,),) = provider.sessions()
    text = ids[0, :5].tolist() + ids[0, 8:].tolist()
    assert_states_of(blocks, text, seen.sent)


def test_beams_are_seen_as_the_rows_that_survived(provider: CuriousProvider, blocks: InputBlocks) -> None:
    with connect(provider) as model:
        model.generate(one(7), max_new_tokens=5, num_beams=3, pad_token_id=0, do_sample=False)
    (rows,) = provider.sessions()
    assert len(rows) == 3
    for row in rows:
        assert_states_of(blocks, draw(7), row.sent[:7])


def test_what_is_seen_is_what_was_sent(provider: CuriousProvider) -> None:
    """With noise and 16 bits: against the frames as the client hands them to its connection."""
    how = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    with connect(provider, noise=GaussianNoise(0.5), wire_dtype="float16") as model:
        steps = capture(model, lambda: model.generate(one(9), **how))
    ((seen,),) = provider.sessions()
    assert torch.equal(seen.sent, torch.cat([step.states for step in steps]).float())


def test_training_is_seen_with_its_gradients(provider: CuriousProvider, blocks: InputBlocks) -> None:
    given = batch()
    with adapted(provider, partition=PARTITION) as model:  # type: ignore[arg-type]
        optimizer = adamw(trained(model))
        for _ in range(2):
            model(**given).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    (texts,) = provider.runs()
    lengths = given["attention_mask"].sum(1).tolist()
    assert sorted(text.length for text in texts) == sorted(lengths * 2)
    first = {text.length: text for text in texts[: len(lengths)]}
    # A fresh adapter changes nothing: the first epoch is that of the public weights, which give the gradient as well.
    output = OutputBlocks.from_checkpoint(open_checkpoint("random:tiny"), PARTITION, dtype=torch.float32)
    learnt = int((given["labels"][:, 1:] != -100).sum())
    for ids, labels, length in zip(given["input_ids"], given["labels"], lengths, strict=True):
        seen = first[length]
        assert_states_of(blocks, ids[:length].tolist(), seen.sent)
        assert seen.returned is not None
        assert seen.gradient is not None
        hidden = seen.returned.clone().requires_grad_()
        logits = output.logits(output(hidden, Rows.uniform(1, 0, length), None))[:-1]
        torch.nn.functional.cross_entropy(logits, labels[1:length], reduction="sum").div(learnt).backward()
        assert hidden.grad is not None
        torch.testing.assert_close(seen.gradient, hidden.grad, atol=1e-6, rtol=1e-4)
    later = {text.length: text for text in texts[len(lengths) :]}
    assert not torch.equal(later[12].sent, first[12].sent)  # the adapter has moved


def test_a_server_that_cannot_start_says_why(provider: CuriousProvider) -> None:
    with pytest.raises(UsageError, match="taken"):
        BackgroundServer(open_checkpoint("random:tiny"), ServerOptions(listen=provider.address))
