"""The wire: what passes between clients and block servers, and how they find and trust each other.

    frames             what is sent: steps and results of sessions, operations and replies of runs
    codec              frames as bytes
    tensors            hidden states, gradients and named tensors as bytes; wire dtypes
    pages              more named tensors than a frame may have
    handshake          what OPEN and OPENED of a session say
    runs               the same of a run, and an optimizer step
    rounds             what coordinator, block server and clients say of a federated round
    contract           gRPC's methods, their options, and errors on their way
    address            HOST:PORT
    credentials        mutual TLS in use: one side's credentials, and channels
    credential_files   the folders that they lie in
    certificates       X.509; roles.py says who is who
    diagnose           why a server cannot be reached

docs/wire.md describes the protocol. Other rooms import these modules, each for itself: what the help of a command needs
(address, roles) imports neither torch nor grpc.
"""

__all__ = [
    "address",
    "certificates",
    "codec",
    "contract",
    "credential_files",
    "credentials",
    "diagnose",
    "frames",
    "handshake",
    "pages",
    "roles",
    "rounds",
    "runs",
    "tensors",
]
