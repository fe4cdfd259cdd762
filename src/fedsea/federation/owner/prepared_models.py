"""Split models that stay loaded between rounds."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from fedsea.client import SplitModelForCausalLM
from fedsea.federation.owner.participant_options import ParticipantOptions
from fedsea.privacy import parse_mechanism

_SAME = ("partition", "credentials", "insecure", "dtype", "wire_dtype", "device")
NO_NOISE = "0"
PREPARED_MODELS = 2  # in one process; simulated clients that differ in partition or noise share a process


class PreparedModels:
    """At most `size` loaded split models, the least used given up first.

    A model is all but stateless between rounds, so simulated clients that would load the same one share it.
    """

    def __init__(self, size: int = PREPARED_MODELS) -> None:
        self._models: OrderedDict[tuple[Any, ...], SplitModelForCausalLM] = OrderedDict()
        self._size = size

    def __iter__(self) -> Iterator[SplitModelForCausalLM]:
        return iter(list(self._models.values()))

    def __len__(self) -> int:
        return len(self._models)

    def get(self, options: ParticipantOptions, server: str, lora: Mapping[str, Any]) -> SplitModelForCausalLM:
        """The model of these options, which may be used with another block server than before."""
        same = {name: getattr(options, name) for name in _SAME}
        key = (options.model, options.noise, *same.values(), repr(sorted(lora.items())))
        if key not in self._models:
            while len(self._models) >= self._size:
                self._models.popitem(last=False)[1].close()
            self._models[key] = SplitModelForCausalLM.from_pretrained(
                options.model,
                server=server,
                noise=parse_mechanism(options.noise or NO_NOISE),
                reconnect_seconds=options.reconnect_seconds,
                **same,
            )
        self._models.move_to_end(key)
        return self._models[key]

    def forget(self, model: SplitModelForCausalLM) -> None:
        """Give up a model that something has gone wrong with."""
        for key in [key for key, held in self._models.items() if held is model]:
            del self._models[key]
        model.close()

    def close(self) -> None:
        """Give up all."""
        while self._models:
            self._models.popitem()[1].close()
