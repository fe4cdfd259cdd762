"""The federation: many data owners, one set of adapters, on Flower.

Its processes, and what passes between them::

    coordinator's machine                                 a data owner's machine, one of several

    fedsea federation up  (coordinator/up.py)             fedsea federation join  (owner/join.py)
      │ starts, watches, starts again                       │ starts, watches, starts again
      ├─ SuperLink  (flower/superlink.py)  <── TLS ──>      ├─ SuperNode  (flower/supernode.py)
      │    │ starts for a run                 messages      │    │ starts for each message
      │  ServerApp  (flower/server_app.py)                  │  ClientApp  (flower/client_app.py): thin, no torch
      │    │ opens rounds, takes averages                   │    │ Unix socket: JSON and safetensors
      │    v                                                │    v
      └─ block server  (fedsea serve)  <── mTLS ────────>   └─ worker  (owner/worker_process.py): model and data
                                hidden states, gradients

Flower carries, each round: to a client its ticket for a seat at a block server, the recipe, and A's and C's adapter;
back, the trained adapter and metrics. Hidden states and gradients go from worker to block server and nowhere else. The
middle's adapter goes from the block server to the ServerApp, averaged.

coordinator/  what runs at the coordinator: servers, rounds, clients, their replies, the folder of results
owner/        what runs at a data owner: worker, data, model, the adapter that stays private
flower/       what Flower loads and starts: the app's two halves, the strategies, the patches of its own processes

`Federation` and `OwnerProcess` are what the commands run, with `Settings`, `UpOptions` and `ParticipantOptions`.
"""

from typing import TYPE_CHECKING

from fedsea.lazy import lazy_face

if TYPE_CHECKING:
    from fedsea.federation.coordinator.block_server_admin import BlockServerAdmin as BlockServerAdmin
    from fedsea.federation.coordinator.deployment import Deployment as Deployment
    from fedsea.federation.coordinator.status import FederationStatus as FederationStatus
    from fedsea.federation.coordinator.status import read_status as read_status
    from fedsea.federation.coordinator.up import Federation as Federation
    from fedsea.federation.coordinator.up_options import UpOptions as UpOptions
    from fedsea.federation.owner.join import OwnerProcess as OwnerProcess
    from fedsea.federation.owner.join import kept_running as kept_running
    from fedsea.federation.owner.participant_options import ParticipantOptions as ParticipantOptions
    from fedsea.federation.owner.private_adapter import read_private_adapter as read_private_adapter
    from fedsea.federation.owner.shards import Sharding as Sharding
    from fedsea.federation.owner.shards import read_shard as read_shard
    from fedsea.federation.settings import Settings as Settings

__all__, __getattr__ = lazy_face(
    __name__,
    {
        "coordinator.block_server_admin": ("BlockServerAdmin",),
        "coordinator.deployment": ("Deployment",),
        "coordinator.status": ("FederationStatus", "read_status"),
        "coordinator.up": ("Federation",),
        "coordinator.up_options": ("UpOptions",),
        "owner.join": ("OwnerProcess", "kept_running"),
        "owner.participant_options": ("ParticipantOptions",),
        "owner.private_adapter": ("read_private_adapter",),
        "owner.shards": ("Sharding", "read_shard"),
        "settings": ("Settings",),
    },
)
