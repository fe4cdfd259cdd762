"""Finding a model by its name and reading its tensors, compared with transformers' own reading."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, PreTrainedModel

from fedsea.checkpoints import load_tokenizer, load_whole_model, open_checkpoint
from fedsea.checkpoints.configurations import CONFIGURATIONS
from fedsea.errors import ModelNotFoundError
from fedsea.partition import layer_of
from tests.support.weights import assert_same_weights, load_all, reference_weights, rewrite

INDEX = "model.safetensors.index.json"
UP = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    """A Llama made and initialised by transformers alone."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(**(CONFIGURATIONS["tiny"] | {"eos_token_id": 3}))
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=["single", "sharded"])
def saved(request: pytest.FixtureRequest, reference: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder, max_shard_size="5GB" if request.param == "single" else "300KB")
    assert (folder / INDEX).exists() == (request.param == "sharded")
    return folder


@pytest.fixture
def folder(reference: PreTrainedModel, tmp_path: Path) -> Path:
    """A sharded checkpoint that a test may damage."""
    reference.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    return tmp_path / "model"


def test_folder_gives_the_weights_that_transformers_saved(saved: Path, reference: PreTrainedModel) -> None:
    checkpoint = open_checkpoint(saved)
    assert checkpoint.config.to_diff_dict() == AutoConfig.from_pretrained(saved).to_diff_dict()
    assert checkpoint.generation_config.eos_token_id == GenerationConfig.from_pretrained(saved).eos_token_id == 3
    assert_same_weights(load_all(checkpoint), reference_weights(reference))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_folder_casts_as_transformers_does(saved: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsea.checkpoints.tensorfile.BUFFER_BYTES", 4096)  # several buffers a tensor
    expected = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype)
    assert_same_weights(load_all(open_checkpoint(saved), dtype), reference_weights(expected))


def test_folder_yields_only_the_named_tensors_in_their_order(saved: Path) -> None:
    names = ["model.norm.weight", "model.layers.5.mlp.up_proj.weight", "model.embed_tokens.weight"]
    assert [name for name, _ in open_checkpoint(saved).load(names, dtype=torch.float32)] == names


def test_tied_head_and_rotary_frequencies_are_no_weights(tmp_path: Path) -> None:
    model = load_whole_model("random:tiny-qwen2")
    model.save_pretrained(tmp_path)
    tied = {"lm_head.weight": model.get_input_embeddings().weight.detach().clone()}
    more = tied | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    rewrite(tmp_path, lambda weights: weights | more)
    assert open_checkpoint(tmp_path).tensor_names() == reference_weights(model).keys()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", r"config\.json of .* cannot be used"),
        ("[]", r"config\.json of .* cannot be used"),
        ('{"model_type": "no-such-family"}', r"config\.json of .* cannot be used"),
        ('{"hidden_size": 8}', r"config\.json of .* cannot be used"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}', r"config\.json of .* cannot be used"),
        ('{"model_type": "vit"}', "not a causal language model"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', "quantised"),
        ('{"model_type": "llama"}', "has no weights"),
        (None, r"has no config\.json"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path, config: str | None, says: str) -> None:
    (tmp_path / "code.py").write_text("raise SystemExit('code of the checkpoint was run')")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelNotFoundError, match=says):
        open_checkpoint(tmp_path)


def test_pickle_weights_are_refused_with_a_way_out(reference: PreTrainedModel, tmp_path: Path) -> None:
    reference.config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ModelNotFoundError, match=r"pickle.*save_pretrained"):
        open_checkpoint(tmp_path)


def test_missing_shard_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelNotFoundError, match=shard.name):
        open_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [{"a": "../secret.safetensors"}, {"a": "/etc/passwd"}, {"a": 3}, ["a"]])
def test_index_that_points_elsewhere_is_refused(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelNotFoundError, match="outside its folder"):
        open_checkpoint(folder)


def shard_of(folder: Path, name: str) -> Path:
    return folder / str(json.loads((folder / INDEX).read_text())["weight_map"][name])


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard_is_refused_when_it_is_needed(folder: Path, keep: int) -> None:
    checkpoint, shard = open_checkpoint(folder), shard_of(folder, UP)
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ModelNotFoundError, match=shard.name):
        next(checkpoint.load([UP], dtype=torch.float32))


