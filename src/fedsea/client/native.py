"""What transformers does to a whole model's weights and adapters, for a model of which the client holds a part.

Each method does what its name says on all three parts, or refuses in one line before anything is touched. Nothing that
looks like a whole checkpoint is written by a part.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from fedsea.client.rounds import RoundMixin
from fedsea.errors import ModelMismatchError, UsageError
from fedsea.partition import LIFT, PROJECT

NAME = "default"  # of the one adapter
NO_ADAPTER = "the model has no adapter; add one first: model.add_adapter(LoraConfig(...))"
# How transformers would lay out files; an adapter is one small file.
_LAYOUT = {"max_shard_size", "safe_serialization", "variant", "save_peft_format", "save_original_format"}


class NativeMixin(RoundMixin):
    """Saving and switching adapters, as transformers' models and PEFT have it. Uses `SplitModelForCausalLM`."""

    # transformers' own versions of these ask for releases of PEFT that the split does not need.

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """As transformers' models: use this adapter. There is one, and it is always in use."""
        self._check_name(adapter_name)

    def enable_adapters(self) -> None:
        """As transformers' models. The adapter is always on."""
        self._check_name(NAME)

    def disable_adapters(self) -> NoReturn:
        """Refused: the middle's half of the adapter would stay on.

        Raises
        ------
        UsageError
            Always.
        """
        raise UsageError("a split model's adapter cannot be switched off; load the model a second time without it")

    def delete_adapter(self, adapter_names: str | list[str]) -> NoReturn:
        """Refused: the middle's half of the adapter would stay on.

        Raises
        ------
        UsageError
            Always.
        """
        raise UsageError("a split model's adapter cannot be taken off; load the model a second time without it")

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """As transformers' models: the whole adapter by its names in a PEFT file, without PEFT's prefix.

        Parameters
        ----------
        state_dict
            Where to take the weights from; None for the model's own.
        """
        self._check_name(adapter_name or NAME)
        return self._adapter_weights(state_dict)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As a transformers model with an adapter: write the adapter, of all three parts, as PEFT does.

        Parameters
        ----------
        save_directory
            Made if it is not there.
        is_main_process
            False writes nothing.
        state_dict
            Weights to write in place of the model's own, named as in its `state_dict()`.

        Raises
        ------
        UsageError
            If there is no adapter: the client holds a part of the model, and a part is no checkpoint. If an argument
            is not supported, or the folder cannot be written.
        ModelMismatchError
            If `state_dict` has not the adapter's weights.
        """
        self._check_savable()
        unsupported = sorted(kwargs.keys() - _LAYOUT - {"token"}) + ["push_to_hub"] * push_to_hub
        if unsupported:
            raise UsageError(f"a split model's save_pretrained does not take {', '.join(unsupported)}")
        if is_main_process:
            self._save_adapter(save_directory, self._adapter_weights(state_dict))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As a transformers model with an adapter: upload the adapter, of all three parts.

        Raises
        ------
        UsageError
            If there is no adapter. No repository is made then.
        """
        self._check_savable()
        return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]

    def _check_savable(self) -> None:
        if self._adapter is None:
            raise UsageError(
                "a client holds a part of the model, and a part is no checkpoint: there is nothing to save before an "
                "adapter is added or loaded (model.add_adapter, model.load_adapter)"
            )

    def _check_name(self, name: str | list[str]) -> None:
        if self._adapter is None:
            raise UsageError(NO_ADAPTER)
        if name not in (NAME, [NAME]):
            raise UsageError(f"a split model has one adapter, named {NAME!r}; there is none named {name!r}")

    def _adapter_weights(self, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The whole adapter, taken from a state that has the names of `state_dict()`; None for the model's own."""
        if state is None:
            return self.adapter_state()
        weights = {
            name.replace(f".{NAME}.", "."): weight
            for name, weight in state.items()
            if ".lora_" in name or name in (PROJECT, LIFT)
        }
        if different := weights.keys() ^ self.adapter_state().keys():
            raise ModelMismatchError(f"the state to save is not this model's: {min(different)} is on one side only")
        return weights
