"""What a coordinator needs of its SuperLink: who is there, start a run, how does it stand. Flower's Control API."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsea.errors import FedSEAError, ServerUnavailableError
from fedsea.federation.flower.app import bundle
from fedsea.process import without_proxy
from fedsea.wire.address import parse_address

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """A data owner's SuperNode, as the SuperLink knows it; its key is PEM."""

    number: int
    name: str
    online: bool
    public_key: bytes


@dataclass(frozen=True)
class FlowerRun:
    """How a run of the app stands, in Flower's words.

    Its status is `pending`, `starting`, `running` or `finished`, a finished one's outcome `completed`, `failed` or
    `stopped`.
    """

    status: str
    outcome: str
    details: str


class Control:
    """The Control API of a SuperLink on this machine, whose certificate the authority (a PEM file) has issued.

    A context manager. What the SuperLink refuses is a FedSEAError; ServerUnavailableError if it does not answer.
    """

    def __init__(self, address: str, authority: Path) -> None:
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        self._address = address
        os.environ.update(without_proxy(parse_address(address)[0]))
        self._client: Any = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=False,
            root_certificates=authority.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def register(self, name: str, public_key: bytes) -> None:
        """Let in the SuperNode that has this key (PEM), unless it is in already."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        if all(node.public_key != public_key for node in self.nodes()):
            self._call(self._client.RegisterNode, RegisterNodeRequest(public_key=public_key, name=name))

    def nodes(self) -> list[Node]:
        """The SuperNodes that are let in, and which of them are there."""
        from flwr.proto.control_pb2 import ListNodesRequest

        return [
            Node(node.node_id, node.name, node.status == "online", node.public_key)
            for node in self._call(self._client.ListNodes, ListNodesRequest()).nodes_info
            if node.status != "unregistered"
        ]

    def start(self, settings: Mapping[str, str | int | float | bool]) -> int:
        """Start a run of the app with these settings (`local-steps` and so on); returns its number."""
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        content = bundle()
        request = StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {})),
            override_config=user_config_to_proto(dict(settings)),
        )
        answer = self._call(self._client.StartRun, request)
        if not answer.HasField("run_id"):
            raise FedSEAError("the SuperLink did not start the run; superlink.log says why")
        return int(answer.run_id)

    def run(self, number: int) -> FlowerRun:
        """How a run stands."""
        from flwr.proto.control_pb2 import ListRunsRequest

        status = self._call(self._client.ListRuns, ListRunsRequest(run_id=number)).run_dict[number].status
        return FlowerRun(status.status, status.sub_status, status.details)

    def stop(self, number: int) -> None:
        """Stop a run."""
        from flwr.proto.control_pb2 import StopRunRequest

        self._call(self._client.StopRun, StopRunRequest(run_id=number))

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_what: object) -> None:
        self.close()

    def _call(self, call: Callable[[Any], T], request: Any) -> T:
        import httpx

        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            text = " ".join(error.response.text.split())[:300]
            raise FedSEAError(f"the SuperLink refused ({error.response.status_code}): {text}") from None
        except httpx.HTTPError as error:
            raise ServerUnavailableError(f"no SuperLink answers at {self._address}: {error}") from None


def new_key() -> bytes:
    """A SuperNode's private key: EC P-384, PEM as OpenSSH has it."""
    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def public_key_of(private: bytes) -> bytes:
    """The public key (PEM) that belongs to what `new_key` made; ValueError if it is no such key."""
    key = serialization.load_ssh_private_key(private, None)
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
