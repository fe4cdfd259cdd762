"""The standard gRPC health service: how the server is, asked once or watched.

Not gRPC's own servicer: there, one watcher that does not read keeps the server from telling the others, and from
stopping. Here each waits for itself, and is counted as every other stream of a client is.
"""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedsea.errors import FedSEAError
from fedsea.server.stream import StreamCounter, identity_of
from fedsea.wire import contract


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Serving from the start, until `stop`. Those that watch are counted with their client's streams."""

    def __init__(self, streams: StreamCounter) -> None:
        self._streams = streams
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Not serving from now on; those that watch are sent that."""
        self._stopping.set()

    def _status(self, name: str) -> Any:
        statuses = health_pb2.HealthCheckResponse
        if name not in ("", contract.SERVICE):
            return statuses.SERVICE_UNKNOWN
        return statuses.NOT_SERVING if self._stopping.is_set() else statuses.SERVING

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """How the server is."""
        status = self._status(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """How the server is, and again once that has changed."""
        try:
            with self._streams.counted(identity_of(context)[0]):
                await context.write(health_pb2.HealthCheckResponse(status=self._status(request.service)))
                await self._stopping.wait()
                await context.write(health_pb2.HealthCheckResponse(status=self._status(request.service)))
                return
        except FedSEAError as error:
            refused = error
        await context.abort(*contract.refusal(refused))
