"""What a data owner decides about its part in a federation. Without torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fedsea.errors import UsageError
from fedsea.flags import DATA, ComputeDtype, Device, Flag, Noise, Threads, WireDtype
from fedsea.partition import Partition

MAX_LOOKS = 64  # the noise of a state that was sent 64 times is worth an eighth; few federations send one so often


@dataclass(frozen=True)
class ParticipantOptions:
    """What a data owner decides: `fedsea federation join`. The help of each flag says what a field means.

    Attributes
    ----------
    name, servers, credentials, insecure, private_ends, output
        `OwnerProcess` takes them from the data owner's folder: the client's name; the block servers that it may be sent
        to, empty for any; its folder of credentials, or no TLS; the file for the adapter of its own blocks in a
        federation that leaves it to its owner, and the folder for the federation's adapter, empty for nowhere.
    lora
        What its owner insists on of the adapter (`{"r": 8}`): a federation that trains another is not joined.
    looks
        Without noise nothing is counted; empty for nowhere.
    """

    data: Annotated[str, DATA]
    name: str = ""
    task: Annotated[str, Flag("The task, as for fedsea finetune.", default="that of the federation")] = ""
    model: Annotated[str, Flag("Your own copy of the model.", default="the federation's model, by its name")] = ""
    partition: Partition = Partition()
    servers: tuple[str, ...] = ()
    credentials: str | None = None
    insecure: bool = False
    noise: Noise = ""
    dtype: ComputeDtype = "float32"
    wire_dtype: WireDtype = None
    device: Device = "cpu"
    threads: Threads = None
    max_tokens: Annotated[int, Flag("Longest text, in tokens. Longer ones lose context.", min=2)] = 512
    shard: Annotated[
        str,
        Flag(
            "For experiments, a part of the data: iid:0/4, dirichlet=0.5:0/4, source=COLUMN:0/4 or folders.",
            default="all of the data",
        ),
    ] = ""
    shard_seed: Annotated[int, Flag("Seed of the parts; the same for all clients.", min=0)] = 0
    lora: Mapping[str, Any] | None = None
    reconnect_seconds: float = 30.0
    private_ends: str = ""
    insist_private: Annotated[
        bool, Flag("Take part only if the adapter of your input and output blocks stays here.", "--private-ends")
    ] = False
    max_looks: Annotated[
        int, Flag("With noise: how often each text may be sent, each time with fresh noise. 0 for no limit.", min=0)
    ] = MAX_LOOKS
    looks: Annotated[
        str, Flag("The file that counts how often each text was sent.", metavar="FILE", default="looks.db in FOLDER")
    ] = ""
    output: str = ""

    def to_body(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> "ParticipantOptions":
        """Read what `to_body` made; UsageError if an option is unknown or missing."""
        try:
            partition = Partition(**body.get("partition", {}))
            return cls(**{**body, "partition": partition, "servers": tuple(body.get("servers", ()))})
        except TypeError as error:
            raise UsageError(f"the options of a participant cannot be read: {error}") from None
