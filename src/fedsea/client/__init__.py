"""The client: a model whose input and output blocks are here, and the connection to its middle.

`SplitModelForCausalLM` (model.py, pretrained.py) is a transformers model. One token's way through it:

    text -> SplitBackbone (backbone.py) -> input blocks -> Protection (protection.py) -> RemoteMiddle (middle.py)
         -> Session (session.py) -> ReconnectingStream (stream.py) -> Connection (connection.py) -> block server
         -> output blocks -> head -> next token

In training, `MiddleRun` (run.py) takes the session's place: the middle as a node of autograd's graph (graph.py), over a
`RunChannel` (channel.py); `TrainedAdapter` (adapter.py) has the adapter of all three parts.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsea.client.answer import Answer, AnswerStats, stop_ids
    from fedsea.client.cache import SplitCache
    from fedsea.client.connection import Connection, ConnectionLost, Endpoint, client_credentials
    from fedsea.client.conversation import Conversation
    from fedsea.client.decode import stream_tokens
    from fedsea.client.dtypes import wire_dtype_for
    from fedsea.client.lookup import GUESSES
    from fedsea.client.middle import MICRO_BATCHES
    from fedsea.client.model import SplitModelForCausalLM
    from fedsea.client.notice import IN_TRAINING, LEARNT, SEE, leak_notice
    from fedsea.client.sampling import GREEDY, Sampling
    from fedsea.client.traffic import Traffic

_HOMES = {
    "answer": ("Answer", "AnswerStats", "stop_ids"),
    "cache": ("SplitCache",),
    "connection": ("Connection", "ConnectionLost", "Endpoint", "client_credentials"),
    "conversation": ("Conversation",),
    "decode": ("stream_tokens",),
    "dtypes": ("wire_dtype_for",),
    "notice": ("IN_TRAINING", "LEARNT", "SEE", "leak_notice"),
    "lookup": ("GUESSES",),
    "middle": ("MICRO_BATCHES",),
    "model": ("SplitModelForCausalLM",),
    "sampling": ("GREEDY", "Sampling"),
    "traffic": ("Traffic",),
}
__all__ = [
    "GREEDY",
    "GUESSES",
    "IN_TRAINING",
    "LEARNT",
    "MICRO_BATCHES",
    "SEE",
    "Answer",
    "AnswerStats",
    "Connection",
    "ConnectionLost",
    "Conversation",
    "Endpoint",
    "Sampling",
    "SplitCache",
    "SplitModelForCausalLM",
    "Traffic",
    "client_credentials",
    "leak_notice",
    "stop_ids",
    "stream_tokens",
    "wire_dtype_for",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: how to sample is an option of commands, whose help needs no torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"fedsea.client.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
