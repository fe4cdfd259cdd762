"""`flwr run`: the example app in Flower's simulation runtime, with Ray."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsea.parts.adapter_files import read_adapter
from fedsea_bench.flower_simulation import SimulationLink
from tests.conftest import RunningServer
from tests.support.federation_commands import write_cb

EXAMPLE = Path(__file__).parents[2] / "examples" / "federation"

pytest.importorskip("ray")


def test_flwr_run_simulates_a_federation(start_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    server, output = start_server("random:tiny"), tmp_path / "out"
    settings = {
        "model": "random:tiny",
        "task": "cb",
        "data": str(write_cb(tmp_path / "cb", train=12, validation=4)),
        "servers": server.address,
        "insecure": True,
        "clients": 2,
        "clients-at-once": 1,
        "rounds": 2,
        "lora-rank": 2,
        "lora-targets": "q_proj",
        "local-steps": 1,
        "output": str(output),
    }
    with SimulationLink() as link:
        link.run(settings, 1, app=EXAMPLE)
    lines = [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()]
    assert [sorted(line["clients"]) for line in lines] == [["client-0", "client-1"]] * 2
    _lora, weights = read_adapter(output / "adapter")
    assert len(weights) == 12
