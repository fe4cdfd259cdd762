"""What the topics of a bench share: settings, one block server, one whole model, prompts, and a console."""

import os
import platform
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor
from transformers import GenerationConfig

from fedsea.checkpoints import load_whole_model, open_checkpoint
from fedsea.client import SplitModelForCausalLM
from fedsea.errors import ModelNotFoundError
from fedsea.partition import Partition
from fedsea.server import ServerProcess

PARTITION = Partition(1, 1)
_Model = TypeVar("_Model")


@dataclass(frozen=True)
class Settings:
    model: str = "smollm2-135m"  # as `open_checkpoint` takes it
    quick: bool = False  # fewer repetitions and smaller cases
    threads: int = 2  # of each side: the whole model, the client, and the server
    plots: Path | None = None  # folder for drawings
    data: Path | None = None  # folder with a folder for each task, named as the task's title


class Workbench(AbstractContextManager["Workbench"]):
    """Sets up what several topics need once, when it is first needed; a context manager, which ends it."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self._things = ExitStack()
        self._servers: dict[tuple[str, ...], ServerProcess] = {}
        torch.set_num_threads(settings.threads)

    def __exit__(self, *_what: object) -> None:
        self._things.close()

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        with self.console.status(what):
            if not self.console.is_terminal:
                self.console.print(f"… {what}", style="dim", highlight=False)
            yield

    def serve(self, *options: str) -> ServerProcess:
        """The block server with some options of `fedsea serve`: one for the same options, of all layers, mutual TLS.

        A process of its own, which may still be starting.
        """
        if options not in self._servers:
            server = ServerProcess(self.settings.model, threads=self.settings.threads, options=options)
            self._servers[options] = self._things.enter_context(server)
        return self._servers[options]

    @property
    def server(self) -> ServerProcess:
        """The block server that computes in float32."""
        return self.serve()

    @cached_property
    def whole(self) -> Any:
        """The whole model in this process, as transformers loads it, float32."""
        with self.step(f"loading the whole of {self.settings.model}"):
            return endless(load_whole_model(self.settings.model, dtype=torch.float32, device="cpu"))

    @cached_property
    def split(self) -> SplitModelForCausalLM:
        """The split model at `server`, as users get it: partition (1, 1), 16 bits on the wire, no noise."""
        return self._things.enter_context(self.connect())

    def connect(self, **options: Any) -> SplitModelForCausalLM:
        """A split model with other options, for the caller to close; `server` among them, to go through a link."""
        server = self.server
        with self.step(f"waiting for the block server of {self.settings.model}"):
            options = {"partition": PARTITION, **server.connection, **options}
        with self.step(f"loading the client's parts of {self.settings.model}, {described(options['partition'])}"):
            return endless(SplitModelForCausalLM.from_pretrained(self.settings.model, **options))

    @cached_property
    def config(self) -> Any:
        return open_checkpoint(self.settings.model).config

    def encode(self, texts: Sequence[str], lengths: Sequence[int]) -> list[list[int]]:
        """Token ids of texts; for a model without a tokenizer drawn ones, of these lengths."""
        try:
            tokenizer = open_checkpoint(self.settings.model).tokenizer()
        except ModelNotFoundError:
            draw = random.Random(1)
            return [[draw.randrange(self.config.vocab_size) for _ in range(length)] for length in lengths]
        return [tokenizer(text)["input_ids"] for text in texts]

    def prompt(self, tokens: int, *, rows: int = 1) -> Tensor:
        """Token ids `[rows, tokens]` drawn from the vocabulary, the same in every run: for what no text changes."""
        return drawn_prompt(self.config.vocab_size, tokens, rows=rows)

    @property
    def place(self) -> str:
        """The machine's side of the conditions."""
        spin = os.environ.get("GOMP_SPINCOUNT", "default")
        return (
            f"{self.settings.model}, float32, {self.settings.threads} threads a process on {os.cpu_count()} "
            f"{platform.machine()} cores, GOMP_SPINCOUNT={spin}"
        )


def endless(model: _Model) -> _Model:
    """Make `generate` write as many tokens as `max_new_tokens` says: greedy, with no end-of-text token."""
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # type: ignore[attr-defined]
    return model


def drawn_prompt(vocabulary: int, tokens: int, *, rows: int = 1) -> Tensor:
    """Token ids `[rows, tokens]`, drawn evenly from the vocabulary with a fixed seed."""
    draw = random.Random(0)
    return torch.tensor([[draw.randrange(vocabulary) for _ in range(tokens)] for _ in range(rows)])


def described(partition: Partition) -> str:
    """A partition as people write it: (1, 1)."""
    return f"({partition.input_layers}, {partition.output_layers})"
