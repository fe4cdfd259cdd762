"""Flower's SuperNode for data owners: `python -m fedsea.federation.flower.supernode ARGUMENTS…`, as `flower-supernode`.

A SuperNode runs the app that its SuperLink sends, beside the data. This one runs FedSEA's own, as it is installed here,
and answers to any other that it cannot be verified (Flower's way for apps that nobody vouches for). It also looks for
messages more often than every three seconds, and is missed sooner; and it answers processes of its own user only, where
Flower would hand tasks to whoever asks on this machine. On standard output it prints `{"connected": NODE}`
and `{"refused": WHY}`.
"""

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from fedsea.errors import UsageError
from fedsea.federation.flower.app import check_bundle, check_run
from fedsea.federation.flower.peers import OwnProcessesOnly

POLL_SECONDS = 0.5
HEARTBEAT_SECONDS = 10  # Flower's least; a SuperNode that died may come back after twice that, not after a minute
_NEEDED = ("_init_connection", "_verify_fab", "start_client_internal", "time")


def main() -> None:
    """Run the SuperNode."""
    node: Any = importlib.import_module("flwr.supernode.start_client_internal")
    command: Any = importlib.import_module("flwr.supernode.cli.flower_supernode")
    served: Any = importlib.import_module("flwr.supernode.main")
    if not all(hasattr(node, name) for name in _NEEDED) or not hasattr(command, "start_client_internal"):
        sys.exit("this version of Flower cannot be kept from running any app that comes; install flwr 1.41")
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(**body: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(body), file=out, flush=True)

    start, connect = command.start_client_internal, node._init_connection
    node._verify_fab = _verifier(tell)
    node._init_connection = _connector(connect, tell)
    node.time = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: time.sleep(min(seconds, POLL_SECONDS))})
    for name in ("flwr.supernode.fleet_http_connection", "flwr.supercore.heartbeat"):
        importlib.import_module(name).HEARTBEAT_DEFAULT_INTERVAL = HEARTBEAT_SECONDS  # type: ignore[attr-defined]
    # The interface for its own children is at a port that every account of this machine can reach.
    create = served.create_app
    served.create_app = lambda **options: _guarded(create(**options))
    # With trusted entities given, every app is verified before it is stored; who they are is not looked at here.
    command.start_client_internal = lambda **options: start(**options | {"trusted_entities": {"fedsea": ""}})
    command.flower_supernode()


def _guarded(app: Any) -> Any:
    app.add_middleware(OwnProcessesOnly)  # what is added last is asked first
    return app


def _verifier(tell: Callable[..., None]) -> Callable[[Any, Mapping[str, str]], bool]:
    def verify(fab: Any, _trusted: Mapping[str, str]) -> bool:
        try:
            check_bundle(fab.content)
        except UsageError as error:
            tell(refused=str(error))
            return False
        return True

    return verify


def _connector(connect: Callable[..., Any], tell: Callable[..., None]) -> Callable[..., Any]:
    @contextlib.contextmanager
    def connected(**options: Any) -> Iterator[tuple[Any, ...]]:
        with connect(**options) as parts:
            tell(connected=str(parts[0]))
            runs: dict[int, str] = {}
            changed = {_GET_RUN: _noting(parts[_GET_RUN], runs), _GET_FAB: _licensed(parts[_GET_FAB], runs, tell)}
            yield tuple(changed.get(at, part) for at, part in enumerate(parts))

    return connected


_GET_RUN, _GET_FAB = 3, 4  # of what `_init_connection` gives


def _noting(get_run: Callable[[int], Any], runs: dict[int, str]) -> Callable[[int], Any]:
    """Note of each run what Flower calls its task, before its app is asked for."""

    def noted(number: int) -> Any:
        run = get_run(number)
        runs[number] = run.primary_task_type
        return run

    return noted


def _licensed(
    get_fab: Callable[[str, int], Any], runs: Mapping[int, str], tell: Callable[..., None]
) -> Callable[[str, int], Any]:
    """Flower verifies what has a licence only; whether the app may run is decided by its run and its content."""

    def licensed(fab_hash: str, number: int) -> Any:
        fab = get_fab(fab_hash, number)
        try:
            check_run(runs.get(number, "run that nobody knows"))
        except UsageError as error:
            tell(refused=str(error))
            return replace(fab, verifications={})
        return replace(fab, verifications={"valid_license": "checked here"})

    return licensed


if __name__ == "__main__":
    main()
