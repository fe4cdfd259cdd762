"""The demonstration: one question through a split model, and what can be measured while it is answered.

Everything in a `DemoReport` was measured in the run that made it, but for `server_bytes`, which is computed.
"""

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import nn
from transformers.generation.streamers import BaseStreamer

from fedsea.chats import chat_tokens, require_chat_template
from fedsea.checkpoints import Checkpoint, load_whole_model, open_checkpoint
from fedsea.checkpoints.packaged import opening
from fedsea.client import connection
from fedsea.client.answer import Answer, AnswerStats, stop_ids
from fedsea.client.model import SplitModelForCausalLM
from fedsea.demo.audience import Audience
from fedsea.errors import ServerUnavailableError
from fedsea.partition import Partition
from fedsea.server.process import ServerProcess
from fedsea.wire import contract
from fedsea.wire.codec import decode, encode
from fedsea.wire.credentials import Credentials, open_channel
from fedsea.wire.frames import Frame, Result, Step

QUESTION = "In one or two sentences: why do leaves change colour in autumn?"
MAX_NEW_TOKENS = 64
UNCACHED_TOKENS = 4
HEALTH_SECONDS = 30.0


@dataclass(frozen=True)
class WireToken:
    """One token of the answer, and the two frames in which it crossed the wire.

    Attributes
    ----------
    text
        The token's text, which stays at the client.
    up, down
        The frames as they were sent and received.
    tensor_bytes
        How many bytes at the end of each are the hidden state.
    """

    text: str
    up: bytes
    down: bytes
    tensor_bytes: int

    def first_bytes(self, frame: bytes) -> bytes:
        """The bytes of the hidden state's first four numbers."""
        return frame[-self.tensor_bytes :][:8]

    def first_numbers(self, frame: bytes) -> tuple[float, ...]:
        """The hidden state's first four numbers."""
        return struct.unpack("<4e", self.first_bytes(frame))


@dataclass(frozen=True)
class DemoReport:
    """What the demonstration has measured.

    Attributes
    ----------
    client_bytes, server_bytes, whole_bytes
        Weights here, at the server (as it says), and of the whole model.
    stats
        What the answer through the split has cost.
    wire_token
        One token as it crossed the wire.
    tokens, whole_tokens
        The answer through the split, and transformers' answer with the whole model in one process.
    whole_tokens_per_second
        Speed of the latter, after its first token.
    uncached_context, uncached_tokens_per_second
        Speed through the split without a KV cache, and at how many tokens of context.
    """

    model: str
    question: str
    answer: str
    num_layers: int
    partition: Partition
    server_layers: range
    client_bytes: int
    server_bytes: int
    whole_bytes: int
    stats: AnswerStats
    wire_token: WireToken
    tokens: list[int]
    whole_tokens: list[int]
    whole_tokens_per_second: float
    uncached_context: int
    uncached_tokens_per_second: float

    @property
    def equal(self) -> bool:
        """Whether both answers are the same, token for token."""
        return self.tokens == self.whole_tokens


def run_demo(name: str, audience: Audience, *, threads: int) -> DemoReport:
    """Ask one question through a split model: this process the client, another one the server, mutual TLS between.

    Parameters
    ----------
    name
        A chat model, as `open_checkpoint` takes it.
    audience
        Told what happens while it happens.
    threads
        CPU threads of either process.

    Raises
    ------
    FedSEAError
        If the model cannot be used, or the server does not start. Nothing is left running.
    """
    torch.set_num_threads(threads)
    partition = Partition(input_layers=1, output_layers=1)
    with audience.step(opening(name)):
        checkpoint = open_checkpoint(name)
        tokenizer = checkpoint.tokenizer()
        require_chat_template(tokenizer)
    middle = partition.middle(checkpoint.config.num_hidden_layers)
    options = ("--layers", f"{middle.start}:{middle.stop}")
    with audience.step("Making certificates, starting the block server as a process of its own"):
        server = ServerProcess(name, threads=threads, secure=True, options=options)
    with server:
        credentials = Credentials.load(server.connection["credentials"], role="client")
        with audience.step("Asking its health service"):
            await_serving(server.address, credentials)
        with audience.step("Loading the client's part, meeting the server over mutual TLS"):
            model = SplitModelForCausalLM.from_pretrained(
                checkpoint, server=server.address, credentials=credentials, partition=partition
            )
        with model:
            return _measure(name, checkpoint, tokenizer, model, server.ready, audience)


