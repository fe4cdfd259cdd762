"""Checkpoints in the Hugging Face layout, in a folder or at a hub."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedsea.checkpoints.base import Checkpoint
from fedsea.checkpoints.conversions import Conversions
from fedsea.checkpoints.files import ModelFiles
from fedsea.checkpoints.fingerprint import Fingerprint, config_digest, group_digests, group_of, sample_bytes
from fedsea.checkpoints.packaged import PACKAGED
from fedsea.checkpoints.quiet import quiet_transformers
from fedsea.checkpoints.tensorfile import TensorFile
from fedsea.errors import ModelNotFoundError
from fedsea.files import parse_json
from fedsea.text import first_line

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)

_TIED = {"lm_head.weight": "model.embed_tokens.weight"}
_COMPUTED = r"rotary_emb\.inv_freq"  # what older files store, and models compute


class FolderCheckpoint(Checkpoint):
    """A model stored as `config.json` and one or several safetensors files."""

    def __init__(self, name: str, files: ModelFiles) -> None:
        self.name, self.where, self._files = name, files.where, files
        self._opened: dict[str, TensorFile] = {}
        self.config = self._read_config()
        family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]
        self._base = f"{family.base_model_prefix}."
        ignored = [_COMPUTED, *(family._keys_to_ignore_on_load_unexpected or ())]
        self._ignored = re.compile("|".join(rf"(?:^|\.)(?:{pattern})$" for pattern in ignored))
        self._conversions = Conversions(family.__name__, self.config)
        tied: dict[str, str] = family._tied_weights_keys or _TIED
        self._head, self._embedding = next(iter(tied.items()))
        self.generation_config = self._read_generation_config()
        self._place = self._locate()
        self._settle_head()
        self._joined = self._conversions.joined(self._place)

    def tensor_names(self) -> frozenset[str]:
        return frozenset({*self._place, *self._joined}.difference(*(sources for _, sources in self._joined.values())))

    def _read(
        self, names: list[str], dtype: torch.dtype, device: torch.device | str
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            converter, sources = self._joined.get(name, (None, {name: ""}))
            tensors = {}
            for source in sources:
                file, stored = self._stored(source)
                tensors[source] = file.read(stored, dtype=dtype, device=device)
            yield name, self._conversions.join(name, converter, sources, tensors) if converter else tensors[name]

    def fingerprint(self, layers: Iterable[int] | None = None) -> Fingerprint:
        wanted = None if layers is None else {str(layer) for layer in layers}
        groups: dict[str, list[str]] = {}
        for name in self._place:
            group = group_of(name)
            if group is not None and (wanted is None or group in wanted):
                groups.setdefault(group, []).append(name)
        return Fingerprint(
            config_digest(self.config),
            group_digests(
                self._sample(name)
                for names in groups.values()
                # A fingerprint is no reason to fetch a file: a group is left out unless all of it is on this machine.
                if all(self._files.on_disk(self._place[name][0]) for name in names)
                for name in names
            ),
        )

    def tokenizer(self) -> Any:
        return self._tokenizer

    def whole_folder(self) -> Path:
        """A folder with all files of the model, fetched if need be, for transformers' own `from_pretrained`."""
        for filename in {CONFIG, *(filename for filename, _ in self._place.values())}:
            self._required(filename)
        for filename in (GENERATION_CONFIG, INDEX):
            self._files.path(filename)
        return self._required(CONFIG).parent

    @cached_property
    def _tokenizer(self) -> Any:
        found = [path for path in map(self._files.path, TOKENIZER_FILES) if path is not None]
        if not found:
            raise ModelNotFoundError(f"{self.where} has no tokenizer (no tokenizer.json)")
        with self._reading("the tokenizer"), quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(found[0].parent, trust_remote_code=False, local_files_only=True)
        # A generation goes on from the last column, so that is where texts of a batch end.
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def _read_config(self) -> PreTrainedConfig:
        path = self._required(CONFIG)
        with self._reading(CONFIG):
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                path.parent, trust_remote_code=False, local_files_only=True
            )
        config.name_or_path = _hub_id(self.name, path)
        if getattr(config, "quantization_config", None) is not None:
            raise ModelNotFoundError(f"{self.where} stores quantised weights; use the original checkpoint instead")
        if not config.architectures:
            known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
            if known is None:
                raise ModelNotFoundError(f"{self.where} is a {config.model_type!r} model, not a causal language model")
            config.architectures = [known]
        return config

    def _read_generation_config(self) -> GenerationConfig:
        path = self._files.path(GENERATION_CONFIG)
        if path is None:
            return GenerationConfig.from_model_config(self.config)
        with self._reading(GENERATION_CONFIG):
            return GenerationConfig.from_pretrained(path.parent, local_files_only=True)

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Whatever a library raises is one line: the files may come from a stranger."""
        try:
            yield
        except Exception as error:
            raise ModelNotFoundError(f"{what} of {self.where} cannot be used: {first_line(error)}") from error

    def _locate(self) -> dict[str, tuple[str, str]]:
        """File and stored name of each weight, without weights that are computed (rotary frequencies)."""
        if self._files.has(SINGLE):
            file_of = dict.fromkeys(self._open(SINGLE).names(), SINGLE)
        elif self._files.has(INDEX):
            file_of = self._read_index()
            # What the files say that are here counts, as for transformers; the index, for those still to be fetched.
            for filename in sorted(set(file_of.values())):
                if self._files.on_disk(filename):
                    file_of |= dict.fromkeys(TensorFile(self._required(filename)).names(), filename)
        else:
            raise self._without_safetensors()
        # A base model that was saved without its head has no prefix.
        bare = not any(name.startswith(self._base) for name in file_of)
        place = {}
        for stored, filename in file_of.items():
            name = self._conversions.renamed(stored)
            if not self._ignored.search(name):
                place[self._base + name if bare and name != self._head else name] = filename, stored
        return place

    def _read_index(self) -> dict[str, str]:
        try:
            file_of = parse_json(self._required(INDEX).read_bytes())["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelNotFoundError(f"{INDEX} of {self.where} is damaged: {error!r}") from None
        # The index may come from a stranger: it names files beside it and nothing else.
        if not isinstance(file_of, dict) or not all(
            isinstance(filename, str) and Path(filename).name == filename for filename in file_of.values()
        ):
            raise ModelNotFoundError(f"{INDEX} of {self.where} names files outside its folder")
        missing = sorted(filename for filename in set(file_of.values()) if not self._files.has(filename))
        if missing:
            raise ModelNotFoundError(f"{self.where} lacks {missing[0]}, which {INDEX} names; copy or fetch it again")
        return file_of

    def _without_safetensors(self) -> ModelNotFoundError:
        if any(self._files.has(pickle) for pickle in ("pytorch_model.bin", "pytorch_model.bin.index.json")):
            return ModelNotFoundError(
                f"{self.where} has pickle weights only (pytorch_model.bin), which can run code and are refused; "
                "load them with transformers where you trust them and call save_pretrained to get safetensors"
            )
        return ModelNotFoundError(f"{self.where} has no weights: neither {SINGLE} nor {INDEX}")

    def _settle_head(self) -> None:
        """Whether the head is the embedding: as the configuration says, or as the weights do if both are stored."""
        embedding, head = self._embedding in self._place, self._head in self._place
        if not self.config.tie_word_embeddings:
            if embedding and not head:
                raise ModelNotFoundError(
                    f"{self.where} has no weight {self._head}, and its {CONFIG} does not say that the head is "
                    "the embedding (tie_word_embeddings); fetch or save the whole model again"
                )
        elif head and not embedding:
            self._place[self._embedding] = self._place.pop(self._head)
        elif head and self._is_same(self._head, self._embedding):
            del self._place[self._head]
        elif head:
            self.config.tie_word_embeddings = False

    def _sample(self, name: str) -> tuple[str, tuple[int, ...], bytes]:
        file, stored = self._stored(name)
        return name, file.shape(stored), sample_bytes(file.sampled_rows(stored))

    def _is_same(self, name: str, other: str) -> bool:
        if self._sample(name)[1:] != self._sample(other)[1:]:
            return False
        (file, stored), (file_there, stored_there) = self._stored(name), self._stored(other)
        return file.is_same(stored, file_there, stored_there)

    def _stored(self, name: str) -> tuple[TensorFile, str]:
        """A weight's file, and its name there."""
        filename, stored = self._place[name]
        return self._open(filename), stored

    def _open(self, filename: str) -> TensorFile:
        if filename not in self._opened:
            self._opened[filename] = TensorFile(self._required(filename))
        return self._opened[filename]

    def _required(self, filename: str) -> Path:
        path = self._files.path(filename)
        if path is None:
            raise ModelNotFoundError(f"{self.where} has no {filename}; it is not a checkpoint in Hugging Face layout")
        return path


def _hub_id(name: str, path: Path) -> str:
    """Under which id others find a model at the hub; empty if it has none. No path is one."""
    if name in PACKAGED:
        return PACKAGED[name].hub
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)", str(path))
    return f"{cached[1]}/{cached[2]}" if cached is not None else ""
