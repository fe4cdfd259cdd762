"""What a client has sent and received, counted in application bytes (frames, without gRPC, TLS and TCP)."""

from dataclasses import dataclass


@dataclass
class Traffic:
    """Counters of a model's wire traffic.

    Attributes
    ----------
    bytes_up, bytes_down
        Bytes of frames sent and received.
    tensor_bytes_up, tensor_bytes_down
        Those of them that are hidden states; the rest are headers, positions and handshakes.
    round_trips
        Exchanges that had to be waited for.
    reconnections
        Times that a lost connection was taken up again.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    tensor_bytes_up: int = 0
    tensor_bytes_down: int = 0
    round_trips: int = 0
    reconnections: int = 0

    def since(self, earlier: "Traffic") -> "Traffic":
        """What was added after `earlier`, a copy taken before."""
        return Traffic(**{name: count - getattr(earlier, name) for name, count in vars(self).items()})

    def copy(self) -> "Traffic":
        """The counters as they are now."""
        return Traffic(**vars(self))
