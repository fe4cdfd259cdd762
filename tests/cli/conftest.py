"""What tests of commands share."""

import signal
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import RunningServer


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Commands that run in this process take over SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def small_server(small: str, start_server: Callable[..., RunningServer]) -> RunningServer:
    """A server of the small model, without TLS."""
    return start_server(small)


@pytest.fixture(scope="session")
def there(small_server: RunningServer) -> list[str]:
    """The options that connect to it."""
    return ["--server", small_server.address, "--insecure"]
