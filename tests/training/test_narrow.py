"""A narrow cut in training and afterwards: as the whole model with the two maps in it, and no wider than it says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from fedsea import GaussianNoise, Partition, SplitModelForCausalLM
from fedsea.checkpoints import open_checkpoint
from fedsea.errors import ModelMismatchError, PartitionError, ProtocolError, UsageError
from fedsea.partition import LIFT, PROJECT
from fedsea.parts.cut_files import read_cut
from fedsea.privacy import NarrowCut, Noise, clip_norms, parse_mechanism
from fedsea.privacy.measure import public_states
from fedsea.training.export import export_adapter, merge_adapter
from fedsea.training.recipe import Recipe
from fedsea.wire.frames import Forward
from fedsea.wire.rounds import Ticket
from fedsea.wire.tensors import tensor_bytes
from tests.conftest import RunningServer, StartServer, connect
from tests.support import fine_tuning as support
from tests.support.comparing import assert_close_states, assert_same_losses, assert_same_state, snapshot, whole_adapter
from tests.support.link import Link
from tests.support.raw_stream import assert_same_tokens, prompt
from tests.support.refused import assert_refused, refused
from tests.support.sent_states import assert_all_noise, by_position, capture
from tests.support.split_training import adamw, adapted, batch, batches, lora, train, trained, whole_twin

HIDDEN, RANK = 64, 16
CUT = NarrowCut(RANK)
ALL_NOISE = parse_mechanism("narrow-cut:rank=32+clip:norm=1e-3+gaussian:std=1")  # all of what leaves is noise


class CutTwin:
    """The reference: PEFT on transformers' whole model, with two linear modules before the first middle layer."""

    def __init__(self, model: SplitModelForCausalLM, folder: Path, clip: float | None = None) -> None:
        start = model.adapter_state()
        self.whole = whole_twin(model, folder)
        self.whole.down, self.whole.up = nn.Linear(HIDDEN, RANK, bias=False), nn.Linear(RANK, HIDDEN, bias=False)
        self.whole.down.weight.data.copy_(start[PROJECT])
        self.whole.up.weight.data.copy_(start[LIFT])
        self._clip = clip
        layers = self.whole.base_model.model.model.layers
        layers[model.partition.input_layers].register_forward_pre_hook(self._through)

    def _through(self, _layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        narrow = self.whole.down(inputs[0])
        if self._clip is not None:
            narrow = clip_norms(narrow.flatten(0, 1), self._clip).view_as(narrow)
        return self.whole.up(narrow), *inputs[1:]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        ends = {PROJECT: self.whole.down.weight.detach(), LIFT: self.whole.up.weight.detach()}
        return whole_adapter(self.whole) | ends


# Training


@pytest.mark.parametrize("partition", [Partition(1, 1), Partition(0, 2)], ids=str)
def test_it_trains_as_the_whole_model_with_the_two_maps_in_it(
    tiny_server: RunningServer, tmp_path: Path, partition: Partition
) -> None:
    with adapted(tiny_server, noise=CUT, partition=partition) as model:
        start, twin = snapshot(model), CutTwin(model, tmp_path)
        torch.testing.assert_close(start[LIFT], start[PROJECT].T)
        data = batches(4)
        assert_same_losses(train(model, data, accumulate=2, clip=0.5), train(twin.whole, data, accumulate=2, clip=0.5))
        assert_close_states(model.adapter_state(), twin.weights)
        moved = snapshot(model)
        assert all(not torch.allclose(moved[name], start[name], atol=1e-3) for name in (PROJECT, LIFT))


def test_with_a_clip_behind_it_recomputed_and_with_adapters_in_other_places_only(
    tiny_server: RunningServer, tmp_path: Path
) -> None:
    clip = 0.5
    noise = parse_mechanism(f"narrow-cut:rank={RANK}+clip:norm={clip}")
    with adapted(tiny_server, lora(layers_to_transform=[3]), noise=noise, partition=Partition(2, 0)) as model:
        twin, data = CutTwin(model, tmp_path, clip), batches(3)
        model.activation_checkpointing_enable()
        steps = capture(model.eval(), lambda: without_graph(model, data[0]))
        norms = torch.cat([step.states for step in steps]).norm(dim=1)
        assert norms == pytest.approx(clip, rel=1e-5)
        model.train()
        sgd = {"make": lambda them: torch.optim.SGD(them, lr=0.1, momentum=0.9)}
        assert_same_losses(train(model, data, **sgd), train(twin.whole, data, **sgd))
        assert_close_states(model.adapter_state(), twin.weights)


def without_graph(model: Any, one: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(one["input_ids"], attention_mask=one["attention_mask"]).logits
        return found


def test_gradients_through_the_wire_are_those_of_finite_differences(tiny_server: RunningServer) -> None:
    one, step = batch(), 1e-2
    with adapted(tiny_server, noise=CUT) as model:
        project = model.narrow_cut["project"].weight
        assert model.middle.run is not None
        run = tiny_server.server.runs.find(model.middle.run.channel.name, "anonymous")

        def loss() -> float:
            with torch.no_grad():
                return float(model(**one).loss)

        model(**one).loss.backward()
        lift = run.trainer.parameters[LIFT].detach().clone()
        assert run.trainer.adapter.gradients is not None
        at_lift, at_project = run.trainer.adapter.gradients[LIFT].clone(), project.grad.clone()
        start = project.detach().clone()
        slopes = []
        for sign in (1, -1):
            model.middle.run.load({LIFT: lift + sign * step * at_lift / at_lift.norm()})
            slopes.append(sign * loss() / (2 * step))
        model.middle.run.load({LIFT: lift})
        assert sum(slopes) == pytest.approx(float(at_lift.norm()), rel=1e-2)
        slopes = []
        for sign in (1, -1):
            project.data.copy_(start + sign * step * at_project / at_project.norm())
            slopes.append(sign * loss() / (2 * step))
        assert sum(slopes) == pytest.approx(float(at_project.norm()), rel=1e-2)


def test_the_narrow_half_of_the_traffic_is_its_rank_wide(tiny_server: RunningServer) -> None:
    one = batch()
    tokens = int(one["attention_mask"].sum())
    with adapted(tiny_server, noise=CUT, wire_dtype="float16") as model:
        before = model.traffic.copy()
        model(**one).loss.backward()
        moved = model.traffic.since(before)
        assert moved.tensor_bytes_up == 2 * tokens * (RANK + HIDDEN)  # states; gradients at h_B
        assert moved.tensor_bytes_down == 2 * tokens * (HIDDEN + RANK)  # h_B; gradients at what was sent
        before = model.traffic.copy()
        model.eval().generate(prompt(), max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
        moved = model.traffic.since(before)
        assert (moved.tensor_bytes_up, moved.tensor_bytes_down) == (2 * 9 * RANK, 2 * 9 * HIDDEN)


def test_float16_learns_as_well(serve: StartServer, tiny_server: RunningServer) -> None:
    server, losses = serve(dtype=torch.float16), []
    for where, how in ((tiny_server, {}), (server, {"dtype": "float16", "wire_dtype": None})):
        with adapted(where, noise=CUT, **how) as model:
            start = snapshot(model)
            losses.append(train(model, [batch()] * 5, make=lambda them: adamw(them, lr=1e-2)))
            now = snapshot(model)
            assert {now[PROJECT].dtype, now[LIFT].dtype} == {torch.float32}
            assert not torch.allclose(now[LIFT], start[LIFT], atol=1e-3)
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=5e-2, atol=0)
    assert losses[1][-1] < losses[1][0] - 0.1


# What leaves


def test_everything_that_leaves_is_narrow_and_noised(tiny_server: RunningServer, forwards: list[Forward]) -> None:
    with adapted(tiny_server, noise=ALL_NOISE) as model:
        optimizer = model.create_optimizer(lr=1e-2)
        for _ in range(2):
            model(**batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        steps = capture(model, lambda: without_graph(model, batch()))
        for options in ({}, {"num_beams": 3}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}):
            how = {"max_new_tokens": 5, "pad_token_id": 0, "do_sample": False} | options
            generated = capture(model, lambda how=how: model.generate(prompt(tokens=9), **how))
            assert_all_noise(torch.stack(list(by_position(generated).values())))
            steps += generated
        model(**batch())  # in evaluation mode, with gradients
    sent = [one.states for one in forwards] + [step.states for step in steps]
    assert {states.shape[1] for states in sent} == {32}
    assert_all_noise(torch.cat(sent))


def test_the_same_text_has_the_same_noise_until_the_projection_moves(
    tiny_server: RunningServer, forwards: list[Forward]
) -> None:
    with adapted(tiny_server, lora(layers_to_transform=[3]), noise=ALL_NOISE) as model:
        model.micro_batches = 1
        optimizer = model.create_optimizer(lr=1e-2)
        model(**batch())
        model(**batch()).loss.backward()
        optimizer.step()
        model(**batch())
    first, again, moved = (tensor_bytes(one.states) for one in forwards)
    assert first == again
    assert torch.corrcoef(torch.stack([one.states.flatten() for one in forwards[1:]]))[0, 1].abs() < 0.2
    assert moved != again


# Sessions


def test_a_session_computes_what_the_training_does(tiny_server: RunningServer, tmp_path: Path) -> None:
    with adapted(tiny_server, noise=CUT) as model:
        twin = CutTwin(model, tmp_path)
        for one in (model, twin.whole):
            train(one, batches(3))
            one.eval()
        data = batch(7)
        mask = data["attention_mask"].bool()
        in_session = without_graph(model, data)[mask]
        with_graph = model(data["input_ids"], attention_mask=data["attention_mask"]).logits.detach()[mask]
        whole = without_graph(twin.whole, data)[mask]
        torch.testing.assert_close(in_session, with_graph, atol=1e-4, rtol=0)
        torch.testing.assert_close(in_session, whole, atol=2e-4, rtol=0)
        assert_same_tokens(model, twin.whole, lambda: None)


def test_a_session_goes_on_after_a_cut_and_is_replayed_if_it_is_gone(tiny_server: RunningServer) -> None:
    how: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    table = tiny_server.server.sessions
    with Link(tiny_server.address) as link, adapted(link, noise=CUT) as model:
        train(model, batches(1))
        model.eval()
        reference = model.generate(prompt(), **how)

        def lose() -> None:
            for session in list(table):
                table.close(session)
            link.cut()

        for midway, replays in ((link.cut, 0), (lose, 1)):
            steps = capture(model, lambda midway=midway: assert_same_tokens(model, model, midway))
            assert len([step for step in steps if not step.want_result]) == replays
            assert {step.states.shape[1] for step in steps} == {RANK}
        assert model.traffic.reconnections >= 2
        assert torch.equal(model.generate(prompt(), **how), reference)


# Checkpoints and files


def test_a_training_state_goes_on_elsewhere_as_here(tiny_server: RunningServer) -> None:
    data = batches(4)
    with adapted(tiny_server, noise=CUT) as model, adapted(tiny_server, noise=CUT) as other:
        optimizer = model.create_optimizer(lr=5e-3)
        train(model, data[:2], optimizer=optimizer)
        state = model.adapter.training_state(optimizer)
        assert {f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq") for name in (PROJECT, LIFT)} <= state[1].keys()
        other.load_state_dict(model.state_dict())
        assert_same_state(snapshot(other), snapshot(model))
        losses = train(model, data[2:], optimizer=optimizer)
        train(other, data[3:])
        again = other.create_optimizer(lr=5e-3)
        other.adapter.set_training_state(again, *state, 2)
        assert train(other, data[2:], optimizer=again) == losses
        assert_same_state(snapshot(other), snapshot(model))


RECIPE = Recipe(steps=6, batch_size=3, lr=1e-2, save_every=2)


def tuning(model: SplitModelForCausalLM, folder: Path, *, resume: bool = False) -> Any:
    training = support.tuning(model, folder, RECIPE, lora(), texts=support.examples(9), resume=resume)
    if resume:
        assert training.resume()
    return training


def test_a_fine_tuning_goes_on_from_its_checkpoint_and_in_its_own_place_only(
    tiny_server: RunningServer, tmp_path: Path
) -> None:
    with connect(tiny_server, noise=CUT) as model:
        assert tuning(model, tmp_path / "whole").run(support.nothing)
        model.adapter.end_run()
    runs, figures = tiny_server.server.runs, []
    with connect(tiny_server, noise=CUT) as model:
        training = tuning(model, tmp_path / "run")

        def on_step(one: Any) -> None:
            figures.append(one)
            if len(figures) == 3:  # the server loses the run: back to step 2, by itself
                runs.close(runs.find(model.middle.run.channel.name, "anonymous"))  # type: ignore[union-attr]

        assert not training.run(on_step, lambda: len(figures) == 5)
    elsewhere: dict[str, Any] = {"noise": CUT, "partition": Partition(2, 1)}
    with connect(tiny_server, **elsewhere) as model, pytest.raises(ProtocolError, match="another partition"):
        tuning(model, tmp_path / "run", resume=True)
    with connect(tiny_server, noise=CUT) as model:
        assert tuning(model, tmp_path / "run", resume=True).run(support.nothing)
        model.adapter.end_run()
    with connect(tiny_server, **elsewhere) as model:  # its run is no more at the server
        with pytest.raises(PartitionError, match="trained after 1 input layers, here there are 2"):
            tuning(model, tmp_path / "run", resume=True)
        model.adapter.end_run()
    assert support.losses(tmp_path / "whole") == support.losses(tmp_path / "run")


@pytest.fixture(scope="module")
def cut_adapter(
    tiny_server: RunningServer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.Tensor, Noise]:
    """A trained adapter with a cut, the logits that it gives without noise, and how it was protected."""
    folder = tmp_path_factory.mktemp("cut") / "adapter"
    noise = parse_mechanism(f"narrow-cut:rank={RANK}+relative-clip:norm=2+relative:level=0.1")
    with adapted(tiny_server, noise=noise) as model:
        train(model, batches(2))
        model.save_adapter(folder)
        own = model.noise
    with connect(tiny_server, noise=CUT) as quiet:
        quiet.load_adapter(folder)
        assert quiet.noise == CUT
        return folder, without_graph(quiet.eval(), batch()), own


def test_an_adapter_brings_its_cut_and_its_noise(
    tiny_server: RunningServer, cut_adapter: tuple[Path, torch.Tensor, Noise]
) -> None:
    folder, reference, own = cut_adapter
    notices: list[str] = []
    for asked, partition, gets in [
        (GaussianNoise(0.0), Partition(1, 1), str(own)),
        (GaussianNoise(0.5), Partition(1, 1), f"narrow-cut:rank={RANK}+gaussian:std=0.5"),
        (CUT, Partition(1, 3), str(CUT)),
    ]:
        with connect(tiny_server, noise=asked, partition=partition, notice=notices.append) as model:
            model.load_adapter(folder, is_trainable=False)
            assert str(model.noise) == gets
            found: list[torch.Tensor] = []
            sent = capture(model, lambda model=model, found=found: found.append(without_graph(model, batch())))
            assert {step.states.shape[1] for step in sent} == {RANK}
        assert torch.allclose(found[0], reference, atol=1e-4) == (asked == CUT)
    assert notices[0].endswith(f"protected by {own}")
    assert notices[1].endswith(f"protected by narrow-cut:rank=16+gaussian:std=0.5; the adapter was trained with {own}")
    with connect(tiny_server, noise=parse_mechanism("relative:level=3"), notice=notices.append) as model:
        model.load_adapter(folder)
        assert model.noise.width == RANK
        project = model.narrow_cut["project"].weight.detach()
        level = model.noise.channel.std
    with connect(tiny_server) as plain:
        left = public_states(plain.input_blocks, open_checkpoint("random:tiny"))[1:] @ project.T
    assert level == pytest.approx(3 * float(left.abs().mean()), rel=1e-4)


def test_an_adapter_of_another_place_rank_or_kind_is_refused_in_one_line(
    tiny_server: RunningServer, cut_adapter: tuple[Path, torch.Tensor, Noise], tmp_path: Path
) -> None:
    folder = cut_adapter[0]
    with adapted(tiny_server) as plain:
        plain.save_adapter(tmp_path / "plain")
        with pytest.raises(ModelMismatchError, match="a narrow cut of rank 16 beside no narrow cut"):
            plain.load_adapter(folder)
    for noise, partition, kind, says, which in [
        (CUT, Partition(2, 1), PartitionError, "trained after 1 input layers, here there are 2", folder),
        (CUT, Partition(0, 1), PartitionError, "trained after 1 input layers, here there are 0", folder),
        (NarrowCut(8), Partition(), ModelMismatchError, "rank 16, .* asks for rank 8; .*narrow-cut:rank=16", folder),
        (CUT, Partition(), UsageError, "was trained without a narrow cut", tmp_path / "plain"),
    ]:
        with connect(tiny_server, noise=noise, partition=partition) as model, refused(kind, says):
            model.load_adapter(which)
    with connect(tiny_server, partition=Partition(3, 3)) as model, pytest.raises(UsageError, match="there is no cut"):
        model.load_adapter(folder)


def test_it_is_exported_beside_its_adapter_and_never_merged(
    tiny_server: RunningServer, cut_adapter: tuple[Path, torch.Tensor, Noise], tmp_path: Path
) -> None:
    folder = cut_adapter[0]
    assert export_adapter(folder, tmp_path / "out")
    one, two = read_cut(folder), read_cut(tmp_path / "out")
    assert one is not None
    assert two is not None
    assert one[0] == two[0]
    assert_same_state(one[1], two[1])
    with pytest.raises(UsageError, match="has a narrow cut, which no merged model can hold"):
        merge_adapter(folder, "random:tiny", tmp_path / "merged", dtype=torch.float32)
    assert not (tmp_path / "merged").exists()
    with adapted(tiny_server, noise=CUT) as model:
        model.save_pretrained(tmp_path / "by transformers")
        state, found = model.adapter_state(), read_cut(tmp_path / "by transformers")
        assert found is not None
        assert all(torch.equal(found[1][name], state[name]) for name in (PROJECT, LIFT))


# What cannot be


def test_what_cannot_be_is_said_in_one_line_before_anything_leaves(tiny_server: RunningServer) -> None:
    for noise, partition, says in [
        (NarrowCut(64), Partition(), "a narrow cut of rank 64 narrows nothing: this model's states have 64"),
        (CUT, Partition(3, 3), "with no middle blocks nothing leaves"),
    ]:
        with pytest.raises(UsageError, match=says):
            connect(tiny_server, noise=noise, partition=partition)
    with connect(tiny_server, noise=CUT) as model:
        ticket = Ticket(tiny_server.address, "r1.a", "a", "0" * 32)
        for action, says in [
            (lambda: model(prompt()), "fine-tune with it first, or load the adapter that was trained with it"),
            (lambda: model.generate(prompt(), max_new_tokens=2, pad_token_id=0), "fine-tune with it first"),
            (lambda: model.adapter.join_round(ticket, lora()), "federated rounds train no narrow cuts"),
        ]:
            sent = capture(model, lambda action=action, says=says: assert_refused(action, says))
            assert not sent
        early = model.new_cache()
        model.add_adapter(lora(), seed=1)
        with torch.no_grad():
            assert_refused(lambda: model(prompt(), past_key_values=early), "begun before the model had its narrow cut")
        with pytest.raises(UsageError, match="PEFT keeps no narrow cut"):
            get_peft_model(connect(tiny_server, noise=CUT), lora())


def test_a_session_that_is_cut_otherwise_than_its_run_is_one_clear_line(tiny_server: RunningServer) -> None:
    with adapted(tiny_server, noise=CUT) as model:
        model.eval()
        model.middle.settings = replace(model.middle.settings, narrow=8)
        model.input_blocks.narrow(torch.zeros(8, HIDDEN))
        model.protection.use(NarrowCut(8))
        with torch.no_grad(), pytest.raises(ProtocolError, match=r"narrow cut has rank 16, the session's .* rank 8"):
            model(prompt())
        with pytest.raises(ProtocolError, match="narrow cut has rank 16, the states that came have 8 numbers"):
            model.train()(**batch())


def test_parameters_that_are_trained_are_the_adapters_and_the_projection(tiny_server: RunningServer) -> None:
    with adapted(tiny_server, noise=CUT) as model:
        names = {name for name, weight in model.named_parameters() if weight.requires_grad and ".lora_" not in name}
        assert names == {"lora_middle", PROJECT}
        assert len(trained(model)) == 2 + 8
