"""`fedsea federation`: folders, errors, what is let in and what is not, and a real deployment."""

import contextlib
import dataclasses
import io
import json
import os
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.supercore.fab import Fab

from fedsea.cli import run
from fedsea.errors import FedSEAError, UsageError
from fedsea.federation.coordinator.deployment import Deployment
from fedsea.federation.coordinator.status import read_status
from fedsea.federation.coordinator.up import Federation, run_config
from fedsea.federation.coordinator.up_options import UpOptions
from fedsea.federation.flower.app import COMPONENTS, bundle, check_bundle, project_file
from fedsea.federation.flower.gate import is_for_data_owners, is_local
from fedsea.federation.flower.patches import connector
from fedsea.federation.invitation import SUPERNODE_KEY, Invitation, federation_name
from fedsea.federation.owner.join import OwnerProcess
from fedsea.federation.settings import Settings
from fedsea.process import Child
from tests.support.federation_commands import gone, own, until

# Errors are one line


def test_an_error_is_one_line_that_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        folder = str(tmp_path / "new")
        up = ["up", folder, "--clients", "a,b", "--port", "0", "--superlink-port", "0"]
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.txt").touch()
        for arguments, code, says in (
            (["up", folder], 2, "--clients a,b,c"),
            (["up", folder, "--clients", "a,A"], 2, "'A' is no name here"),
            (["up", folder, "--clients", "a,a"], 2, "named twice"),
            ([*up[:3], "a,coordinator", *up[4:]], 2, "the folder of that name is taken"),
            ([*up, "--mode", "sideways"], 2, "--mode"),
            ([*up, "--set", "round=2"], 2, "did you mean rounds"),
            ([*up, "--set", "rounds"], 2, "--set takes KEY=VALUE"),
            ([*up, "--set", "lr=fast"], 2, "lr must be a number; got 'fast'"),
            ([*up, "--set", "lr=-1"], 2, "lr must be from 1e-08 to 10"),
            ([*up, "--listen", "0.0.0.0"], 2, "give --host NAME"),
            ([*up[:5], port, *up[6:]], 2, f"port {port} is taken; choose another with --port"),
            ([*up[:7], port], 2, "choose another with --superlink-port"),
            ([*up, "--server", "nowhere"], 2, "HOST:PORT"),
            (["up", str(tmp_path / "full"), "--clients", "a"], 2, "is not empty and holds no federation"),
            ([*up, "--model", "no-such-model", "--threads", "1"], 1, "no model 'no-such-model'"),
            (["join", str(tmp_path), "--data", "x"], 2, "is no folder of a data owner"),
            (["status", str(tmp_path)], 2, "holds no federation"),
        ):
            assert run(["federation", *arguments]) == code, arguments
            last = capsys.readouterr().err.splitlines()[-1]
            assert last.startswith("fedsea: error: ")
            assert says in last, arguments


# Folders


def test_each_data_owner_gets_its_own_keys_and_where_to_connect(tmp_path: Path) -> None:
    here = Deployment(tmp_path / "fed")
    here.prepare(["gpu.example.org"], ["alice", "bob"])
    invitation = Invitation("fed", "alice", "m", "cb", "gpu.example.org:7071", ("gpu.example.org:7070",))
    invitation.write(here.client("alice"))
    assert Invitation.read(here.client("alice")).servers == ("gpu.example.org:7070",)
    for path in (tmp_path / "fed").rglob("*"):
        if path.name != "federation.json":
            private = 0o700 if path.is_dir() else 0o600
            assert stat.S_IMODE(path.stat().st_mode) in (private, 0o755 if path.name == "clients" else private), path
    assert here.public_key("alice") != here.public_key("bob")
    before = {name: here.public_key(name) for name in ("alice", "bob")}
    here.prepare(["gpu.example.org"], ["alice", "bob", "carol"])
    assert {name: here.public_key(name) for name in before} == before
    (here.client("bob") / SUPERNODE_KEY).write_text("no key")
    with pytest.raises(FedSEAError, match="is no key of a SuperNode"):
        here.public_key("bob")


def test_the_command_of_a_data_owner_can_be_pasted(tmp_path: Path) -> None:
    path = tmp_path / "hospi täls #1 it's $x"
    settings = Settings(name="fed", model="random:tiny", task="cb")
    federation = Federation(path, settings, UpOptions(("alice",), port=0, superlink_port=0), print)
    words = shlex.split(federation.commands()["alice"])
    assert words[:4] == ["fedsea", "federation", "join", str(path.resolve() / "clients" / "alice")]


