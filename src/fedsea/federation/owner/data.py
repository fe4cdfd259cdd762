"""A client's examples, read and tokenised once for each process; and what coordinator and clients compare of a task."""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from fedsea.checkpoints import open_checkpoint
from fedsea.checkpoints.configurations import PREFIX
from fedsea.errors import ModelNotFoundError
from fedsea.federation.owner.shards import Sharding, read_shard
from fedsea.tasks import Example, LabelTask, Split, Task, encode
from fedsea.training.examples import Encoded


class ByteTokenizer:
    """UTF-8 bytes as tokens: for the random models of tests and timing, which have no tokenizer."""

    chat_template = eos_token = pad_token_id = eos_token_id = None
    is_fast = False

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, tokens: Sequence[int], **_options: Any) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def batch_decode(self, rows: Sequence[Sequence[int]], **options: Any) -> list[str]:
        return [self.decode(row, **options) for row in rows]


@lru_cache(maxsize=4)
def tokenizer_of(model: str) -> Any:
    """A model's tokenizer; bytes for a random model. ModelNotFoundError if it has none."""
    checkpoint = open_checkpoint(model)
    try:
        return checkpoint.tokenizer()
    except ModelNotFoundError:
        if model.startswith(PREFIX) and checkpoint.config.vocab_size >= 256:
            return ByteTokenizer()
        raise


class Texts:
    """A client's examples of one task, tokenised by the model's tokenizer and cut to `max_tokens`.

    `path`, `sharding` and `client` are those of `read_shard`. UsageError if nothing to train on can be read.
    """

    def __init__(self, task: Task, path: str, sharding: Sharding | None, client: str, model: str, max_tokens: int):
        self.task, self.max_tokens, self._model = task, max_tokens, model
        self._where = (path, sharding, client)
        self.train: list[Encoded] = [self._encoded(example) for example in self._examples("train")]

    def validation(self, limit: int = 0) -> list[Example]:
        """The first examples of the validation split, `limit` of them; 0 for all. UsageError if there is none."""
        return self._examples("validation")[: limit or None]

    def _examples(self, split: Split) -> list[Example]:
        path, sharding, client = self._where
        return read_shard(self.task, path, sharding, client, split)

    def _encoded(self, example: Example) -> Encoded:
        return encode(self.task, example, tokenizer_of(self._model), self.max_tokens)


def task_schema(task: Task) -> str:
    """A digest of what clients of one federation must agree on: what a task asks for, its labels, its metrics."""
    compared = {
        "name": task.name,
        "needs": task.needs,
        "metrics": task.metrics,
        "cue": task.cue,
        "labels": dict(task.verbalisers) if isinstance(task, LabelTask) else None,
    }
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:16]
