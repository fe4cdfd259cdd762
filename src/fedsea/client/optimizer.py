"""torch's optimizers and the handle of a run: a step of the one is a step of the middle's adapter as well."""

import gc
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fedsea.errors import UsageError

STATE = "middle"  # under which an optimizer's state_dict has the middle's part of it


class SteppedElsewhere(Protocol):
    """What has a handle among the parameters here: a `MiddleRun`, whose methods these are."""

    handle: nn.Parameter

    def before_step(self, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None: ...

    def state(self) -> dict[str, Tensor]: ...


_BY_HANDLE: "weakref.WeakValueDictionary[int, SteppedElsewhere]" = weakref.WeakValueDictionary()


def register_handle(run: SteppedElsewhere) -> None:
    """Have `run` hear of the steps of every optimizer that has its handle."""
    _BY_HANDLE[id(run.handle)] = run


def keep_state(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer's `state_dict` hold the middle's states as well, so that saving and loading it is enough."""
    if not getattr(optimizer, "_keeps_middle", False):
        optimizer.register_state_dict_post_hook(_add_middle)
        optimizer._keeps_middle = True  # type: ignore[attr-defined]


def all_finite(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all gradients of an optimizer are."""
    gradients = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and parameter.grad.numel()
    ]
    norms = torch.stack([norm.cpu() for norm in torch._foreach_norm(gradients)])
    return bool(torch.isfinite(norms).all())


def optimizers_of(handle: nn.Parameter) -> list[torch.optim.Optimizer]:
    """All optimizers of this process that have a parameter; takes long."""
    every = [one for one in gc.get_objects() if issubclass(type(one), torch.optim.Optimizer)]
    return [
        one
        for one in every
        if any(handle is own for group in getattr(one, "param_groups", ()) for own in group["params"])
    ]


def _run_of(parameter: nn.Parameter) -> SteppedElsewhere | None:
    run = _BY_HANDLE.get(id(parameter))
    return run if run is not None and run.handle is parameter else None


def _add_middle(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    for group, numbers in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, number in zip(group["params"], numbers["params"], strict=True):
            run, held = _run_of(parameter), saved["state"].get(number)
            # One that has not stepped has no states, and torch takes any that it has for all of them.
            if run is not None and held and STATE not in held:
                saved["state"][number] = {**held, STATE: run.state()}  # a new one: that saved is the optimizer's own


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for group in optimizer.param_groups:
        for run in filter(None, map(_run_of, group["params"])):
            if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
                raise UsageError("a split model's optimizer takes no closure; call loss.backward() before step()")
            run.before_step(optimizer, group)


register_optimizer_step_pre_hook(_before_step)
