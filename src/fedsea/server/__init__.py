"""The block server: it holds the middle blocks of one model, and computes with them for many clients at once.

`BlockServer` (service.py) is the gRPC service; each of its calls is a `SessionStream`, a `RunStream` or a
`CoordinatorStream`. What they work on is in `ServerState` (state.py): sessions with their KV caches, runs with their
adapters, federated rounds, one ledger of the memory that is kept for each client, and one worker thread for torch.
`ServerProcess` (process.py) is `fedsea serve` as a child process.
"""

from typing import TYPE_CHECKING

from fedsea.lazy import lazy_face
from fedsea.server.limits import Limits as Limits

if TYPE_CHECKING:
    from fedsea.server.background import BackgroundServer as BackgroundServer
    from fedsea.server.process import ServerProcess as ServerProcess
    from fedsea.server.service import BlockServer as BlockServer
    from fedsea.server.state import ServerOptions as ServerOptions

# Limits are options of `fedsea serve`, whose help needs neither torch nor grpc.
__all__, __getattr__ = lazy_face(
    __name__,
    {
        "background": ("BackgroundServer",),
        "process": ("ServerProcess",),
        "service": ("BlockServer",),
        "state": ("ServerOptions",),
    },
    ready=("Limits",),
)
