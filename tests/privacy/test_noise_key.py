"""What noise is keyed by: a state that has changed carries another draw, one that has not carries the same."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from transformers import Trainer, TrainingArguments
from transformers.integrations.neftune import neftune_post_forward_hook

from fedsea import GaussianNoise, Partition, SplitModelForCausalLM
from fedsea.parts import InputBlocks
from fedsea.parts.adapters import adapter_parameters
from fedsea.privacy import clipped_gaussian
from fedsea.wire.frames import Forward
from tests.conftest import RunningServer, connect
from tests.support.sent_states import by_position, capture

STD = 20.0
TEXT = torch.randint(1, 256, (1, 12), generator=torch.Generator().manual_seed(3))
CLEAN = GaussianNoise(0.0)


@pytest.fixture
def model(tiny_server: RunningServer) -> Iterator[SplitModelForCausalLM]:
    """With noise and an adapter that is not at its start, in training mode."""
    with connect(tiny_server, noise=GaussianNoise(STD)) as made:
        yield adapted(made)


def adapted(model: SplitModelForCausalLM, **options: Any) -> SplitModelForCausalLM:
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options), seed=0)
    for name, weight in adapter_parameters(model.input_blocks).items():
        if ".lora_B." in name:
            weight.data.normal_(0, 0.3)
    model.train()
    return model


class Passes:
    """Training passes over a text: what its states were, and the noise that left on them."""

    def __init__(self, model: SplitModelForCausalLM, seen: list[Forward]) -> None:
        self.model, self._seen = model, seen

    def send(self, ids: torch.Tensor = TEXT, *, backward: bool = False) -> torch.Tensor:
        torch.manual_seed(1)
        loss = self.model(ids, labels=ids).loss
        if backward:
            loss.backward()
        return self._seen[-1].states.clone()

    def look(self, ids: torch.Tensor = TEXT) -> tuple[torch.Tensor, torch.Tensor]:
        """The state, and its noise as a multiple of its standard deviation."""
        noise = self.model.noise
        self.model.noise = CLEAN
        state = self.send(ids)
        self.model.noise = noise
        return state, (self.send(ids) - state) / noise.channel.std


@pytest.fixture
def passes(model: SplitModelForCausalLM, forwards: list[Forward]) -> Passes:
    return Passes(model, forwards)


def are_the_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two looks carry one draw: of two draws, no half of the numbers are so close by chance."""
    return float((one - other).abs().median()) < 1e-3


def stepped(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[Passes], None]:
    def change(passes: Passes) -> None:
        optimizer = make([one for one in passes.model.parameters() if one.requires_grad], lr=0.1, **options)
        passes.send(backward=True)
        optimizer.step()

    return change


def of_weights(do: Callable[[torch.nn.Parameter], None]) -> Callable[[Passes], None]:
    def change(passes: Passes) -> None:
        for weight in adapter_parameters(passes.model.input_blocks).values():
            do(weight)

    return change


def to_vector_and_back(passes: Passes) -> None:
    weights = list(adapter_parameters(passes.model.input_blocks).values())
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(weights) + 0.2, weights)


def assigned(passes: Passes) -> None:
    blocks = passes.model.input_blocks
    state = {name: value + 0.2 if ".lora_" in name else value for name, value in blocks.state_dict().items()}
    blocks.load_state_dict(state, assign=True)


def swapped(passes: Passes) -> None:  # as averages of weights are, before an evaluation
    for weight in adapter_parameters(passes.model.input_blocks).values():
        weight.data, _kept = weight.data * 0.9, weight.data


def larger(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight + 0.1 for name, weight in weights.items()}


def training_state(passes: Passes) -> None:
    optimizer, own = passes.model.create_optimizer(lr=0.1), passes.model.adapter
    adapter, states = own.training_state(optimizer)
    own.set_training_state(optimizer, larger(adapter), states, 0)


def of_lora(do: Callable[[Linear], object]) -> Callable[[Passes], None]:
    """Past what a split model refuses."""

    def change(passes: Passes) -> None:
        for module in passes.model.input_blocks.modules():
            if isinstance(module, Linear):
                do(module)

    return change


def mlp(passes: Passes) -> Any:
    return passes.model.input_blocks.model.layers["0"].mlp


def embedding_row(passes: Passes) -> None:
    passes.model.get_input_embeddings().weight.data[TEXT[0, 0]] += 1.0