def _measure(
    name: str,
    checkpoint: Checkpoint,
    tokenizer: Any,
    model: SplitModelForCausalLM,
    server: dict[str, Any],
    audience: Audience,
) -> DemoReport:
    prompt = chat_tokens(tokenizer, [{"role": "user", "content": QUESTION}])
    answer = Answer(model, tokenizer, prompt, cache=model.new_cache(), max_new_tokens=MAX_NEW_TOKENS)
    audience.ask(QUESTION)
    with frames_kept() as frames:
        for piece in answer:
            audience.piece(piece)
    with audience.step("Without the KV cache: sending the whole text again for every token"):
        context = [*prompt, *answer.tokens]
        uncached = _uncached_speed(model, context)
    with audience.step("For comparison: loading the whole model into one process, asking it the same"):
        whole = load_whole_model(name)
        whole_tokens, whole_speed = _whole_answer(whole, prompt, stop_ids(model, tokenizer))
    return DemoReport(
        model=name,
        question=QUESTION,
        answer=answer.text,
        num_layers=checkpoint.config.num_hidden_layers,
        partition=model.partition,
        server_layers=range(*server["layers"]),
        client_bytes=_bytes(model),
        server_bytes=server["weight_bytes"],
        whole_bytes=_bytes(whole),
        stats=answer.stats,
        wire_token=_choose_token(tokenizer, answer.tokens, frames),
        tokens=answer.tokens,
        whole_tokens=whole_tokens,
        whole_tokens_per_second=whole_speed,
        uncached_context=len(context),
        uncached_tokens_per_second=uncached,
    )


def await_serving(address: str, credentials: Credentials) -> None:
    """Wait until the block server's gRPC health service says SERVING.

    Raises
    ------
    ServerUnavailableError
        If it says anything else, or nothing in time.
    """
    with open_channel(address, credentials) as channel:
        request = health_pb2.HealthCheckRequest(service=contract.SERVICE)
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=HEALTH_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            raise ServerUnavailableError(f"the block server's health service does not answer: {error.code()}") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise ServerUnavailableError("the block server says that it does not serve")


@contextmanager
def frames_kept() -> Iterator[list[tuple[Frame, bytes]]]:
    """Within the block, keep a copy of every STEP that leaves and every RESULT that comes, in the order of the wire."""
    kept: list[tuple[Frame, bytes]] = []

    def keep_sent(frame: Frame) -> bytes:
        data = encode(frame)
        if isinstance(frame, Step):
            kept.append((frame, data))
        return data

    def keep_received(data: bytes, **limits: Any) -> Frame:
        frame = decode(data, **limits)
        if isinstance(frame, Result):
            kept.append((frame, data))
        return frame

    # A connection offers no place to listen in, for good reason; the demonstration takes over its two calls.
    hooked: Any = connection
    hooked.encode, hooked.decode = keep_sent, keep_received
    try:
        yield kept
    finally:
        hooked.encode, hooked.decode = encode, decode


def _choose_token(tokenizer: Any, tokens: list[int], frames: list[tuple[Frame, bytes]]) -> WireToken:
    """A token of the answer that is a word, with its frames. The prompt has the first two, the last token has none."""
    texts = [tokenizer.decode([token]) for token in tokens[:-1]]
    place = max(range(len(texts)), key=lambda index: (len(texts[index].strip()), -index))
    (step, up), (_result, down) = frames[2 * place + 2 : 2 * place + 4]
    assert isinstance(step, Step)
    return WireToken(texts[place], up, down, step.states.shape[1] * step.states.element_size())


def _uncached_speed(model: SplitModelForCausalLM, context: list[int]) -> float:
    """Tokens/s if each token is computed from the whole text."""
    ids = torch.tensor([context], device=model.device)
    return 1 / median(_seconds(lambda: model(ids, use_cache=False, logits_to_keep=1)) for _ in range(UNCACHED_TOKENS))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class _Clock(BaseStreamer):
    """Notes when `generate` gives something out: the prompt, then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _whole_answer(whole: Any, prompt: list[int], ends: frozenset[int]) -> tuple[list[int], float]:
    """What transformers' own `generate` answers with the whole model, and its tokens/s after the first token."""
    clock = _Clock()
    ids = torch.tensor([prompt])
    text = whole.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
        streamer=clock,
    )
    tokens: list[int] = text[0, len(prompt) :].tolist()
    first, last = clock.times[1], clock.times[-1]
    return tokens, (len(tokens) - 1) / (last - first)


def _bytes(part: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in part.parameters())
