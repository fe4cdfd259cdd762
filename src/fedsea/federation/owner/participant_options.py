"""What a data owner decides about its part in a federation. Without torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedsea.errors import UsageError
from fedsea.partition import Partition

MAX_LOOKS = 64  # the noise of 64 looks at one state is worth an eighth; a federation rarely evaluates more often


@dataclass(frozen=True)
class ParticipantOptions:
    """What a data owner decides: `fedsea federation join`.

    Attributes
    ----------
    data, task, shard
        What it learns, an empty task for the federation's; `shard` as `Sharding.parse` reads it, empty for all of the
        data. `shard_seed` is the same for all clients.
    model, input_layers, output_layers, dtype, device, threads
        As `fedsea finetune` has them; an empty model for the federation's, None for torch's own number of threads.
    name
        Of the client. `OwnerProcess` takes it, `servers`, `credentials`, `private_ends` and `output` from its folder.
    servers
        Addresses of the block servers that it may be sent to; empty for any.
    credentials, insecure
        Its folder of `fedsea credentials init`; or no TLS, on this machine only.
    noise_level, mechanism
        How what leaves is protected: noise, as a multiple of the mean |h_A|, or a mechanism as `parse_mechanism` reads
        it. Not both.
    private_ends
        Where to keep the adapter of its own blocks in a federation that leaves it to its owner (a file); empty for
        nowhere. `insist_private` refuses one that does not.
    looks, max_looks
        Where looks at its texts are counted (a file); empty for nowhere. How often each text may be looked at under
        fresh noise, in all rounds and evaluations; 0 for as often as one likes. Without noise nothing is counted.
    output
        The folder to keep the federation's adapter in once it is over; empty for nowhere.
    max_tokens
        The longest text; what is more is cut from its context.
    wire_dtype
        What to send hidden states in; None for 16 bits.
    lora
        What its owner insists on of the adapter (`{"r": 8}`): a federation that trains another is not joined.
    reconnect_seconds
        How long to try again after the connection to the block server is lost.
    """

    data: str
    name: str = ""
    model: str = ""
    task: str = ""
    input_layers: int = 1
    output_layers: int = 1
    servers: tuple[str, ...] = ()
    credentials: str | None = None
    insecure: bool = False
    noise_level: float = 0.0
    mechanism: str = ""
    dtype: str = "float32"
    wire_dtype: str | None = None
    device: str = "cpu"
    threads: int | None = None
    max_tokens: int = 512
    shard: str = ""
    shard_seed: int = 0
    lora: Mapping[str, Any] | None = None
    reconnect_seconds: float = 30.0
    private_ends: str = ""
    insist_private: bool = False
    looks: str = ""
    max_looks: int = MAX_LOOKS
    output: str = ""

    @property
    def partition(self) -> Partition:
        """Where the cuts are."""
        return Partition(self.input_layers, self.output_layers)

    def to_body(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> "ParticipantOptions":
        """Read what `to_body` made; UsageError if an option is unknown or missing."""
        try:
            return cls(**{**body, "servers": tuple(body.get("servers", ()))})
        except TypeError as error:
            raise UsageError(f"the options of a participant cannot be read: {error}") from None