CHANGES: dict[str, Callable[[Passes], object]] = {
    "adamw": stepped(torch.optim.AdamW),
    "adamw, fused": stepped(torch.optim.AdamW, fused=True),
    "adamw, foreach": stepped(torch.optim.AdamW, foreach=True),
    "adamw, one by one": stepped(torch.optim.AdamW, foreach=False),
    "adam, fused": stepped(torch.optim.Adam, fused=True),
    "sgd, fused": stepped(lambda weights, lr: torch.optim.SGD(weights, lr=100 * lr, fused=True)),
    "data, in place": of_weights(lambda weight: weight.data.add_(0.2)),
    "data, another tensor": of_weights(lambda weight: setattr(weight, "data", weight.data + 0.2)),
    "vector_to_parameters": to_vector_and_back,
    "assigned": assigned,
    "averaged weights": swapped,
    "set_local_adapter": lambda one: one.model.adapter.set_local(larger(one.model.adapter.local_state())),
    "set_adapter_state": lambda one: one.model.set_adapter_state(larger(one.model.adapter_state())),
    "set_training_state": training_state,
    "scaling": of_lora(lambda module: Linear.set_scale(module, "default", 3.0)),
    "switched off": of_lora(lambda module: Linear.enable_adapters(module, False)),
    "merged": of_lora(Linear.merge),
    "embedding": embedding_row,
    "base weight": lambda one: mlp(one).down_proj.weight.data.mul_(1.5),
    "hook": lambda one: mlp(one).register_forward_hook(lambda _module, _given, out: out + 1.0),
    "dtype": lambda one: one.model.input_blocks.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_state_that_changed_never_carries_the_noise_of_before(passes: Passes, name: str) -> None:
    before, first = passes.look()
    CHANGES[name](passes)
    passes.model.zero_grad(set_to_none=True)
    after, second = passes.look()
    assert not torch.equal(before, after)
    assert not are_the_same(first, second)


def neftune(passes: Passes) -> None:
    embedding = passes.model.get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    embedding.register_forward_hook(neftune_post_forward_hook)


def attention_dropout(passes: Passes) -> None:
    passes.model.input_blocks.model.layers["0"].self_attn.attention_dropout = 0.5


lora_dropout = of_lora(lambda module: module.lora_dropout.update({"default": torch.nn.Dropout(0.5).train()}))


@pytest.mark.parametrize("begin", [lora_dropout, neftune, attention_dropout])
@pytest.mark.parametrize("gradients", [True, False])
def test_what_is_drawn_on_the_way_changes_the_noise(
    tiny_server: RunningServer, passes: Passes, begin: Callable[[Passes], None], gradients: bool
) -> None:
    begin(passes)
    model, looks = passes.model, []
    for seed in (1, 2, 1):
        pair = []
        for noise in (CLEAN, GaussianNoise(STD)):
            torch.manual_seed(seed)
            model.noise = noise
            if gradients:
                model(TEXT, labels=TEXT)
                pair.append(passes._seen[-1].states.clone())
            else:
                with torch.no_grad():
                    pair.append(capture(model, lambda: model(TEXT))[-1].states.clone())
        looks.append((pair[0], (pair[1] - pair[0]) / STD))
    (clean, first), (other, second), (again, third) = looks
    assert not torch.equal(clean, other)
    assert not are_the_same(first, second)
    assert torch.equal(clean, again)
    assert are_the_same(first, third)


def test_a_state_that_did_not_change_carries_the_same_noise(passes: Passes) -> None:
    model = passes.model
    first = passes.send()
    model.adapter.set_local(model.adapter.local_state())
    assert torch.equal(passes.send(), first)
    model.set_adapter_state(model.adapter_state())
    assert torch.equal(passes.send(), first)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.0, weight_decay=0.0)
    passes.send(backward=True)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    assert torch.equal(passes.send(), first)
    model.gradient_checkpointing_enable()
    sent = len(passes._seen)
    assert torch.equal(passes.send(backward=True), first)
    assert len(passes._seen) == sent + 1
    # Changed and back: the draw of the first time, not a further look.
    weights = model.adapter.local_state()
    for change in (0.2, 0.0):
        model.adapter.set_local({name: weight + change for name, weight in weights.items()})
        assert torch.equal(passes.send(), first) == (change == 0.0)
    model.noise = clipped_gaussian(1e9, STD)
    assert not are_the_same(passes.send() / STD, first / STD)
    model.noise = GaussianNoise(STD)
    assert torch.equal(passes.send(), first)


def test_evaluation_carries_the_noise_of_training_whatever_the_shape_of_the_batch(passes: Passes) -> None:
    first = passes.send()
    model = passes.model.eval()
    batch = torch.cat([TEXT.roll(1, 1), TEXT, TEXT.flip(1)])
    with torch.no_grad():
        alone = capture(model, lambda: model(TEXT))[-1].states
        among = by_position(capture(model, lambda: model(batch)))
        cache = model.new_cache()
        in_pieces = capture(model, lambda: [model(TEXT[:, at : at + 4], past_key_values=cache) for at in (0, 4, 8)])
        anew = by_position(
            capture(model, lambda: model.generate(TEXT, max_new_tokens=4, use_cache=False, pad_token_id=0))
        )
    place = next(row for row in range(3) if torch.allclose(among[row, 0], first[0], atol=0.04))
    rows = [torch.stack([found[row, at] for at in range(12)]) for found, row in ((among, place), (anew, 0))]
    for found in (alone, *rows, torch.cat([one.states for one in in_pieces])):
        torch.testing.assert_close(found, first, atol=0.04, rtol=1e-3)  # a step of the grid


