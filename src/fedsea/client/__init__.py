"""The client: a model whose input and output blocks are here, and the connection to its middle.

`SplitModelForCausalLM` (model.py, pretrained.py) is a transformers model. One token's way through it:

    text -> SplitBackbone (backbone.py) -> input blocks -> Protection (protection.py) -> RemoteMiddle (middle.py)
         -> Session (session.py) -> ReconnectingStream (stream.py) -> Connection (connection.py) -> block server
         -> output blocks -> head -> next token

In training, `MiddleRun` (run.py) takes the session's place: the middle as a node of autograd's graph (graph.py), over a
`RunChannel` (channel.py); `TrainedAdapter` (adapter.py) has the adapter of all three parts.
"""

from typing import TYPE_CHECKING

from fedsea.lazy import lazy_face

if TYPE_CHECKING:
    from fedsea.client.answer import Answer as Answer
    from fedsea.client.answer import AnswerStats as AnswerStats
    from fedsea.client.cache import SplitCache as SplitCache
    from fedsea.client.connection import Connection as Connection
    from fedsea.client.connection import ConnectionLost as ConnectionLost
    from fedsea.client.connection import Endpoint as Endpoint
    from fedsea.client.connection import client_credentials as client_credentials
    from fedsea.client.conversation import Conversation as Conversation
    from fedsea.client.decode import stream_tokens as stream_tokens
    from fedsea.client.dtypes import wire_dtype_for as wire_dtype_for
    from fedsea.client.lookup import GUESSES as GUESSES
    from fedsea.client.middle import MICRO_BATCHES as MICRO_BATCHES
    from fedsea.client.model import SplitModelForCausalLM as SplitModelForCausalLM
    from fedsea.client.notice import IN_TRAINING as IN_TRAINING
    from fedsea.client.notice import LEARNT as LEARNT
    from fedsea.client.notice import SEE as SEE
    from fedsea.client.notice import leak_notice as leak_notice
    from fedsea.client.sampling import GREEDY as GREEDY
    from fedsea.client.sampling import Sampling as Sampling
    from fedsea.client.traffic import Traffic as Traffic

__all__, __getattr__ = lazy_face(
    __name__,
    {
        "answer": ("Answer", "AnswerStats"),
        "cache": ("SplitCache",),
        "connection": ("Connection", "ConnectionLost", "Endpoint", "client_credentials"),
        "conversation": ("Conversation",),
        "decode": ("stream_tokens",),
        "dtypes": ("wire_dtype_for",),
        "lookup": ("GUESSES",),
        "middle": ("MICRO_BATCHES",),
        "model": ("SplitModelForCausalLM",),
        "notice": ("IN_TRAINING", "LEARNT", "SEE", "leak_notice"),
        "sampling": ("GREEDY", "Sampling"),
        "traffic": ("Traffic",),
    },
)
