"""The worker: a real process at a real socket, with client apps that come, hang and die."""

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsea.errors import FedSEAError, ProtocolError, ServerUnavailableError, StragglerError, UsageError
from fedsea.federation.owner.worker import MAX_TEXT, WorkerClient, receive, send
from fedsea.federation.owner.worker_process import WorkerServer
from fedsea.threads import WAITING
from tests.support.federation_commands import until
from tests.support.rounds import together

NAME = "model.layers.0.self_attn.q_proj.lora_A.weight"
WEIGHTS = {NAME: np.arange(6, dtype=np.float32).reshape(2, 3)}


class RunningWorker:
    """`tests/support/adding_worker.py`, and what it says."""

    def __init__(self, path: Path) -> None:
        self.path, self.client = path, WorkerClient(path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.adding_worker", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=WAITING | os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def says(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        return said

    def request(self, **body: Any) -> Connection:
        """A client app that has sent a request to train, and now waits."""
        connection: Connection = Client(str(self.path), "AF_UNIX")
        send(connection, {"do": "train", "body": body})
        return connection

    def wait_until_it_trains(self) -> None:
        until(lambda: self.client.ping()["state"] == "train", 10)

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=20)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fedsea-") as made:  # a socket's path must be short
        yield Path(made)


def started(path: Path) -> Iterator[RunningWorker]:
    running = RunningWorker(path)
    try:
        assert running.says()["ready"]["name"] == "adder"
        yield running
    finally:
        running.stop()


@pytest.fixture
def worker(folder: Path) -> Iterator[RunningWorker]:
    yield from started(folder / "socket")


@pytest.fixture(scope="module")
def steady() -> Iterator[RunningWorker]:
    """One for all tests after which it must go on as if nothing had been."""
    with tempfile.TemporaryDirectory(prefix="fedsea-") as made:
        for running in started(Path(made) / "socket"):
            yield running
            assert running.client.train({}, WEIGHTS)[0]["num-examples"] == 3


def test_requests_and_their_outcomes_pass_through(worker: RunningWorker) -> None:
    metrics, trained = worker.client.train({"round": 2}, WEIGHTS)
    assert metrics == {"num-examples": 3, "train-loss": 0.5}
    np.testing.assert_array_equal(trained[NAME], WEIGHTS[NAME] + 1)
    assert worker.client.evaluate({}, WEIGHTS) == {"sum": 15.0}
    assert worker.client.describe()["trainings"] == 1
    said = worker.says()
    assert (said["did"], said["round"], said["metrics"]) == ("train", 2, metrics)
    assert worker.says()["did"] == "evaluate"


def test_errors_keep_their_class_and_leave_the_worker_as_it_was(worker: RunningWorker) -> None:
    with pytest.raises(StragglerError, match=r"^the others went on$"):
        worker.client.train({"fail": "straggler"}, {})
    with pytest.raises(FedSEAError, match=r"^the client failed with ZeroDivisionError; its log says why$"):
        worker.client.train({"fail": "bug"}, {})
    with pytest.raises(ProtocolError, match="cannot 'dance'"):
        worker.client.request("dance")
    assert worker.says()["error"]["code"] == "straggler"
    assert worker.says()["error"]["message"] == "unexpected ZeroDivisionError: a bug"  # its owner may know
    assert worker.client.describe()["trainings"] == 0


def test_a_ping_is_answered_while_it_trains_and_tells_the_progress(worker: RunningWorker) -> None:
    with worker.request(steps=1000, seconds=0.01, round=7):
        worker.wait_until_it_trains()
        status = until(lambda: (now := worker.client.ping()).get("step", 0) > 60 and now, 20)
        assert (status["round"], status["loss"]) == (7, pytest.approx(1 / status["step"]))
        written = json.loads(worker.path.with_name("status.json").read_text())
        assert written["state"] == "train"
        assert 0 < written["step"] <= worker.client.ping()["step"]


def test_a_request_whose_client_app_died_is_given_up_at_its_next_step(worker: RunningWorker) -> None:
    request = worker.request(steps=100_000, seconds=0.01)
    worker.wait_until_it_trains()
    request.close()
    started = time.monotonic()
    worker.client.train({}, WEIGHTS)
    assert time.monotonic() - started < 100  # all of its steps would take a thousand
    assert worker.client.describe()["trainings"] == 1
    assert worker.says()["error"]["code"] == "abandoned"


