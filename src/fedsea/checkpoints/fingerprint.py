"""Short digests by which two machines find out whether they hold the same model, and if not, which part differs."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from fedsea.errors import ProtocolError
from fedsea.fields import Fields
from fedsea.files import parse_json
from fedsea.partition import layer_of

DIGEST_CHARACTERS = 32
MAX_LAYERS = 4096
MAX_JSON_BYTES = 64 * (MAX_LAYERS + 8)

_DIGEST = re.compile(rf"[0-9a-f]{{{DIGEST_CHARACTERS}}}")
_LAYER = re.compile(r"0|[1-9][0-9]{0,3}")
# What the ends are called in one family or another; the norm of an embedding is of the embedding.
_ENDS = {"embedding": re.compile(r"emb|wte|wpe|project"), "norm": re.compile(r"norm|ln_f"), "head": re.compile("head")}

# What the numbers of a forward pass depend on. Picked by hand: a library's `to_dict` changes with its version.
_CONFIG_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
_FIELDS_KNOWN = ("llama", "mistral", "qwen2", "qwen3")  # types of which these fields say all
_NOT_COMPUTED = re.compile(r"dtype|version|_token_id|drop|initializer|init_std|use_cache|architectures|label|path")


@dataclass(frozen=True)
class Fingerprint:
    """Digests of a model's configuration and of groups of its weights.

    The digests find mistakes (another model, revision or fine-tune, a damaged file), not malice: of each weight they
    see name, shape and a sample of the values.

    Parameters
    ----------
    config
        Digest of the configuration fields that the computation depends on.
    groups
        Digest by group: `"embedding"`, `"0"` to `"L-1"` for the decoder layers, `"norm"`, `"head"` (absent where the
        head is tied to the embedding). Groups that the machine does not hold are absent.
    """

    config: str
    groups: Mapping[str, str]

    def restrict(self, layers: Iterable[int]) -> "Fingerprint":
        """The same, with only the groups of the given decoder layers."""
        wanted = {str(layer) for layer in layers}
        return Fingerprint(self.config, {key: value for key, value in self.groups.items() if key in wanted})

    def mismatches(self, other: "Fingerprint") -> list[str]:
        """Names, for a person, of what differs among the groups that both sides hold; empty if nothing does."""
        found = [] if self.config == other.config else ["the configuration"]
        for key in sorted(self.groups.keys() & other.groups.keys(), key=_group_order):
            if self.groups[key] != other.groups[key]:
                found.append(f"layer {key}" if key.isdecimal() else f"the {'final norm' if key == 'norm' else key}")
        return found

    def to_json(self) -> str:
        """The fingerprint as one line of JSON (about 45 bytes a layer)."""
        return json.dumps({"config": self.config, "groups": dict(self.groups)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Fingerprint":
        """Read what `to_json` of another machine wrote.

        Raises
        ------
        ProtocolError
            If the text is anything else: too long, not JSON, unknown, repeated or missing keys, malformed digests.
        """
        if len(text) > MAX_JSON_BYTES:
            raise ProtocolError(f"a fingerprint of {len(text)} bytes is longer than {MAX_JSON_BYTES}")
        try:
            content = parse_json(text, unique_keys=True)
        except ValueError as error:
            raise ProtocolError(f"a fingerprint is not JSON: {error}") from None
        read = Fields(content, "a fingerprint", only=("config", "groups"))
        groups = Fields(read.body.get("groups"), "the groups of a fingerprint")
        if not all(key in _ENDS or _LAYER.fullmatch(key) for key in groups.body):
            raise ProtocolError("the groups of a fingerprint must be 'embedding', 'norm', 'head' or layer numbers")
        return cls(read.text("config", like=_DIGEST), {key: groups.text(key, like=_DIGEST) for key in groups.body})


def config_digest(config: PreTrainedConfig) -> str:
    """Digest of the fields of `config` that the computation depends on.

    It is the same under every version of transformers and every compute dtype.
    """
    fields = {name: _canonical(getattr(config, name, None)) for name in _CONFIG_FIELDS}
    if fields["head_dim"] is None:  # some families leave it to be worked out
        fields["head_dim"] = config.hidden_size // config.num_attention_heads
    if config.model_type not in _FIELDS_KNOWN:  # all that is not as the family has it by itself
        own = {name: value for name, value in config.to_diff_dict().items() if not _NOT_COMPUTED.search(name)}
        fields |= {name: _canonical(value) for name, value in own.items()}
    # Families and versions differ in whether they spell out what is absent, so what is off is left out.
    present = {name: value for name, value in fields.items() if value is not None and value is not False}
    return _digest(json.dumps(present, sort_keys=True, separators=(",", ":")).encode())


def group_digests(tensors: Iterable[tuple[str, tuple[int, ...], bytes]]) -> dict[str, str]:
    """Digest by group of (name, shape, sample of the values) of each weight; weights of no group are left out."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, shape, sample in tensors:
        group = group_of(name)
        if group is not None:
            groups.setdefault(group, []).append((name, _digest(repr((name, shape)).encode() + sample)))
    return {key: _digest(repr(sorted(groups[key])).encode()) for key in sorted(groups, key=_group_order)}


def group_of(name: str) -> str | None:
    """The fingerprint's group that a weight of the whole model belongs to; None if it belongs to none."""
    layer = layer_of(name)
    if layer is not None:
        return str(layer)
    return next((group for group, pattern in _ENDS.items() if pattern.search(name)), None)


def sample_bytes(rows: Iterable[torch.Tensor]) -> bytes:
    """The sampled rows of a weight as bytes: in float32, so that a lossless change of dtype changes nothing."""
    return b"".join(row.to(torch.float32).contiguous().numpy().astype("<f4").tobytes() for row in rows)


def _canonical(value: Any) -> Any:
    """`value` as JSON that is equal whenever the meaning is, with empty entries left out."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [_canonical(entry) for entry in value]
    if isinstance(value, float):
        # 1e4 and 10000 are one value, and so are 1e-5 and its float32 that a GGUF file stores.
        return int(value) if value.is_integer() else float(np.float32(value))
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def _group_order(key: str) -> tuple[int, int]:
    if key.isdecimal():
        return (1, int(key))
    return ({"embedding": 0, "norm": 2, "head": 3}[key], 0)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGEST_CHARACTERS]
