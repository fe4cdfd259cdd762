"""A narrow cut at the client: where its projection starts, and taking up the one of a trained adapter."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from fedsea.checkpoints import Checkpoint
from fedsea.client.connection import Endpoint
from fedsea.client.passes import PassMixin
from fedsea.client.session import SessionSettings
from fedsea.errors import UsageError
from fedsea.partition import LIFT, PROJECT, Partition
from fedsea.parts import InputBlocks
from fedsea.parts.adapters import adapter_parameters
from fedsea.parts.cut_files import CutRecord, read_cut
from fedsea.parts.narrow import principal_directions
from fedsea.privacy import Magnitude, Noise, NoiseSource, parse_mechanism, public_states, taken_up


class NarrowMixin(PassMixin):
    """The narrow cut of a `SplitModelForCausalLM`, if it has one. Uses its attributes, and adds:

    Attributes
    ----------
    narrow_cut
        The client's half, `project`; empty without a cut. The block server has the other half, `lift`.
    """

    narrow_cut: nn.ModuleDict
    partition: Partition
    _endpoint: Endpoint | None
    _settings: SessionSettings
    _middle_weights: Callable[[], dict[str, Tensor]]

    def _protect(self, asked: Noise, measure: Callable[[], Magnitude]) -> None:
        """Have what leaves protected as asked from now on, calibrated to the model as it is now."""
        self._asked, self._measure = asked, measure
        self.noise = asked.calibrated(measure)
        self._source = NoiseSource(self.noise)

    @property
    def asked(self) -> Noise:
        """The mechanism as it was asked for, or taken up with an adapter: not calibrated."""
        return self._asked

    def measure_states(self) -> Magnitude:
        """How large the states are that the input blocks make of a public text now, with their adapter, and its cut."""
        training = self.input_blocks.training
        self.input_blocks.eval()  # dropout would draw, and a measure is to be the same whenever it is taken
        try:
            return self._measure()
        finally:
            self.input_blocks.train(training)

    def protect_look(self, look: Noise | None, lasting: Noise) -> None:
        """Protect what training passes send, and what all else does, as it is said here until it is said otherwise.

        Parameters
        ----------
        look
            For passes whose loss may be taken back; None for `lasting`.
        lasting
            `noise`: for all that leaves outside of them, chat and evaluation, and what is on record with a narrow cut.
        """
        self.noise, self._look = lasting, look

    @property
    def _projection(self) -> nn.Parameter:
        return adapter_parameters(self.input_blocks)[PROJECT]

    @property
    def projection(self) -> Tensor | None:
        """The narrow cut's half that is here, `[rank, hidden]`; None without one."""
        return self.narrow_cut["project"].get_parameter("weight").detach() if self.narrow_cut else None

    def cut_record(self) -> CutRecord | None:
        """What is saved of the cut beside its weights; None if the adapter has none."""
        if self._adapter is None or not self._adapter.narrow:
            return None
        return CutRecord(self._adapter.narrow, self.partition.input_layers, str(self.noise))

    def _read_cut(self, folder: str | Path) -> tuple[CutRecord, dict[str, Tensor]] | None:
        """The narrow cut beside an adapter, if there is one.

        Raises
        ------
        UsageError
            If the user's mechanism has a cut, and the adapter none.
        PartitionError
            If it belongs to another place.
        """
        found = read_cut(folder)
        if found is None:
            if self.noise.width is not None:
                raise UsageError(
                    f"the adapter in {folder} was trained without a narrow cut; leave narrow-cut out of the mechanism, "
                    "or fine-tune with it first"
                )
            return None
        if self._endpoint is None:
            raise UsageError(f"the adapter in {folder} has a narrow cut, and without middle blocks there is no cut")
        found[0].check_place(self.partition.input_layers, folder)
        return found

    def _take_up_cut(self, cut: CutRecord, weights: Mapping[str, Tensor], source: object) -> None:
        """Go through an adapter's narrow cut from now on, and protect what is left as `taken_up` says.

        Raises
        ------
        ModelMismatchError
            If the user asks for a cut of another rank, or the weights are another model's.
        """
        own = parse_mechanism(cut.mechanism)
        if own.width != cut.rank:
            raise UsageError(f"the narrow cut in {source} says two things of its rank: {cut.rank} and {own}")
        mechanism = taken_up(self._asked, own, source)
        hidden = self._settings.hidden_size
        if weights[PROJECT].shape != (cut.rank, hidden) or weights[LIFT].shape != (hidden, cut.rank):
            raise UsageError(f"the narrow cut in {source} is of another model: this one's states have {hidden} numbers")
        self.input_blocks.narrow(weights[PROJECT])
        self._protect(mechanism, self._measure)
        trained = "" if mechanism == own else f"; the adapter was trained with {own}"
        self._settings.notice(f"what leaves goes through the adapter's narrow cut, protected by {self.noise}{trained}")


def check_rank(noise: Noise, hidden_size: int, middle: range) -> None:
    """Refuse a narrow cut that a model cannot have.

    Raises
    ------
    UsageError
        If it is as wide as the states, or nothing crosses.
    """
    if noise.width is None:
        return
    if not middle:
        raise UsageError("with no middle blocks nothing leaves, so there is no cut to make narrow")
    if noise.width >= hidden_size:
        raise UsageError(f"a narrow cut of rank {noise.width} narrows nothing: this model's states have {hidden_size}")


def narrow_at_start(input_blocks: InputBlocks, checkpoint: Checkpoint, rank: int) -> None:
    """Cut `h_A` narrow along its principal directions on a public text."""
    input_blocks.narrow(principal_directions(public_states(input_blocks, checkpoint), rank))
