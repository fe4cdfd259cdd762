"""PEFT's layers on one part of a model, held so that an adapter changes on all parts or on none.

PEFT switches, merges, scales and takes off adapters layer by layer, on the layers that it finds in its process. On a
part that would leave half of an adapter. A held layer refuses before anything is touched, and passes on what can be
done.
"""

import weakref
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NoReturn, Protocol

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from fedsea.errors import UsageError

NAME = "default"  # of the one adapter
ANOTHER = "a split model has one adapter, named 'default'; load the model again for another one"
NARROW_ON = "an adapter with a narrow cut cannot be switched off; load the model a second time without it"
TAKEN_OFF = "a split model's adapter cannot be taken off; load the model a second time without it"
MERGED = "a split model's adapter cannot be merged; save it and merge it where the whole model is"
SCALED = "a split model's adapter cannot be scaled; set lora_alpha in its configuration"


class Holder(Protocol):
    """Who answers for the whole adapter."""

    def refusal(self, why: str) -> UsageError:
        """Undo what PEFT has begun; what is to be raised."""
        ...

    def has_foreign_layers(self) -> bool:
        """Whether PEFT has put layers on the part that are not the adapter's."""

    def switch(self, on: bool) -> None:
        """The adapter is switched on or off, everywhere; raises `refusal` if it cannot be."""

    def set_trainable(self, trainable: bool) -> None:
        """The client's half is trained or frozen from now on: so is the middle's."""


def _refusing(why: str) -> Callable[..., NoReturn]:
    """A method that refuses."""

    def refuse(self: "Held", *_args: Any, **_kwargs: Any) -> NoReturn:
        raise self._holder().refusal(why)

    return refuse


class Held:
    """Comes before one of PEFT's layer classes, and has its methods that change an adapter's state."""

    _holder: Any

    delete_adapter = _refusing(TAKEN_OFF)
    merge = unmerge = _refusing(MERGED)
    update_layer = _refusing(ANOTHER)
    set_scale = scale_layer = unscale_layer = _refusing(SCALED)
    scaling = property(lambda self: self.__dict__.get("scaling", {}), _refusing(SCALED))

    def unload_and_optionally_merge_module(self, merge: bool, *_args: Any, **_kwargs: Any) -> None:
        raise self._holder().refusal(MERGED if merge else TAKEN_OFF)

    def enable_adapters(self, enabled: bool) -> None:
        self._holder().switch(enabled)
        super().enable_adapters(enabled)  # type: ignore[misc]

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        if adapter_names not in (NAME, [NAME]) or self._holder().has_foreign_layers():
            raise self._holder().refusal(ANOTHER)
        super().set_adapter(adapter_names, *args, **kwargs)  # type: ignore[misc]
        self._holder().set_trainable(not (args[0] if args else kwargs.get("inference_mode", False)))

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)  # type: ignore[misc]
        self._holder().set_trainable(requires_grad)


class OneConfig(dict[str, LoraConfig]):
    """The adapter's configuration under its name, only to read: PEFT puts on another adapter by writing here first."""

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise UsageError(ANOTHER)

    __setitem__ = __delitem__ = update = setdefault = pop = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # a copy is a dictionary like any other


class RemoteModule(Held, nn.Module, LoraLayer):
    """Stands where a target module of another process would be: PEFT tells by modules what belongs to an adapter.

    It has PEFT's names and no weights.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_magnitude_vector")
    other_param_names = ()

    def __init__(self) -> None:
        nn.Module.__init__(self)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict({NAME: nn.Module()}))


@cache
def _held(kind: type) -> type:
    return type(kind.__name__, (Held, kind), {"__module__": kind.__module__})


def hold(module: nn.Module, remote: Iterable[str], holder: Holder) -> None:
    """Hold a part's adapter, and let modules of these names stand for what is in other processes."""
    for name in remote:
        here = module
        *path, last = name.split(".")
        for step in path:
            found = dict(here.named_children()).get(step)
            if found is None:
                found = nn.Module()
                here.add_module(step, found)
            here = found
        if last not in dict(here.named_children()):
            here.add_module(last, RemoteModule())
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, Held):
            layer.__class__ = _held(type(layer))
        if isinstance(layer, Held):
            layer._holder = weakref.ref(holder)


def foreign_layers(module: nn.Module) -> dict[str, nn.Module]:
    """PEFT's layers that are not held, by name."""
    kinds: Any = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    modules = module.named_modules()
    return {name: layer for name, layer in modules if isinstance(layer, kinds) and not isinstance(layer, Held)}


def take_off(module: nn.Module) -> None:
    """Put what PEFT has wrapped, and is not held, back in its place."""
    for name, layer in foreign_layers(module).items():
        path, _, last = name.rpartition(".")
        inside: Any = layer.original_module if isinstance(layer, AuxiliaryTrainingWrapper) else layer
        setattr(module.get_submodule(path), last, inside.get_base_layer() if hasattr(inside, "base_layer") else inside)
