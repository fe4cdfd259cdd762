"""What a provider sees of a text, and what an attacker knows beside it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedsea.audit.candidates import Candidates, protected, same_without_draws
from fedsea.audit.known_adapter import KnownAdapter
from fedsea.checkpoints import Checkpoint
from fedsea.checkpoints.whole import whole_model
from fedsea.partition import Partition
from fedsea.parts import InputBlocks, OutputBlocks, Rows
from fedsea.privacy import Noise
from fedsea.privacy.measure import public_tokens

Blocks = TypeVar("Blocks", InputBlocks, OutputBlocks)
SUMS = 2.0**-16  # relative error of float32 sums in another order, at most


@dataclass(frozen=True)
class Observation:
    """What the provider has of one text, in float32 on the CPU. The text itself is not in it.

    Attributes
    ----------
    sent
        `h_A` as it came over the wire, `[tokens, hidden]`.
    returned
        `h_B` as it went back, `[tokens, hidden]`; None if it did not (a replay).
    gradient
        At `h_B`, `[tokens, hidden]`; None in inference.
    """

    sent: Tensor
    returned: Tensor | None = None
    gradient: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return len(self.sent)


@dataclass(frozen=True)
class Subject:
    """A text under attack: every look that the provider had at it, and the truth, which attacks are not given.

    Attributes
    ----------
    looks
        One for each time that the whole text was sent, the first one first. More than one in training (epochs), or
        where texts are sent again.
    tokens
        The text.
    prompt
        How many of its tokens were given to the model; what comes after is the answer.
    labels
        The tokens again where they were learnt, -100 elsewhere; None in inference.
    """

    looks: tuple[Observation, ...]
    tokens: tuple[int, ...]
    prompt: int
    labels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Knowledge:
    """What attackers know: the public weights, how the model is cut, and how the states are protected.

    By Kerckhoffs's principle the mechanism and its strength are known; its draws are not.

    Parameters
    ----------
    checkpoint
        The public base model.
    partition
        Where it is cut.
    noise
        The mechanism, calibrated.
    tokenizer
        The model's; None if it has none (random weights).
    adapter
        That the client runs with, for an attacker who has it (because the coordinator of a federation, or a client,
        colludes); None for one who has not.
    projection
        Of a narrow cut, `[rank, hidden]`; None without one. It starts from public weights and is trained with its other
        half, which the provider has, so it is taken to be known.
    colluder
        Texts of a colluding client and what the provider saw of them, in the same configuration.
    wire_dtype
        What states are rounded to.
    start
        What every text begins with, as is public: a begin-of-text token, a chat template's first tokens.
    """

    checkpoint: Checkpoint
    partition: Partition
    noise: Noise
    tokenizer: Any
    adapter: KnownAdapter | None = None
    projection: Tensor | None = None
    colluder: Sequence[Subject] = field(default=())
    wire_dtype: torch.dtype = torch.float16
    start: tuple[int, ...] = ()

    def but(self, *, start: tuple[int, ...]) -> "Knowledge":
        """The same with another known start; what has been computed is not computed again."""
        other = dataclasses.replace(self, start=start)
        other.take_over(self)
        return other

    def take_over(self, other: "Knowledge") -> None:
        """Have what another one of the same model and partition, with the same adapter, has computed already.

        Another mechanism needs tables of its own, unless it differs in the strength of noise only.
        """
        shared = {"input_blocks", "output_blocks", "whole"}
        if self.noise == other.noise:
            shared |= {"candidates", "noise_variance"}
        elif "candidates" in other.__dict__ and same_without_draws(
            self.noise, other.noise, self.checkpoint.config.hidden_size
        ):
            shared |= {"candidates"}
        self.__dict__.update({name: other.__dict__[name] for name in shared & other.__dict__.keys()})

    @cached_property
    def input_blocks(self) -> InputBlocks:
        """A as far as it is known: its base weights, and the adapter if the attacker has it; float32."""
        return self._known(InputBlocks)

    @cached_property
    def output_blocks(self) -> OutputBlocks:
        """C, likewise."""
        return self._known(OutputBlocks)

    def _known(self, kind: type[Blocks]) -> Blocks:
        with torch.inference_mode(False):  # attacks that descend need weights that autograd takes
            blocks = kind.from_checkpoint(self.checkpoint, self.partition, dtype=torch.float32)
            if self.adapter is not None:
                self.adapter.put_on(blocks)
            if self.projection is not None and isinstance(blocks, InputBlocks):
                blocks.narrow(self.projection)
        return blocks

    @cached_property
    def whole(self) -> Any:
        """The whole base model as transformers loads it, float32: the language model that an attacker guesses with."""
        return whole_model(self.checkpoint, dtype=torch.float32, device="cpu")

    @cached_property
    def candidates(self) -> Candidates:
        """Every token as A and the mechanism make it."""
        return Candidates(self.input_blocks, self.noise, public_tokens(self.checkpoint).tolist())

    @cached_property
    def noise_variance(self) -> float:
        """Variance of what the mechanism adds to an element, and of what rounding on the wire adds.

        Measured by running the mechanism, with draws of the attacker's own, on the states of a public text.
        """
        with torch.inference_mode():
            tokens = public_tokens(self.checkpoint)[:64].unsqueeze(0)
            hidden = self.input_blocks(tokens, Rows.uniform(1, 0, tokens.shape[1]), None)[0]
            clean = protected(hidden, self.noise)
            normals = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
            drawn = self.noise.apply(hidden, lambda: normals)
        # Errors of rounding are even, up to half a unit in the last place; float32's own sums differ by more than that.
        half_unit = max(torch.finfo(self.wire_dtype).eps, SUMS) / 2
        rounding = clean.square().mean() * half_unit**2 / 3
        return float((drawn - clean).square().mean() + rounding)
