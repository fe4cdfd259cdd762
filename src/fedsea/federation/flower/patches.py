"""Every private part of Flower 1.41 that FedSEA replaces, and the check of Flower's version.

superlink   a gate before its interfaces (`gate.py`): Flower has no place for middleware of others, and its server waits
            for silent connections for ever
supernode   runs FedSEA's own app as it is installed here, and answers to any other that it cannot be verified (Flower's
            way for apps without a trusted signature); polls for messages more often than every three seconds, and is
            missed sooner; answers processes of its own user only, where Flower hands tasks to all accounts of a machine
"""

import contextlib
import importlib
import importlib.metadata
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from fedsea.errors import UsageError
from fedsea.extras import install_line
from fedsea.federation.flower.app import check_bundle, check_run
from fedsea.federation.flower.gate import Gate, OwnProcessesOnly, patient_protocol

VERSION = "1.41"
CONNECTIONS = 4096  # of a SuperLink; more are answered that the service is unavailable
POLL_SECONDS = 0.5
HEARTBEAT_SECONDS = 10  # Flower's least; a SuperNode that died may come back after twice that, not after a minute
_GET_RUN, _GET_FAB = 3, 4  # of what `_init_connection` gives
Tell = Callable[..., None]


def require_flower() -> None:
    """Check that Flower is installed, in a version that this works with; UsageError if it is not."""
    try:
        version = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(f"a federation needs Flower: {install_line('flwr')}") from None
    if not version.startswith(f"{VERSION}."):
        raise UsageError(f"a federation needs Flower {VERSION}, not {version}: {install_line('flwr')}")


def _module(name: str, *needed: str) -> Any:
    """A module of Flower's that has the names to replace; the process ends if it has not."""
    module = importlib.import_module(name)
    for one in needed:
        if not hasattr(module, one):
            sys.exit(f"this version of Flower has no {name}.{one} to replace; install flwr {VERSION}")
    return module


def superlink() -> Callable[[], None]:
    """Flower's `flower-superlink`, with the gate."""
    import uvicorn
    from starlette.middleware import Middleware

    command = _module("flwr.superlink.cli.flower_superlink", "uvicorn", "flower_superlink")
    extensions = _module("flwr.superlink.extensions", "get_middleware")
    before = extensions.get_middleware
    extensions.get_middleware = lambda: (Middleware(Gate), *before())
    how: dict[str, Any] = {
        "http": patient_protocol(),
        "ws": "none",
        "proxy_headers": False,
        "limit_concurrency": CONNECTIONS,
        "access_log": False,  # a line for every poll for replies, day and night; what is refused is logged by the gate
    }
    command.uvicorn = SimpleNamespace(run=lambda **given: uvicorn.run(**(given | how)))
    run: Callable[[], None] = command.flower_superlink
    return run


def supernode(tell: Tell) -> Callable[[], None]:
    """Flower's `flower-supernode`, that runs one app only; `tell` gets `connected=NODE` and `refused=WHY`."""
    node = _module("flwr.supernode.start_client_internal", "_init_connection", "_verify_fab", "time")
    command = _module("flwr.supernode.cli.flower_supernode", "start_client_internal", "flower_supernode")
    served = _module("flwr.supernode.main", "create_app")
    node._verify_fab = verifier(tell)
    node._init_connection = connector(node._init_connection, tell)
    node.time = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: time.sleep(min(seconds, POLL_SECONDS))})
    for name in ("flwr.supernode.fleet_http_connection", "flwr.supercore.heartbeat"):
        _module(name, "HEARTBEAT_DEFAULT_INTERVAL").HEARTBEAT_DEFAULT_INTERVAL = HEARTBEAT_SECONDS
    # The interface for its own children is at a port that every account of this machine can reach.
    create, start = served.create_app, command.start_client_internal
    served.create_app = lambda **options: guarded(create(**options))
    # With trusted entities given, every app is verified before it is stored; who they are is not looked at here.
    command.start_client_internal = lambda **options: start(**options | {"trusted_entities": {"fedsea": ""}})
    run: Callable[[], None] = command.flower_supernode
    return run


def guarded(app: Any) -> Any:
    """A SuperNode's interface for its children, that answers no other account's processes."""
    app.add_middleware(OwnProcessesOnly)  # what is added last is called first
    return app


def verifier(tell: Tell) -> Callable[[Any, Mapping[str, str]], bool]:
    """In place of the check of an app's signatures: it must be this installation's own."""

    def verify(fab: Any, _trusted: Mapping[str, str]) -> bool:
        try:
            check_bundle(fab.content)
        except UsageError as error:
            tell(refused=str(error))
            return False
        return True

    return verify


def connector(connect: Callable[..., Any], tell: Tell) -> Callable[..., Any]:
    """In place of the connection to the SuperLink: it notes what each run is before the run's app is fetched."""

    @contextlib.contextmanager
    def connected(**options: Any) -> Iterator[tuple[Any, ...]]:
        with connect(**options) as parts:
            tell(connected=str(parts[0]))
            kinds: dict[int, str] = {}  # of runs: what Flower calls their task

            def get_run(number: int) -> Any:
                run = parts[_GET_RUN](number)
                kinds[number] = run.primary_task_type
                return run

            def get_fab(fab_hash: str, number: int) -> Any:
                # Flower verifies what has a licence only; whether the app may run is decided by its run and content.
                fab = parts[_GET_FAB](fab_hash, number)
                try:
                    check_run(kinds.get(number, "run of an unknown kind"))
                except UsageError as error:
                    tell(refused=str(error))
                    return replace(fab, verifications={})
                return replace(fab, verifications={"valid_license": "checked here"})

            changed = {_GET_RUN: get_run, _GET_FAB: get_fab}
            yield tuple(changed.get(at, part) for at, part in enumerate(parts))

    return connected
