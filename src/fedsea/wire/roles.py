"""Whose certificate a peer has shown: a client's or a coordinator's. Read for every stream, so it needs no library."""

from collections.abc import Mapping, Sequence
from typing import Literal

Role = Literal["client", "server", "coordinator"]

COORDINATOR = "coordinator"
"""Common name of the coordinator's certificate, and its folder; no client can be called that."""

COORDINATOR_URI = "urn:fedsea:coordinator"
"""Stands in the coordinator's certificate as a subject alternative name, and makes it one. Names of clients become
common names only, so no choice of a name gives a client this role."""


def is_coordinator(auth_context: Mapping[str, Sequence[bytes]]) -> bool:
    """Whether a gRPC call's peer has shown a coordinator's certificate, of which gRPC has checked the authority."""
    return COORDINATOR_URI.encode() in auth_context.get("peer_uri", ())
