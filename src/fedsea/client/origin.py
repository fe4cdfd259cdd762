"""What a hidden state comes from beside its text: by content, as that is what its noise is keyed by.

A state that changes must not carry the noise of before: the difference would leave without any. One that does not must
carry it again: fresh draws average away. So the key of a draw holds the content of all that the state is a function of:

- the text up to its token, the positions, and what the embedding gave for each of these tokens, as it was used (so an
  embedding that was changed, or that NEFTune has put noise on, is another one),
- the adapter's and the projection's weights and the base layers' of the input blocks; LoRA's scaling, whether adapters
  are on or merged, autocast,
- what earlier tokens of a session came from, where something has changed since,
- and the state itself, wherever it is a function of more than that: when torch's generator was drawn from on the way
  (dropout of any kind), or there are hooks that may do anything.

Never by a counter of changes: `Tensor._version` stays where it is under fused optimizers, `.data` and `assign=True`.
Not by the state alone either. One text in batches of two shapes has states that differ in the last bits, and a draw for
each of them is a further look. Where these bits are coarse, the state has a small part in the draw (`is_coarse`).
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fedsea.partition import PROJECT
from fedsea.parts import InputBlocks
from fedsea.wire.tensors import tensor_bytes

PARTS = 16  # of a large weight, each with a sum of its own
SMALL = 1 << 16  # bytes of a weight that is hashed as it is
_OF_ANY_MODULE = frozenset({*vars(nn.Module()), "gradient_checkpointing"})  # they change no state
_PLAIN = (bool, int, float, str, bytes, type(None))


class Origin:
    """What a model's input blocks make states of when it is asked. Keeps what it has read, to compare with."""

    def __init__(self) -> None:
        self._trained: tuple[dict[str, Tensor], bytes] | None = None
        self._base = b""

    def digest(self, blocks: InputBlocks, *, base: bool = True) -> bytes:
        """Of all but the text and the embedding: 32 bytes.

        To read the base weights again (`base`) takes as long as to read that much memory. Without, they count as what
        they were last.
        """
        trained, frozen = dict[str, Tensor](), dict[str, Tensor]()
        for name, tensor in _tensors(blocks):
            (trained if ".lora_" in name or name == PROJECT else frozen)[name] = tensor.detach()
        if base or not self._base:
            self._base = _hashed({name: _sums(tensor) for name, tensor in frozen.items()})
        known = self._trained
        if known is None or not _same(trained, known[0]):
            known = self._trained = {name: tensor.clone() for name, tensor in trained.items()}, _hashed(trained)
        return hashlib.blake2b(self._base + known[1] + _circumstances(blocks), digest_size=32).digest()


class Watch:
    """Made before input blocks run; tells afterwards whether their states are a function of more than is known."""

    def __init__(self, blocks: InputBlocks) -> None:
        self._blocks, self._before = blocks, _generators(blocks.device)

    def of_states(self, hidden: Tensor) -> list[bytes]:
        """What to add to the keys of `[tokens, width]` states: nothing, or the states themselves."""
        return [b""] * len(hidden) if self._is_known() else row_bytes(hidden)

    def _is_known(self) -> bool:
        if self._blocks.looks_at_length:
            return False  # its rotary factors change with the length of the text, or of its batch
        if any(_may_do_anything(module) for _name, module in _modules(self._blocks)) or _global_hooks():
            return False
        after = _generators(self._blocks.device)
        return all(torch.equal(*pair) for pair in zip(self._before, after, strict=True))


def is_coarse(*states: Tensor) -> bool:
    """Whether what these were computed in rounds so coarsely that the way of computing shows: 16 bits, or TF32."""
    device = states[0].device.type
    if torch.is_autocast_enabled(device) or any(one.element_size() < 4 for one in states):
        return True
    return device == "cuda" and torch.backends.cuda.matmul.allow_tf32


def row_bytes(states: Tensor) -> list[bytes]:
    """The bytes of each of `[tokens, width]` states."""
    data, size = tensor_bytes(states.detach().cpu()), states.shape[1] * states.element_size()
    return [data[first : first + size] for first in range(0, len(data), size)]


def _modules(blocks: InputBlocks) -> Iterator[tuple[str, nn.Module]]:
    """All but the embedding, whose output is looked at as it is."""
    embedding = blocks.structure.embedding
    return ((name, module) for name, module in blocks.named_modules() if not name.startswith(embedding))


def _tensors(blocks: InputBlocks) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in _modules(blocks):
        for found in (module.named_parameters, module.named_buffers):
            yield from found(prefix, recurse=False)


def _same(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether every bit is."""
    if tensors.keys() != others.keys():
        return False
    return all(
        (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
        and torch.equal(one.contiguous().view(torch.uint8), other.view(torch.uint8))
        for one, other in ((tensor, others[name]) for name, tensor in tensors.items())
    )


def _hashed(tensors: dict[str, Tensor]) -> bytes:
    """Of names, kinds and every byte: one who chooses the weights finds no two of one digest."""
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor_bytes(tensor.reshape(-1).cpu()))
    return digest.digest()


def _sums(tensor: Tensor) -> Tensor:
    """A base weight as it is, or sums of a large one's bits: no other party chooses it."""
    words = tensor.numel() * tensor.element_size() // 8
    if words * 8 < SMALL:
        return tensor
    flat = tensor.contiguous().view(-1)
    whole = words - words % PARTS
    rest = flat[whole * 8 // tensor.element_size() :].double().sum().view(1).view(torch.int64)
    bits = flat[: whole * 8 // tensor.element_size()].view(torch.int64)
    return torch.cat([bits.view(PARTS, -1).sum(1), rest, torch.tensor(tensor.shape, device=tensor.device)])


def _circumstances(blocks: InputBlocks) -> bytes:
    """All else that layers compute by: what their modules are told, as LoRA's scaling, and what torch is."""
    device = blocks.device.type
    precision = [torch.is_autocast_enabled(device), str(torch.get_autocast_dtype(device)) if device != "meta" else ""]
    said = [(name, type(module).__qualname__, _plain_facts(module)) for name, module in _modules(blocks)]
    return repr((precision, said)).encode()


def _plain_facts(module: nn.Module) -> list[tuple[str, Any]]:
    # `training`, among the ones left out, changes no state by itself: what it lets happen is seen by what it draws.
    facts = vars(module).items()
    return sorted((name, value) for name, value in facts if name not in _OF_ANY_MODULE and _is_plain(value))


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _may_do_anything(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _global_hooks() -> bool:
    hooks = nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def _generators(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):  # CUDA's, Apple's and others: a draw that is not seen repeats noise
        one_of_several = (device,) if device.type == "cuda" else ()
        states.append(torch.get_device_module(device).get_rng_state(*one_of_several))
    return states
