"""The server's half of a run, without a network: what is done once, what is refused, what is left as it was."""

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsea import Partition
from fedsea.errors import (
    FedSEAError,
    LimitExceededError,
    NonFiniteError,
    PartitionError,
    ProtocolError,
    RunLostError,
    UsageError,
)
from fedsea.parts import Rows
from fedsea.parts.adapters import AdapterSpec
from fedsea.server.runs import REPLIES, Run, RunTable
from fedsea.server.trainer import Trainer
from fedsea.wire.frames import Command, Outcome, States, Tensors
from fedsea.wire.runs import Attach, OptimizerStep
from tests.support.raw_stream import HIDDEN
from tests.support.server_runs import (
    MIDDLE,
    ROWS,
    SPEC,
    backward,
    begin,
    do,
    ended,
    forward,
    load,
    request,
    spec_of,
    states,
    table_of,
    update,
)


@pytest.fixture
def table() -> RunTable:
    return table_of()


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in run.trainer.parameters.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def gradients(run: Run) -> list[torch.Tensor]:
    return [gradient.clone() for gradient in (run.trainer.adapter.gradients or {}).values()]


def test_forward_backward_and_step_are_those_of_the_layers_themselves(table: RunTable) -> None:
    run = begin(table)
    blocks = Trainer(MIDDLE, SPEC, range(1, 5), torch.float32).blocks
    hidden = states(1).clone().requires_grad_()
    output = blocks(hidden, ROWS, None, range(1, 5))
    output.backward(states(101) / 100)
    there, back = do(table, run, forward(1), backward(2))
    torch.testing.assert_close(there.states, output.detach())
    assert hidden.grad is not None
    torch.testing.assert_close(back.states * 2.0**-back.exponent, hidden.grad)
    trained = [weight for weight in blocks.parameters() if weight.requires_grad]
    assert back.norm == pytest.approx(float(torch.nn.utils.get_total_norm([weight.grad for weight in trained])))
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    optimizer.step()
    assert do(table, run, update(3, weight_decay=0.1)) == [Outcome(3, {"version": 1})]
    for ours, theirs in zip(weights(run).values(), trained, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), atol=1e-7, rtol=0)


def test_gradients_add_up_until_a_fresh_one(table: RunTable) -> None:
    run = begin(table)
    do(table, run, forward(1), backward(2))
    once = gradients(run)
    do(table, run, forward(3), backward(4, fresh=False))
    for one, two in zip(once, gradients(run), strict=True):
        torch.testing.assert_close(2 * one, two)
    do(table, run, Command(5, {"do": "rescale", "factor": 0.25}))
    for one, half in zip(once, gradients(run), strict=True):
        torch.testing.assert_close(one / 2, half)
    do(table, run, forward(6), backward(7))
    for one, again in zip(once, gradients(run), strict=True):
        torch.testing.assert_close(one, again)


def test_a_scaled_gradient_counts_as_what_it_stands_for(table: RunTable) -> None:
    run = begin(table)
    plain = do(table, run, forward(1), backward(2))[1]
    for number, exponent in ((3, 20), (5, -20)):
        scaled = backward(number + 1, gradient=states(101) / 100 * 2.0**exponent, exponent=exponent)
        answer = do(table, run, forward(number), scaled)[1]
        assert answer.norm == pytest.approx(plain.norm)
        torch.testing.assert_close(answer.states * 2.0**-answer.exponent, plain.states * 2.0**-plain.exponent)


@pytest.mark.parametrize("exponent", [-114, 200])
def test_exponents_at_the_ends_of_what_is_allowed_raise_nothing(table: RunTable, exponent: int) -> None:
    run = begin(table)
    _, first, _, second = do(
        table, run, forward(1), backward(2, exponent=exponent), forward(3), backward(4, exponent=exponent, fresh=False)
    )
    assert isinstance(first, States)
    assert isinstance(second, States)


def test_kept_recomputed_and_evaluated_passes_agree_and_only_dropout_differs() -> None:
    spec = spec_of(lora_dropout=0.3)
    outcomes = []
    for recompute, limit in ((False, 1 << 24), (True, 1 << 24), (False, 0)):
        table = table_of(graph_bytes=limit)
        run = begin(table, adapter=spec)
        load(run.trainer, {name: torch.ones_like(weight) / 9 for name, weight in weights(run).items()})
        # The first pass measures what a graph takes, and is kept; so look at the second.
        do(table, run, forward(1), backward(2))
        there = do(table, run, forward(3, recompute=recompute))[0]
        kept = run.trainer.graph_bytes > 0
        assert kept == (not recompute and limit > 0)
        back = do(table, run, backward(4))[0]
        outcomes.append((there.states, back.states, back.norm))
        still = do(table, run, forward(5, training=False), forward(6, training=False))
        assert torch.equal(still[0].states, still[1].states)
        assert not torch.equal(still[0].states, there.states)
    for output, gradient, norm in outcomes[1:]:
        assert torch.equal(output, outcomes[0][0])
        torch.testing.assert_close(gradient, outcomes[0][1])
        assert norm == pytest.approx(outcomes[0][2])


