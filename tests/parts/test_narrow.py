"""A narrow cut's pieces: the mechanism, its two maps and where they start, its files, what a server makes of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedsea import GaussianNoise, Partition, RelativeGaussianNoise
from fedsea.checkpoints import open_checkpoint
from fedsea.errors import FedSEAError, ModelNotFoundError, PartitionError, ProtocolError, UsageError
from fedsea.partition import LIFT, PROJECT
from fedsea.parts import InputBlocks, MiddleBlocks, Rows
from fedsea.parts.adapter_files import WEIGHTS, read_adapter, save_adapter
from fedsea.parts.adapters import MAX_NARROW, AdapterSpec, adapter_parameters
from fedsea.parts.cut_files import CUT, CUT_WEIGHTS, CutRecord, read_cut
from fedsea.parts.narrow import principal_directions, project
from fedsea.privacy import Chain, Clip, NarrowCut, clipped_gaussian, parse_mechanism, taken_up
from fedsea.privacy.bound import estimated_bound, guaranteed_bound, power_capacity, uniform_source
from fedsea.privacy.measure import measure_magnitude, public_states
from fedsea.server import Limits
from fedsea.server.rounds import RoundTable
from fedsea.server.runs import RunTable
from fedsea.server.scheduler import Scheduler
from fedsea.server.sessions import SessionTable, check_cut
from fedsea.wire.frames import Backward, Forward, Step
from fedsea.wire.handshake import Open
from fedsea.wire.rounds import RoundPlan, Seat
from fedsea.wire.runs import Attach
from tests.support.split_training import lora

CHECKPOINT = open_checkpoint("random:tiny")
HIDDEN, RANK = 64, 8
LAYERS = range(1, 5)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def nothing_is_drawn() -> torch.Tensor:
    raise AssertionError


# The mechanism


def test_it_is_written_first_and_says_how_wide_what_leaves_is() -> None:
    text = "narrow-cut:rank=16+clip:norm=30.0+gaussian:std=4.0"
    chain = parse_mechanism(text)
    assert chain == Chain((NarrowCut(16), Clip(30.0), GaussianNoise(4.0)))
    assert str(chain) == text
    assert (chain.width, chain.alters, chain.strength) == (16, True, 4.0)
    assert chain.channel == replace(clipped_gaussian(30.0, 4.0).channel, width=16)
    alone = parse_mechanism("narrow-cut:rank=16")
    assert (alone, alone.width, alone.strength) == (NarrowCut(16), 16, None)
    assert parse_mechanism("clip:norm=1+gaussian:std=1").width is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("narrow-cut:rank=0", "a whole number, 1 or more; got 0.0"),
        ("narrow-cut:rank=2.5", "a whole number, 1 or more; got 2.5"),
        ("narrow-cut:rank=inf", "a whole number, 1 or more; got inf"),
        ("narrow-cut:rank=nan", "a whole number, 1 or more; got nan"),
        ("narrow-cut", "lacks rank; write narrow-cut:rank=NUMBER"),
        ("gaussian:std=1+narrow-cut:rank=8", "write narrow-cut first, and once"),
        ("narrow-cut:rank=8+narrow-cut:rank=4", "write narrow-cut first, and once"),
    ],
)
def test_what_cannot_be_is_one_line(text: str, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_mechanism(text)
    assert says in str(raised.value)


def test_states_that_are_not_projected_do_not_pass() -> None:
    narrow = drawn(3, RANK)
    assert NarrowCut(RANK).apply(narrow, nothing_is_drawn) is narrow
    for mechanism in (NarrowCut(RANK), Chain((NarrowCut(RANK), GaussianNoise(1.0)))):
        with pytest.raises(UsageError, match="project them first"):
            mechanism.apply(drawn(3, HIDDEN), lambda: drawn(3, HIDDEN))


def test_the_bound_counts_the_numbers_that_leave_whatever_the_model_has() -> None:
    cut, source = parse_mechanism("narrow-cut:rank=8+clip:norm=20+gaussian:std=4"), uniform_source(49152)
    expected = power_capacity(400.0, 4.0, 8)
    for hidden in (8, 576, 4096):
        assert guaranteed_bound(cut, hidden, source).bits == expected
    wide = guaranteed_bound(clipped_gaussian(20.0, 4.0), 576, source)
    assert expected < wide.bits
    sample = drawn(600, 8)
    assert estimated_bound(cut, sample, source) == estimated_bound(clipped_gaussian(20.0, 4.0), sample, source)
    with pytest.raises(UsageError, match="sends 8 numbers a state; project the sample, it has 576"):
        estimated_bound(cut, drawn(600, 576), source)


OWN = parse_mechanism("narrow-cut:rank=8+clip:norm=3+gaussian:std=2")


@pytest.mark.parametrize(
    ("asked", "gets"),
    [
        ("gaussian:std=0", str(OWN)),
        ("gaussian:std=5", "narrow-cut:rank=8+gaussian:std=5.0"),
        ("relative:level=5", "narrow-cut:rank=8+relative:level=5.0"),
        ("clip:norm=1+gaussian:std=5", "narrow-cut:rank=8+clip:norm=1.0+gaussian:std=5.0"),
        ("narrow-cut:rank=8", "narrow-cut:rank=8"),
        ("narrow-cut:rank=8+gaussian:std=1", "narrow-cut:rank=8+gaussian:std=1.0"),
    ],
)
def test_nothing_that_was_asked_is_dropped_and_nothing_of_the_adapters_unless_asked(asked: str, gets: str) -> None:
    assert taken_up(parse_mechanism(asked), OWN, "x") == parse_mechanism(gets)


# Its two maps


def test_it_starts_along_what_keeps_most_of_the_states_each_counted_alike() -> None:
    scales = torch.linspace(2, 0.1, 12)
    states = drawn(200, 12) * scales @ torch.linalg.qr(drawn(12, 12, seed=1))[0]
    found = principal_directions(states, 4)
    torch.testing.assert_close(found @ found.T, torch.eye(4), atol=1e-6, rtol=0)
    unit = (states / states.norm(dim=1, keepdim=True)).double().numpy()
    values, vectors = np.linalg.eigh(unit.T @ unit)
    energy = float((torch.from_numpy(unit).float() @ found.T).square().sum())
    assert energy == pytest.approx(values[-4:].sum(), rel=1e-5)
    kept = found.double().numpy() @ vectors[:, -4:]
    assert np.linalg.svd(kept)[1] == pytest.approx(np.ones(4), abs=1e-5)  # the same subspace
    outlier = states.clone()
    outlier[0] *= 1000
    torch.testing.assert_close(principal_directions(outlier, 4), found, atol=1e-5, rtol=0)


def test_directions_that_the_sample_does_not_have_are_drawn_and_always_the_same() -> None:
    states = drawn(5, 32)
    found = principal_directions(states, 20)
    torch.testing.assert_close(found @ found.T, torch.eye(20), atol=1e-6, rtol=0)
    torch.testing.assert_close(states @ found.T @ found, states, atol=1e-5, rtol=0)
    torch.manual_seed(3)
    assert torch.equal(found, principal_directions(states, 20))


@pytest.mark.parametrize(
    "mechanism", ["narrow-cut:rank=3", "narrow-cut:rank=3+clip:norm=6+gaussian:std=0.5"], ids=lambda text: text
)
def test_the_gradients_at_states_and_projection_are_those_of_finite_differences(mechanism: str) -> None:
    noise, draws = parse_mechanism(mechanism), drawn(6, 3, seed=2, dtype=torch.float64)
    hidden, weight = drawn(6, 7, dtype=torch.float64), drawn(3, 7, seed=1, dtype=torch.float64)

    def leaving(states: torch.Tensor, map_: torch.Tensor) -> torch.Tensor:
        return noise.apply(project(states, map_), lambda: draws)

    assert 0 < (project(hidden, weight).norm(dim=1) > 6).sum() < 6
    torch.autograd.gradcheck(leaving, (hidden.requires_grad_(), weight.requires_grad_()))


def test_the_gradients_at_what_came_and_at_the_lift_are_those_of_finite_differences() -> None:
    blocks = MiddleBlocks.from_checkpoint(CHECKPOINT, range(2, 3), dtype=torch.float64)
    blocks.add_narrow_cut(drawn(HIDDEN, 1, dtype=torch.float64))
    rows = Rows.uniform(1, 0, 3)
    weight = blocks.narrow_cut["lift"].weight.requires_grad_()

    def through(states: torch.Tensor, map_: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(
            blocks, {LIFT: map_}, (states, rows, None, range(2, 3)), strict=False
        )
        return out[..., :4]

    # transformers' norms compute in float32, so steps are larger than for doubles.
    states = drawn(3, 1, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(through, (states, weight), eps=1e-3, atol=1e-2, rtol=1e-2, fast_mode=True)


def test_maps_are_float32_in_a_16_bit_model_and_round_once() -> None:
    blocks = InputBlocks.from_checkpoint(CHECKPOINT, Partition(1, 1), dtype=torch.bfloat16)
    ids, rows = torch.arange(3, 12), Rows((0,), (9,))
    hidden = blocks(ids, rows, None)
    weight = principal_directions(hidden, RANK)
    blocks.narrow(weight)
    narrow = blocks(ids, rows, None)
    assert adapter_parameters(blocks)[PROJECT].dtype is torch.float32
    assert (narrow.shape, narrow.dtype) == ((9, RANK), torch.bfloat16)
    assert torch.equal(narrow, (hidden.float() @ weight.T).bfloat16())


def test_levels_are_relative_to_what_is_left() -> None:
    blocks = InputBlocks.from_checkpoint(CHECKPOINT, Partition(1, 1), dtype=torch.float32)
    states = public_states(blocks, CHECKPOINT)
    blocks.narrow(principal_directions(states, RANK))
    left = (states @ adapter_parameters(blocks)[PROJECT].T)[1:]
    noise = parse_mechanism("narrow-cut:rank=8+relative-clip:norm=0.5+relative:level=2")
    found = noise.calibrated(lambda: measure_magnitude(blocks, CHECKPOINT))
    assert found.channel.clip == pytest.approx(0.5 * float(left.norm(dim=1).mean()), rel=1e-5)
    assert found.channel.std == pytest.approx(2 * float(left.abs().mean()), rel=1e-5)
    assert found.width == RANK


# Its description


SPEC = replace(AdapterSpec.from_config(lora(), CHECKPOINT.config, 1), narrow=RANK)


def test_a_description_has_the_rank() -> None:
    assert AdapterSpec.from_body(SPEC.to_body()) == SPEC
    for bad in (-1, True, 1.5, "8", MAX_NARROW + 1, None):
        with pytest.raises(ProtocolError, match="'narrow' must be a whole number"):
            AdapterSpec.from_body(SPEC.to_body() | {"narrow": bad})
    plain = replace(SPEC, narrow=0)
    assert SPEC.difference(plain) == "a narrow cut of rank 8 beside no narrow cut"
    assert plain.difference(replace(SPEC, narrow=4)) == "no narrow cut beside a narrow cut of rank 4"
    wish = Open(Partition(), CHECKPOINT.fingerprint(), "float32", run="one", narrow=RANK)
    assert Open.from_body(wish.to_body()).narrow == RANK
    with pytest.raises(ProtocolError, match="'narrow' must be a whole number"):
        Open.from_body(wish.to_body() | {"narrow": -1})


# Its files


RECORD = CutRecord(RANK, 1, "narrow-cut:rank=8+gaussian:std=2.0")


def saved(folder: Path, cut: CutRecord | None = RECORD) -> dict[str, torch.Tensor]:
    weights = {"model.layers.0.self_attn.q_proj.lora_A.weight": drawn(4, HIDDEN)}
    if cut is not None:
        weights |= {PROJECT: drawn(RANK, HIDDEN, seed=1), LIFT: drawn(HIDDEN, RANK, seed=2)}
    save_adapter(folder, lora(), weights, None, cut)
    return weights


def test_it_is_saved_beside_its_adapter_and_read_with_it(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    _config, read = read_adapter(tmp_path)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    found = read_cut(tmp_path)
    assert found is not None
    assert found[0] == RECORD
    found[0].check_place(1, tmp_path)
    with pytest.raises(PartitionError, match=r"trained after 1 input layers, here there are 2: .* --input-layers 1"):
        found[0].check_place(2, tmp_path)
    assert not {name for name in load_file(tmp_path / WEIGHTS) if "narrow" in name}
    saved(tmp_path, None)  # over it: nothing of the cut is left
    assert read_cut(tmp_path) is None
    assert read_adapter(tmp_path)[1].keys() == weights.keys() - {PROJECT, LIFT}


def test_an_adapter_whose_cut_is_missing_or_damaged_is_not_read(tmp_path: Path) -> None:
    saved(tmp_path)
    for damage in (
        lambda: (tmp_path / CUT_WEIGHTS).unlink(),
        lambda: (tmp_path / CUT_WEIGHTS).write_bytes(b"nothing"),
        lambda: (tmp_path / CUT_WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()),
        lambda: (tmp_path / CUT).write_text("[]"),
        lambda: (tmp_path / CUT).write_text(json.dumps({"rank": 4, "input_layers": 1, "mechanism": ""})),
        lambda: (tmp_path / CUT).write_text(json.dumps({"rank": "8", "input_layers": 1, "mechanism": ""})),
    ):
        damage()
        with pytest.raises(ModelNotFoundError, match=r"the narrow cut in .* cannot be read") as raised:
            read_adapter(tmp_path)
        assert "\n" not in str(raised.value)
        saved(tmp_path)
    for name in (CUT, CUT_WEIGHTS):
        (tmp_path / name).unlink()
    with pytest.raises(ModelNotFoundError, match="trained with a narrow cut, whose files are not there"):
        read_adapter(tmp_path)


# At the server


MIDDLE = MiddleBlocks.from_checkpoint(CHECKPOINT, LAYERS, dtype=torch.float32)
ROWS = Rows.uniform(1, 0, 3)


def ended(_reason: FedSEAError) -> None:
    pass


@pytest.fixture
def runs() -> RunTable:
    limits = Limits(run_bytes=1 << 24, graph_bytes=1 << 24)
    return RunTable(MIDDLE, limits, dtype=torch.float32, clock=lambda: 0.0)


def begin(runs: RunTable, spec: AdapterSpec = SPEC, **more: Any) -> Any:
    request = Attach("one", Partition(1, 1), CHECKPOINT.fingerprint(), "float32", spec, 0, True)
    return runs.attach(replace(request, **more), "a", ended)[0]


def test_a_run_takes_states_of_its_ranks_width_and_gradients_of_the_models(runs: RunTable) -> None:
    run = begin(runs)
    assert run.trainer.parameters[LIFT].shape == (HIDDEN, RANK)
    assert not MIDDLE.narrow_cut  # the base model has none
    runs.admit(run, Forward(1, 1, ROWS, drawn(3, RANK)))
    with pytest.raises(ProtocolError, match="the run's narrow cut has rank 8, the states that came have 64 numbers"):
        runs.admit(run, Forward(1, 1, ROWS, drawn(3, HIDDEN)))
    runs.admit(run, Backward(1, 1, drawn(3, HIDDEN)))
    with pytest.raises(ProtocolError, match="the model's hidden size is 64, the states that came have 8 numbers"):
        runs.admit(run, Backward(1, 1, drawn(3, RANK)))


def test_a_run_is_taken_up_with_its_own_rank_only(runs: RunTable) -> None:
    begin(runs)
    with pytest.raises(ProtocolError, match="a narrow cut of rank 4 beside a narrow cut of rank 8"):
        begin(runs, replace(SPEC, narrow=4), begin=False)
    begin(runs, begin=False)


def test_a_cut_that_is_not_narrow_is_refused_and_its_memory_counts(runs: RunTable) -> None:
    with pytest.raises(ProtocolError, match="a narrow cut of rank 64 is not narrow: the hidden size is 64"):
        begin(runs, replace(SPEC, narrow=HIDDEN))
    plain = begin(runs, replace(SPEC, narrow=0), run="plain").adapter.size()
    assert begin(runs).adapter.size() - plain == 16 * RANK * HIDDEN
    tight = RunTable(MIDDLE, Limits(run_bytes=plain, graph_bytes=0), dtype=torch.float32, clock=lambda: 0.0)
    with pytest.raises(FedSEAError, match="memory for adapters"):
        begin(tight)
    assert begin(tight, replace(SPEC, narrow=0)).adapter.size() == plain


def test_a_session_is_as_narrow_as_its_run_or_is_refused(runs: RunTable) -> None:
    trainer = begin(runs).trainer
    check_cut(RANK, trainer)
    check_cut(0, None)
    for narrow, adapted, says in [
        (4, trainer, "the run's narrow cut has rank 8, the session's mechanism has rank 4"),
        (0, trainer, "the run's narrow cut has rank 8, the session's mechanism has none"),
        (4, None, "there is no narrow cut at the server, the session's mechanism has rank 4"),
    ]:
        with pytest.raises(ProtocolError, match=says):
            check_cut(narrow, adapted)
    limits = Limits(cache_bytes=1 << 20)
    sessions = SessionTable(MIDDLE, limits, dtype=torch.float32, clock=lambda: 0.0)
    session = sessions.open("a", LAYERS, torch.float32, ended, trainer)
    sessions.admit(session, Step(1, ROWS, drawn(3, RANK)))
    with pytest.raises(ProtocolError, match="the run's narrow cut has rank 8, the states that came have 64 numbers"):
        sessions.admit(session, Step(1, ROWS, drawn(3, HIDDEN)))
    plain = sessions.open("a", LAYERS, torch.float32, ended)
    with pytest.raises(ProtocolError, match="the model's hidden size is 64, the states that came have 8 numbers"):
        sessions.admit(plain, Step(1, ROWS, drawn(3, RANK)))


def test_a_federated_round_has_none(runs: RunTable) -> None:
    rounds = RoundTable(runs, Scheduler(), secure=False)
    plan = RoundPlan("r1", "client-batch", SPEC, (Seat("a", "0" * 64),), 1.0, 1.0)
    with pytest.raises(ProtocolError, match="federated rounds train no narrow cuts"):
        rounds.open(plan, {})


def test_states_that_are_not_finite_after_the_lift_name_the_layer(runs: RunTable) -> None:
    run = begin(runs)
    run.trainer.adapter.load({f"adapter/{LIFT}": torch.full((HIDDEN, RANK), 1e38)}, LAYERS)
    operation = Forward(1, 1, ROWS, drawn(3, RANK).abs())
    runs.admit(run, operation)
    with pytest.raises(FedSEAError, match="first after layer 1, in the middle blocks"):
        runs.do(run, operation)


def test_a_relative_level_behind_a_cut_has_to_be_calibrated() -> None:
    with pytest.raises(UsageError, match="has to be calibrated"):
        _ = Chain((NarrowCut(RANK), RelativeGaussianNoise(2.0))).channel