@pytest.mark.parametrize("computed", ["bfloat16", "float16", "autocast"])
def test_what_16_bits_round_away_differs_never_without_noise(
    tiny_server: RunningServer, monkeypatch: pytest.MonkeyPatch, computed: str
) -> None:
    # Another order of the same sums, as for a batch of another shape: all that goes in is the same, and states differ
    # by a last place. Which shapes do that depends on the processor, so it is done by hand.
    compute, last_place = InputBlocks.run_embedded, [1.0]

    def in_another_order(self: InputBlocks, *args: Any) -> torch.Tensor:
        return compute(self, *args) * last_place[0]

    monkeypatch.setattr(InputBlocks, "run_embedded", in_another_order)
    sent: list[torch.Tensor] = []
    dtype = "float32" if computed == "autocast" else computed
    with connect(tiny_server, dtype=dtype, noise=GaussianNoise(STD)) as model, torch.no_grad():
        for factor in (1.0, 1.0, 1 + 2**-7):
            last_place[0] = factor
            with torch.autocast("cpu", torch.bfloat16, enabled=computed == "autocast"):
                sent += [step.states.float() for step in capture(model, lambda: model(TEXT))]
    assert torch.equal(sent[0], sent[1])
    # Each number of such a state has noise of its own, and yet what both have in common is by far the larger part.
    apart = ((sent[2] - sent[0]) / STD).abs().median()
    assert 0.03 < float(apart) < 0.4


def test_strengths_that_are_set_between_passes_share_no_draw(passes: Passes) -> None:
    looks = [passes.look()[1]]
    for noise in (GaussianNoise(2 * STD), clipped_gaussian(1e9, STD), clipped_gaussian(1e9, 9.0)):
        passes.model.noise = noise
        looks.append(passes.look()[1])
        assert not any(are_the_same(looks[-1], before) for before in looks[:-1])


def test_noise_that_begins_within_a_session_is_of_its_text(tiny_server: RunningServer) -> None:
    found = []
    with connect(tiny_server) as model, torch.no_grad():
        for text in (TEXT, TEXT.roll(3, 1)):
            model.noise, cache, new = CLEAN, model.new_cache(), torch.tensor([[7]])
            state = capture(model, lambda text=text, new=new: model(torch.cat([text, new], 1)))[-1].states[-1]  # type: ignore[misc]
            model(text, past_key_values=cache)
            model.noise = GaussianNoise(STD)
            sent = capture(model, lambda cache=cache, new=new: model(new, past_key_values=cache))[-1].states[-1]  # type: ignore[misc]
            found.append((sent - state) / STD)
    assert not are_the_same(*found)


def test_two_models_share_no_draw(tiny_server: RunningServer) -> None:
    sent = []
    for _ in range(2):
        with connect(tiny_server, noise=GaussianNoise(STD)) as model, torch.no_grad():
            sent.append(capture(model, lambda model=model: model(TEXT))[-1].states / STD)  # type: ignore[misc]
    assert not are_the_same(*sent)


def test_without_input_layers_an_embedding_that_changed_has_other_noise(tiny_server: RunningServer) -> None:
    with connect(tiny_server, noise=GaussianNoise(STD), partition=Partition(0, 1)) as model, torch.no_grad():
        before = capture(model, lambda: model(TEXT))[-1].states.clone()
        weight = model.get_input_embeddings().weight
        weight.data[TEXT[0, 4]] += 1.0
        after = capture(model, lambda: model(TEXT))[-1].states
        first = TEXT[0].tolist().index(int(TEXT[0, 4]))
        assert torch.equal(before[:first], after[:first])
        assert not are_the_same(before[first] / STD, after[first] / STD)


@pytest.mark.parametrize("options", [{}, {"neftune_noise_alpha": 5.0}], ids=str)
def test_no_difference_between_two_epochs_of_a_trainer_is_without_noise(
    tiny_server: RunningServer, forwards: list[Forward], tmp_path: Path, options: dict[str, Any]
) -> None:
    rows = [{"input_ids": TEXT[0].tolist(), "labels": TEXT[0].tolist(), "attention_mask": [1] * 12}]
    with connect(tiny_server, noise=GaussianNoise(STD)) as model:
        adapted(model)
        arguments = TrainingArguments(
            str(tmp_path), num_train_epochs=3, learning_rate=1e-4, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, **options,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train()
    sent = [forward.states for forward in forwards]
    assert len(sent) == 3
    for one, other in ((0, 1), (1, 2), (0, 2)):
        # The states themselves move by far less.
        assert float((sent[one] - sent[other]).abs().median()) > 0.1 * STD
