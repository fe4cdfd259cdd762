"""Outputs that are kept: a model has a few sessions open, however many texts it may go on with."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from fedsea import GaussianNoise, SplitModelForCausalLM
from fedsea.client.places import OPEN_SESSIONS
from fedsea.errors import LimitExceededError, ProtocolError
from fedsea.server import Limits
from fedsea.wire.codec import decode
from fedsea.wire.frames import Kind, Step
from fedsea.wire.tensors import tensor_bytes
from tests.conftest import RunningServer, StartServer, connect
from tests.support.raw_stream import eventually, prompt
from tests.support.split_training import adapted, batches, train, whole_twin

EXACT = {"atol": 1e-4, "rtol": 0}
# One more may be on its way out, and one on its way in.
AT_MOST = OPEN_SESSIONS + 2


class Recorder:
    """The steps that clients have sent, by stream."""

    def __init__(self) -> None:
        self.streams: list[list[Step]] = []

    def __call__(self) -> Callable[[bool, bytes], None]:
        steps: list[Step] = []
        self.streams.append(steps)

        def keep(from_client: bool, data: bytes) -> None:
            if from_client and data[1] == Kind.STEP:
                frame = decode(bytes(data))
                assert isinstance(frame, Step)
                steps.append(frame)

        return keep


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def server(start_server: StartServer, recorder: Recorder) -> RunningServer:
    return start_server(tap=recorder, limits=Limits(client_sessions=AT_MOST))


@pytest.fixture
def model(server: RunningServer) -> Iterator[SplitModelForCausalLM]:
    with connect(server) as one, torch.no_grad():
        yield one


def keep(model: Any, count: int) -> list[Any]:
    """The outputs of so many texts."""
    return [model(prompt(tokens=6, seed=seed)) for seed in range(count)]


def assert_goes_on(model: Any, output: Any, seed: int, whole: Any) -> None:
    more = prompt(tokens=3, seed=1000 + seed)
    text = torch.cat([prompt(tokens=6, seed=seed), more], dim=1)
    logits = model(more, past_key_values=output.past_key_values).logits
    torch.testing.assert_close(logits, whole(text).logits[:, -3:], **EXACT)


def test_forty_outputs_are_kept_and_each_can_be_gone_on_from(
    server: RunningServer, model: SplitModelForCausalLM, whole_tiny: Any
) -> None:
    outputs = keep(model, 40)
    assert eventually(lambda: len(server.server.sessions) <= OPEN_SESSIONS)
    for seed, output in enumerate(outputs):
        torch.testing.assert_close(output.logits, whole_tiny(prompt(tokens=6, seed=seed)).logits, **EXACT)
    for seed in (0, 20, 39):
        assert_goes_on(model, outputs[seed], seed, whole_tiny)
    assert model.traffic.reconnections == 0


def test_a_server_with_fewer_places_than_the_model_would_take(serve: StartServer, whole_tiny: Any) -> None:
    small = serve(limits=Limits(client_sessions=2))
    with connect(small) as model, torch.no_grad():
        outputs = keep(model, 5)
        for seed in (0, 4, 2):
            assert_goes_on(model, outputs[seed], seed, whole_tiny)
        with pytest.raises(LimitExceededError, match=r"close one first \(cache.close\(\).*--max-client-sessions"):
            connect(small)


def test_what_beams_and_corrections_have_made_of_a_text_is_what_comes_back(
    model: SplitModelForCausalLM, whole_tiny: Any
) -> None:
    ids, more = prompt(rows=2, tokens=8), prompt(rows=2, tokens=4, seed=5)
    cache = model.new_cache()
    model(ids, past_key_values=cache)
    cache.crop(-2)
    keep_open = keep(model, OPEN_SESSIONS)
    cache.reorder_cache(torch.tensor([1, 0]))
    logits = model(more, past_key_values=cache).logits
    texts = torch.cat([ids[[1, 0], :6], more], dim=1)
    torch.testing.assert_close(logits, whole_tiny(texts).logits[:, -4:], **EXACT)
    assert len(keep_open) == OPEN_SESSIONS


def test_threads_that_share_a_model_do_not_take_each_others_session_away(
    server: RunningServer, model: SplitModelForCausalLM, whole_tiny: Any
) -> None:
    outputs = keep(model, 2 * OPEN_SESSIONS)

    def go_on(seed: int) -> None:
        with torch.no_grad():
            assert_goes_on(model, outputs[seed], seed, whole_tiny)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(go_on, [*range(len(outputs))][::-1]))
    assert eventually(lambda: len(server.server.sessions) <= OPEN_SESSIONS)


def test_noise_is_not_drawn_again_for_what_a_parked_session_had_sent(server: RunningServer, recorder: Recorder) -> None:
    with connect(server, noise=GaussianNoise(0.5)) as model, torch.no_grad():
        recorder.streams = []
        first = keep(model, OPEN_SESSIONS + 1)[0]
        model(prompt(tokens=3), past_key_values=first.past_key_values)
    [sent] = recorder.streams[0]
    again, new = recorder.streams[-1]
    assert not again.want_result
    assert (again.rows.starts, again.rows.counts) == ((0,), (6,))
    assert tensor_bytes(again.states) == tensor_bytes(sent.states)
    assert new.rows.starts == (6,)


def test_an_adapter_that_was_trained_since_is_not_mixed_with_what_it_was(server: RunningServer, tmp_path: Any) -> None:
    with adapted(server) as model:
        train(model, batches(2))
        whole = whole_twin(model, tmp_path).eval()
        model.eval()
        with torch.no_grad():
            outputs = keep(model, OPEN_SESSIONS + 2)
            assert_goes_on(model, outputs[0], 0, whole)
        model.train()
        train(model, batches(1))
        model.eval()
        with torch.no_grad():
            for output in (outputs[1], outputs[-1]):  # one that is parked, one that is not
                with pytest.raises(ProtocolError, match="was trained since this session's text began; begin it anew"):
                    model(prompt(tokens=3), past_key_values=output.past_key_values)
            keep(model, 1)
