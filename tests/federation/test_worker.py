"""The warm worker: a real process at a real socket, with client apps that come, hang and die."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsea.errors import FedSEAError, ProtocolError, ServerUnavailableError, StragglerError, UsageError
from fedsea.federation.owner.worker import LENGTHS, WORKER, WorkerClient, receive_frame, send_frame
from fedsea.federation.owner.worker_process import WorkerServer
from fedsea.threads import WAITING

ENVIRONMENT = WAITING | os.environ | {"OMP_NUM_THREADS": "1"}
WEIGHTS = {"model.layers.0.self_attn.q_proj.lora_A.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}


class RunningWorker:
    """`tests/support/worker_half.py`, and what it says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.worker_half", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        self.client = WorkerClient(path)

    def says(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        return said

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(20)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        return code


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fedsea-") as made:  # a socket's path must be short
        yield Path(made)


@pytest.fixture
def worker(folder: Path) -> Iterator[RunningWorker]:
    running = RunningWorker(folder / "socket")
    assert running.says()["ready"]["name"] == "adder"
    yield running
    running.stop()


@pytest.fixture(scope="module")
def steady() -> Iterator[RunningWorker]:
    """One for all tests after which it must go on as if nothing had been."""
    with tempfile.TemporaryDirectory(prefix="fedsea-") as made:
        running = RunningWorker(Path(made) / "socket")
        assert running.says()["ready"]["name"] == "adder"
        yield running
        assert running.client.train({}, WEIGHTS)[0]["num-examples"] == 3
        running.stop()


def begin(worker: RunningWorker, **body: Any) -> socket.socket:
    """A client app that has sent a request to train, and now waits."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(worker.path))
    send_frame(connection, {"do": "train", "body": body})
    return connection


def wait_until_trains(worker: RunningWorker) -> None:
    end = time.monotonic() + 10
    while worker.client.ping()["state"] != "train":
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_worker_that_answers_at_once_and_goes_has_answered() -> None:
    here, there = socket.socketpair()

    class Slow(socket.socket):
        """The other side is done by the time that a call returns."""

        def sendall(self, data: Any, *flags: Any) -> None:
            super().sendall(data, *flags)
            if there.fileno() >= 0:
                assert receive_frame(there) == ({"do": "ping"}, b"")
                send_frame(there, {"value": 1})
                there.close()

    with Slow(fileno=here.detach()) as connection:
        send_frame(connection, {"do": "ping"})
        assert receive_frame(connection) == ({"value": 1}, b"")


def test_requests_and_their_outcomes_pass_through(worker: RunningWorker) -> None:
    metrics, trained = worker.client.train({"round": 2}, WEIGHTS)
    assert metrics == {"num-examples": 3, "train-loss": 0.5}
    np.testing.assert_array_equal(trained[next(iter(WEIGHTS))], WEIGHTS[next(iter(WEIGHTS))] + 1)
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
        worker.client._call("dance")
    assert worker.says()["error"]["code"] == "straggler"
    assert worker.says()["error"]["message"] == "unexpected ZeroDivisionError: a bug"  # its owner may know
    assert worker.client.describe()["trainings"] == 0


def test_a_ping_is_answered_while_it_trains_and_tells_the_progress(worker: RunningWorker) -> None:
    with begin(worker, steps=1000, seconds=0.01, round=7):
        wait_until_trains(worker)
        time.sleep(0.8)
        status = worker.client.ping()
        assert status["round"] == 7
        assert status["step"] > 10
        assert status["loss"] == pytest.approx(1 / status["step"])
        written = json.loads(worker.path.with_name("status.json").read_text())
        assert written["state"] == "train"
        assert 0 < written["step"] <= worker.client.ping()["step"]


def test_a_request_whose_client_app_died_is_given_up_at_its_next_step(worker: RunningWorker) -> None:
    begin(worker, steps=100_000, seconds=0.01).close()
    started = time.monotonic()
    worker.client.train({}, WEIGHTS)
    assert time.monotonic() - started < 100  # all of its steps would take a thousand
    assert worker.client.describe()["trainings"] == 1
    assert worker.says()["error"]["code"] == "abandoned"


def test_a_request_that_waits_is_dropped_when_its_client_app_dies(worker: RunningWorker) -> None:
    with begin(worker, steps=150, seconds=0.01):
        wait_until_trains(worker)
        begin(worker).close()
        metrics, _ = worker.client.train({}, WEIGHTS)
        assert metrics["num-examples"] == 3
    assert worker.client.describe()["trainings"] == 2


def test_requests_are_done_one_at_a_time(worker: RunningWorker) -> None:
    threads = [threading.Thread(target=worker.client.train, args=({"steps": 5, "seconds": 0.02}, {})) for _ in range(4)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started >= 0.4
    assert worker.client.describe()["trainings"] == 4


def test_a_client_app_that_hangs_in_the_middle_of_its_request_keeps_nobody_waiting(steady: RunningWorker) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as hangs:
        hangs.connect(str(steady.path))
        hangs.sendall(LENGTHS.pack(1000, 0) + b"{")
        assert steady.client.train({}, WEIGHTS)[0]["num-examples"] == 3


@pytest.mark.parametrize("sent", [LENGTHS.pack(1 << 31, 0), LENGTHS.pack(3, 0) + b"abc", LENGTHS.pack(2, 0) + b"[]"])
def test_what_is_no_frame_is_refused(steady: RunningWorker, sent: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.connect(str(steady.path))
        stranger.sendall(sent)
        received = receive_frame(stranger)
    assert received is not None
    assert received[0]["error"]["code"] == "protocol"


def test_weights_that_are_no_safetensors_are_refused(steady: RunningWorker) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.connect(str(steady.path))
        send_frame(stranger, {"do": "train"}, b"not tensors")
        received = receive_frame(stranger)
    assert received is not None
    assert "cannot be read" in received[0]["error"]["message"]


def test_a_worker_that_dies_in_a_request_is_told_of_and_its_successor_takes_over(
    worker: RunningWorker, folder: Path
) -> None:
    with pytest.raises(ServerUnavailableError, match="went away before it answered"):
        worker.client.train({"fail": "die"}, WEIGHTS)
    worker.process.wait(5)
    waiting: list[Any] = []
    thread = threading.Thread(target=lambda: waiting.append(worker.client.train({}, WEIGHTS)))
    thread.start()  # finds the dead one's socket, and waits for the next
    successor = RunningWorker(folder / "socket")
    try:
        thread.join(30)
        assert waiting[0][0]["num-examples"] == 3
    finally:
        successor.stop()


def test_a_stopped_worker_closes_its_half_and_takes_its_files_away(worker: RunningWorker, folder: Path) -> None:
    # A status that is just being written has a name of its own for a moment.
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {"socket", "status.json"}
    assert stat.S_IMODE((folder / "socket").stat().st_mode) == 0o600
    with begin(worker, steps=100_000, seconds=0.01):
        wait_until_trains(worker)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(10) == 0
    assert {path.name for path in folder.iterdir()} == {"closed"}


def test_a_worker_ends_with_the_process_that_started_it(worker: RunningWorker) -> None:
    assert worker.process.stdin is not None
    worker.process.stdin.close()  # as when that process is killed
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


def test_the_environment_names_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKER, raising=False)
    assert WorkerClient.from_environment() is None
    monkeypatch.setenv(WORKER, "/x/socket")
    found = WorkerClient.from_environment()
    assert found is not None
    assert found.path == Path("/x/socket")


def test_the_client_side_imports_no_torch(worker: RunningWorker) -> None:
    code = (
        "import sys, numpy; from fedsea.federation.owner.worker import WorkerClient;"
        f"print(WorkerClient({str(worker.path)!r}).train({{}}, {{'a': numpy.zeros(2, numpy.float32)}})[1]['a'].sum());"
        "sys.exit(bool({'torch', 'transformers', 'grpc', 'typer', 'flwr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2.0\n"), done.stderr
