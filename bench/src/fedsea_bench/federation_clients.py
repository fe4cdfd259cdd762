"""Benched federations without Flower: client processes, each behind a link of its own if need be, and their rounds.

Run as a module, it is one of those clients: rounds are requested on standard input, a line each.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsea.checkpoints import open_checkpoint
from fedsea.client import SplitModelForCausalLM
from fedsea.federation.coordinator.block_server_admin import BlockServerAdmin
from fedsea.flags import Strategy
from fedsea.parts.adapters import AdapterSpec
from fedsea.process import Child
from fedsea.server import ServerProcess
from fedsea.wire.rounds import RoundPlan, Ticket, new_seat
from fedsea_bench.clock import seconds_of
from fedsea_bench.link import slow as slow_link
from fedsea_bench.training_case import adamw, adapter_config, even_batch, train_step
from fedsea_bench.workbench import PARTITION

CLIENTS = 8
NAMES = tuple(f"client-{number}" for number in range(CLIENTS))
WAIT_SECONDS = 600.0  # a round on two cores


class ClientProcesses(AbstractContextManager["ClientProcesses"]):
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
        with ExitStack() as things:
            self.server = things.enter_context(ServerProcess(model, threads=threads, clients=NAMES))
            self._spec = AdapterSpec.from_config(adapter_config(), open_checkpoint(model).config)
            address = self.server.address
            self._admin = things.enter_context(BlockServerAdmin(address, self.server.folder / "coordinator"))
            self._addresses = [address] * clients
            if slow:
                self._addresses = [things.enter_context(slow_link(address)).address for _ in range(clients)]
            logs = Path(things.enter_context(tempfile.TemporaryDirectory(prefix="fedsea-bench-")))
            self._clients = []
            for name, server in zip(NAMES, self._addresses, strict=False):
                given = {"model": model, "rows": rows, "tokens": tokens}
                options = {**given, "credentials": str(self.server.folder / name), "server": server}
                child = Child(__name__, [], logs / name, {"OMP_NUM_THREADS": "1"}, stdin=json.dumps(options))
                self._clients.append(things.enter_context(child))
            for client in self._clients:
                client.answer(WAIT_SECONDS)
            self._things = things.pop_all()

    def __exit__(self, *_what: object) -> None:
        self._things.close()

    def round(self, strategy: Strategy, clients: Sequence[int], steps: int) -> float:
        """Let some clients train a round of `steps` steps each, and average; returns the seconds."""
        if strategy != "sequential":
            return seconds_of(lambda: self._round(strategy, clients, steps))
        return sum(self.round("server-hierarchical", [number], steps) for number in clients)

    def _round(self, strategy: Strategy, clients: Sequence[int], steps: int) -> None:
        servers = {NAMES[number]: self._addresses[number] for number in clients}
        tickets = open_round(self._admin, "bench", strategy, self._spec, servers, {})
        for number in clients:
            self._clients[number].tell(json.dumps({"ticket": tickets[NAMES[number]].to_body(), "steps": steps}))
        for number in clients:
            self._clients[number].answer(WAIT_SECONDS)
        self._admin.aggregate("bench", dict.fromkeys(servers, 1.0))


def open_round(
    admin: BlockServerAdmin,
    run: str,
    strategy: Strategy,
    spec: AdapterSpec,
    servers: Mapping[str, str],
    weights: Mapping[str, Tensor],
) -> dict[str, Ticket]:
    """Open a round for clients, each at a block server's address, from an adapter; their tickets by name."""
    seats = {name: new_seat(server, run, name) for name, server in servers.items()}
    members = tuple(seat for seat, _ in seats.values())
    admin.open_round(RoundPlan(run, strategy, spec, members, WAIT_SECONDS, WAIT_SECONDS), weights)
    return {name: ticket for name, (_, ticket) in seats.items()}


def _client() -> None:
    """Read options, then rounds: `{"ticket", "steps"}`; train each and write the `loss`. The first line says ready."""
    options: dict[str, Any] = json.loads(sys.stdin.readline())
    with SplitModelForCausalLM.from_pretrained(
        options["model"], server=options["server"], credentials=Path(options["credentials"]), partition=PARTITION
    ) as model:
        model.micro_batches = 1
        batch = even_batch(model.config.vocab_size, options["rows"], options["tokens"])
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            model.adapter.join_round(Ticket.from_body(request["ticket"]), adapter_config())
            model.train()
            optimizer = adamw(model)
            losses = [train_step(model, optimizer, [batch]) for _ in range(request["steps"])]
            model.adapter.finish_round()
            print(json.dumps({"loss": losses[-1]}), flush=True)


if __name__ == "__main__":
    _client()
