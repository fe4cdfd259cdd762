"""What a coordinator asks of its SuperLink: who is there, start a run, how does it stand. Flower's Control API."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from fedsea.errors import FedSEAError, ServerUnavailableError
from fedsea.federation.flower.app import bundle
from fedsea.process import without_proxy
from fedsea.wire.address import parse_address

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """A data owner's SuperNode, as the SuperLink knows it: its number, its name, whether it is there, its key (PEM)."""

    number: int
    name: str
    online: bool
    public_key: bytes


@dataclass(frozen=True)
class FlowerRun:
    """How a run of the app stands.

    Attributes
    ----------
    status
        `pending`, `starting`, `running` or `finished`.
    outcome
        Of a finished one: `completed`, `failed` or `stopped`.
    details
        What Flower says about it.
    """

    status: str
    outcome: str
    details: str


class Control:
    """A SuperLink's Control API; a context manager.

    Parameters
    ----------
    address
        `HOST:PORT`, of this machine.
    authority
        The PEM file of the authority that issued the SuperLink's certificate.
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

        if any(node.public_key == public_key for node in self._nodes()):
            return
        self._ask(lambda: self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name)))

    def nodes(self) -> list[Node]:
        """The SuperNodes that are let in, and which of them are there."""
        return [Node(node.node_id, node.name, node.status == "online", node.public_key) for node in self._nodes()]

    def _nodes(self) -> Any:
        from flwr.proto.control_pb2 import ListNodesRequest

        nodes = self._ask(lambda: self._client.ListNodes(ListNodesRequest())).nodes_info
        return [node for node in nodes if node.status != "unregistered"]

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
        answer = self._ask(lambda: self._client.StartRun(request))
        if not answer.HasField("run_id"):
            raise FedSEAError("the SuperLink did not start the run; superlink.log says why")
        return int(answer.run_id)

    def run(self, number: int) -> FlowerRun:
        """How a run stands."""
        from flwr.proto.control_pb2 import ListRunsRequest

        runs = self._ask(lambda: self._client.ListRuns(ListRunsRequest(run_id=number))).run_dict
        status = runs[number].status
        return FlowerRun(status.status, status.sub_status, status.details)

    def stop(self, number: int) -> None:
        """Stop a run."""
        from flwr.proto.control_pb2 import StopRunRequest

        self._ask(lambda: self._client.StopRun(StopRunRequest(run_id=number)))

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, call: Callable[[], T]) -> T:
        import httpx

        try:
            return call()
        except httpx.HTTPStatusError as error:
            text = " ".join(error.response.text.split())[:300]
            raise FedSEAError(f"the SuperLink refused ({error.response.status_code}): {text}") from None
        except httpx.HTTPError as error:
            raise ServerUnavailableError(f"no SuperLink answers at {self._address}: {error}") from None


def new_key() -> tuple[bytes, bytes]:
    """A SuperNode's private key as OpenSSH has it, and its public key: both PEM, EC P-384."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return private, public_key_of(private)


def public_key_of(private: bytes) -> bytes:
    """The public key (PEM) that belongs to what `new_key` made.

    Raises
    ------
    ValueError
        If it is no such key.
    """
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_ssh_private_key(private, None)
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
