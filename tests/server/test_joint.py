"""Several runs in one pass: each gets what it gets by itself."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea.checkpoints import open_checkpoint
from fedsea.errors import NonFiniteError, ProtocolError
from fedsea.parts import MiddleBlocks
from fedsea.parts.adapters import AdapterSpec
from fedsea.server.joint import backward_together, forward_together
from fedsea.server.lanes import twin_of
from fedsea.wire.frames import States
from tests.conftest import save_small_model
from tests.support.joint_runs import (
    ALL,
    DTYPE,
    MOST,
    SOME,
    Member,
    alone,
    apart,
    assert_all_same,
    assert_backward,
    assert_forward,
    assert_same,
    assert_same_adapters,
    backward,
    forward,
    kept,
    members,
)
from tests.support.raw_stream import HIDDEN
from tests.support.server_runs import CHECKPOINT, MIDDLE, load, spec_of
from tests.support.split_training import lora

DROPS = {"spec": spec_of(lora_dropout=0.3, target_modules="all-linear")}
DORA = {"spec": spec_of(use_dora=True)}
CASES: dict[str, list[dict[str, Any]]] = {
    "eight": [{}] * 8,
    "ragged": [{"counts": (count, 3)} for count in (5, 9, 1)],
    "as long": [{"counts": (4, 4)}] * 3,
    "other numbers of rows": [{"counts": counts} for counts in SOME],
    "other partitions": [{"layers": layers} for layers in (MOST, range(2, 4), range(1, 6), range(6))],
    "partitions that do not touch": [
        {"layers": range(2), "counts": (9, 2)},
        {"layers": range(4, 6)},
        {"layers": range(4, 5), "counts": (1, 1, 7)},
    ],
    "dropout": [DROPS] * 3,
    "ragged dropout and other partitions": [
        {**DROPS, "counts": counts, "layers": layers}
        for counts, layers in zip(SOME, (MOST, range(2, 4), range(2, 6), MOST), strict=True)
    ],
    "dropout beside none": [DROPS, {}, {"spec": spec_of(lora_dropout=0.1)}],
    "rsLoRA": [{"spec": spec_of(use_rslora=True)}, {}, {"spec": spec_of(use_rslora=True, lora_alpha=3)}],
    "other ranks": [{"spec": spec_of(r=rank)} for rank in (4, 2, 7)],
    "other targets": [{"spec": spec_of(target_modules=names)} for names in ("all-linear", ["q_proj"], ["down_proj"])],
    "DoRA beside others": [{}, DORA, {"counts": (2, 2)}, DORA],
    "evaluation beside training": [DROPS, {**DROPS, "training": False}, DROPS, {**DROPS, "training": False}],
    "no gradient wanted": [{"want_gradient": False}, {}, {"want_gradient": False, "counts": (8,)}],
    "computed again": [{"recompute": True}] * 2 + [{**DROPS, "recompute": True, "counts": (9, 9)}],
    "some computed again": [{"recompute": True}, {}, {"recompute": True}, {}],
    "no room": [{"room": 0}] * 3,
    "room for some": [{"room": 0}, {}, {}, {"room": 100_000}],
    "nothing to train": [{"spec": spec_of(layers_to_transform=[0])}, {}],
    "nothing to do": [{"layers": range(3, 3)}, {}, {}],
}


@pytest.mark.parametrize("case", CASES)
def test_runs_in_one_pass_get_what_each_gets_by_itself(case: str) -> None:
    ones, others = members(CASES[case]), members(CASES[case])
    for step in (1, 2, 3):
        assert_forward(ones, others, step)
        assert_backward(ones, others, step)
        for one in [*ones, *others]:
            one.update(step)
        assert_same_adapters(ones, others)
        assert kept(ones) == [0] * len(ones)


def test_runs_of_any_shape_and_partition_are_one_pass_over_the_base_layers() -> None:
    ones = members(CASES["ragged dropout and other partitions"] + CASES["other ranks"])
    calls = []
    twin, _active = twin_of(MIDDLE)
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in twin.model.layers.values()]
    forward(ones)
    assert len(calls) == 5  # layers 1 to 5, once each
    assert len({one.graph() for one in ones}) == 1
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 0.3), (torch.float16, 0.05)])
def test_half_precision_is_as_good_together_as_alone(dtype: torch.dtype, atol: float) -> None:
    middle = MiddleBlocks.from_checkpoint(CHECKPOINT, ALL, dtype=dtype)
    cases = [{"middle": middle, "dtype": dtype, "counts": counts} for counts in SOME]
    ones, others = members(cases), members(cases)
    for one, other in zip(forward(ones), [alone(other.forward()) for other in others], strict=True):
        assert one.states.dtype is dtype
        torch.testing.assert_close(one.states, other.states, rtol=0.1, atol=atol)
    for one, other in zip(backward(ones, exponent=3), [alone(o.backward(exponent=3)) for o in others], strict=True):
        assert one.norm == pytest.approx(other.norm, rel=0.1)
    for member in ones:
        member.update()


@pytest.mark.parametrize("name", ["random:tiny-qwen2", "random:tiny-qwen3"])
def test_other_families_compute_together_too(name: str) -> None:
    checkpoint = open_checkpoint(name)
    middle = MiddleBlocks.from_checkpoint(checkpoint, range(1, 5), dtype=DTYPE)
    spec = AdapterSpec.from_config(lora(target_modules="all-linear"), checkpoint.config, 1)
    cases = [{"middle": middle, "spec": spec, "counts": counts} for counts in (*SOME, (40, 30))]
    ones, others = members(cases), members(cases)
    assert_forward(ones, others)
    assert_backward(ones, others)


def test_a_rotary_embedding_that_depends_on_the_longest_text_sees_each_runs_own(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    folder = save_small_model(tmp_path, max_position_embeddings=8, rope_parameters=rope)
    checkpoint = open_checkpoint(folder)
    middle = MiddleBlocks.from_checkpoint(checkpoint, range(4), dtype=DTYPE)
    spec = AdapterSpec.from_config(lora(), checkpoint.config, 1)
    cases = [{"middle": middle, "spec": spec, "layers": range(1, 3), "counts": (count,)} for count in (5, 20)]
    ones, others = members(cases), members(cases)
    assert_forward(ones, others)


def test_runs_on_other_base_weights_and_two_micro_batches_of_one_run_may_come_in_one_call() -> None:
    middle = MiddleBlocks.from_checkpoint(CHECKPOINT, range(1, 5), dtype=DTYPE)
    cases: list[dict[str, Any]] = [{}, {"middle": middle}, DORA, {"middle": middle}]
    ones, others = members(cases), members(cases)
    for number in (1, 2):
        for other in others:
            alone(other.forward(number))
    forward_together([one.forward(number) for number in (1, 2) for one in ones])
    # The second of each run adds up; the first begins anew.
    answers = backward_together([one.backward(number, fresh=number == 1) for number in (1, 2) for one in ones])
    assert_all_same(answers, [alone(o.backward(number, fresh=number == 1)) for number in (1, 2) for o in others])


# Who is missing, and what is kept for it


def test_who_is_missing_computes_again_when_it_comes_though_the_others_have_gone_on() -> None:
    ones, others = members([DROPS] * 4), members([DROPS] * 4)
    assert_forward(ones, others)
    assert_backward(ones[:3], others[:3])
    late = alone(others[3].backward())
    assert ones[3].trainer.graph_bytes == 0  # the graph is spent, and nothing is kept for a guest that may not come
    for member in ones[:3]:
        member.update()
    assert_same(backward_together([ones[3].backward()])[0], late)


def test_a_few_of_many_leave_the_graph_to_the_others() -> None:
    cases = [{**DROPS, "counts": (7,) * rows} for rows in (1, 2, 3, 1, 3)]
    ones, others = members(cases), members(cases)
    forward(ones)
    back = apart(others)
    whole = sum(kept(ones))
    graph = ones[1].graph()
    assert_all_same(backward(ones[:2]), back[:2])
    assert [one.graph() for one in ones[2:]] == [graph] * 3
    # It is as large as before, and on the account of those who are still in it.
    assert kept(ones[:2]) == [0, 0]
    assert sum(kept(ones)) == pytest.approx(whole, abs=5)
    ones[0].update()  # what the graph was made with has changed: it is no good any more
    assert_all_same(backward(ones[2:]), back[2:])
    assert sum(kept(ones)) == 0


def test_a_gradient_that_comes_after_the_weights_have_changed_is_that_of_the_new_ones() -> None:
    ones, others = members([DROPS] * 3), members([{**DROPS, "recompute": True}] * 3)
    for step in (1, 2):
        forward(ones, step)
        for other in others:
            alone(other.forward(step))
    backward(ones)
    for other in others:
        alone(other.backward())
    for member in (ones[0], others[0], ones[1], others[1]):
        member.update()
    assert_backward(ones[:2], others[:2], step=2)
    assert_backward(ones[2:], others[2:], step=2)


def test_a_graph_is_used_though_few_have_come_where_there_is_no_room_for_another() -> None:
    ones = members([{}] * 5)
    forward(ones)
    for one in ones:
        one.trainer.room = lambda _bytes: False
    backward_together([ones[0].backward()])
    assert kept(ones) == [0] * 5


ENDS: dict[str, Any] = {
    "discarded": lambda member: member.trainer.discard([1]),
    "restored": lambda member: member.trainer.restore(0, clear=True),
    "given up for later ones": lambda member: [alone(member.forward(step, recompute=True)) for step in range(2, 10)],
    "closed": lambda member: setattr(member, "trainer", None),
    "sent again": lambda member: alone(member.forward(recompute=True)),
}


@pytest.mark.parametrize("how", ENDS)
def test_memory_is_free_once_nobody_needs_the_graph(how: str) -> None:
    ones = members([{}] * 3)
    forward(ones)
    whole = sum(kept(ones))
    gone = [weakref.ref(ones[0].graph()), *[weakref.ref(one.trainer.waiting[1].output) for one in ones]]
    ENDS[how](ones[0])
    assert gone[0]() is not None
    assert sum(kept(ones[1:])) == pytest.approx(whole, abs=5)
    for one in ones[1:]:
        ENDS[how](one)
    gc.collect()
    assert [one() for one in gone] == [None] * 4
    assert [one.trainer.graph_bytes for one in ones if one.trainer is not None] == [0] * (3 if how != "closed" else 0)


def test_a_joint_pass_keeps_no_run_and_no_weights_of_its_own() -> None:
    ones = members([{}] * 2)
    forward(ones)
    backward(ones)
    gone = [weakref.ref(one.trainer) for one in ones]
    ones.clear()
    gc.collect()
    assert [one() for one in gone] == [None, None]
    twin, _active = twin_of(MIDDLE)
    assert twin_of(MIDDLE)[0] is twin
    assert {weight.data_ptr() for weight in twin.parameters()} <= {weight.data_ptr() for weight in MIDDLE.parameters()}
    other = MiddleBlocks.from_checkpoint(CHECKPOINT, range(2), dtype=DTYPE)
    freed = weakref.ref(twin_of(other)[0])
    del other
    gc.collect()
    assert freed() is None


def test_activations_are_counted_as_for_runs_by_themselves() -> None:
    ones, others = members([{}] * 3), members([{}] * 3)
    forward(ones)
    for other in others:
        alone(other.forward())
    together, separate = (sum(kept(some)) for some in (ones, others))
    assert 0.8 < together / separate < 1.2
    assert kept(ones) == [pytest.approx(together / 3, abs=3)] * 3
    large, small = members([{"counts": (9, 9, 9)}, {"counts": (1,), "layers": range(2, 4)}])
    forward_together([large.forward(), small.forward()])  # 27 tokens through four layers, one token through two
    assert large.trainer.graph_bytes == pytest.approx(54 * small.trainer.graph_bytes, rel=1e-3)


# One bad among good ones


def spoil(member: Member, a: float, b: float) -> None:
    name = "model.layers.3.self_attn.v_proj.lora_{}.weight"
    load(member.trainer, {name.format("A"): torch.full((4, 64), a), name.format("B"): torch.full((32, 4), b)})


def test_states_that_are_not_finite_are_their_own_runs_error_alone() -> None:
    ones, others = members([{}] * 3), members([{}] * 3)
    for some in (ones, others):
        spoil(some[1], 1.0, 3e38)
    first, bad, last = forward(ones)
    assert isinstance(bad, NonFiniteError)
    assert "first after layer 3" in str(bad)
    assert_all_same([first, last], [alone(other.forward()) for other in (others[0], others[2])])
    first, bad, last = backward(ones)
    assert isinstance(bad, ProtocolError)
    assert "not waiting" in str(bad)
    assert_all_same([first, last], [alone(other.backward()) for other in (others[0], others[2])])


def test_gradients_that_are_not_finite_or_do_not_fit_are_their_own_runs_alone() -> None:
    ones, others = members([{}] * 4), members([{}] * 4)
    for some in (ones, others):
        spoil(some[1], 0.0, 3e38)
    assert_forward(ones, others)
    jobs = [one.backward() for one in ones]
    jobs[2] = ones[2].backward(gradient=torch.zeros(3, HIDDEN))
    answers = backward_together(jobs)
    assert answers[1] == States(2, None, norm=float("inf"))
    assert ones[1].trainer.trouble == "the gradient is not finite: first at layer 3, in the middle blocks"
    assert isinstance(answers[2], ProtocolError)
    assert "has 8 tokens, its gradient 3" in str(answers[2])
    assert_all_same([answers[0], answers[3]], [alone(other.backward()) for other in (others[0], others[3])])
    # It was not done, and can still be.
    assert_same(backward_together([ones[2].backward()])[0], alone(others[2].backward()))
