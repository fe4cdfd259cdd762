"""The demonstration: one question through a split model, and what can be measured while it is answered.

Everything in a `DemoReport` was measured in the run that made it, but for `server_bytes`, which is computed.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import Tensor, nn

from fedsea.chats import chat_tokens, end_tokens
from fedsea.checkpoints import Checkpoint, load_whole_model
from fedsea.client import AnswerStats, SplitModelForCausalLM
from fedsea.demo.chat import ask, ask_whole, open_chat_model
from fedsea.demo.screen import Screen
from fedsea.errors import ServerUnavailableError
from fedsea.partition import Partition
from fedsea.parts import Rows
from fedsea.server import ServerProcess
from fedsea.wire import contract
from fedsea.wire.credentials import Credentials, open_channel

QUESTION = "In one or two sentences: why do leaves change colour in autumn?"
MAX_NEW_TOKENS = 64
UNCACHED_TOKENS = 4
HEALTH_SECONDS = 30.0


@dataclass(frozen=True)
class WireToken:
    """One token of the answer, whose text stays at the client, and what crossed the wire for it.

    `up` and `down` are the hidden states that were sent and received, as bytes of 16-bit numbers; the other two the
    sizes of the frames that they were in.
    """

    text: str
    up: bytes
    down: bytes
    up_bytes: int
    down_bytes: int


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


def run_demo(name: str, screen: Screen, *, threads: int) -> DemoReport:
    """Ask a chat model one question: this process is the client, another one the server, with mutual TLS between.

    Either process has `threads` CPU threads. FedSEAError if the model cannot be used, or the server does not start.
    """
    torch.set_num_threads(threads)
    partition = Partition(input_layers=1, output_layers=1)
    checkpoint, tokenizer = open_chat_model(name, screen)
    middle = partition.middle(checkpoint.config.num_hidden_layers)
    options = ("--layers", f"{middle.start}:{middle.stop}")
    with screen.step("Making certificates, starting the block server as a process of its own"):
        server = ServerProcess(name, threads=threads, secure=True, options=options)
    with server:
        credentials = Credentials.load(server.connection["credentials"], role="client")
        with screen.step("Asking its health service"):
            _await_serving(server.address, credentials)
        with screen.step("Loading the client's part, meeting the server over mutual TLS"):
            model = SplitModelForCausalLM.from_pretrained(
                checkpoint, server=server.address, credentials=credentials, partition=partition
            )
        with model:
            return _measure(name, checkpoint, tokenizer, model, server.ready, screen)


def _measure(
    name: str,
    checkpoint: Checkpoint,
    tokenizer: Any,
    model: SplitModelForCausalLM,
    server: dict[str, Any],
    screen: Screen,
) -> DemoReport:
    prompt = chat_tokens(tokenizer, [{"role": "user", "content": QUESTION}])
    with _steps_kept(model) as steps:
        answer = ask(model, tokenizer, QUESTION, prompt, MAX_NEW_TOKENS, screen)
    with screen.step("Without the KV cache: sending the whole text again for every token"):
        context = [*prompt, *answer.tokens]
        uncached = _uncached_speed(model, context)
    with screen.step("For comparison: loading the whole model into one process, asking it the same"):
        whole = load_whole_model(name)
        whole_tokens, whole_speed = _whole_answer(whole, prompt, end_tokens(model.generation_config, tokenizer))
    return DemoReport(
        model=name,
        question=QUESTION,
        answer=answer.text,
        num_layers=checkpoint.config.num_hidden_layers,
        server_layers=range(*server["layers"]),
        client_bytes=_bytes(model),
        server_bytes=server["weight_bytes"],
        whole_bytes=_bytes(whole),
        stats=answer.stats,
        wire_token=_choose_token(tokenizer, answer.tokens, steps),
        tokens=answer.tokens,
        whole_tokens=whole_tokens,
        whole_tokens_per_second=whole_speed,
        uncached_context=len(context),
        uncached_tokens_per_second=uncached,
    )


def _await_serving(address: str, credentials: Credentials) -> None:
    """Wait until the block server's gRPC health service says SERVING; else ServerUnavailableError."""
    with open_channel(address, credentials) as channel:
        request = health_pb2.HealthCheckRequest(service=contract.SERVICE)
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=HEALTH_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            raise ServerUnavailableError(f"the block server's health service does not answer: {error.code()}") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise ServerUnavailableError("the block server says that it does not serve")


@contextmanager
def _steps_kept(model: SplitModelForCausalLM) -> Iterator[list[tuple[bytes, bytes, int, int]]]:
    """Within the block, keep of each step the states that were sent and received, and the sizes of the frames."""
    kept: list[tuple[bytes, bytes, int, int]] = []
    up, down = model.traffic.bytes_up, model.traffic.bytes_down

    def keep(_rows: Rows, sent: Tensor, returned: Tensor) -> None:
        nonlocal up, down
        states = (one.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for one in (sent, returned))
        kept.append((*states, model.traffic.bytes_up - up, model.traffic.bytes_down - down))  # type: ignore[arg-type]
        up, down = model.traffic.bytes_up, model.traffic.bytes_down

    model.tap = keep
    try:
        yield kept
    finally:
        model.tap = None


def _choose_token(tokenizer: Any, tokens: list[int], steps: list[tuple[bytes, bytes, int, int]]) -> WireToken:
    """A token of the answer that is a word, with its step. The first step is the prompt's, the last token has none."""
    texts = [tokenizer.decode([token]) for token in tokens[:-1]]
    place = max(range(len(texts)), key=lambda index: (len(texts[index].strip()), -index))
    return WireToken(texts[place], *steps[place + 1])


def _uncached_speed(model: SplitModelForCausalLM, context: list[int]) -> float:
    """Tokens/s if each token is computed from the whole text."""
    ids = torch.tensor([context], device=model.device)
    return 1 / median(_seconds(lambda: model(ids, use_cache=False, logits_to_keep=1)) for _ in range(UNCACHED_TOKENS))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _whole_answer(whole: Any, prompt: list[int], ends: frozenset[int]) -> tuple[list[int], float]:
    """What the whole model answers, and its tokens/s after the first token."""
    ask_whole(whole, prompt, ends, 1)  # whatever is done once only
    first, began = _seconds(lambda: ask_whole(whole, prompt, ends, 1)), time.perf_counter()
    tokens = ask_whole(whole, prompt, ends, MAX_NEW_TOKENS)
    return tokens, (len(tokens) - 1) / (time.perf_counter() - began - first)


def _bytes(part: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in part.parameters())
