"""What an attacker knows beside what it observes."""

import pydoc_data.topics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from fedsea.audit.candidates import Candidates, protected, same_without_draws
from fedsea.audit.language import Continuation
from fedsea.audit.observation import Recovery, Subject
from fedsea.checkpoints import Checkpoint
from fedsea.checkpoints.whole import whole_model
from fedsea.partition import Partition
from fedsea.parts import InputBlocks, OutputBlocks, Rows
from fedsea.parts.adapter_files import read_adapter
from fedsea.parts.adapters import AdapterSpec, adapter_parameters
from fedsea.parts.blocks import Part
from fedsea.privacy import Noise
from fedsea.privacy.measure import public_tokens

Blocks = TypeVar("Blocks", InputBlocks, OutputBlocks)
SUMS = 2.0**-16  # relative error of float32 sums in another order, at most
DRAWS = 1 << 15  # tokens of a public text, for a model without a tokenizer


@dataclass(frozen=True)
class KnownAdapter:
    """A LoRA adapter of the whole model that attackers have; its weights by their names there."""

    spec: AdapterSpec
    weights: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: Path, config: PreTrainedConfig) -> Self:
        """A PEFT adapter from its folder; errors as `read_adapter` and `AdapterSpec.from_config` raise them."""
        lora, weights = read_adapter(folder)
        return cls(AdapterSpec.from_config(lora, config, fresh=False), weights)

    @torch.no_grad()
    def put_on(self, part: Part) -> None:
        """Put it on a part's layers, frozen."""
        self.spec.put_on(part, part.layers)
        for name, parameter in adapter_parameters(part).items():
            parameter.copy_(self.weights[name])
        part.requires_grad_(False)


@dataclass(eq=False)
class SharedKnowledge:
    """What attackers know whatever the mechanism is: the public weights, and how the model is cut.

    What is computed from it is computed once, when it is first needed. An attacker may have the client's `adapter`
    (because the coordinator of a federation, or a client, colludes). They have the `projection` of a narrow cut,
    `[rank, hidden]`: it starts from public weights and is trained with its other half, which the provider has.
    """

    checkpoint: Checkpoint
    partition: Partition
    tokenizer: Any = None
    adapter: KnownAdapter | None = None
    projection: Tensor | None = None
    _candidates: tuple[Noise, Candidates] | None = field(default=None, init=False)
    _predicted: dict[tuple[int, ...], tuple[Recovery, Tensor]] = field(default_factory=dict, init=False)
    _written: dict[tuple[int, ...], list[int]] = field(default_factory=dict, init=False)

    @cached_property
    def input_blocks(self) -> InputBlocks:
        """A as far as it is known: its base weights, and the adapter if the attacker has it; float32."""
        blocks = self._known(InputBlocks)
        if self.projection is not None:
            blocks.narrow(self.projection)
        return blocks

    @cached_property
    def output_blocks(self) -> OutputBlocks:
        """C, likewise."""
        return self._known(OutputBlocks)

    def _known(self, kind: type[Blocks]) -> Blocks:
        blocks = kind.from_checkpoint(self.checkpoint, self.partition, dtype=torch.float32)
        if self.adapter is not None:
            self.adapter.put_on(blocks)
        return blocks

    @cached_property
    def whole(self) -> Any:
        """The whole base model as transformers loads it, float32: the language model that an attacker guesses with."""
        return whole_model(self.checkpoint, dtype=torch.float32, device="cpu")

    @cached_property
    def public_text(self) -> Tensor:
        """A long public text as the model's tokenizer cuts it, int64 `[tokens]`: the help topics of every Python.

        A model without a tokenizer gets draws from its vocabulary.
        """
        if self.tokenizer is None:
            vocabulary: int = self.checkpoint.config.vocab_size
            return torch.randint(vocabulary, (DRAWS,), generator=torch.Generator().manual_seed(0))
        topics = pydoc_data.topics.topics
        rows = self.tokenizer([topics[name] for name in sorted(topics)], add_special_tokens=False).input_ids
        return torch.tensor([token for row in rows for token in row])

    def candidates(self, noise: Noise) -> Candidates:
        """Every token as A and a mechanism make it; mechanisms that differ only in strength have the same.

        They are kept until those of another mechanism are needed.
        """
        size: int = self.checkpoint.config.hidden_size
        if self._candidates is None or not same_without_draws(noise, self._candidates[0], size):
            self._candidates = noise, Candidates(self.input_blocks, noise, public_tokens(self.checkpoint).tolist())
        return self._candidates[1]

    @torch.no_grad()
    def written(self, start: tuple[int, ...], length: int) -> list[int]:
        """What the language model itself writes, greedily, after `start`: `length` tokens with that."""
        tokens = self._written.setdefault(start, list(start))
        if len(tokens) < length:
            model = Continuation(self.whole)
            new = [*([] if start else [self._first_token()]), *tokens]
            while len(tokens) < length:
                new = [int(model.extend([new])[0].argmax())]
                tokens += new
        return tokens[:length]

    def _first_token(self) -> int:
        names = ("bos_token_id", "eos_token_id")
        return next((token for name in names if (token := getattr(self.tokenizer, name, None)) is not None), 0)

    @torch.no_grad()
    def predicted_by_context(self, text: tuple[int, ...]) -> tuple[Recovery, Tensor]:
        """What the language model predicts at each position from the true tokens before it. No attack: it needs those.

        A generous reference: an attack that does not do better has learnt nothing from what crosses the wire. With it,
        the cross entropy of each true token but the first, nats, `[tokens - 1]`.
        """
        if text not in self._predicted:
            ids = torch.tensor([text])
            logits = self.whole(ids).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            self._predicted[text] = Recovery((None, *logits.argmax(-1).tolist())), losses
        return self._predicted[text]


@dataclass(frozen=True)
class Knowledge:
    """What the attackers of one mechanism know. By Kerckhoffs's principle that is all but the mechanism's draws."""

    shared: SharedKnowledge
    noise: Noise  # calibrated
    colluder: Sequence[Subject] = ()  # texts of a colluding client, in the same configuration
    wire_dtype: torch.dtype = torch.float16
    start: tuple[int, ...] = ()  # what every text publicly begins with: a begin-of-text token, a chat template's tokens

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model knows."""
        size: int = self.shared.checkpoint.config.vocab_size
        return size

    @property
    def input_blocks(self) -> InputBlocks:
        """A, as far as it is known."""
        return self.shared.input_blocks

    @property
    def output_blocks(self) -> OutputBlocks:
        """C, as far as it is known."""
        return self.shared.output_blocks

    @cached_property
    def candidates(self) -> Candidates:
        """Every token as A and the mechanism make it."""
        return self.shared.candidates(self.noise)

    @cached_property
    def noise_variance(self) -> float:
        """Variance of what the mechanism adds to an element, and of what rounding on the wire adds.

        Measured by running the mechanism, with draws of the attacker's own, on the states of a public text.
        """
        with torch.no_grad():
            tokens = public_tokens(self.shared.checkpoint)[:64]
            hidden = self.input_blocks(tokens, Rows((0,), (len(tokens),)), None)
            clean = protected(hidden, self.noise)
            normals = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
            drawn = self.noise.apply(hidden, lambda: normals)
        # Errors of rounding are even, up to half a unit in the last place; float32's own sums differ by more than that.
        half_unit = max(torch.finfo(self.wire_dtype).eps, SUMS) / 2
        rounding = clean.square().mean() * half_unit**2 / 3
        return float((drawn - clean).square().mean() + rounding)
