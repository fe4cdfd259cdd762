"""Several runs train one adapter: what one run with the rows of them all would make of it."""

from typing import Any

import pytest
import torch

from fedsea.errors import PartitionError, ProtocolError
from fedsea.parts import Rows
from fedsea.server.joint import backward_together, forward_together
from fedsea.server.trainer import Trainer
from fedsea.wire.frames import Backward, Forward, States
from fedsea.wire.runs import OptimizerStep
from tests.support.joint_runs import (
    ALL,
    DTYPE,
    MOST,
    SOME,
    Member,
    alone,
    apart,
    assert_all_same,
    assert_close,
    assert_same_adapters,
    backward,
    filled,
    forward,
    values,
)
from tests.support.raw_stream import HIDDEN
from tests.support.server_runs import MIDDLE, SPEC, load, spec_of


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
            apart([own], step)
            for name, gradient in (own.trainer.adapter.gradients or {}).items():
                layer = int(name.split(".")[2])
                share = weight / sum(w for span, w in zip(spans, weights, strict=True) if layer in span)
                before = copies[name].grad
                copies[name].grad = gradient * share + (0 if before is None else before)
        forward(ones, step)
        answers = backward(ones, step)
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
        forward(ones, step)
    backward(ones)
    backward(ones, 2, fresh=False, weight=9.0)
    at_once = gradients(common)
    one_by_one, twos = shared(weight=2.0)
    for step in (1, 2):
        for two in twos:
            alone(two.forward(step))
            alone(two.backward(step, fresh=step == 1))
    assert one_by_one.adapter.norm() == pytest.approx(common.adapter.norm(), rel=1e-5)
    for name, gradient in gradients(one_by_one).items():
        torch.testing.assert_close(gradient, at_once[name], rtol=1e-4, atol=1e-5)


def test_who_starts_over_in_one_adapters_gradient_is_refused_and_the_others_are_not() -> None:
    common, ones = shared()
    for step in (1, 2):
        forward(ones, step)
    backward(ones[:2])
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
    forward(ones)
    forward(twos)
    first, bad, last = backward_together([ones[0].backward(), ones[1].backward(**how), ones[2].backward()])
    assert bad == States(2, None, norm=float("inf"))
    assert_all_same([first, last], backward([twos[0], twos[2]]))
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(gradient, gradients(common)[name], rtol=1e-4, atol=1e-6)


def test_an_adapter_of_ones_own_knows_no_weights() -> None:
    plain, heavy = Member(1), Member(1, weight=17.3)
    apart([plain, heavy])
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
