"""The training loop: what it keeps, and that it goes on to the same losses after whatever happens."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from fedsea import Partition, SplitModelForCausalLM
from fedsea.checkpoints import load_whole_model
from fedsea.errors import UsageError
from fedsea.server import ServerProcess
from fedsea.training import checkpoints
from fedsea.training.batches import Batches
from fedsea.training.examples import Encoded
from fedsea.training.export import export_adapter
from fedsea.training.folder import RunFolder
from fedsea.training.loop import FineTuning
from fedsea.training.recipe import Recipe
from tests.conftest import connect
from tests.support import fine_tuning as support
from tests.support.comparing import assert_same_state
from tests.support.fine_tuning import Tuning, examples, losses, nothing, stop_after

RECIPE = Recipe(steps=6, batch_size=3, accumulation=2, lr=1e-2, warmup=1, save_every=2)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1)


def tuning(model: SplitModelForCausalLM, folder: Path, recipe: Recipe = RECIPE, *, resume: bool = False) -> Tuning:
    training: Tuning = support.tuning(model, folder, recipe, LORA, resume=resume)
    if resume:
        assert training.resume()
    return training


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """A server in a process of its own: dropout draws from a generator that threads of one process would share."""
    with ServerProcess("random:tiny", threads=1, secure=False) as process:
        yield process


@pytest.fixture(scope="module")
def whole(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a training that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.manual_seed(7)
    with connect(server) as model:
        assert tuning(model, folder).run(nothing)
    return folder


def test_batches_go_through_all_examples_in_an_order_of_the_seed() -> None:
    batches = Batches(examples(10), 4, seed=1)
    seen = [tuple(row[:2].tolist()) for number in range(5) for row in batches[number].input_ids]
    assert len(set(seen[:10])) == len(set(seen[10:])) == 10
    assert seen[:10] != seen[10:]
    again = Batches(examples(10), 4, seed=1)
    assert torch.equal(again[4].input_ids, batches[4].input_ids)  # without those before it
    assert not torch.equal(Batches(examples(10), 4, seed=2)[0].labels, batches[0].labels)
    with pytest.raises(UsageError, match="nothing to learn"):
        Batches([Encoded((1, 2), (1, -100), 0)], 1, 0)


def test_a_training_that_was_stopped_goes_on_to_the_same_losses(
    whole: Path, server: ServerProcess, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    with connect(server) as model:
        training = tuning(model, tmp_path / "run")
        assert not training.run(*stop_after(3))
        assert training.step == 3
    torch.manual_seed(99)
    with connect(server) as model:
        assert tuning(model, tmp_path / "run", resume=True).run(nothing)
    assert losses(tmp_path / "run") == losses(whole)
    assert_same_state(adapter(tmp_path / "run"), adapter(whole))
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial*"))


def test_it_goes_on_in_another_partition(server: ServerProcess, tmp_path: Path) -> None:
    plain = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    results = []
    for name, partitions in (("one", (Partition(1, 1), Partition(1, 1))), ("two", (Partition(0, 2), Partition(3, 0)))):
        folder = RunFolder(tmp_path / name, print)
        for number, partition in enumerate(partitions):
            run = folder.begin({}) if number == 0 else folder.resume({})
            with connect(server, partition=partition) as model:
                model.add_adapter(plain, run=run if number == 0 else f"{run}-moved", seed=0)
                batches = Batches(examples(), RECIPE.batch_size, 0)
                training = FineTuning(model, batches, RECIPE, folder, lora=plain, base_model=None, notice=print)
                assert training.resume() == (number == 1)
                training.run(*stop_after(3)) if number == 0 else training.run(nothing)
                model.adapter.end_run()
        results.append(losses(tmp_path / name))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


CLIENT = """
    import sys, torch
    from pathlib import Path
    from tests.conftest import connect
    from tests.training.test_loop import tuning
    address, folder = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(7)
    with connect(address) as model:
        tuning(model, Path(folder)).run(lambda figures: print(figures.step, flush=True))
