"""What a decode step costs in Python: calls of our own functions, at the client and at the server."""

import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import fedsea
from fedsea.client import stream_tokens
from tests.conftest import RunningServer, connect
from tests.support.raw_stream import prompt

SOURCE = str(Path(fedsea.__file__).parent)
MOST = 115  # 108, and what the server may still do for the step before; comprehensions are not counted


def calls_of_a_step(start_server: Callable[..., RunningServer]) -> Counter[str]:
    """By thread: of the sixth token, when all that is done once is done."""
    calls, counting = Counter[str](), threading.Event()

    def count(frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event == "call" and counting.is_set() and code.co_filename.startswith(SOURCE) and code.co_name[0] != "<":
            calls[threading.current_thread().name] += 1

    threading.setprofile(count)  # before the server's threads begin
    try:
        server = start_server()
        with connect(server, wire_dtype="float16") as model:
            tokens = stream_tokens(model, prompt(), cache=model.new_cache(), max_new_tokens=20)
            for _ in range(5):
                next(tokens)
            sys.setprofile(count)
            counting.set()
            next(tokens)
            counting.clear()
            sys.setprofile(None)
        server.stop()
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
        sys.setprofile(None)
    return calls


def test_a_decode_step_costs_few_calls_on_both_sides(start_server: Callable[..., RunningServer]) -> None:
    calls = calls_of_a_step(start_server)
    assert len(calls) == 3  # the client, the server's loop, its worker
    assert calls.total() <= MOST, calls