def test_a_request_that_waits_is_dropped_when_its_client_app_dies(worker: RunningWorker) -> None:
    with worker.request(steps=150, seconds=0.01):
        worker.wait_until_it_trains()
        worker.request().close()
        metrics, _ = worker.client.train({}, WEIGHTS)
        assert metrics["num-examples"] == 3
    assert worker.client.describe()["trainings"] == 2


def test_requests_are_done_one_at_a_time(worker: RunningWorker) -> None:
    started = time.monotonic()
    together(*[lambda: worker.client.train({"steps": 5, "seconds": 0.02}, {})] * 4)
    assert time.monotonic() - started >= 0.4
    assert worker.client.describe()["trainings"] == 4


def test_a_client_app_that_hangs_in_the_middle_of_its_request_holds_no_other_up(steady: RunningWorker) -> None:
    with Client(str(steady.path), "AF_UNIX") as hangs:
        os.write(hangs.fileno(), (1000).to_bytes(4) + b"{")
        assert steady.client.train({}, WEIGHTS)[0]["num-examples"] == 3


@pytest.mark.parametrize("text", [(MAX_TEXT + 1).to_bytes(4), b"\0\0\0\3abc", b"\0\0\0\2[]", b"\0\0\0\1{"])
def test_a_request_that_cannot_be_read_is_refused(steady: RunningWorker, text: bytes) -> None:
    with Client(str(steady.path), "AF_UNIX") as stranger:
        os.write(stranger.fileno(), text + bytes(4))
        assert receive(stranger)[0]["error"]["code"] == "protocol"


def test_weights_that_are_no_safetensors_are_refused(steady: RunningWorker) -> None:
    with Client(str(steady.path), "AF_UNIX") as stranger:
        send(stranger, {"do": "train"}, b"not tensors")
        assert "cannot be read" in receive(stranger)[0]["error"]["message"]


def test_a_worker_that_dies_in_a_request_is_noticed_and_its_successor_takes_over(
    worker: RunningWorker, folder: Path
) -> None:
    with pytest.raises(ServerUnavailableError, match="went away before it answered"):
        worker.client.train({"fail": "die"}, WEIGHTS)
    worker.process.wait(5)
    waiting: list[Any] = []
    thread = threading.Thread(target=lambda: waiting.append(worker.client.train({}, WEIGHTS)))
    thread.start()  # finds the dead one's socket, and waits for the next
    for _successor in started(folder / "socket"):
        thread.join(30)
        assert waiting[0][0]["num-examples"] == 3


def test_a_stopped_worker_closes_and_takes_its_files_away(worker: RunningWorker, folder: Path) -> None:
    # A status that is just being written has a name of its own for a moment.
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {"socket", "status.json"}
    assert stat.S_IMODE((folder / "socket").stat().st_mode) == 0o600
    with worker.request(steps=100_000, seconds=0.01):
        worker.wait_until_it_trains()
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(10) == 0
    assert {path.name for path in folder.iterdir()} == {"closed"}


def test_a_worker_ends_with_the_process_that_started_it(worker: RunningWorker) -> None:
    assert worker.process.stdin is not None
    worker.process.stdin.close()  # as when that process is killed
    worker.process.stdin = None
    assert worker.process.wait(10) == 0


def test_no_worker_is_one_line(folder: Path) -> None:
    with pytest.raises(ServerUnavailableError, match=r"there is no worker at .*fedsea federation join"):
        WorkerClient(folder / "nobody", connect_seconds=0.2).ping()


def test_a_folder_that_others_may_enter_and_a_second_worker_are_refused(worker: RunningWorker, folder: Path) -> None:
    with pytest.raises(UsageError, match="already"):
        WorkerServer(folder / "socket", print)
    folder.chmod(0o755)
    with pytest.raises(UsageError, match="chmod 700"):
        WorkerServer(folder / "other", print)


def test_the_client_side_imports_no_torch(worker: RunningWorker) -> None:
    code = (
        "import sys, numpy; from fedsea.federation.owner.worker import WorkerClient;"
        f"print(WorkerClient({str(worker.path)!r}).train({{}}, {{'a': numpy.zeros(2, numpy.float32)}})[1]['a'].sum());"
        "sys.exit(bool({'torch', 'transformers', 'grpc', 'typer', 'flwr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2.0\n"), done.stderr