"""


def test_a_client_that_was_killed_goes_on_from_its_checkpoint(
    whole: Path, server: ServerProcess, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    script = [sys.executable, "-c", textwrap.dedent(CLIENT), server.address, str(folder)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True, env=environment) as client:
        assert client.stdout is not None
        while client.stdout.readline().strip() != "4":
            assert client.poll() is None
        client.kill()
    torch.manual_seed(99)
    with connect(server) as model:
        assert tuning(model, folder, resume=True).run(nothing)
    assert losses(folder) == losses(whole)


def test_a_damaged_checkpoint_is_passed_over(whole: Path, server: ServerProcess, tmp_path: Path) -> None:
    torch.manual_seed(7)
    with connect(server) as model:
        assert not tuning(model, tmp_path / "run").run(*stop_after(4))
    damaged = tmp_path / "run" / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    told: list[str] = []
    state = RunFolder(tmp_path / "run", told.append).checkpoints.load()
    assert state is not None
    assert state.step == 2
    assert told == [
        "the checkpoint of step 4 is damaged (optimizer.safetensors has changed); going back to the one before"
    ]
    with connect(server) as model:
        assert tuning(model, tmp_path / "run", resume=True).run(nothing)
    assert losses(tmp_path / "run") == losses(whole)


def test_a_full_disk_leaves_the_checkpoint_before(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, folder = checkpoints.save_file, tmp_path / "run"

    def full(tensors: Any, path: Path, *rest: Any, **options: Any) -> None:
        save(tensors, path, *rest, **options)
        if "step-00000004" in str(path) or "00000004-" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "save_file", full)
    with connect(server) as model:
        training = tuning(model, folder)
        with pytest.raises(UsageError, match=r"step 4: No space left on device; the one of step 2 is intact"):
            training.run(nothing)
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000000", "step-00000002"]
    monkeypatch.undo()
    with connect(server) as model:
        assert tuning(model, folder, resume=True).run(nothing)


def test_an_output_folder_belongs_to_one_training(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", print)
    name = folder.begin({"task": "cb", "lr": 0.1})
    assert folder.resume({"task": "cb", "lr": 0.1}) == name
    with pytest.raises(UsageError, match=r"holds another training \(cb, run .*\); go on with it by --resume"):
        folder.begin({})
    with pytest.raises(UsageError, match=r"holds another training: lr was 0.1 and is 0.2 now"):
        folder.resume({"task": "cb", "lr": 0.2})
    with pytest.raises(UsageError, match=r"holds no training: run.json is missing"):
        RunFolder(tmp_path / "none", print).resume({})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="is not empty and holds no training"):
        RunFolder(tmp_path / "full", print).begin({})
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UsageError, match=r"run.json is damaged"):
        folder.read()


def test_the_figures_of_a_crash_are_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, print)
    for step in (1, 2, 3):
        folder.record({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    folder.forget_after(2)
    assert [line["step"] for line in folder.metrics()] == [1, 2]


def test_the_adapter_can_be_exported_and_merged(whole: Path, tmp_path: Path) -> None:
    export_adapter(whole, tmp_path / "out")
    reference = PeftModel.from_pretrained(load_whole_model("random:tiny"), str(tmp_path / "out")).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = reference(ids).logits
        assert not torch.allclose(expected, load_whole_model("random:tiny")(ids).logits, atol=1e-3)
    with pytest.raises(UsageError, match="is there already"):
        export_adapter(whole, tmp_path / "out")
    with pytest.raises(UsageError, match="neither a training's output folder nor an adapter"):
        export_adapter(tmp_path, tmp_path / "other")
    # A training that is not done gives its last checkpoint.
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text((whole / "run.json").read_text())
    (unfinished / "checkpoints").symlink_to(whole / "checkpoints")
    export_adapter(unfinished, tmp_path / "last")
    config = json.loads((tmp_path / "last" / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj", "v_proj"]
