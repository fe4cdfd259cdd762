"""Several runs in one pass: each gets what it gets by itself, and runs of one adapter what one run of them all gets."""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea.checkpoints import open_checkpoint
from fedsea.errors import NonFiniteError, PartitionError, ProtocolError
from fedsea.parts import MiddleBlocks, Rows
from fedsea.parts.adapters import AdapterSpec
from fedsea.server.joint import backward_together, forward_together
from fedsea.server.lanes import twin_of
from fedsea.server.trainer import Trainer
from fedsea.wire.frames import Backward, Forward, States
from fedsea.wire.runs import OptimizerStep
from tests.conftest import save_small_model
from tests.support.raw_stream import HIDDEN
from tests.support.server_runs import CHECKPOINT, MIDDLE, SPEC, load, spec_of
from tests.support.split_training import lora

DTYPE = torch.float32
ALL = range(6)
MOST = range(1, 5)


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(trainer: Trainer, seed: int = 0) -> Trainer:
    """With an adapter that has an effect: PEFT's own start has none."""
    drawn = {name: values(seed, *weight.shape) / 8 for name, weight in trainer.parameters.items()}
    load(trainer, {name: weight for name, weight in drawn.items() if "magnitude" not in name})
    return trainer


class Member:
    """A run and what its client sends: each step another micro-batch."""

    def __init__(
        self,
        seed: int,
        counts: Sequence[int] = (5, 3),
        layers: range = MOST,
        *,
        middle: MiddleBlocks = MIDDLE,
        spec: AdapterSpec = SPEC,
        dtype: torch.dtype = DTYPE,
        share: Trainer | None = None,
        weight: float = 1.0,
        room: int | None = None,
        **forward: Any,
    ) -> None:
        def has_room(graph_bytes: int) -> bool:
            return room is None or self.trainer.graph_bytes + graph_bytes <= room

        self.trainer = Trainer(middle, spec, layers, dtype, has_room, share=share)
        if share is None:
            filled(self.trainer, seed)
        self.seed, self.rows, self.how, self.weight = seed, Rows((0,) * len(counts), tuple(counts)), forward, weight
        self.hidden = middle.config.hidden_size

    def forward(self, step: int = 1, **more: Any) -> tuple[Trainer, Forward]:
        states = values(10 * self.seed + step, self.rows.total, self.hidden).to(self.trainer.dtype)
        operation = Forward(3 * step - 2, step, self.rows, states, seed=100 * self.seed + step, **self.how)
        return self.trainer, replace(operation, **more)

    def backward(self, step: int = 1, **more: Any) -> tuple[Trainer, Backward]:
        gradient = (values(10 * self.seed + step + 5, self.rows.total, self.hidden) / 100).to(self.trainer.dtype)
        operation = Backward(3 * step - 1, step, gradient, 0, fresh=True, weight=self.weight)
        return self.trainer, replace(operation, **more)

    def update(self, step: int = 1) -> None:
        self.trainer.adapter.update(OptimizerStep("adamw", step, 1.0, 1e-2, 0.1))

    def graph(self, step: int = 1) -> Any:
        return self.trainer.waiting[step].graph


def alone(job: tuple[Trainer, Any]) -> States:
    """The same by the run itself."""
    [answer] = (forward_together if isinstance(job[1], Forward) else backward_together)([job])
    assert isinstance(answer, States), answer
    return answer


def assert_same(joint: Any, separate: Any) -> None:
    assert isinstance(joint, States), joint
    assert isinstance(separate, States), separate
    assert joint.number == separate.number
    assert joint.norm == pytest.approx(separate.norm, rel=1e-4, abs=1e-6)
    assert (joint.states is None) == (separate.states is None)
    if joint.states is not None and separate.states is not None:
        one, other = (frame.states.double() * 2.0**-frame.exponent for frame in (joint, separate))
        assert_close(one, other)


def assert_forward(ones: Sequence[Member], others: Sequence[Member], step: int = 1) -> None:
    """Forward passes of the ones together are those of the others by themselves."""
    for one, other in zip(forward_together([one.forward(step) for one in ones]), others, strict=True):
        assert_same(one, alone(other.forward(step)))