def test_a_data_owners_folder_must_be_whole_and_its_own(tmp_path: Path) -> None:
    here = Deployment(tmp_path / "fed")
    here.prepare([], ["alice", "bob"])
    for name in ("alice", "bob"):
        Invitation("fed", name, "random:tiny", "", "127.0.0.1:1", ("127.0.0.1:2",)).write(here.client(name))
    with pytest.raises(UsageError, match="leaves the task open"):
        OwnerProcess(here.client("alice"), own("x", ""), print)
    for file in ("certificate.pem", "key.pem"):
        shutil.copy(here.client("bob") / file, here.client("alice") / file)
    with pytest.raises(FedSEAError, match="has the certificate of bob, but is for alice"):
        OwnerProcess(here.client("alice"), own("x"), print)
    (here.client("bob") / SUPERNODE_KEY).unlink()
    with pytest.raises(FedSEAError, match="is missing: ask for the folder again"):
        OwnerProcess(here.client("bob"), own("x"), print)
    (here.client("bob") / "federation.json").write_text('{"version": 1}')
    with pytest.raises(UsageError, match="is not what fedsea federation up"):
        OwnerProcess(here.client("bob"), own("x"), print)


@pytest.mark.parametrize(
    ("path", "name"),
    [("hospitals", "hospitals"), ("My Fed. 2", "my-fed-2"), ("___", "federation"), ("x" * 99, "x" * 20)],
)
def test_a_federation_is_called_after_its_folder(tmp_path: Path, path: str, name: str) -> None:
    assert federation_name(tmp_path / path) == name


def test_the_run_configuration_says_what_is_not_the_default() -> None:
    assert run_config(Settings()) == {}
    assert run_config(Settings(rounds=7, local_steps=3)) == {"rounds": 7, "local-steps": 3}


# What a data owner lets in


