"""A client or a block server of version 1 of the protocol is told so in one line, as is the user at the other side.

The bytes and the refusal are recorded from FedSEA 0.2.0.
"""

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from fedsea import SplitModelForCausalLM
from fedsea.errors import ProtocolError
from fedsea.wire import contract
from tests.conftest import RunningServer
from tests.support.ports import grpc_serving
from tests.support.raw_stream import RawStream

SAYS = (
    "client and block server speak different versions of the protocol (1 and 2); "
    "install the same version of FedSEA on both sides"
)
SESSION = (
    b"\x01\x01\x00\x00\x00\x00\x00\x00?\x02\x00\x00\x00\x00\x00\x00"
    b'{"input_layers":1,"output_layers":1,"fingerprint":"{\\"config\\":\\"89bab5ee68636c161d5d8cd1651e4897\\",'
    b'\\"groups\\":{\\"embedding\\":\\"dc6497510d2e86f590005113afd6bd2c\\",\\"0\\":\\"ad07a528eaeb4384d181fb4584191'
    b'a51\\",\\"1\\":\\"e32a09f4852a03d5f2c3e1c56301259e\\",\\"2\\":\\"1f95058b2c2ce6495c4c2dec8c686e4b\\",\\"3\\":\\"'
    b'e57e49ed4f0bf4e4051eab85c486b4b7\\",\\"4\\":\\"e2943c2c6cb22c054dbde7db17540c52\\",\\"5\\":\\"e925ced890e45f'
    b'6ac6b5eaced8db3dfb\\",\\"norm\\":\\"948bc0bf36ce2cb0bcf156ac8d55f787\\",\\"head\\":\\"f655dcfe3c2c708c08ded0'
    b'aa47cae7e0\\"}}","wire_dtype":"float32","resume":null,"run":null,"narrow":0}'
)
COORDINATOR = b"\x01\x01\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00{}"
OPENED = (
    b"\x01\x02\x00\x00\x00\x00\x00\x00V\x00\x00\x00\x00\x00\x00\x00"
    b'{"session":"abcdefgh","step":0,"max_tokens":512,"frame_bytes":67108864,"layers":[1,5]}'
)
REFUSAL = "this side speaks version 1 of the protocol, the peer sent version 2"


@pytest.mark.parametrize(
    ("path", "opening"),
    [(contract.SESSION_PATH, SESSION), (contract.RUN_PATH, SESSION), (contract.COORDINATE_PATH, COORDINATOR)],
)
def test_a_client_of_version_1_is_told_and_so_is_the_servers_log(
    tiny_server: RunningServer, caplog: pytest.LogCaptureFixture, path: str, opening: bytes
) -> None:
    with RawStream(tiny_server.address, path=path) as stream:
        stream.send(opening)
        assert str(stream.refusal()) == SAYS
    assert [record.getMessage() for record in caplog.records if SAYS in record.getMessage()]


class OldServer(grpc.GenericRpcHandler):
    """Does with every stream what a server of version 1 does."""

    def __init__(self, answers: Callable[[Any], Iterator[bytes]]) -> None:
        self._answers = answers

    def service(self, _details: Any) -> Any:
        return grpc.stream_stream_rpc_method_handler(lambda _frames, context: self._answers(context))


def refuses(context: Any) -> Iterator[bytes]:
    context.set_trailing_metadata(((contract.ERROR_KEY, "protocol"),))
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, REFUSAL)
    yield b""


def answers(_context: Any) -> Iterator[bytes]:
    yield OPENED


@pytest.mark.parametrize("does", [refuses, answers])
def test_a_server_of_version_1_is_named_to_the_client(does: Callable[[Any], Iterator[bytes]]) -> None:
    with grpc_serving(OldServer(does)) as address, pytest.raises(ProtocolError) as refused:
        SplitModelForCausalLM.from_pretrained("random:tiny", server=address, insecure=True)
    assert str(refused.value) == SAYS
