"""What a coordinator needs of its SuperLink: who is there, start a run, how does it stand. Flower's Control API."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
    """How a run of the app stands, in Flower's words."""

    status: str  # pending, starting, running, finished
    outcome: str  # of a finished one: completed, failed, stopped
    details: str


class Control:
    """The Control API of a SuperLink on this machine, whose certificate the authority (a PEM file) has issued.

    What the SuperLink refuses is a FedSEAError; ServerUnavailableError if it does not answer.
    """

    def __init__(self, address: str, authority: Path) -> None:
        from flwr.proto import control_pb2
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        self._address = address
        self._requests: Any = control_pb2
        os.environ.update(without_proxy(parse_address(address)[0]))
        self._client: Any = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=False,
            root_certificates=authority.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def register(self, name: str, public_key: bytes) -> None:
        """Let in the SuperNode that has this key (PEM), unless it is in already."""
        if all(node.public_key != public_key for node in self.nodes()):
            request = self._requests.RegisterNodeRequest(public_key=public_key, name=name)
            self._call(self._client.RegisterNode, request)

    def nodes(self) -> list[Node]:
        """The SuperNodes that are let in, and which of them are there."""
        return [
            Node(node.node_id, node.name, node.status == "online", node.public_key)
            for node in self._call(self._client.ListNodes, self._requests.ListNodesRequest()).nodes_info
            if node.status != "unregistered"
        ]

    def start(self, settings: Mapping[str, str | int | float | bool]) -> int:
        """Start a run of the app with these settings (`local-steps` and so on); returns its number."""
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.supercore.fab import Fab

        content = bundle()
        request = self._requests.StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {})),
            override_config=user_config_to_proto(dict(settings)),
        )
        answer = self._call(self._client.StartRun, request)
        if not answer.HasField("run_id"):
            raise FedSEAError("the SuperLink did not start the run; superlink.log says why")
        return int(answer.run_id)

    def run(self, number: int) -> FlowerRun:
        """How a run stands."""
        runs = self._call(self._client.ListRuns, self._requests.ListRunsRequest(run_id=number)).run_dict
        status = runs[number].status
        return FlowerRun(status.status, status.sub_status, status.details)

    def stop(self, number: int) -> None:
        """Stop a run."""
        self._call(self._client.StopRun, self._requests.StopRunRequest(run_id=number))

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()

    def _call(self, call: Callable[[Any], T], request: Any) -> T:
        import httpx

        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            text = " ".join(error.response.text.split())[:300]
            raise FedSEAError(f"the SuperLink refused ({error.response.status_code}): {text}") from None
        except httpx.HTTPError as error:
            raise ServerUnavailableError(f"no SuperLink answers at {self._address}: {error}") from None
