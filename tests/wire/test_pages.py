"""Named tensors go over the wire in pages: all of them, each once, and nothing that was not asked for."""

from collections.abc import Callable

import pytest
import torch

from fedsea.errors import ProtocolError
from fedsea.wire.codec import decode, encode
from fedsea.wire.frames import Command, Operation, Outcome, Reply, Tensors
from fedsea.wire.pages import page, read_pages, send_pages
from fedsea.wire.tensors import MAX_TENSORS

SOME = {f"n{number:05}": torch.tensor([float(number)]) for number in range(MAX_TENSORS + 5)}


class Server:
    """Has tensors; its frames are encoded and decoded on their way."""

    def __init__(self, tensors: dict[str, torch.Tensor], limit: int) -> None:
        self.tensors, self.limit, self.frames = tensors, limit, 0

    def call(self, make: Callable[[int], Operation]) -> Reply:
        self.frames += 1
        operation = decode(encode(make(self.frames)), knows=SOME.__contains__)
        if isinstance(operation, Tensors):
            self.tensors |= operation.tensors
            return Outcome(operation.number, {})
        assert isinstance(operation, Command)
        assert operation.body["do"] == "export"
        return page(self.tensors, operation.number, operation.body["after"], self.limit)


@pytest.mark.parametrize(("limit", "frames"), [(1 << 30, 2), (100 * 74, 42), (1, len(SOME))])
def test_all_tensors_go_there_and_back_in_pages(limit: int, frames: int) -> None:
    server = Server({}, limit)
    send_pages(server.call, SOME, limit)
    assert server.frames == frames
    assert server.tensors == SOME
    found = read_pages(server.call, {"do": "export"}, dict.fromkeys(SOME, (1,)), SOME)
    assert server.frames == 2 * frames
    assert found == SOME


def test_a_tensor_that_is_left_out_is_missed_where_it_is_needed() -> None:
    server = Server({"n00001": SOME["n00001"]}, 100)
    assert read_pages(server.call, {"do": "export"}, {"n00001": None, "n00002": None}).keys() == {"n00001"}
    with pytest.raises(ProtocolError, match="export lacks n00002"):
        read_pages(server.call, {"do": "export"}, {"n00001": None, "n00002": None}, ["n00002"])