def packed(files: dict[str, str], *twice: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as made:
        for name in (*files, *twice):
            made.writestr(name, files[name])
    return content.getvalue()


def test_the_app_is_data_only_and_has_every_setting() -> None:
    check_bundle(bundle())
    config = tomllib.loads(project_file())["tool"]["flwr"]["app"]["config"]
    assert Settings.from_run_config(config) == Settings()
    assert len(config) == len(dataclasses.fields(Settings))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_app_that_could_run_anything_else_is_refused() -> None:
    project = project_file()
    check_bundle(packed({"pyproject.toml": project, "README.md": "x"}))
    for content in (
        b"no zip",
        packed({"README.md": "x"}),
        packed({"pyproject.toml": "["}),
        packed({"pyproject.toml": "[tool]"}),
        packed({"pyproject.toml": project, "fedsea/federation/flower/client_app.py": "print('mine')"}),
        packed({"pyproject.toml": project, "../x": "y"}),
        packed({"pyproject.toml": project}, "pyproject.toml"),
        packed({"pyproject.toml": project.replace(COMPONENTS["clientapp"], "os:system")}),
        packed({"pyproject.toml": project + " " * (1 << 20)}),
        packed({"pyproject.toml": project, "README.md": "\0" * (200 << 20)}),
        packed({"pyproject.toml": project}) + bytes(1 << 20),
        packed({"pyproject.toml": project.replace("clientapp =", 'agentapp = "antigravity:fly"\nclientapp =')}),
        packed({"pyproject.toml": project.replace("serverapp =", "other =")}),
        packed({"pyproject.toml": project.replace(COMPONENTS["serverapp"], "os:system")}),
        packed({"pyproject.toml": project.replace("dependencies = []", 'dependencies = ["antigravity"]')}),
        packed({"pyproject.toml": project + '\n[tool.flwr.federations]\ndefault = "here"\n'}),
        packed({"pyproject.toml": project.replace("local-steps = 10", "local-steps = 11")}),
        packed({"pyproject.toml": "[tool.flwr.app]\ncomponents = [1]\n"}),
        packed({"pyproject.toml": "[tool.flwr.app]\ncomponents = 3\n"}),
        packed({"pyproject.toml": "tool = 1979-05-27\n"}),
        packed({"pyproject.toml": "\x00" + project}),
        packed({"pyproject.toml": "a = " + "[" * 50_000}),
    ):
        with pytest.raises(UsageError, match="not run here"):
            check_bundle(content)


def test_the_supernode_runs_nothing_for_a_run_that_is_no_federation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower would start an agent, which the app's pyproject.toml names, beside the data."""

    @contextlib.contextmanager
    def connect(**_options: Any) -> Iterator[tuple[Any, ...]]:
        def get_run(number: int) -> Any:
            return SimpleNamespace(primary_task_type=("flwr-serverapp", "flwr-agentapp", "anything")[number])

        def get_fab(fab_hash: str, number: int) -> Fab:
            return Fab(fab_hash, bundle(), {})

        yield 1, None, None, get_run, get_fab

    told: list[dict[str, Any]] = []
    with connector(connect, lambda **body: told.append(body))() as (*_others, get_run, get_fab):
        for number in range(3):
            get_run(number)
        licensed = [bool(get_fab("x", number).verifications.get("valid_license")) for number in range(4)]
    assert licensed == [True, False, False, False]
    assert len([body for body in told if "not run here" in body.get("refused", "")]) == 3


@pytest.mark.parametrize(
    ("path", "client", "server", "allowed"),
    [
        ("/v1/fleet/pull-messages", "10.0.0.9", "10.0.0.1", True),
        ("/v1/control/start-run", "10.0.0.9", "10.0.0.1", False),
        ("/v1/runtime/acquire-task", "10.0.0.9", "10.0.0.1", False),
        ("/v1/fleet", "10.0.0.9", "10.0.0.1", False),
        ("/docs", "10.0.0.9", "10.0.0.1", False),
        ("/v1/control/start-run", "10.0.0.1", "10.0.0.1", True),
        ("/v1/control/start-run", "127.0.0.1", "127.0.0.1", True),
        ("/v1/control/start-run", "::ffff:127.0.0.1", "::", True),
        ("/v1/control/start-run", "::ffff:10.0.0.9", "::", False),
        ("/v1/control/start-run", "::1", "::1", True),
        ("/v1/control/start-run", "unix", "10.0.0.1", False),
    ],
)
def test_other_machines_reach_the_interface_for_data_owners_only(
    path: str, client: str, server: str, allowed: bool
) -> None:
    scope = {"type": "http", "path": path, "client": (client, 9), "server": (server, 7071)}
    assert (is_for_data_owners(scope) or is_local(scope)) is allowed
    assert not is_local({"type": "http", "path": "/v1/control/x", "client": None, "server": None})


# How it stands


def test_status_is_read_from_the_rounds_that_are_done_and_what_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Deployment(tmp_path / "fed")
    here.output.mkdir(parents=True)
    here.describe(name="fed", model="m", mode="client-batch", rounds=4, clients=["alice", "bob", "carol"])
    waiting = read_status(here.path)
    assert (waiting.doing, waiting.running, waiting.age, waiting.round) == ("", False, None, 0)
    here.online.write_text('{"clients": ["bob"]}')
    assert {name: client.state for name, client in read_status(here.path).clients.items()} == {
        "alice": "not there",
        "bob": "there",
        "carol": "not there",
    }
    its = {"num-examples": 12, "train-loss": 0.5, "bytes-up": 1_000_000, "bytes-down": 2_000_000}
    report = {"round": 1, "loss": 0.5, "seconds": 2.0, "bytes_up": 1_000_000, "bytes_down": 2_000_000}
    report |= {"clients": {"alice": its}, "stragglers": ["bob"], "dropped": {"bob": "it was gone [1 s]"}}
    (here.output / "rounds.jsonl").write_text(json.dumps(report) + '\n{"round": 2, "los')
    now = {"time": time.time(), "pid": os.getpid(), "doing": "training", "round": 2, "rounds": 4}
    now |= {"members": {"alice": {"state": "joined", "steps": 3, "straggled": False}}, "refused": {"carol": "no"}}
    (here.output / "now.json").write_text(json.dumps(now))
    status = read_status(here.path)
    alice, bob, carol = (status.clients[name] for name in ("alice", "bob", "carol"))
    assert (status.running, status.round, len(status.reports)) == (True, 2, 1)
    assert (alice.state, alice.steps, alice.rounds, alice.loss, alice.bytes_down) == ("training", 3, 1, 0.5, 2_000_000)
    assert (bob.straggled, bob.note) == (1, "it was gone [1 s]")
    assert (carol.state, carol.note) == ("refused", "no")
    assert run(["federation", "status", str(here.path)]) == 0
    shown = capsys.readouterr().out
    assert "fed  m  client-batch  round 2 of 4  training" in shown
    assert "it was gone [1" in shown
    assert run(["federation", "status", str(here.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clients"]["alice"]["steps"] == 3
    (here.output / "now.json").write_text(json.dumps(now | {"pid": 2**22 + 1}))
    assert not read_status(here.path).running


# Processes


def test_a_child_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from fedsea.process import Child;"
        f"child = Child('http.server', ['0', '--bind', '127.0.0.1'], Path({str(tmp_path / 'log')!r}));"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    starter.kill()
    starter.wait()
    starter.stdout.close()
    until(lambda: gone(pid), 20)


def test_a_child_that_dies_is_told_of_with_its_last_words(tmp_path: Path) -> None:
    with Child("no_such_module", [], tmp_path / "log") as child:
        assert child.says(20) is None
        until(lambda: not child.running, 20)
        assert "No module named no_such_module" in child.end()
