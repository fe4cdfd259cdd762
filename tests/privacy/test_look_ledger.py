"""The budget of looks: how often a text leaves under fresh noise, over rounds, evaluations, processes and restarts."""

import json
import multiprocessing
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea import GaussianNoise
from fedsea.cli import run as command
from fedsea.cli.audit import _looks
from fedsea.errors import FedSEAError, LimitExceededError, TermsError, UsageError
from fedsea.federation.owner.participant import Participant
from fedsea.parts.adapters import adapter_parameters
from fedsea.privacy import LookLedger
from fedsea.server import Limits
from tests.conftest import RunningServer, connect
from tests.privacy.test_noise_key import TEXT, adapted
from tests.support.federation_commands import write_cb
from tests.support.participants import SETTINGS, Coordinator, body, local, options, weights

NOISE = "gaussian:std=4.0"


@pytest.fixture
def coordinator(start_server: Callable[..., RunningServer]) -> Coordinator:
    return Coordinator(start_server("random:tiny"))


def moved(whole: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    return {name: weight + number / 100 for name, weight in whole.items()}


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(write_cb(tmp_path / "cb", train=4, validation=2))


def test_a_look_is_a_fresh_draw_and_the_last_one_again_is_none(tmp_path: Path) -> None:
    ledger = LookLedger(tmp_path / "kept" / "looks.db", 2)
    for draw in (b"a", b"a", b"b", b"b"):
        ledger.charge([([1, 2], draw), ([3], b"c")])
    assert ledger.most_seen() == 2
    with pytest.raises(LimitExceededError, match=r"left under fresh noise 2 times.*--max-looks"):
        LookLedger(ledger.path, 2).charge([([4], b"d"), ([1, 2], b"e")])
    ledger.charge([([4], b"e"), ([4], b"f")])  # of what was refused nothing was counted
    LookLedger(ledger.path, 3).charge([([1, 2], b"e")])
    LookLedger(ledger.path, 0).charge([([1, 2], bytes([draw])) for draw in range(9)])
    assert ledger.most_seen() == 12


def test_its_file_is_its_owners_and_holds_no_text(tmp_path: Path) -> None:
    path = tmp_path / "looks.db"
    path.touch(0o644)
    text = [0x61626364, 0x65666768]
    LookLedger(path, 1).charge([(text, b"draw")])
    other = tmp_path / "other.db"
    LookLedger(other, 1).charge([(text, b"draw")])
    assert [stat.S_IMODE(one.stat().st_mode) for one in (path, other)] == [0o600, 0o600]
    assert b"dcba" not in path.read_bytes()
    names = [sqlite3.connect(one).execute("SELECT text FROM looks").fetchone()[0] for one in (path, other)]
    assert names[0] != names[1]  # by a key of its own: nobody tries texts without it


@pytest.mark.parametrize("spoil", [lambda path: path.mkdir(), lambda path: path.write_bytes(b"no database" * 99)])
def test_what_cannot_be_counted_does_not_leave(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    spoil(tmp_path / "looks.db")
    with pytest.raises(UsageError, match=r"looks cannot be counted in .*looks\.db"):
        LookLedger(tmp_path / "looks.db", 1).charge([([1], b"a")])


def _charge(path: Path, draw: int) -> None:
    for number in range(20):
        LookLedger(path, 0).charge([([1], bytes([draw, number]))])


def test_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "looks.db"
    processes = [multiprocessing.get_context("fork").Process(target=_charge, args=(path, one)) for one in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert LookLedger(path, 0).most_seen() == 60


def test_training_and_evaluation_of_a_model_are_counted_until_there_is_no_look_left(
    tiny_server: RunningServer, tmp_path: Path
) -> None:
    ledger = LookLedger(tmp_path / "looks.db", 3)

    def train(model: Any) -> None:
        model.train()
        model(TEXT, labels=TEXT).loss.backward()
        model.zero_grad(set_to_none=True)

    with connect(tiny_server, noise=GaussianNoise(1.0)) as model:
        adapted(model)
        model.look_ledger = ledger
        for _ in range(3):
            train(model)
        with torch.no_grad():
            model.eval()(TEXT)
            model.generate(TEXT, max_new_tokens=3, use_cache=False, pad_token_id=0)
        assert ledger.most_seen() == 1
        # By a hair: still a look, as its noise is another.
        weight = next(iter(adapter_parameters(model.input_blocks).values()))
        weight.data.view(-1)[0] = torch.nextafter(weight.data.view(-1)[0], torch.tensor(9.0))
        train(model)
    with connect(tiny_server, noise=GaussianNoise(1.0)) as model:  # a new secret
        adapted(model)
        model.look_ledger = ledger
        train(model)
        weight = next(iter(adapter_parameters(model.input_blocks).values()))
        weight.data += 0.1
        sent = model.traffic.bytes_up
        with pytest.raises(LimitExceededError, match="the budget of looks is used up"):
            train(model)
        with pytest.raises(LimitExceededError, match="the budget of looks is used up"), torch.no_grad():
            model.eval()(TEXT)
        assert model.traffic.bytes_up - sent < TEXT.numel() * 64 * 4  # no states
        model.noise = GaussianNoise(0.0)
        train(model)  # nothing to average
    assert ledger.most_seen() == 3


def test_a_coordinator_gets_no_more_looks_than_a_data_owner_allows(
    coordinator: Coordinator, data: str, tmp_path: Path
) -> None:
    """Over rounds of weights that hardly move, their repetition, evaluations and restarts of the worker."""
    path, whole = tmp_path / "looks.db", weights()
    given = options(data, noise=NOISE, looks=str(path), max_looks=4)
    recipe = SETTINGS.recipe() | {"lr": 1e-8, "local_steps": 1, "batch_size": 4}
    refused, done = None, 0
    for number in range(6):
        if not number % 2:
            participant = Participant(given)
        (ticket,) = coordinator.open("ann")
        try:
            participant.train(
                body(ticket, recipe=recipe), local({name: one + number / 100 for name, one in whole.items()})
            )
            done += 1
        except FedSEAError as error:
            refused = error
            break
    assert done == 4
    assert isinstance(refused, LimitExceededError)
    assert LookLedger(path, 0).most_seen() == 4
    (ticket,) = coordinator.open("ann")
    with pytest.raises(LimitExceededError, match="--max-looks"):  # the texts that are evaluated are among those learnt
        participant.evaluate(body(ticket), local(whole))
    participant.close()


def test_evaluations_are_looks(coordinator: Coordinator, data: str, tmp_path: Path) -> None:
    participant = Participant(options(data, noise=NOISE, looks=str(tmp_path / "looks.db"), max_looks=2))
    whole = weights()
    for number in (0, 0, 1, 1):  # again with the same weights: the noise of before, and so no look
        (ticket,) = coordinator.open("ann")
        participant.evaluate(body(ticket), local(moved(whole, number)))
    (ticket,) = coordinator.open("ann")
    with pytest.raises(LimitExceededError, match="--max-looks"):
        participant.evaluate(body(ticket), local(moved(whole, 2)))
    coordinator.wait_until_gone()
    participant.close()


def test_without_noise_no_budget_is_in_the_way(coordinator: Coordinator, data: str, tmp_path: Path) -> None:
    participant = Participant(options(data, looks=str(tmp_path / "looks.db"), max_looks=1))
    for _ in range(3):
        (ticket,) = coordinator.open("ann")
        participant.train(body(ticket), local(weights()))
    assert not (tmp_path / "looks.db").exists()
    participant.close()


def test_a_server_does_not_decide_where_texts_are_cut(
    start_server: Callable[..., RunningServer], data: str, tmp_path: Path
) -> None:
    coordinator = Coordinator(start_server("random:tiny", limits=Limits(session_tokens=100)))
    participant = Participant(options(data, noise=NOISE, looks=str(tmp_path / "looks.db")))
    (ticket,) = coordinator.open("ann")
    with pytest.raises(TermsError, match="join with --max-tokens 100"):
        participant.train(body(ticket), local(weights()))
    participant.close()


def test_commands_count_in_one_file(
    small: str, start_server: Callable[..., RunningServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, file, server = tmp_path / "rows.jsonl", tmp_path / "looks.db", start_server(small).address
    data.write_text('{"text": "The tide comes in twice a day."}\n')
    where = [small, "--server", server, "--insecure", "--task", "text", "--data", str(data), "--noise", "1"]
    counted = ["--looks", str(file), "--max-looks", "2"]
    steps = ["--steps", "1", "--batch-size", "1", "--json"]
    assert command(["finetune", *where, *counted, *steps, "--output", str(tmp_path / "one")]) == 0
    assert json.loads(capsys.readouterr().out)["looks"] == 1
    assert command(["evaluate", *where, *counted, "--json"]) == 0
    assert LookLedger(file, 0).most_seen() == 2
    capsys.readouterr()
    for refused in (
        ["evaluate", *where, *counted],
        ["finetune", *where, *counted, *steps, "--output", str(data) + "2"],
    ):
        assert command(refused) != 0
        assert "the budget of looks is used up" in capsys.readouterr().err
    assert command(["evaluate", *where, "--max-looks", "2"]) != 0
    assert "--looks FILE" in capsys.readouterr().err
    assert command(["finetune", *where, *steps, "--output", str(tmp_path / "three")]) == 0
    assert LookLedger(tmp_path / "three" / "looks.db", 0).most_seen() == 1
    assert _looks(str(file)) == 2


def test_an_audit_takes_its_looks_from_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, says in (("0", "1 or more"), (str(tmp_path / "none.db"), "the file of another command's --looks")):
        assert command(["audit", "random:tiny", "--looks", given]) != 0
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", ["looks.db", ":memory:"])
def test_a_ledger_is_one_file_wherever_its_process_goes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ledger = LookLedger(name, 1)
    ledger.charge([([1, 2], b"one")])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(LimitExceededError, match="used up"):
        ledger.charge([([1, 2], b"two")])
