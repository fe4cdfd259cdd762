"""A provider that keeps what it sees: a real block server, whose frames are read as they pass."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedsea.audit.observation import Observation
from fedsea.checkpoints import Checkpoint
from fedsea.parts import Rows
from fedsea.server import BackgroundServer, ServerOptions
from fedsea.wire.codec import decode
from fedsea.wire.frames import Backward, Forward, Result, States, Step


class CuriousProvider(BackgroundServer):
    """A block server in a thread of its own, and a record of every frame, which stays when it is closed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._streams: list[_Record] = []
        super().__init__(checkpoint, ServerOptions(listen="127.0.0.1:0"), self._record)

    def sessions(self) -> list[list[Observation]]:
        """Of each session that has sent anything, in the order in which they began: what was seen of each row."""
        return [record.session_rows() for record in self._streams if record.steps]

    def runs(self) -> list[list[Observation]]:
        """Of each run that has sent anything: what was seen of each text, in the order in which they were sent."""
        return [record.run_rows() for record in self._streams if record.forwards]

    def forget(self) -> None:
        """Drop the record of streams that are over, and of what the others have sent so far."""
        for record in self._streams:
            record.clear()

    def _record(self) -> Callable[[bool, bytes], None]:
        record = _Record()
        self._streams.append(record)
        return record.keep


class _Record:
    """The frames of one stream."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.steps: dict[int, tuple[Step, Tensor | None]] = {}
        self.forwards: dict[int, tuple[Forward, Tensor | None]] = {}
        self.gradients: dict[int, Tensor] = {}
        self._of_micro: dict[int, int] = {}

    def keep(self, inbound: bool, data: bytes) -> None:
        """Take note of a frame; OPEN, OPENED and CLOSE say nothing of a text."""
        match frame := decode(data, knows=lambda _name: True):
            case Step():
                self.steps[frame.number] = (frame, None)
            case Result() if frame.number in self.steps and frame.states is not None:
                self.steps[frame.number] = (self.steps[frame.number][0], frame.states.float())
            case Forward():
                self.forwards[frame.number] = (frame, None)
                self._of_micro[frame.micro] = frame.number
            case States() if frame.number in self.forwards and frame.states is not None:
                self.forwards[frame.number] = (self.forwards[frame.number][0], frame.states.float())
            case Backward() if inbound and frame.micro in self._of_micro:
                self.gradients[self._of_micro[frame.micro]] = frame.gradient.float() * 2.0**-frame.exponent

    def session_rows(self) -> list[Observation]:
        """What was seen of each row, as it stands after the last step."""
        rows: list[list[tuple[Tensor, Tensor | None]]] = []
        for _number, (step, returned) in sorted(self.steps.items()):
            if step.row_map is not None:
                rows = [list(rows[at]) for at in step.row_map]
            elif not rows:
                rows = [[] for _ in range(len(step.rows))]
            parts = _by_row(step.rows, step.states.float()), _by_row(step.rows, returned)
            for row, start, states, answer in zip(rows, step.rows.starts, *parts, strict=True):
                assert states is not None
                del row[start:]  # rolled back
                row += zip(states, [None] * len(states) if answer is None else answer, strict=True)
        return [_observation(row) for row in rows]

    def run_rows(self) -> list[Observation]:
        """What was seen of each text of each forward pass."""
        found = []
        for number, (forward, returned) in sorted(self.forwards.items()):
            seen = forward.states.float(), returned, self.gradients.get(number)
            parts = zip(*(_by_row(forward.rows, one) for one in seen), strict=True)
            found += [Observation(sent, back, gradient) for sent, back, gradient in parts if sent is not None]
        return found


def _by_row(rows: Rows, packed: Tensor | None) -> Sequence[Tensor | None]:
    return [None] * len(rows) if packed is None else packed.split(rows.counts)


def _observation(row: list[tuple[Tensor, Tensor | None]]) -> Observation:
    returned = [answer for _, answer in row if answer is not None]
    sent = torch.stack([state for state, _ in row])
    return Observation(sent, torch.stack(returned) if len(returned) == len(row) else None)
