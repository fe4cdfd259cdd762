"""Certificates and servers that the tests of the server share."""

from pathlib import Path

import pytest

from fedsea.wire.credential_files import create_credentials


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of credentials, of two clients beside the server and the coordinator."""
    folder = tmp_path_factory.mktemp("made")
    create_credentials(folder, clients=["client-a", "client-b"])
    return folder
