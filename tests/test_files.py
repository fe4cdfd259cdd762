"""Files: whole or as they were, their owner's alone, and one line where the disk is full."""

import contextlib
import errno
import os
import resource
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from fedsea.checkpoints.tensorfile import TensorFile
from fedsea.errors import FedSEAError, ModelNotFoundError, UsageError
from fedsea.federation.coordinator.folder import FederationFolder
from fedsea.federation.invitation import FEDERATION
from fedsea.federation.owner.private_adapter import PrivateAdapter
from fedsea.files import append_json, read_lines, read_object, replace_folder, replacing, write_file, write_json
from fedsea.parts.adapter_files import CONFIG, WEIGHTS, read_adapter, save_adapter
from fedsea.parts.cut_files import CUT, CUT_WEIGHTS, read_cut
from fedsea.training.checkpoints import CheckpointFolder, TrainingState
from fedsea.training.folder import RUN, RunFolder

WEIGHT = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1, 4)}
DEEP = "[" * 100_000


@contextlib.contextmanager
def short_files() -> Iterator[None]:
    """No file may be longer than 100 bytes, as if the disk were full; neither may pytest's own output meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def write_all(folder: Path) -> None:
    """Everything that a training and a federation write."""
    run = RunFolder(folder, print)
    run.begin({})
    run.record({"step": 1})
    run.forget_after(1)
    state = TrainingState(1, WEIGHT, {"step/x": torch.zeros(1)}, {"cpu": torch.zeros(1)})
    run.checkpoints.save(state, LoraConfig(r=1), None)
    save_adapter(run.adapter, LoraConfig(r=1), WEIGHT, None)
    PrivateAdapter(folder / "ends" / "own-ends.safetensors", "f").save({"a": torch.zeros(1)})
    (folder / "federation").mkdir()
    federation = FederationFolder(folder / "federation", LoraConfig(r=1), None, print)
    federation.begin({"name": "f"}, resume=False)
    arrays = {name: weight.numpy() for name, weight in WEIGHT.items()}
    federation.save(1, arrays, {}, {"round": 1})
    federation.add_evaluation(1, {"loss": 1.0})
    federation.show(doing="nothing")
    federation.finish(arrays)
    federation.finish(arrays)


def test_what_is_learnt_is_its_owners_alone_also_in_a_folder_that_others_may_enter(tmp_path: Path) -> None:
    before = os.umask(0o000)
    try:
        write_all(tmp_path)
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 15
    assert [path for path in written if stat.S_IMODE(path.stat().st_mode) & 0o077] == []


def test_what_is_written_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[tuple[int, int]] = set()
    fsync, replace = os.fsync, os.replace

    def noting(number: int) -> None:
        fsync(number)
        entry = os.fstat(number)
        synced.add((entry.st_dev, entry.st_ino))

    def checking(source: Any, target: Any, **how: Any) -> None:
        entry = os.stat(source)  # noqa: PTH116
        assert (entry.st_dev, entry.st_ino) in synced, f"{source} may be empty after a loss of power"
        replace(source, target, **how)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "replace", checking)
    write_all(tmp_path / "out")
    assert len(synced) > 15


def test_a_full_disk_is_one_line_and_what_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = RunFolder(tmp_path / "run", print)
    run.record({"step": 1, "text": "x" * 20})
    federation = FederationFolder(tmp_path / "federation", LoraConfig(r=1), None, print)
    federation.begin({"name": "f"}, resume=False)
    federation.show(doing="nothing")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    full: list[Callable[[], object]] = [
        lambda: run.record({"step": 2, "text": "x" * 200}),
        lambda: federation.show(doing="x" * 200),
        lambda: PrivateAdapter(tmp_path / "ends", "f").save({"a": torch.zeros(100)}),
        lambda: write_json(tmp_path / "x.json", ["x" * 200]),
    ]
    for write in full:
        with pytest.raises(UsageError, match=r"(?i)cannot (write|keep).*file too large") as raised, short_files():
            write()
        assert "\n" not in str(raised.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    run.record({"step": 2})
    assert [figures["step"] for figures in run.metrics()] == [1, 2]


def test_a_folder_takes_anothers_place_and_a_failure_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, final = tmp_path / "made", tmp_path / "final"
    for folder, text in ((made, "new"), (final, "old")):
        folder.mkdir()
        write_file(folder / "file", text)
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self == made:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", full)
        with pytest.raises(OSError, match="No space"):
            replace_folder(made, final)
    assert (final / "file").read_text() == "old"
    replace_folder(made, final)
    assert (final / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [final]


def test_an_interrupt_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_file(file, "old")

    def interrupted() -> None:
        with replacing(file) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_line_that_a_crash_has_cut_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    assert read_lines(file) == []
    for number in range(3):
        append_json(file, {"number": number})
    file.write_bytes(file.read_bytes()[:-4])
    assert read_lines(file) == [{"number": 0}, {"number": 1}]


@pytest.mark.parametrize("content", [DEEP, '{"a": ' * 100_000])
def test_json_that_is_nested_without_end_is_one_line(tmp_path: Path, content: str) -> None:
    for name in (RUN, FEDERATION, CONFIG, CUT):
        (tmp_path / name).write_text(content)
    for name in (WEIGHTS, CUT_WEIGHTS):
        (tmp_path / name).touch()
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(content)
    told: list[str] = []
    reads: list[Callable[[], object]] = [
        lambda: RunFolder(tmp_path, print).read(),
        lambda: FederationFolder(tmp_path, LoraConfig(), None, print).begin({}, resume=True),
        lambda: read_object(tmp_path / FEDERATION, ""),
        lambda: read_adapter(tmp_path),
        lambda: read_cut(tmp_path),
    ]
    for read in reads:
        with pytest.raises(FedSEAError, match=r"damaged|cannot be read") as raised:
            read()
        assert "\n" not in str(raised.value)
    assert CheckpointFolder(tmp_path / "checkpoints", told.append).load() is None
    assert "nested too deeply" in told[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs files of two users")
def test_weights_that_another_user_keeps_to_himself_are_not_called_missing() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
        (folder / "model.safetensors").chmod(0o600)
        os.seteuid(65534)
        try:
            with pytest.raises(ModelNotFoundError, match=r"belongs to another user.*FEDSEA_CACHE"):
                TensorFile(folder / "model.safetensors")
        finally:
            os.seteuid(0)