def test_shard_cut_short_while_in_use_is_an_error_and_no_crash(folder: Path) -> None:
    checkpoint, shard = open_checkpoint(folder), shard_of(folder, UP)
    load_all(checkpoint)
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(ModelNotFoundError, match="cut short"):
        load_all(checkpoint, torch.float16)


def test_unknown_tensor_is_refused(saved: Path) -> None:
    for checkpoint in (open_checkpoint(saved), open_checkpoint("random:tiny")):
        with pytest.raises(ModelNotFoundError, match=r"no weight model\.layers\.6\."):
            list(checkpoint.load(["model.layers.6.mlp.up_proj.weight"], dtype=torch.float32))


class FakeHub:
    """A hub that serves one folder as the repository `somebody/tiny`, and notes what is fetched from it."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache, self.fetched = folder, cache, list[str]()
        self.reachable = True

    def model_info(self, api: object, repository: str, *, timeout: float) -> object:
        if not self.reachable:
            raise ConnectionError("no route")
        assert repository == "somebody/tiny"
        files = [SimpleNamespace(rfilename=path.name) for path in self.folder.iterdir()]
        return SimpleNamespace(sha="c0ffee", siblings=files)

    def download(self, repository: str, filename: str, *, revision: str) -> str:
        assert revision == "c0ffee"
        if not (self.cache / filename).exists():
            if not self.reachable:
                raise ConnectionError("no route")
            self.fetched.append(filename)
            shutil.copy(self.folder / filename, self.cache)
        return str(self.cache / filename)

    def cached(self, repository: str, filename: str, revision: str | None = None) -> str | None:
        return str(self.cache / filename) if (self.cache / filename).exists() else None


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    (tmp_path / "cache").mkdir()
    fake = FakeHub(folder, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda api, *args, **kw: fake.model_info(api, *args, **kw))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake.download)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", fake.cached)
    return fake


def test_hub_model_fetches_only_the_shards_of_its_part(hub: FakeHub, reference: PreTrainedModel) -> None:
    checkpoint = open_checkpoint("somebody/tiny")
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]
    names = sorted(name for name in checkpoint.tensor_names() if "embed" in name or layer_of(name) == 0)
    part = dict(checkpoint.load(names, dtype=torch.float32))
    assert_same_weights(part, {name: reference_weights(reference)[name] for name in names})
    shards = {name for name in hub.fetched if name.endswith(".safetensors")}
    assert (
        shards
        == {shard_of(hub.folder, name).name for name in names}
        < {one.name for one in hub.folder.glob("*.safetensors")}
    )
    # A fingerprint covers what is here, and fetches nothing.
    groups = checkpoint.fingerprint().groups
    assert {"embedding", "0"} <= groups.keys()
    assert "5" not in groups
    assert shards == {name for name in hub.fetched if name.endswith(".safetensors")}
    token_ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(load_whole_model("somebody/tiny")(token_ids).logits, reference(token_ids).logits)


def test_hub_out_of_reach_gives_what_is_cached_or_says_so(hub: FakeHub, reference: PreTrainedModel) -> None:
    hub.reachable = False
    with pytest.raises(ModelNotFoundError, match=r"could not be reached for somebody/tiny .*give a folder"):
        open_checkpoint("somebody/tiny")
    hub.reachable = True
    load_all(open_checkpoint("somebody/tiny"))
    hub.reachable = False
    assert_same_weights(load_all(open_checkpoint("somebody/tiny")), reference_weights(reference))


def test_hub_that_goes_away_before_a_shard_is_fetched_says_so(hub: FakeHub) -> None:
    checkpoint = open_checkpoint("somebody/tiny")
    hub.reachable = False
    with pytest.raises(ModelNotFoundError, match=r"safetensors of hub repository somebody/tiny could not be fetched"):
        load_all(checkpoint)


def test_hub_repository_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(ModelNotFoundError, match="no hub repository some/body"):
        open_checkpoint("some/body")


def test_folder_without_tokenizer_says_so(saved: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no tokenizer"):
        load_tokenizer(saved)


@pytest.mark.parametrize("name", ["nope", "./no/such/folder", "a/b/c", "random"])
def test_unknown_name_lists_what_there_is(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"smollm2-135m.*random:llama-2-7b"):
        open_checkpoint(name)


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelNotFoundError, match=r"neither a folder nor a \.gguf file"):
        open_checkpoint(tmp_path / "model.bin")
