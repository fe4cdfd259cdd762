"""The block server: it holds the middle blocks of one model, and computes with them for many clients at once.

`BlockServer` (service.py) is the gRPC service; each of its calls is a `SessionStream`, a `RunStream` or a
`CoordinatorStream`. What they work on is in `ServerState` (state.py): sessions with their KV caches, runs with their
adapters, federated rounds, one ledger of the memory that is kept for each client, and one worker thread for torch.
`ServerProcess` (process.py) is `fedsea serve` as a child process.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedsea.server.limits import Limits

if TYPE_CHECKING:
    from fedsea.server.background import BackgroundServer
    from fedsea.server.process import ServerProcess
    from fedsea.server.service import BlockServer
    from fedsea.server.state import ServerOptions

__all__ = ["BackgroundServer", "BlockServer", "Limits", "ServerOptions", "ServerProcess"]
# Limits are options of `fedsea serve`, whose help needs neither torch nor grpc. The others do: they are imported late.
_MODULES = {
    "BackgroundServer": "background",
    "BlockServer": "service",
    "ServerOptions": "state",
    "ServerProcess": "process",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