def test_dropouts_draws_leave_torchs_generator_alone_and_depend_on_the_seed_alone(table: RunTable) -> None:
    run = begin(table, adapter=spec_of(lora_dropout=0.5))
    load(run.trainer, {name: torch.ones_like(weight) for name, weight in weights(run).items()})
    before = torch.get_rng_state()
    again = {"states": states(1)}
    one, two, three = do(table, run, forward(1, 1), forward(2, 2, seed=7, **again), forward(3, 3, **again))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one.states, two.states)
    assert torch.equal(one.states, three.states)


def one_tensor(kind: str = "adapter", layer: int = 2, rank: int = 4) -> Tensors:
    return Tensors(3, {f"{kind}/model.layers.{layer}.self_attn.q_proj.lora_A.weight": torch.zeros(rank, 64)})


REFUSED: dict[str, tuple[Any, str]] = {
    "an operation left out": (forward(4, 9), "operation 4 came after operation 2; 3 was expected"),
    "an operation again": (forward(2, 9), "operation 2 came after operation 2"),
    "a gradient for nothing": (backward(3, 9), "micro-batch 9, which is not waiting"),
    "a gradient again": (backward(3, 1), "micro-batch 1, which is not waiting"),
    "a gradient of another length": (backward(3, 2, gradient=states(1, 7)), "has 8 tokens, its gradient 7"),
    "another hidden size": (forward(3, 9, states=torch.zeros(8, 63)), "hidden size is 64"),
    "another dtype": (forward(3, 9, states=states().half()), "wire dtype is torch.float32"),
    "a gradient of another dtype": (backward(3, 2, gradient=states().bfloat16()), "wire dtype is"),
    "a text too long": (
        forward(3, 9, rows=Rows((0,), (513,)), states=torch.zeros(513, HIDDEN)),
        "a row of 513 tokens is longer than the model's 512 positions",
    ),
    "a step too far": (update(3, 2), "optimizer step 2 came after step 0"),
    "a step again": (update(3, 0), "optimizer step 0 came after step 0"),
    "a step of an unknown optimizer": (
        Command(3, {"do": "update", **OptimizerStep("lion", 1, 1.0, 1.0).to_body()}),
        "must be one of adamw, adam, sgd",
    ),
    "an unknown command": (Command(3, {"do": "format"}), "no command 'format'"),
    "no command": (Command(3, {}), "no command None"),
    "an export after nothing": (Command(3, {"do": "export", "after": 3}), "'after' must be a text"),
    "micro-batches by name": (Command(3, {"do": "discard", "micros": ["1"]}), "whole numbers"),
    "micro-batches without a list": (Command(3, {"do": "discard"}), "'micros' must be a list"),
    "a version below 0": (Command(3, {"do": "restore", "version": -1}), "'version' must be a whole"),
    "an endless rescale": (Command(3, {"do": "rescale", "factor": float("inf")}), "'factor' must be"),
    "an unknown weight": (Tensors(3, {"adapter/model.x": torch.zeros(1)}), "no weight 'model.x'"),
    "an unknown state": (one_tensor("loot"), "no state 'loot'"),
    "a weight of another shape": (one_tensor(rank=5), r"has shape \[5, 64\], the weight has \[4, 64\]"),
    "a weight of a layer that the client has": (one_tensor(layer=0), "no weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_not_done_and_the_run_goes_on_as_if_nothing_had_been(table: RunTable, case: str) -> None:
    operation, says = REFUSED[case]
    kind = LimitExceededError if case == "a text too long" else ProtocolError
    run, twin = begin(table), begin(table, "twin")
    do(table, run, forward(1, 1), forward(2, 2))
    run.trainer.discard([1])
    with pytest.raises(kind, match=says) as raised:
        do(table, run, operation)
    assert "\n" not in str(raised.value)
    assert run.number == 2
    with pytest.raises(ProtocolError, match="no gradient before it"):
        do(table, run, update(3))
    do(table, run, backward(3, 2), update(4))
    do(table, twin, forward(1, 2), backward(2, 2), update(3))
    assert same(weights(run), weights(twin))


def test_an_operation_that_reaches_the_worker_twice_is_done_once(table: RunTable) -> None:
    run = begin(table)
    do(table, run, forward(1), backward(2))
    table.admit(run, replace(update(3), received=2))
    table.do(run, update(3))
    after = weights(run)
    with pytest.raises(ProtocolError, match="done already"):
        table.do(run, update(3))
    assert same(weights(run), after)


def test_the_oldest_micro_batch_gives_way_and_its_gradient_is_told_so() -> None:
    table = table_of(run_micro_batches=2)
    run = begin(table)
    do(table, run, forward(1, 1), forward(2, 2), forward(3, 3))
    with pytest.raises(ProtocolError, match="micro-batch 1, which was given up for later ones"):
        do(table, run, backward(4, 1))
    do(table, run, backward(4, 3), backward(5, 2))
    # A client that comes back from the dead counts its micro-batches anew.
    do(table, run, forward(6, 1), forward(7, 2), forward(8, 1), forward(9, 3), backward(10, 1), backward(11, 3))


def test_states_that_are_not_finite_name_the_layer_and_change_nothing(table: RunTable) -> None:
    run = begin(table)
    do(table, run, forward(1), backward(2), update(3))
    good = weights(run)
    name = "adapter/model.layers.3.self_attn.v_proj.lora_B.weight"
    do(table, run, Tensors(4, {name: torch.full((32, 4), 3e38)}))
    with pytest.raises(NonFiniteError, match="first after layer 3, in the middle blocks"):
        do(table, run, forward(5))
    do(table, run, Tensors(5, {name: good[name.removeprefix("adapter/")]}), forward(6), backward(7), update(8, 2))


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_weights_and_states_that_are_exported_go_on_elsewhere_as_here(table: RunTable, kind: str) -> None:
    table.limits = replace(table.limits, frame_bytes=9_000)  # so that it takes several frames
    how = {"momentum": 0.9} if kind == "sgd" else {"amsgrad": True}

    def step(number: int, version: int) -> list[Any]:
        settings = OptimizerStep(kind, version, 0.5, 1e-2, **how)
        return [forward(number), backward(number + 1), Command(number + 2, {"do": "update", **settings.to_body()})]

    run = begin(table)
    do(table, run, *step(1, 1), *step(4, 2))
    held: dict[str, torch.Tensor] = {}
    frames, more = 0, True
    while more:
        [answer] = do(table, run, Command(run.number + 1, {"do": "export", "after": max(held, default="")}))
        assert sum(tensor.nbytes for tensor in answer.tensors.values()) <= 4500
        assert not held.keys() & answer.tensors.keys()
        held |= answer.tensors
        frames, more = frames + 1, answer.more
    assert frames > 3
    states = {"momentum_buffer"} if kind == "sgd" else {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert {name.partition("/")[0] for name in held} == {"adapter"} | states
    twin = begin(table, "twin")
    do(table, twin, Command(1, {"do": "restore", "version": 2, "clear": False}), Tensors(2, held))
    do(table, run, *step(run.number + 1, 3))
    do(table, twin, *step(3, 3))
    assert same(weights(run), weights(twin))


def test_states_of_another_optimizer_are_refused(table: RunTable) -> None:
    run = begin(table)
    name = next(iter(run.trainer.parameters))
    do(table, run, Tensors(1, {f"exp_avg/{name}": torch.zeros(4, 64)}), forward(2), backward(3))
    with pytest.raises(ProtocolError, match=r"the optimizer's states of .* are exp_avg, not adamw's"):
        do(table, run, update(4))
    before = weights(run)
    do(table, run, update(4, fresh=True))
    assert not same(weights(run), before)


def test_another_optimizer_in_the_middle_of_a_run_must_say_that_it_is_new(table: RunTable) -> None:
    run = begin(table)
    do(table, run, forward(1), backward(2), update(3), forward(4), backward(5))
    sgd = OptimizerStep("sgd", 2, 1.0, 0.1)
    with pytest.raises(ProtocolError, match="the run's optimizer is adamw, not sgd"):
        do(table, run, Command(6, {"do": "update", **sgd.to_body()}))
    do(table, run, Command(6, {"do": "update", **replace(sgd, fresh=True).to_body()}))


def test_a_cleared_run_knows_no_gradient_and_no_micro_batch(table: RunTable) -> None:
    run = begin(table)
    do(table, run, forward(1), backward(2), forward(3, 3), Command(4, {"do": "restore", "version": 7, "clear": True}))
    for operation, says in ((backward(5, 3), "not waiting"), (update(5, 8), "no gradient")):
        with pytest.raises(ProtocolError, match=says):
            do(table, run, operation)
    assert run.version == 7
    assert run.trainer.graph_bytes == 0


# Whose they are, and how long


def test_a_run_is_its_own_clients_only(table: RunTable) -> None:
    run = begin(table)
    with pytest.raises(RunLostError, match="does not have the run 'one'"):
        table.find("one", "b")
    others = begin(table, client="b")
    assert (table.find("one", "a"), table.find("one", "b")) == (run, others)
    do(table, run, forward(1), backward(2), update(3))
    table.close(others)
    assert table.find("one", "a") is run


def test_a_run_is_taken_up_as_it_is_or_not_at_all(table: RunTable) -> None:
    def again(**more: Any) -> Attach:
        return request(begin=False, **more)

    reasons: list[FedSEAError] = []
    run = table.attach(request(), "a", reasons.append)[0]
    do(table, run, forward(1), backward(2))
    for other, says in [
        (again(adapter=spec_of(r=5)), "trains another adapter: rank 5"),
        (again(adapter=spec_of(target_modules="all-linear")), "trains another adapter: other target modules"),
        (again(partition=Partition(1, 2)), "another partition or wire dtype"),
        (again(wire_dtype="float16"), "another partition or wire dtype"),
        (again(received=3), "has done 2 operations, not 3"),
    ]:
        with pytest.raises(ProtocolError, match=says):
            table.attach(other, "a", ended)
    with pytest.raises(UsageError, match="the run 'one' is at the server already, after 0 optimizer steps"):
        table.attach(request(), "a", ended)
    assert reasons == []
    assert table.attach(again(received=1), "a", ended) == (run, False)
    assert [str(reason) for reason in reasons] == ["another connection has taken the run up"]
    assert run.number == 2


def test_answers_are_kept_until_the_client_has_them(table: RunTable) -> None:
    run = begin(table)
    for number in range(1, 4):
        table.admit(run, forward(number))
        table.do(run, forward(number))
    assert list(run.replies) == [1, 2, 3]
    table.admit(run, replace(forward(4), received=2))
    assert list(run.replies) == [3]
    for number in range(4, REPLIES + 3):
        command = Command(number, {"do": "explain"})
        table.admit(run, replace(command, received=2))
        table.do(run, command)
    with pytest.raises(LimitExceededError, match=f"{REPLIES} answers were left unread"):
        table.admit(run, Command(REPLIES + 3, {"do": "explain"}, received=2))


def test_a_run_that_has_ended_does_nothing_more(table: RunTable) -> None:
    run = begin(table)
    table.close(run)
    with pytest.raises(RunLostError, match="has ended"):
        table.do(run, forward(1))
    with pytest.raises(RunLostError, match="resume the training from its last checkpoint"):
        begin(table, begin=False)
    assert len(table) == 0


def test_memory_for_adapters_is_limited_over_all_runs() -> None:
    weights = SPEC.weight_shapes(table_of().modules, range(1, 5)).values()
    table = table_of(run_bytes=4 * 4 * sum(map(math.prod, weights)))  # of its four middle layers, once
    begin(table)
    with pytest.raises(LimitExceededError, match=r"memory for adapters .* is used up: the run needs 0.1 MiB"):
        begin(table, "two")
    assert len(table) == 1


def test_a_run_that_does_not_fit_the_model_is_refused_and_not_there(table: RunTable) -> None:
    bodiless = AdapterSpec({"model.layers.99.self_attn.q_proj": (4, 8.0)})
    nothing = AdapterSpec({"model.layers.2.self_attn.nothing": (4, 8.0)})
    for how, kind, says in [
        ({"adapter": bodiless}, ProtocolError, "names layers that the model does not have"),
        ({"adapter": nothing}, ProtocolError, "is not a linear module"),
        ({"partition": Partition(4, 4)}, PartitionError, "more than"),
    ]:
        with pytest.raises(kind, match=says):
            begin(table, **how)
    assert len(table) == 0


def test_runs_do_not_touch_each_other_or_the_base_model(table: RunTable) -> None:
    before = {name: weight.clone() for name, weight in MIDDLE.state_dict().items()}
    one, two, alone = begin(table, "one"), begin(table, "two", adapter=spec_of(r=2)), begin(table, "alone")
    for number in (1, 4):
        for run in (one, two):
            do(table, run, forward(number))
        for run in (two, one):
            do(table, run, backward(number + 1), update(number + 2, number // 3 + 1))
    for number in (1, 4):
        do(table, alone, forward(number), backward(number + 1), update(number + 2, number // 3 + 1))
    assert same(weights(one), weights(alone))
    assert all(torch.equal(weight, before[name]) for name, weight in MIDDLE.state_dict().items())


@pytest.mark.parametrize("gives_up", [lambda run: run.trainer.close(), lambda run: run.trainer.restore(0, clear=True)])
def test_the_ledger_may_look_while_micro_batches_are_given_up(table: RunTable, gives_up: Callable[[Run], None]) -> None:
    """Freeing a tensor lets other threads run: what they then find of the others must be whole."""
    run = begin(table)
    do(table, run, forward(1, micro=1), forward(2, micro=2), forward(3, micro=3))
    seen: list[int] = []
    for micro in run.trainer.waiting.values():
        weakref.finalize(micro, lambda: seen.append(run.trainer.waiting_bytes))
    del micro
    gives_up(run)
    assert seen == [0, 0, 0]
