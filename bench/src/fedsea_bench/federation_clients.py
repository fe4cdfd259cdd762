"""Benched federations without Flower: client processes, each behind a link of its own if asked, and their rounds."""

import json
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from fedsea.checkpoints import open_checkpoint
from fedsea.errors import FedSEAError
from fedsea.federation.coordinator.block_server_admin import BlockServerAdmin
from fedsea.parts.adapters import AdapterSpec
from fedsea.process import module_command
from fedsea.server.process import ServerProcess
from fedsea.wire.rounds import RoundPlan, Strategy, new_seat
from fedsea_bench.link import LinkProcess
from fedsea_bench.processes import environment
from fedsea_bench.speed import LINK_MBIT, RTT_SECONDS
from fedsea_bench.training_case import adapter_config

CLIENTS = 8
NAMES = tuple(f"client-{number}" for number in range(CLIENTS))
WAIT_SECONDS = 600.0  # a round on two cores


class Federation:
    """A block server and client processes that wait for rounds; a context manager.

    Parameters
    ----------
    model, threads
        As a bench's settings; each client computes on one thread.
    clients
        How many, up to `CLIENTS`.
    rows, tokens
        Of each client's batches.
    slow
        Put each client behind a link of its own, 20 ms and 100 Mbit/s.
    """

    def __init__(self, model: str, threads: int, *, clients: int, rows: int, tokens: int, slow: bool = False) -> None:
        self._things = ExitStack()
        try:
            self.server = self._things.enter_context(ServerProcess(model, threads=threads, clients=NAMES))
            self.spec = AdapterSpec.from_config(adapter_config(), open_checkpoint(model).config)
            address = self.server.address
            self.admin = self._things.enter_context(BlockServerAdmin(address, self.server.folder / "coordinator"))
            self._addresses = [address] * clients
            if slow:
                self._addresses = [
                    self._things.enter_context(
                        LinkProcess(address, delay_ms=1000 * RTT_SECONDS / 2, rate_mbit=LINK_MBIT)
                    ).address
                    for _ in range(clients)
                ]
            self._clients = [self._start(number, model, rows, tokens) for number in range(clients)]
            for client in self._clients:
                _answer(client)
        except BaseException:
            self._things.close()
            raise

    def _start(self, number: int, model: str, rows: int, tokens: int) -> "subprocess.Popen[str]":
        options = {
            "model": model,
            "server": self._addresses[number],
            "credentials": str(self.server.folder / NAMES[number]),
            "rows": rows,
            "tokens": tokens,
            "micro_batches": 1,
        }
        command = module_command("fedsea_bench.federation_client", json.dumps(options))
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(1),
            start_new_session=True,  # an interrupt typed at the terminal is for the bench, which then ends it
        )
        self._things.callback(_end, process)
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._things.close()

    def round(self, strategy: Strategy, clients: Sequence[int], steps: int) -> float:
        """Let some clients train a round of so many steps each, and average; returns the seconds."""
        began = time.perf_counter()
        if strategy == "sequential":
            for number in clients:
                self._round("server-hierarchical", [number], steps)
        else:
            self._round(strategy, clients, steps)
        return time.perf_counter() - began

    def _round(self, strategy: Strategy, clients: Sequence[int], steps: int) -> None:
        seats = [new_seat(self._addresses[number], "bench", NAMES[number]) for number in clients]
        plan = RoundPlan("bench", strategy, self.spec, tuple(seat for seat, _ in seats), WAIT_SECONDS, WAIT_SECONDS)
        self.admin.open_round(plan, {})
        for number, (_, ticket) in zip(clients, seats, strict=True):
            stream: Any = self._clients[number].stdin
            stream.write(json.dumps({"ticket": ticket.to_body(), "steps": steps}) + "\n")
            stream.flush()
        for number in clients:
            _answer(self._clients[number])
        self.admin.aggregate("bench", {NAMES[number]: 1.0 for number in clients})


def _answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise FedSEAError(f"a client of the bench ended (exit status {process.wait()}); what it said is above")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _end(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
