"""Folders that earlier versions wrote are read: trainings go on, adapters load, federations are taken up."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from fedsea.errors import LimitExceededError
from fedsea.federation.coordinator.deployment import Deployment
from fedsea.federation.coordinator.folder import FederationFolder
from fedsea.federation.coordinator.status import read_status
from fedsea.federation.coordinator.up_options import UpOptions
from fedsea.federation.invitation import Invitation
from fedsea.federation.settings import Settings
from fedsea.parts.adapter_files import read_adapter
from fedsea.privacy import parse_mechanism
from fedsea.privacy.ledger import LookLedger
from fedsea.training.batches import Batches
from fedsea.training.folder import RunFolder
from fedsea.training.loop import FineTuning
from fedsea.training.recipe import Recipe
from tests.conftest import RunningServer, connect
from tests.support.fine_tuning import examples

DATA = Path(__file__).parent / "data"
RECIPE = Recipe(steps=6, batch_size=3, accumulation=2, lr=1e-2, warmup=1, save_every=2)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
NARROW = "narrow-cut:rank=8+gaussian:std=0.1"


@pytest.fixture(params=["0.1.0", "0.2.0"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of what a version wrote."""
    folder: Path = shutil.copytree(DATA / request.param, tmp_path / "written")
    return folder


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["training", "narrow-cut"])
def test_a_training_goes_on_from_its_checkpoint(written: Path, kind: str, tiny_server: RunningServer) -> None:
    folder = RunFolder(written / kind, lambda _line: None)
    narrow = kind == "narrow-cut"
    with connect(tiny_server, **({"noise": parse_mechanism(NARROW)} if narrow else {})) as model:
        run = folder.resume({"task": "text", "lr": 0.01})
        model.add_adapter(LORA, run=run, take_up=True, seed=RECIPE.seed)
        batches = Batches(examples(), RECIPE.batch_size, RECIPE.seed)
        training = FineTuning(model, batches, RECIPE, folder, lora=LORA, base_model=None, notice=lambda _line: None)
        assert training.resume()
        assert training.step == 3
        assert training.run(lambda _figures: None)
    found = [line["loss"] for line in folder.metrics()]
    expected = [line["loss"] for line in lines(written / kind / "expected.jsonl")]
    # Noise is drawn anew, without a seed; without it, the figures are those of the training that nothing happened to.
    assert found == pytest.approx(expected, abs=0.2 if narrow else 1e-5)
    if not narrow:
        weights = load_file(written / "adapter" / "adapter_model.safetensors")
        for name, weight in load_file(written / kind / "adapter" / "adapter_model.safetensors").items():
            torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=0)


def test_an_adapter_loads(written: Path, tiny_server: RunningServer) -> None:
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        with connect(tiny_server) as model:
            plain = model(ids).logits
            model.load_adapter(str(written / "adapter"))
            assert not torch.allclose(model(ids).logits, plain, atol=1e-3)
        with connect(tiny_server, noise=parse_mechanism(NARROW)) as model:
            model.load_adapter(str(written / "narrow-adapter"))
            assert model(ids).logits.isfinite().all()


def test_a_federation_is_taken_up(written: Path) -> None:
    folder = written / "federation"
    status = read_status(folder)
    assert (status.doing, status.round, status.rounds) == ("done", 1, 1)
    assert set(status.clients) == {"alice", "bob"}
    before = Deployment(folder).before()
    settings = Settings.from_run_config(before["settings"])
    assert (settings.name, settings.lora_rank, settings.min_clients) == ("federation", 4, 2)
    assert UpOptions.from_body(before["options"]).clients == ("alice", "bob")
    assert Invitation.read(folder / "clients" / "alice").client == "alice"
    output = FederationFolder(folder / "output", LORA, None, lambda _line: None)
    state = output.begin(json.loads((folder / "output" / "federation.json").read_text()), resume=True)
    assert state is not None
    assert state.step == 1
    _lora, weights = read_adapter(folder / "output" / "adapter")
    assert state.adapter.keys() == weights.keys()


def test_looks_go_on_being_counted(tmp_path: Path) -> None:
    shutil.copy(DATA / "0.2.0" / "looks.db", tmp_path)
    ledger = LookLedger(tmp_path / "looks.db", 4)
    assert ledger.most_seen() == 3
    ledger.charge([([4, 5], b"x")])  # the draw that it carried last
    ledger.charge([([1, 2, 3], b"new")])
    with pytest.raises(LimitExceededError):
        ledger.charge([([1, 2, 3], b"newer")])


@pytest.mark.parametrize(
    "name",
    [
        "gaussian:std=0.1",
        "relative:level=2.3",
        "clip:norm=30+gaussian:std=4",
        "relative-clip:norm=2+relative:level=1",
        "clipped-gaussian:clip=30,std=4",
        "relative-clipped-gaussian:clip=2,level=1",
        "adaptive:clip=2,level=1,looks=4",
        "narrow-cut:rank=8",
        NARROW,
    ],
)
def test_names_of_mechanisms_that_files_hold_are_read(name: str) -> None:
    assert str(parse_mechanism(name))