def assert_backward(ones: Sequence[Member], others: Sequence[Member], step: int = 1) -> None:
    """And so are backward passes."""
    for one, other in zip(backward_together([one.backward(step) for one in ones]), others, strict=True):
        assert_same(one, alone(other.backward(step)))


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    """Up to a part of the largest value: hidden states go up to some tens."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


def assert_same_adapters(ones: Sequence[Member], others: Sequence[Member], atol: float = 1e-5) -> None:
    for one, other in zip(ones, others, strict=True):
        for name, weight in one.trainer.parameters.items():
            torch.testing.assert_close(
                weight, other.trainer.parameters[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )


def members(cases: Sequence[dict[str, Any]]) -> list[Member]:
    return [Member(seed, **case) for seed, case in enumerate(cases, 1)]


DROPS = {"spec": spec_of(lora_dropout=0.3, target_modules="all-linear")}
DORA = {"spec": spec_of(use_dora=True)}
SOME: list[Sequence[int]] = [(5, 3), (7,), (2, 4, 6), (9, 1)]
CASES: dict[str, list[dict[str, Any]]] = {
    "two": [{}] * 2,
    "three": [{}] * 3,
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
        assert [one.trainer.graph_bytes for one in ones] == [0] * len(ones)


def test_runs_of_any_shape_and_partition_are_one_pass_over_the_base_layers() -> None:
    ones = members(CASES["ragged dropout and other partitions"] + CASES["other ranks"])
    calls = []
    twin, _active = twin_of(MIDDLE)
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in twin.model.layers.values()]
    forward_together([one.forward() for one in ones])
    assert len(calls) == 5  # layers 1 to 5, once each
    assert len({one.graph() for one in ones}) == 1
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 0.3), (torch.float16, 0.05)])
def test_half_precision_is_as_good_together_as_alone(dtype: torch.dtype, atol: float) -> None:
    middle = MiddleBlocks.from_checkpoint(CHECKPOINT, ALL, dtype=dtype)
    cases = [{"middle": middle, "dtype": dtype, "counts": counts} for counts in SOME]
    ones, others = members(cases), members(cases)
    there = forward_together([one.forward() for one in ones])
    for one, other in zip(there, [alone(other.forward()) for other in others], strict=True):
        assert isinstance(one, States)
        assert one.states is not None
        assert one.states.dtype is dtype
        assert other.states is not None
        torch.testing.assert_close(one.states, other.states, rtol=0.1, atol=atol)
    gradients = [one.backward(exponent=3) for one in ones]
    for one, other in zip(backward_together(gradients), [alone(o.backward(exponent=3)) for o in others], strict=True):
        assert isinstance(one, States)
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
    expected = [alone(other.backward(number, fresh=number == 1)) for number in (1, 2) for other in others]
    for answer, other in zip(answers, expected, strict=True):
        assert_same(answer, other)


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
    forward_together([one.forward() for one in ones])
    back = [alone(other.forward()) and alone(other.backward()) for other in others]
    whole = sum(one.trainer.graph_bytes for one in ones)
    graph = ones[1].graph()
    for one, other in zip(backward_together([one.backward() for one in ones[:2]]), back[:2], strict=True):
        assert_same(one, other)
    assert [one.graph() for one in ones[2:]] == [graph] * 3
    # It is as large as before, and on the account of those who are still in it.
    assert [one.trainer.graph_bytes for one in ones[:2]] == [0, 0]
    assert sum(one.trainer.graph_bytes for one in ones) == pytest.approx(whole, abs=5)
    ones[0].update()  # what the graph was made with has changed: it is no good any more
    for one, other in zip(backward_together([one.backward() for one in ones[2:]]), back[2:], strict=True):
        assert_same(one, other)
    assert sum(one.trainer.graph_bytes for one in ones) == 0


def test_a_gradient_that_comes_after_the_weights_have_changed_is_that_of_the_new_ones() -> None:
    ones, others = members([DROPS] * 3), members([{**DROPS, "recompute": True}] * 3)
    for step in (1, 2):
        forward_together([one.forward(step) for one in ones])
        for other in others:
            alone(other.forward(step))
    backward_together([one.backward() for one in ones])
    for other in others:
        alone(other.backward())
    for member in (ones[0], others[0], ones[1], others[1]):
        member.update()
    assert_backward(ones[:2], others[:2], step=2)
    assert_backward(ones[2:], others[2:], step=2)


def test_a_graph_is_used_though_few_have_come_where_there_is_no_room_for_another() -> None:
    ones = members([{}] * 5)
    forward_together([one.forward() for one in ones])
    for one in ones:
        one.trainer.room = lambda _bytes: False
    backward_together([ones[0].backward()])
    assert [one.trainer.graph_bytes for one in ones] == [0] * 5


ENDS: dict[str, Any] = {
    "discarded": lambda member: member.trainer.discard([1]),
    "restored": lambda member: member.trainer.restore(0, clear=True),
    "given up for later ones": lambda member: [
        alone(member.forward(step, recompute=True)) for step in range(2, 2 + 64)
    ],
    "closed": lambda member: setattr(member, "trainer", None),
    "sent again": lambda member: alone(member.forward(recompute=True)),
}


@pytest.mark.parametrize("how", ENDS)
def test_memory_is_free_once_nobody_needs_the_graph(how: str) -> None:
    ones = members([{}] * 3)
    forward_together([one.forward() for one in ones])
    whole = sum(one.trainer.graph_bytes for one in ones)
    gone = [weakref.ref(ones[0].graph()), *[weakref.ref(one.trainer.waiting[1].output) for one in ones]]
    ENDS[how](ones[0])
    assert gone[0]() is not None
    assert sum(one.trainer.graph_bytes for one in ones[1:]) == pytest.approx(whole, abs=5)
    for one in ones[1:]:
        ENDS[how](one)
    gc.collect()
    assert [one() for one in gone] == [None] * 4
    assert [one.trainer.graph_bytes for one in ones if one.trainer is not None] == [0] * (3 if how != "closed" else 0)


def test_a_joint_pass_keeps_no_run_and_no_weights_of_its_own() -> None:
    ones = members([{}] * 2)
    forward_together([one.forward() for one in ones])
    backward_together([one.backward() for one in ones])
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
    forward_together([one.forward() for one in ones])
    for other in others:
        alone(other.forward())
    together, apart = (sum(one.trainer.graph_bytes for one in some) for some in (ones, others))
    assert 0.8 < together / apart < 1.2
    assert [one.trainer.graph_bytes for one in ones] == [pytest.approx(together / 3, abs=3)] * 3
    large, small = members([{"counts": (9, 9, 9)}, {"counts": (1,), "layers": range(2, 4)}])
    forward_together([large.forward(), small.forward()])  # three rows of four layers, one row, as wide, of two
    assert large.trainer.graph_bytes == pytest.approx(6 * small.trainer.graph_bytes, rel=1e-3)


# One bad among good ones


def spoil(member: Member, a: float, b: float) -> None:
    name = "model.layers.3.self_attn.v_proj.lora_{}.weight"
    load(member.trainer, {name.format("A"): torch.full((4, 64), a), name.format("B"): torch.full((32, 4), b)})


def test_states_that_are_not_finite_are_their_own_runs_error_alone() -> None:
    ones, others = members([{}] * 3), members([{}] * 3)
    for some in (ones, others):
        spoil(some[1], 1.0, 3e38)
    first, bad, last = forward_together([one.forward() for one in ones])
    assert isinstance(bad, NonFiniteError)
    assert "first after layer 3" in str(bad)
    assert_same(first, alone(others[0].forward()))
    assert_same(last, alone(others[2].forward()))
    first, bad, last = backward_together([one.backward() for one in ones])
    assert isinstance(bad, ProtocolError)
    assert "not waiting" in str(bad)
    assert_same(first, alone(others[0].backward()))
    assert_same(last, alone(others[2].backward()))


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
    for index in (0, 3):
        assert_same(answers[index], alone(others[index].backward()))
    # It was not done, and can still be.
    assert_same(backward_together([ones[2].backward()])[0], alone(others[2].backward()))


# One adapter for several


def head_gradient(states: torch.Tensor, labels: torch.Tensor, tokens: int) -> torch.Tensor:
    """At `h_B`, of the cross-entropy summed over `labels` and divided by `tokens`, under a fixed output head."""
    states = states.detach().clone().requires_grad_()
    logits = states @ values(77, HIDDEN, 32) / 8
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / tokens
    loss.backward()
    assert states.grad is not None
    return states.grad


def labels_of(seed: int, tokens: int) -> torch.Tensor:
    labels = torch.randint(32, (tokens,), generator=torch.Generator().manual_seed(seed))
    labels[: seed % 4] = -100  # a prompt: learnt tokens are other in number than tokens
    return labels


@pytest.mark.parametrize("how", [{}, {"recompute": True}])
def test_runs_of_one_adapter_train_it_as_one_run_with_all_rows_would(how: dict[str, Any]) -> None:
    common = filled(Trainer(MIDDLE, SPEC, ALL, DTYPE))
    single = filled(Trainer(MIDDLE, SPEC, ALL, DTYPE))
    ones = [Member(seed, counts, ALL, share=common, **how) for seed, counts in enumerate(SOME, 1)]
    sizes = [one.rows.total for one in ones]
    rows = Rows((0,) * sum(len(counts) for counts in SOME), tuple(count for counts in SOME for count in counts))
    for step in (1, 2, 3):
        labels = [labels_of(10 * step + index, size) for index, size in enumerate(sizes)]
        learnt = [int((one >= 0).sum()) for one in labels]
        forwards = [one.forward(step) for one in ones]
        everything = torch.cat([operation.states for _, operation in forwards])
        outputs = [answer.states for answer in forward_together(forwards)]
        whole = alone((single, Forward(3 * step, step, rows, everything))).states
        assert whole is not None
        assert_close(torch.cat(outputs), whole)
        jobs = [
            one.backward(step, gradient=head_gradient(output, label, count), weight=float(count))
            for one, output, label, count in zip(ones, outputs, labels, learnt, strict=True)
        ]
        answers = backward_together(jobs)
        gradient = head_gradient(whole, torch.cat(labels), sum(learnt))
        expected = alone((single, Backward(3 * step, step, gradient, 0, fresh=True)))
        assert expected.states is not None
        for answer, part, count in zip(answers, expected.states.split(sizes), learnt, strict=True):
            assert answer.norm == pytest.approx(expected.norm, rel=1e-4)
            # Each client's loss is the mean over its own tokens.
            assert_close(answer.states, part * sum(learnt) / count)
        for trainer in (ones[0].trainer, single):
            trainer.adapter.update(OptimizerStep("adamw", step, 0.5, 1e-2, 0.1))
        assert {one.trainer.adapter.version for one in ones} == {common.adapter.version} == {step}
        for name, weight in common.parameters.items():
            torch.testing.assert_close(weight, single.parameters[name], rtol=0, atol=1e-5)


def test_in_a_layer_of_one_adapter_the_mean_is_over_those_whose_middle_has_it() -> None:
    spans = (range(1, 5), range(2, 4), range(1, 5), range(3, 6))
    weights = (3.0, 5.0, 1.0, 4.0)
    common = filled(Trainer(MIDDLE, SPEC, ALL, DTYPE))
    ones = [
        Member(seed, counts, layers, share=common, weight=weight)
        for seed, (counts, layers, weight) in enumerate(zip(SOME, spans, weights, strict=True), 1)
    ]
    copies = {name: torch.nn.Parameter(weight.detach().clone()) for name, weight in common.parameters.items()}
    optimizer = torch.optim.AdamW(copies.values(), lr=1e-2, weight_decay=0.1)
    for step in (1, 2):
        for index, (layers, weight) in enumerate(zip(spans, weights, strict=True)):
            own = Member(index + 1, SOME[index], layers)
            load(own.trainer, {name: copies[name].detach() for name in own.trainer.parameters})
            alone(own.forward(step))
            alone(own.backward(step))
            for name, gradient in (own.trainer.adapter.gradients or {}).items():
                layer = int(name.split(".")[2])
                share = weight / sum(w for span, w in zip(spans, weights, strict=True) if layer in span)
                before = copies[name].grad
                copies[name].grad = gradient * share + (0 if before is None else before)
        forward_together([one.forward(step) for one in ones])
        answers = backward_together([one.backward(step) for one in ones])
        total = torch.nn.utils.get_total_norm([copy.grad for copy in copies.values() if copy.grad is not None])
        assert [answer.norm for answer in answers] == [pytest.approx(float(total), rel=1e-4)] * 4
        ones[1].update(step)
        optimizer.step()
        optimizer.zero_grad()
        for name, weight in common.parameters.items():
            torch.testing.assert_close(weight, copies[name].detach(), rtol=0, atol=1e-5)


def shared(count: int = 3, **how: Any) -> tuple[Trainer, list[Member]]:
    common = filled(Trainer(MIDDLE, SPEC, ALL, DTYPE))
    return common, [Member(seed, share=common, **how) for seed in range(1, count + 1)]


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: gradient.clone() for name, gradient in (trainer.adapter.gradients or {}).items()}


def test_one_adapters_gradient_is_the_same_whoever_comes_when_and_a_first_weight_counts() -> None:
    common, ones = shared(weight=2.0)
    for step in (1, 2):
        forward_together([one.forward(step) for one in ones])
    backward_together([one.backward() for one in ones])
    backward_together([one.backward(2, fresh=False, weight=9.0) for one in ones])
    at_once = gradients(common)
    apart, twos = shared(weight=2.0)
    for step in (1, 2):
        for two in twos:
            alone(two.forward(step))
            alone(two.backward(step, fresh=step == 1))
    assert apart.adapter.norm() == pytest.approx(common.adapter.norm(), rel=1e-5)
    for name, gradient in gradients(apart).items():
        torch.testing.assert_close(gradient, at_once[name], rtol=1e-4, atol=1e-5)


def test_who_starts_over_in_one_adapters_gradient_is_refused_and_the_others_are_not() -> None:
    common, ones = shared()
    for step in (1, 2):
        forward_together([one.forward(step) for one in ones])
    backward_together([one.backward() for one in ones[:2]])
    before = gradients(common)
    bad, good = backward_together([ones[0].backward(2), ones[2].backward()])
    assert isinstance(bad, ProtocolError)
    assert "cannot be removed" in str(bad)
    assert isinstance(good, States)
    assert any(not torch.equal(before[name], gradient) for name, gradient in gradients(common).items())
    # After the step all begin anew, with or without being told to.
    ones[0].update()
    with pytest.raises(ProtocolError, match="no gradient before it"):
        ones[1].update(2)
    first = backward_together([ones[1].backward(2, fresh=False)])[0]
    assert isinstance(first, States)
    fresh, twos = shared()
    load(fresh, {name: weight.detach() for name, weight in common.parameters.items()})
    alone(twos[1].forward(2))
    assert alone(twos[1].backward(2)).norm == pytest.approx(first.norm, rel=1e-5)
    assert isinstance(backward_together([ones[0].backward(2)])[0], States)


@pytest.mark.parametrize("how", [{"gradient": torch.full((8, HIDDEN), 3e38)}, {"weight": 3e38, "exponent": -100}])
def test_a_gradient_that_is_not_finite_is_left_out_of_one_adapters(how: dict[str, Any]) -> None:
    common, ones = shared()
    other, twos = shared()
    forward_together([one.forward() for one in ones])
    forward_together([two.forward() for two in twos])
    first, bad, last = backward_together([ones[0].backward(), ones[1].backward(**how), ones[2].backward()])
    assert bad == States(2, None, norm=float("inf"))
    expected = backward_together([twos[0].backward(), twos[2].backward()])
    assert_same(first, expected[0])
    assert_same(last, expected[1])
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(gradient, gradients(common)[name], rtol=1e-4, atol=1e-6)


def test_an_adapter_of_ones_own_knows_no_weights() -> None:
    plain, heavy = Member(1), Member(1, weight=17.3)
    for member in (plain, heavy):
        alone(member.forward())
        alone(member.backward())
    ours, theirs = gradients(plain.trainer), gradients(heavy.trainer)
    assert all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items())
    for member in (plain, heavy):
        member.update()
    assert_same_adapters([plain], [heavy], atol=0)


def test_a_run_of_one_adapter_sees_the_layers_of_its_own_middle_only() -> None:
    common = filled(Trainer(MIDDLE, SPEC, MOST, DTYPE))
    one = Trainer(MIDDLE, SPEC, range(2, 4), DTYPE, share=common)
    assert {int(name.split(".")[2]) for name in one.parameters} == {2, 3}
    assert one.blocks is common.blocks
    sent = one.adapter.export(1, "", 1 << 30, one.layers).tensors
    assert {name.partition("/")[2] for name in sent} == set(one.parameters)
    with pytest.raises(ProtocolError, match="has no weight"):
        load(one, {"model.layers.1.self_attn.q_proj.lora_A.weight": torch.zeros(4, HIDDEN)})
    with pytest.raises(PartitionError, match="has the layers 1:5, not 0:4"):
        Trainer(MIDDLE, SPEC, range(4), DTYPE, share=common)
    with pytest.raises(ProtocolError, match="rank 5"):
        Trainer(MIDDLE, spec_of(r=5), range(2, 4), DTYPE, share=common)
