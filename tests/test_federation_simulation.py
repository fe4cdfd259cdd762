"""`flwr run`: the example app in Flower's simulation runtime, with Ray."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedsea.parts.adapter_files import read_adapter
from tests.conftest import RunningServer
from tests.test_federation_participant import write_cb

EXAMPLE = Path(__file__).parent.parent / "examples" / "federation"
TOOLS = Path(sys.executable).parent

pytest.importorskip("ray")


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A SuperLink that simulates; gives the environment in which `flwr` finds it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path / "flower"
    home.mkdir()
    config = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(config)
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_WAIT_POLICY": "passive",
    }
    command = [TOOLS / "flower-superlink", "--insecure", "--simulation", "--disable-runtime-dependency-installation"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "superlink.log").open("wb") as log:
        # A session of its own: what it starts ends with it.
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    yield environment
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_flwr_run_simulates_a_federation(
    start_server: Callable[..., RunningServer], flower: dict[str, str], tmp_path: Path
) -> None:
    server, output = start_server("random:tiny"), tmp_path / "out"
    settings = {
        "model": "random:tiny",
        "task": "cb",
        "data": write_cb(tmp_path / "cb"),
        "servers": server.address,
        "insecure": True,
        "clients": 3,
        "clients-at-once": 1,
        "rounds": 2,
        "lora-rank": 2,
        "lora-targets": "q_proj",
        "local-steps": 1,
        "output": str(output),
    }
    given = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    command = [TOOLS / "flwr", "run", EXAMPLE, "here", "--stream", "-c", given]
    command += ["--federation-config", "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=1"]
    done = subprocess.run(command, env=flower, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()]
    assert [sorted(line["clients"]) for line in lines] == [["client-0", "client-1", "client-2"]] * 2, done.stdout
    _lora, weights = read_adapter(output / "adapter")
    assert len(weights) == 12
    assert "the adapter is in" in done.stdout
