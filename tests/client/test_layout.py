"""Masks, positions and packed rows: the logits of transformers' whole model, or a refusal before anything is sent."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fedsea import SplitModelForCausalLM
from fedsea.checkpoints import load_whole_model
from fedsea.errors import UsageError
from tests.conftest import RunningServer, connect
from tests.support.refused import refused
from tests.support.split_training import adapted, whole_twin

FAMILIES = ("tiny", "tiny-mistral", "tiny-qwen2", "tiny-qwen3")
COLUMNS = 12
LONG = 60  # past the sliding windows of mistral and qwen2
IDS = torch.randint(1, 256, (3, COLUMNS), generator=torch.Generator().manual_seed(0))
ONES = torch.ones_like(IDS)
RIGHT, LEFT, HOLE = (ONES.clone() for _ in range(3))
RIGHT[1, 7:] = RIGHT[2, 3:] = 0
LEFT[1, :5] = LEFT[2, :9] = 0
HOLE[1, 4:6] = HOLE[2, :3] = HOLE[2, 8] = 0
COUNTED = torch.arange(COLUMNS)[None]
CLOSED_UP = {name: (mask.cumsum(1) - 1).clamp(min=0) for name, mask in (("left", LEFT), ("hole", HOLE))}
PACKED = torch.tensor([[*range(5), *range(7)], [*range(12)], [*range(3), *range(2), *range(6), 0]])

# As the whole model has it, exactly: how a batch is given.
HONOURED: dict[str, dict[str, torch.Tensor]] = {
    "nothing": {},
    "a mask of ones": {"attention_mask": ONES},
    "padding at the right": {"attention_mask": RIGHT},
    "padding at the left": {"attention_mask": LEFT},
    "padding at the left, positions closed up": {"attention_mask": LEFT, "position_ids": CLOSED_UP["left"]},
    "a hole, positions closed up": {"attention_mask": HOLE, "position_ids": CLOSED_UP["hole"]},
    "positions": {"position_ids": COUNTED},
    "positions from 5 on": {"position_ids": (COUNTED + 5).expand(3, -1)},
    "positions and a mask": {"attention_mask": LEFT, "position_ids": COUNTED + 2},
    "packed": {"position_ids": PACKED},
    "packed, the same in each row": {"position_ids": PACKED[:1]},
    "positions that jump, without a mask": {"position_ids": torch.where(COUNTED > 6, COUNTED + 3, COUNTED)},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a hole": ({"attention_mask": HOLE}, "row 1 has padding between its tokens"),
    "a hole, positions counted": ({"attention_mask": HOLE, "position_ids": COUNTED}, "position_ids of row 1 do not"),
    "packed and a mask": ({"position_ids": PACKED, "attention_mask": ONES}, "position_ids of row 0 do not count on"),
    "packed, to be kept": ({"position_ids": PACKED, "use_cache": True}, "use_cache=False"),
    "a mask of four dimensions": (
        {"attention_mask": torch.ones(3, 1, 12, 12)},
        r"attention_mask has the shape \[3, 1,",
    ),
    "a mask that is too short": ({"attention_mask": ONES[:, :5]}, r"here \[3, 12\]"),
    "positions of three dimensions": ({"position_ids": PACKED.expand(3, 3, 12)}, r"position_ids must be .*\[3, 12\]"),
    "positions that are too few": ({"position_ids": COUNTED[:, :4]}, "position_ids must be"),
    "positions that are not whole": ({"position_ids": COUNTED.float()}, "position_ids must be"),
    "other lengths than positions": (
        {"position_ids": PACKED, "cu_seq_lens_q": torch.tensor([0, 12, 24, 36])},
        "cu_seq_lens_q says",
    ),
    "lengths alone": ({"cu_seq_lens_q": torch.tensor([0, 6, 36])}, "cu_seq_lens_q says"),
    "text numbers alone": ({"seq_idx": PACKED}, "seq_idx says"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: Any, start_server: Any) -> Iterator[tuple[SplitModelForCausalLM, Any]]:
    name = f"random:{request.param}"
    with connect(start_server(name), name) as model:
        yield model, load_whole_model(name)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    places = torch.ones(ours.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(ours[places], theirs[places], atol=1e-4, rtol=0)


@pytest.mark.parametrize("way", HONOURED)
def test_forward_has_the_whole_models_logits(pair: tuple[SplitModelForCausalLM, Any], way: str) -> None:
    split, whole = pair
    given = HONOURED[way]
    with torch.no_grad():
        ours, theirs = (one(IDS, **given, **more).logits for one, more in ((split, {}), (whole, {"use_cache": False})))
        assert_same(ours, theirs, given.get("attention_mask"))


ONE_TEXT = [way for way in HONOURED if not any(word in way for word in ("jump", "packed", "right"))]


@pytest.mark.parametrize("way", ONE_TEXT)
def test_a_cache_goes_on_as_the_whole_models(pair: tuple[SplitModelForCausalLM, Any], way: str) -> None:
    split, whole = pair
    ours, theirs = split.new_cache(), None
    given = HONOURED[way]
    with torch.no_grad():
        for first, last in ((0, 10), (10, 11), (11, 12)):
            now = {name: value[:, :last] for name, value in given.items()}
            if "position_ids" in now:
                now["position_ids"] = now["position_ids"][:, first:]
            one = IDS[:, first:last]
            expected = whole(one, **now, past_key_values=theirs, use_cache=True)
            theirs = expected.past_key_values
            mask = now.get("attention_mask")
            found = split(one, **now, past_key_values=ours).logits
            assert_same(found, expected.logits, None if mask is None else mask[:, first:])
    ours.close()


@pytest.mark.parametrize("way", REFUSED)
def test_what_lengths_cannot_say_is_refused_before_anything_is_sent(split: SplitModelForCausalLM, way: str) -> None:
    given, why = REFUSED[way]
    before = split.traffic.bytes_up
    with refused(UsageError, why):
        split(IDS, **given)
    assert split.traffic.bytes_up == before


def test_a_cache_is_gone_on_from_as_it_is(split: SplitModelForCausalLM) -> None:
    cache = split.new_cache()
    split(IDS, attention_mask=LEFT, past_key_values=cache)
    before = split.traffic.bytes_up
    other = torch.cat([ONES, ONES[:, :1]], dim=1)
    good = torch.cat([LEFT, ONES[:, :1]], dim=1)
    for given, why in (
        ({}, "attention_mask of all columns"),
        ({"attention_mask": other}, "another than before"),
        ({"attention_mask": ONES[:, :1]}, r"here \[3, 13\]"),
        ({"attention_mask": good, "position_ids": torch.tensor([[20]])}, "do not count on"),
        ({"attention_mask": good, "position_ids": good.cumsum(1)[:, -1:] - 1}, "do not count on"),
    ):
        with pytest.raises(UsageError, match=why):
            split(IDS[:, :1], past_key_values=cache, **given)
    assert split.traffic.bytes_up == before
    assert split(IDS[:, :1], past_key_values=cache, attention_mask=good).logits.shape == (3, 1, 256)
    cache.close()


def test_sliding_windows_count_columns(pair: tuple[SplitModelForCausalLM, Any]) -> None:
    split, whole = pair
    ids = torch.randint(1, 256, (2, LONG), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    with torch.no_grad():
        packed = torch.cat([torch.arange(45), torch.arange(15)])[None]
        assert_same(split(ids, position_ids=packed).logits, whole(ids, position_ids=packed, use_cache=False).logits)
        assert_same(split(ids, attention_mask=mask).logits, whole(ids, attention_mask=mask).logits, mask)
        mask[1] = 1
        mask[1, 10:13] = 0
        given = {"attention_mask": mask, "position_ids": mask.cumsum(1) - 1}
        if split.config.model_type in ("llama", "qwen3"):
            assert_same(split(ids, **given).logits, whole(ids, **given).logits, mask)
        else:
            with pytest.raises(UsageError, match="sliding windows"):
                split(ids, **given)


def test_generate_closes_holes_up_and_goes_on_after_a_texts_last_token(pair: tuple[SplitModelForCausalLM, Any]) -> None:
    split, whole = pair
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"use_cache": False}, {"num_beams": 2}):
        for mask in (LEFT, HOLE):
            expected = whole.generate(IDS, attention_mask=mask, **how, **more)
            assert torch.equal(split.generate(IDS, attention_mask=mask, **how, **more), expected)
        found = split.generate(IDS, attention_mask=RIGHT, **how, **more)
        for row, ids, mask in zip(found, IDS, RIGHT, strict=True):
            alone = whole.generate(ids[None, mask == 1], **how, **more)
            assert torch.equal(row[COLUMNS:], alone[0, int(mask.sum()) :])


def loss_of(model: Any, **given: Any) -> tuple[float, float]:
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return loss.item(), float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))


@pytest.mark.parametrize("way", HONOURED)
def test_training_has_the_whole_models_loss_and_gradient(tiny_pair: tuple[Any, Any], way: str) -> None:
    model, whole = tiny_pair
    given = HONOURED[way]
    mask = given.get("attention_mask", ONES)
    labels = IDS.masked_fill((mask == 0) | (mask.cumsum(1) == 1) | (mask.roll(1, 1) == 0), -100)
    ours = loss_of(model, input_ids=IDS, labels=labels, use_cache=False, **given)
    theirs = loss_of(whole, input_ids=IDS, labels=labels, use_cache=False, **given)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def tiny_pair(tiny_server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    with adapted(tiny_server) as model:
        generator = torch.Generator().manual_seed(2)
        state = model.adapter_state()
        model.set_adapter_state({name: torch.randn(one.shape, generator=generator) / 8 for name, one in state.items()})
        yield model, whole_twin(model, tmp_path_factory.mktemp("start"))


def test_labels_at_padding_are_refused(tiny_pair: tuple[Any, Any]) -> None:
    model, whole = tiny_pair
    before = model.traffic.bytes_up
    for mask in (LEFT, RIGHT):
        with pytest.raises(UsageError, match="learnt from a column of padding"):
            model(input_ids=IDS, attention_mask=mask, labels=IDS)
    assert model.traffic.bytes_up == before
    # What comes right after a text is learnt from the text: padding that ends it, say.
    labels = IDS.masked_fill((RIGHT == 0) & (RIGHT.roll(1, 1) == 0), -100)
    ours, theirs = (loss_of(one, input_ids=IDS, attention_mask=RIGHT, labels=labels) for one in (model, whole))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=0)
