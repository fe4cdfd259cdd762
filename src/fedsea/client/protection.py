"""What is done to `h_A` before it leaves: the mechanism, its draws, and the count of how often a text leaves."""

import secrets
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsea.checkpoints import Checkpoint
from fedsea.client.origin import Origin, Watch, is_coarse, row_bytes
from fedsea.errors import UsageError
from fedsea.partition import LIFT, PROJECT
from fedsea.parts import InputBlocks, RowCache, Rows
from fedsea.parts.cut_files import CutRecord
from fedsea.parts.narrow import principal_directions
from fedsea.privacy import DIGEST_BYTES, LookLedger, Magnitude, Noise, NoiseSource, parse_mechanism, taken_up
from fedsea.privacy.measure import measure_magnitude, public_states


class Protection:
    """How the hidden states of one model are protected when they leave.

    A narrow cut of the mechanism starts along the principal directions of a public text's states.

    Attributes
    ----------
    spec, noise
        The mechanism as the user has named it, or as it was taken up with an adapter; and the same, calibrated.
    in_training
        What protects forward passes whose loss may be backpropagated instead; None for `noise`.
    ledger
        Counts how often each text leaves under fresh noise, and refuses what is beyond its number; None for no count.
    """

    def __init__(self, spec: Noise, blocks: InputBlocks, checkpoint: Checkpoint) -> None:
        self._blocks, self._checkpoint = blocks, checkpoint
        self._origin = Origin()
        self.in_training: Noise | None = None
        self.ledger: LookLedger | None = None
        if spec.width is not None:
            blocks.narrow(principal_directions(public_states(blocks, checkpoint), spec.width))
        self.use(spec)

    def use(self, spec: Noise) -> None:
        """Protect by this mechanism from now on, calibrated to the model as it is now."""
        self.spec, self.noise = spec, spec.calibrated(self.measure)
        self.source = NoiseSource(self.noise)

    def measure(self) -> Magnitude:
        """How large the states of a public text are now, with the adapter and the narrow cut."""
        training = [module for module in self._blocks.modules() if module.training]
        self._blocks.eval()  # dropout would draw, and a measure is to be the same whenever it is taken
        try:
            return measure_magnitude(self._blocks, self._checkpoint)
        finally:
            for module in training:
                module.training = True

    def states(
        self,
        blocks: InputBlocks,
        tokens: Tensor,
        rows: Rows,
        chunk: Rows,
        cache: RowCache | None,
        digests: list[list[bytes]],
        *,
        training: bool = False,
        base: bool = True,
    ) -> Tensor:
        """Run the input blocks on some of a step's places; returns what may leave for these, `[chunk.total, width]`.

        `tokens` `[tokens]` and `rows` are of the whole step. `digests` has the keys of each row's draws up to
        where the chunk starts; those of the chunk are added. `base` says whether base weights may be others than when
        they were read last, `training` whether the loss may be backpropagated.
        """
        noise = (self.in_training or self.noise) if training else self.noise
        ids = tokens if chunk is rows else rows.of(tokens, chunk)
        alters = noise.alters
        watch = Watch(blocks) if alters else None
        embedded = blocks.embed(ids, chunk)
        hidden = blocks.run_embedded(embedded, chunk, cache)
        if hidden.dtype is torch.float64:  # for measuring, and not put on the grid of what leaves
            hidden = hidden.float()
        if watch is None:
            return hidden
        source = self.source = self.source.under(noise)

        def normals() -> Tensor:
            here = self._origin.digest(blocks, base=base)
            places = chunk.positions(torch.device("cpu")).unsqueeze(1)
            parts = (row_bytes(places), row_bytes(embedded), watch.of_states(hidden))
            made = [here + place + token + state for place, token, state in zip(*parts, strict=True)]
            drawn = _extend(digests, source, ids, chunk, made)
            self._charge(tokens, rows, chunk.starts, drawn)
            states = row_bytes(hidden) if is_coarse(hidden, embedded) else None
            return source.normals([key for row in drawn for key in row], hidden.shape[1], states)

        return noise.apply(hidden, normals)

    def _charge(self, tokens: Tensor, rows: Rows, starts: Sequence[int], drawn: list[list[bytes]]) -> None:
        """A text is counted where it begins to leave, as what it is in this step."""
        if self.ledger is not None:
            texts = zip(tokens.split(rows.counts), starts, drawn, strict=True)
            self.ledger.charge([(row.tolist(), keys[-1]) for row, start, keys in texts if keys and not start])

    # A narrow cut

    @property
    def projection(self) -> Tensor | None:
        """The narrow cut's half that is here, `[rank, hidden]`; None without one."""
        cut = self._blocks.narrow_cut
        return cut["project"].get_parameter("weight").detach() if cut else None

    def take_up(self, cut: CutRecord, weights: Mapping[str, Tensor], source: object) -> str:
        """Go through an adapter's narrow cut from now on, and protect what is left; says how, in one line."""
        own = parse_mechanism(cut.mechanism)
        if own.width != cut.rank:
            raise UsageError(f"the narrow cut in {source} says two things of its rank: {cut.rank} and {own}")
        spec = taken_up(self.spec, own, source)
        hidden = self._checkpoint.config.hidden_size
        if weights[PROJECT].shape != (cut.rank, hidden) or weights[LIFT].shape != (hidden, cut.rank):
            raise UsageError(f"the narrow cut in {source} is of another model: this one's states have {hidden} numbers")
        self._blocks.narrow(weights[PROJECT])
        self.use(spec)
        trained = "" if spec == own else f"; the adapter was trained with {own}"
        return f"what leaves goes through the adapter's narrow cut, protected by {self.noise}{trained}"


def check_rank(noise: Noise, hidden_size: int, middle: range) -> None:
    """Refuse a narrow cut that is as wide as the states, or where nothing crosses."""
    if noise.width is None:
        return
    if not middle:
        raise UsageError("with no middle blocks nothing leaves, so there is no cut to make narrow")
    if noise.width >= hidden_size:
        raise UsageError(f"a narrow cut of rank {noise.width} narrows nothing: this model's states have {hidden_size}")


def _extend(
    digests: list[list[bytes]], source: NoiseSource, tokens: Tensor, rows: Rows, made: list[bytes]
) -> list[list[bytes]]:
    """The keys of draws for `[tokens]`, row by row, which are added to what is known of each row."""
    drawn, done = [], 0
    for known, start, count, row in zip(digests, rows.starts, rows.counts, tokens.split(rows.counts), strict=True):
        # What left before there was noise is not known here: no other text may have the keys of this one then.
        known.extend(secrets.token_bytes(DIGEST_BYTES) for _ in range(start - len(known)))
        before = known[start - 1] if start else b""
        known[start:] = source.extend(before, row.tolist(), made[done : done + count])
        drawn.append(known[start:])
        done += count
    return drawn
