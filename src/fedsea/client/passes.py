"""The training pass: token ids through A, the middle and C in one autograd graph, and the loss at its end.

`PassMixin` is what a forward pass needs of `TrainingMixin`; the adapter and its optimizer are not its business.
"""

import hashlib
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedsea.client.graph import Exchange, ScaleGradient, SpoilStep
from fedsea.client.layout import Layout
from fedsea.client.origin import Origin, Watch, is_coarse, row_bytes
from fedsea.client.run import MiddleRun
from fedsea.errors import LimitExceededError, NonFiniteError, UsageError
from fedsea.parts import InputBlocks, OutputBlocks, RowCache, Rows
from fedsea.parts.adapters import AdapterSpec, adapter_parameters
from fedsea.parts.blocks import Part
from fedsea.parts.families import turning_point
from fedsea.privacy import LookLedger, Noise, NoiseSource
from fedsea.privacy.source import DIGEST_BYTES
from fedsea.wire.codec import MAX_PLACES

WINDOW = 32  # micro-batches that are under way at most


class PassMixin:
    """A training model's forward pass. Uses the attributes of `SplitModelForCausalLM` and `TrainingMixin`."""

    training: bool
    noise: Noise
    _parts: tuple[InputBlocks, OutputBlocks]
    lora_middle: nn.Parameter
    micro_batches: int
    gradient_checkpointing: bool
    _source: NoiseSource
    _origin: Origin
    _look: Noise | None
    look_ledger: LookLedger | None
    _check_lengths: Callable[[Rows], None]
    _run: MiddleRun | None
    _adapter: AdapterSpec | None
    _adapter_on: bool
    _weight: float

    @property
    def _module(self) -> Any:
        return self

    @property
    def input_blocks(self) -> InputBlocks:
        """A, of the modules that are registered in this model now."""
        return self._parts[0].follow(self._module)

    @property
    def output_blocks(self) -> OutputBlocks:
        """C, of the modules that are registered in this model now."""
        return self._parts[1].follow(self._module)

    def answer_loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, items: int) -> Tensor:
        """The loss of `forward`, computed from the logits of the learnt tokens only.

        Where the prompt is not learnt, that spares most of the head's work and memory.

        Parameters
        ----------
        input_ids, attention_mask, labels
            `[rows, columns]`.
        items
            Over how many labels the sum is averaged.
        """
        learnt = labels[:, 1:] != -100
        self._weight = float(max(1, items))
        hidden = self._module._states(input_ids, attention_mask)[0][:, :-1][learnt]
        logits = self._scaled(self.output_blocks.logits(hidden).float())
        loss = nn.functional.cross_entropy(logits, labels[:, 1:][learnt], reduction="sum") / items
        return self._finish_loss(loss, hidden, logits) if loss.requires_grad else loss

    def _trains(self) -> bool:
        """Whether a forward pass now is one whose loss will be taken back."""
        if not torch.is_grad_enabled() or self._adapter is None or not self._adapter_on:
            return False
        return any(parameter.requires_grad for parameter in adapter_parameters(self._module).values()) or (
            self._run is not None and self.lora_middle.requires_grad
        )

    def _pass_with_graph(self, ids: Tensor, layout: Layout) -> Tensor:
        """Token ids `[rows, columns]` -> states before the final norm `[rows, columns, hidden]`, in a graph."""
        rows = layout.rows
        self._check_lengths(rows)
        tokens = layout.take(ids)
        if self._run is None:
            hidden = self.input_blocks(tokens, rows, None)
            packed = rows.pack(self.output_blocks(hidden, rows, None))
        else:
            packed = self._through_middle(self._run, tokens, rows)
        return layout.place(packed, ids.shape)

    def _through_middle(self, run: MiddleRun, tokens: Tensor, rows: Rows) -> Tensor:
        sent: list[tuple[Rows, Exchange, Tensor]] = []
        done: list[Tensor] = []

        def receive() -> None:
            piece, exchange, token = sent[len(done)]
            received = run.receive(exchange, token)
            done.append(piece.pack(self.output_blocks(piece.unpack(received), piece, None)))

        run.begin_sum()
        blocks = self.input_blocks
        for first, last in self._split(run, rows):
            piece = Rows(rows.starts[first:last], rows.counts[first:last])
            ids = tokens[first:last, : piece.width]
            hidden = self._protected(
                ids, piece, None, self._look or self.noise, [[] for _ in range(len(piece))], base=first == 0
            )
            if not bool(torch.isfinite(hidden).all()):
                where = first_not_finite(blocks, blocks.model.embed_tokens(ids), piece)
                where = where or "with the noise"
                run.trouble = f"the hidden states are not finite: first {where}, in the input blocks"
                raise NonFiniteError(run.explanation())
            sent.append(
                (
                    piece,
                    *run.send(
                        hidden,
                        piece,
                        want_gradient=hidden.requires_grad,
                        training=self.training,
                        recompute=self.gradient_checkpointing,
                        seed=self._dropout_seed(),
                    ),
                )
            )
            if len(sent) - len(done) >= WINDOW:
                receive()
        while len(done) < len(sent):
            receive()
        for _piece, exchange, _token in sent:
            exchange.loss_exponent = run.scale.exponent if run.scale is not None else 0
            exchange.weight = self._weight
        return torch.cat(done) if len(done) > 1 else done[0]

    def _dropout_seed(self) -> int:
        """From torch's generator, which whoever resumes a training sets; hashed, so that it tells nothing of it."""
        if not self.training or self._adapter is None or not self._adapter.dropout:
            return 0
        drawn = int(torch.randint(1 << 62, ()))
        return int.from_bytes(hashlib.blake2b(drawn.to_bytes(8), digest_size=4).digest()) >> 1

    def _split(self, run: MiddleRun, rows: Rows) -> list[tuple[int, int]]:
        limit = run.channel.micro_batches
        pieces = min(self.micro_batches, limit)
        turn = turning_point(self._module.config)
        mixed = turn is not None and min(rows.counts) <= turn < max(rows.counts)
        split = split_rows(rows, 1 if mixed else pieces, run.tokens_of_frame(len(rows)))
        if mixed and len(split) > 1:
            raise UsageError(
                f"this model computes texts of up to {turn} tokens in another way than longer ones; put no "
                "texts of both kinds into a batch that is too large for one frame, or make the batch smaller"
            )
        if len(split) > limit:
            raise LimitExceededError(
                f"the batch takes {len(split)} micro-batches, the block server keeps {limit}; make the batch smaller"
            )
        return split

    def _protected(
        self,
        tokens: Tensor,
        rows: Rows,
        cache: RowCache | None,
        noise: Noise,
        digests: list[list[bytes]],
        *,
        base: bool = True,
        step: tuple[Tensor, Rows] | None = None,
    ) -> Tensor:
        """What may leave for some tokens `[rows, width]`: `[tokens, width of a state]`.

        Parameters
        ----------
        digests
            Of each row, the keys of its draws up to where these tokens start. Those of the tokens are added.
        base
            Whether base weights may be others than when they were read last.
        step
            All tokens of which these are a part, and their rows; None if these are all.
        """
        blocks = self.input_blocks
        watch = Watch(blocks)
        embedded = blocks.model.embed_tokens(tokens)
        hidden = rows.pack(blocks.run_embedded(embedded, rows, cache))
        source = self._source = self._source.under(noise)

        def normals() -> Tensor:
            here = self._origin.digest(blocks, base=base)
            places = rows.pack(rows.positions(torch.device("cpu")).expand(len(rows), -1).unsqueeze(2))
            parts = (row_bytes(places), row_bytes(rows.pack(embedded)), watch.of_states(hidden))
            made = [here + place + token + state for place, token, state in zip(*parts, strict=True)]
            drawn = _extend(digests, source, tokens, rows, made)
            self._count_looks(*(step or (tokens, rows)), rows.starts, drawn)
            states = row_bytes(hidden) if is_coarse(hidden, embedded) else None
            return source.normals([key for row in drawn for key in row], hidden.shape[1], states)

        # Float64 is for measuring, and not put on the grid of what leaves.
        return noise.apply(hidden.float() if hidden.dtype is torch.float64 else hidden, normals)

    def _count_looks(self, tokens: Tensor, rows: Rows, starts: Sequence[int], drawn: list[list[bytes]]) -> None:
        """A text is counted where it begins to leave, as what it is in this step."""
        if self.look_ledger is None:
            return
        texts = zip(tokens.tolist(), rows.counts, starts, drawn, strict=True)
        self.look_ledger.charge([(row[:count], keys[-1]) for row, count, start, keys in texts if keys and not start])

    def _finish_loss(self, loss: Tensor, hidden: Tensor, logits: Tensor) -> Tensor:
        """A loss that is not finite spoils the step, and says why."""
        if self._run is None or bool(torch.isfinite(loss)):
            return loss
        where = "the loss" if bool(torch.isfinite(logits).all()) else "the logits"
        where = where if bool(torch.isfinite(hidden).all()) else "the states of the output blocks"
        trouble = f"the loss is not finite: {where} came out so first, in the output blocks"
        return SpoilStep.apply(loss, self._run, trouble)  # type: ignore[no-any-return]

    def _scaled(self, states: Tensor) -> Tensor:
        """States or logits as they are, on which every loss depends; their gradient scaled, as float16 needs it."""
        if self._run is None or self._run.scale is None or not states.requires_grad:
            return states
        return ScaleGradient.apply(states, self._run.scale.exponent)  # type: ignore[no-any-return]

    def _backbone_states(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        hidden, cache = self._module._states(*args, **kwargs)
        return self._scaled(hidden), cache


def _extend(
    digests: list[list[bytes]], source: NoiseSource, tokens: Tensor, rows: Rows, made: list[bytes]
) -> list[list[bytes]]:
    """The keys of draws for tokens `[rows, width]`, row by row, which are added to what is known of each row."""
    drawn, done = [], 0
    for known, start, count, row in zip(digests, rows.starts, rows.counts, tokens.tolist(), strict=True):
        # What left before there was noise is not known here: no other text may have the keys of this one then.
        known.extend(secrets.token_bytes(DIGEST_BYTES) for _ in range(start - len(known)))
        before = known[start - 1] if start else b""
        known[start:] = source.extend(before, row[:count], made[done : done + count])
        drawn.append(known[start:])
        done += count
    return drawn


def split_rows(rows: Rows, pieces: int, max_tokens: int) -> list[tuple[int, int]]:
    """Rows `first` to `last` (exclusive) of each micro-batch: about `pieces`, none larger than a frame may be.

    Raises
    ------
    LimitExceededError
        If one row has more than `max_tokens` tokens.
    """
    if max(rows.counts) > max_tokens:
        raise LimitExceededError(
            f"a text of {max(rows.counts)} tokens does not fit into a frame of the block server's; {max_tokens} do"
        )
    size = -(-len(rows) // max(1, pieces))
    split, first = [], 0
    while first < len(rows):
        last = first + 1
        width = tokens = rows.counts[first]
        while last < len(rows) and last - first < size:
            width, tokens = max(width, rows.counts[last]), tokens + rows.counts[last]
            if (last + 1 - first) * width > MAX_PLACES or tokens > max_tokens:
                break
            last += 1
        split.append((first, last))
        first = last
    return split


@torch.no_grad()
def first_not_finite(part: Part, hidden: Tensor, rows: Rows) -> str | None:
    """After which layer of a part the states are not finite first, in words; None if all are."""
    for layer in part.layers:
        if not bool(torch.isfinite(rows.pack(hidden)).all()):
            return f"before layer {layer}"
        hidden = part.run_layers(hidden, rows, None, range(layer, layer + 1))
    return f"after layer {part.layers[-1]}" if part.layers and not bool(torch.isfinite(hidden).all()) else None
