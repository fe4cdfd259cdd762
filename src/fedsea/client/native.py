"""What transformers does to a whole model's weights and adapters, for a model of which the client holds a part.

Each method does what its name says on all three parts, or refuses in one line before anything is touched. Nothing that
looks like a whole checkpoint is written by a part.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import LoraConfig
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedsea.client.rounds import RoundMixin
from fedsea.errors import ModelMismatchError, UsageError
from fedsea.partition import LIFT, PROJECT
from fedsea.parts.adapters import AdapterSpec, adapter_parameters
from fedsea.parts.held import ANOTHER, NAME, NARROW_ON, TAKEN_OFF, Held, OneConfig, foreign_layers, take_off

NO_ADAPTER = "the model has no adapter; add one first: model.add_adapter(LoraConfig(...))"
# How transformers would lay out files; an adapter is one small file.
_LAYOUT = {"max_shard_size", "safe_serialization", "variant", "save_peft_format", "save_original_format"}


@cache
def known_as(kind: type, model_type: str) -> Any:
    """A model class under the name, and in the module, of transformers' own class for the whole model.

    By it Trainer shifts the labels for label smoothing, `pipeline` knows what a model is for, and PEFT notes in an
    adapter's configuration how to load the base model.
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    module = f"transformers.models.{model_type}.modeling_{model_type}"
    return type(kind)(name, (kind,), {"__module__": module, "__qualname__": name, "__doc__": kind.__doc__})


class NativeMixin(RoundMixin):
    """Saving and switching adapters, as transformers' models and PEFT have it. Uses `SplitModelForCausalLM`."""

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """The adapter's configuration under its name, as PEFT keeps it."""
        if self._lora is None:
            raise AttributeError("peft_config")
        return OneConfig({NAME: self._lora})

    @peft_config.setter
    def peft_config(self, configs: dict[str, LoraConfig]) -> None:
        """PEFT sets this once it has put an adapter on the client's layers (`peft.get_peft_model`): take it up."""
        if self._adapter is not None:
            return
        try:
            if list(configs) != [NAME]:
                raise UsageError(ANOTHER)
            if self.noise.width is not None:
                raise UsageError("PEFT keeps no narrow cut: use model.add_adapter(LoraConfig(...)), model.save_adapter")
            spec = AdapterSpec.from_config(configs[NAME], self.config, int(torch.randint(1 << 62, ())))
            self._begin_run(spec, None)
        except BaseException:
            take_off(self._module)
            raise
        self._peft_configs = configs
        for parameter in adapter_parameters(self._module).values():
            parameter.data = parameter.data.float()
        self._keep(spec, configs["default"])

    # What PEFT's layers ask of who answers for the whole adapter

    def refusal(self, why: str) -> UsageError:
        """Undo what PEFT has begun to do to the adapter's half that is here; what is to be raised."""
        take_off(self._module)
        if self._peft_configs is not None and self._lora is not None:
            self._peft_configs.clear()
            self._peft_configs[NAME] = self._lora
        return UsageError(why)

    def has_foreign_layers(self) -> bool:
        """Whether PEFT has put layers on the client's half that are not the adapter's."""
        return bool(foreign_layers(self._module))

    def switch(self, on: bool) -> None:
        """Compute with the adapter, or without it, on all parts. What a cache holds stays as it was computed."""
        if not on and self.noise.width is not None:
            raise self.refusal(NARROW_ON)
        self._adapter_on = on
        if not on:
            self.set_trainable(False)

    def set_trainable(self, trainable: bool) -> None:
        """Train or freeze the middle's half of the adapter, as the client's half is."""
        if self._run is not None:
            self.lora_middle.requires_grad_(trainable)

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        raise UsageError(
            "a split model holds a connection to its block server, so it cannot be copied or pickled; load it again "
            "with SplitModelForCausalLM.from_pretrained"
        )

    # transformers' own versions of these ask for releases of PEFT that the split does not need.

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """As transformers' models: use this adapter. There is one."""
        self._check_name(adapter_name)

    def enable_adapters(self) -> None:
        """As transformers' models: switch the adapter on again, on all parts."""
        self._switch_all(True)

    def disable_adapters(self) -> None:
        """As transformers' models: switch the adapter off, on all parts; what is computed then is the base model's.

        Raises
        ------
        UsageError
            If there is no adapter, or it has a narrow cut: nothing of the base model's fits through that.
        """
        self._switch_all(False)

    def _switch_all(self, on: bool) -> None:
        self._check_name(NAME)
        self.switch(on)
        for module in self._module.modules():
            if isinstance(module, Held):
                module.enable_adapters(on)

    def delete_adapter(self, adapter_names: str | list[str]) -> NoReturn:
        """Refused: the middle's half of the adapter would stay on.

        Raises
        ------
        UsageError
            Always.
        """
        raise UsageError(TAKEN_OFF)

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
            raise UsageError(ANOTHER)

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
