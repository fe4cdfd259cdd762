"""The adapter of a split model: LoRA in the input and output blocks here, and the handle of the middle's."""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from fedsea.client.loss_scale import LossScale
from fedsea.client.middle import RemoteMiddle
from fedsea.client.protection import Protection
from fedsea.client.run import MiddleRun
from fedsea.client.state_dict import HANDLE, register_state_hooks
from fedsea.errors import ModelMismatchError, UsageError
from fedsea.partition import LIFT, PROJECT, Partition, in_middle
from fedsea.parts import AdapterSpec, InputBlocks, OutputBlocks, adapter_parameters, misfit
from fedsea.parts.adapter_files import read_adapter, save_adapter, write_card
from fedsea.parts.cut_files import CutRecord, read_cut
from fedsea.parts.held import ANOTHER, NAME, NARROW_ON, Held, foreign_layers, hold, take_off
from fedsea.wire.rounds import Ticket

NO_ADAPTER = "the model has no adapter; add one first: model.add_adapter(LoraConfig(...))"


class TrainedAdapter:
    """The one adapter that a split model may have, on all three parts; `spec` and `lora` are None while there is none.

    `model` holds this object, not the other way round.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: tuple[InputBlocks, OutputBlocks],
        partition: Partition,
        middle: RemoteMiddle | None,
        protection: Protection,
    ) -> None:
        self._model, self._parts, self._partition = weakref.ref(model), parts, partition
        self._middle, self._protection = middle, protection
        self.config = parts[0].config
        self.spec: AdapterSpec | None = None
        self.lora: LoraConfig | None = None
        self.on = True
        self._known: tuple[AdapterSpec, dict[str, tuple[int, ...]]] | None = None
        self._peft_configs: dict[str, LoraConfig] | None = None  # PEFT's own, where it has put the adapter on
        register_state_hooks(model)

    @property
    def _module(self) -> Any:
        model = self._model()
        assert model is not None, "the adapter is used without its model"
        return model

    @property
    def _middle_layers(self) -> range:
        return self._partition.middle(self.config.num_hidden_layers)

    @property
    def run(self) -> MiddleRun | None:
        """Its training at the server; None while there is none."""
        return self._middle.run if self._middle is not None else None

    @property
    def local(self) -> dict[str, nn.Parameter]:
        """The weights in the input and output blocks, by their names in the whole model."""
        return adapter_parameters(self._module)

    @property
    def trains(self) -> bool:
        """Whether a forward pass now is one whose loss may be backpropagated."""
        if not torch.is_grad_enabled() or self.spec is None or not self.on:
            return False
        if self.run is not None and self.run.handle.requires_grad:
            return True
        return any(parameter.requires_grad for parameter in self.local.values())

    def require_name(self, name: str | Sequence[str]) -> None:
        """Refuse another name than the one adapter's, and any where there is none."""
        if self.spec is None:
            raise UsageError(NO_ADAPTER)
        if name not in (NAME, [NAME]):
            raise UsageError(ANOTHER)

    # Putting it on

    def add(self, lora: LoraConfig, run: str | None, *, take_up: bool, seed: int | None) -> None:
        """Put a new one on all three parts, as `SplitModelForCausalLM.add_adapter` says."""
        drawn = int(torch.randint(1 << 62, ())) if seed is None else seed
        spec = replace(AdapterSpec.from_config(lora, self.config, drawn), narrow=self._protection.noise.width or 0)
        self._begin_run(spec, run, take_up=take_up)  # first: what the server refuses leaves the model as it was
        self._put_on(spec, lora)

    def load(self, folder: str | Path, run: str | None, *, trainable: bool) -> None:
        """Take up a PEFT adapter, as `SplitModelForCausalLM.load_adapter` says."""
        lora, weights = read_adapter(folder)
        cut = self._read_cut(folder)
        narrow = cut[0].rank if cut is not None else 0
        spec = replace(AdapterSpec.from_config(lora, self.config, fresh=False), narrow=narrow)
        if self.spec is None:
            # Before anything changes.
            shapes = {name: shape for name, shape in self._shapes(spec).items() if name not in (PROJECT, LIFT)}
            found = {name: weight for name, weight in weights.items() if name not in (PROJECT, LIFT)}
            _check_fits(shapes, found, f"the adapter in {folder}")
            _check_finite(weights)
            if cut is not None and self._middle is not None:
                self._middle.settings.notice(self._protection.take_up(*cut, folder))
            self._begin_run(spec, run)
            self._put_on(spec, lora)
        elif (different := spec.difference(self.spec)) is not None:
            raise ModelMismatchError(f"the adapter in {folder} does not fit the model's: {different}")
        self.set_state(weights)
        for parameter in self.local.values():
            parameter.requires_grad_(trainable)
        self.set_trainable(trainable)

    def _read_cut(self, folder: str | Path) -> tuple[CutRecord, dict[str, Tensor]] | None:
        """The narrow cut beside an adapter, if there is one; refuses one that the model cannot have."""
        found = read_cut(folder)
        if found is None and self._protection.noise.width is not None:
            raise UsageError(
                f"the adapter in {folder} was trained without a narrow cut; leave narrow-cut out of the mechanism, or "
                "fine-tune with it first"
            )
        if found is not None:
            if self._middle is None:
                raise UsageError(f"the adapter in {folder} has a narrow cut, and without middle blocks there is no cut")
            found[0].check_place(self._partition.input_layers, folder)
        return found

    def take_over(self, configs: dict[str, LoraConfig]) -> None:
        """PEFT has put an adapter on the client's layers (`peft.get_peft_model`): have it on the middle's as well."""
        if self.spec is not None:
            return
        try:
            if list(configs) != [NAME]:
                raise UsageError(ANOTHER)
            if self._protection.noise.width is not None:
                raise UsageError("PEFT keeps no narrow cut: use model.add_adapter(LoraConfig(...)), model.save_adapter")
            spec = AdapterSpec.from_config(configs[NAME], self.config, int(torch.randint(1 << 62, ())))
            self._begin_run(spec, None)
        except BaseException:
            take_off(self._module)
            raise
        self._peft_configs = configs
        for parameter in self.local.values():
            parameter.data = parameter.data.float()
        self._keep(spec, configs[NAME])

    def _put_on(self, spec: AdapterSpec, lora: LoraConfig) -> None:
        self.spec = spec  # or else PEFT's own notice of what is put on would come here again
        spec.put_on(self._module, [*self._parts[0].layers, *self._parts[1].layers])
        self._keep(spec, lora)

    def _keep(self, spec: AdapterSpec, lora: LoraConfig) -> None:
        module = self._module
        self.spec, self.lora = spec, lora
        module._hf_peft_config_loaded = True
        hold(module, spec.within(self._middle_layers), self)
        run = self.run
        if run is None:
            return
        run.handle.requires_grad_(True)
        module.narrow_cut.requires_grad_(True)
        input_blocks, output_blocks = (part.follow(module.backbone, module.base_model_prefix) for part in self._parts)
        run.local = {
            "output blocks": adapter_parameters(output_blocks),
            "input blocks": adapter_parameters(input_blocks),
        }
        if run.scale is not None:
            scale = run.scale
            for parameter in self.local.values():
                parameter.register_hook(lambda gradient: gradient * 2.0**-scale.exponent)

    def _begin_run(
        self, spec: AdapterSpec, name: str | None, *, take_up: bool = False, token: str | None = None
    ) -> None:
        if self._middle is None:
            return
        before, middle, dtype = self.run, self._middle_layers, self._module.dtype
        scale = before.scale if before is not None else None
        make = partial(
            MiddleRun,
            handle=self._module.get_parameter(HANDLE),
            scale=LossScale() if scale is None and dtype is torch.float16 else scale,
            context=f"noise: {self._protection.noise!r}; dtype: {str(dtype).removeprefix('torch.')}",
            weights=lambda: {name: shape for name, shape in self._shapes(spec).items() if in_middle(name, middle)},
            local=before.local if before is not None else {},
        )
        is_new = self._middle.begin_run(spec, name, make, take_up=take_up, token=token)
        self._middle.use_adapter(self.on)
        if spec.narrow and is_new and self.run is not None:
            # Until it is trained, the lift undoes what it can of the projection, whose rows are orthonormal.
            self.run.load({LIFT: adapter_parameters(self._parts[0])[PROJECT].T})

    def _shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all weights of such an adapter; worked out once."""
        if self._known is None or self._known[0] != spec:
            hidden = self.config.hidden_size
            cut = {PROJECT: (spec.narrow, hidden), LIFT: (hidden, spec.narrow)} if spec.narrow else {}
            self._known = spec, spec.shapes_in(self.config, range(self.config.num_hidden_layers)) | cut
        return self._known[1]

    # Its weights

    def state(self) -> dict[str, Tensor]:
        """All of its weights, float32, by their names in the whole model; the middle's come from the server."""
        if self.spec is None:
            raise UsageError(NO_ADAPTER)
        return dict(sorted({**self.middle_state(), **self.local_state()}.items()))

    def middle_state(self) -> dict[str, Tensor]:
        return self.run.export()[0] if self.run is not None else {}

    def local_state(self) -> dict[str, Tensor]:
        """The weights in the input and output blocks, float32, by their names in the whole model."""
        return {name: weight.detach().float().cpu().clone() for name, weight in self.local.items()}

    def set_state(self, weights: Mapping[str, Tensor]) -> None:
        """Set all weights, named as `state` names them. ModelMismatchError, and nothing is set, if they do not fit."""
        _check_fits(self._shapes(self.spec) if self.spec is not None else {}, weights)
        _check_finite(weights)
        if self.run is not None:
            self.run.load({name: one for name, one in weights.items() if in_middle(name, self._middle_layers)})
        self.set_local(weights)

    @torch.no_grad()
    def set_local(self, weights: Mapping[str, Tensor]) -> None:
        """Set the weights in the input and output blocks; those of the middle's layers are not looked at."""
        local = self.local
        shapes = {name: tuple(parameter.shape) for name, parameter in local.items()}
        _check_fits(shapes, {name: weight for name, weight in weights.items() if name in local})
        for name, parameter in local.items():
            parameter.copy_(weights[name])

    def chosen_state(self, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """All weights, taken from a state that has the names of the model's `state_dict()`; None for its own."""
        if state is None:
            return self.state()
        weights = {
            name.replace(f".{NAME}.", "."): weight
            for name, weight in state.items()
            if ".lora_" in name or name in (PROJECT, LIFT)
        }
        _check_fits(self._shapes(self.spec) if self.spec is not None else {}, weights, "the state to save")
        return weights

    def save(self, folder: str | Path, weights: Mapping[str, Tensor]) -> None:
        """Write these weights as a PEFT adapter of the whole model, with a card, and a narrow cut beside it."""
        assert self.lora is not None
        cut, base = self.cut_record(), self.config.name_or_path or None
        save_adapter(folder, self.lora, weights, base, cut)
        kept = f"{self._partition.input_layers} input and {self._partition.output_layers} output layers at the client"
        write_card(folder, self.lora, base, kept, has_cut=cut is not None)

    def cut_record(self) -> CutRecord | None:
        """What is saved of the narrow cut beside its weights; None if the adapter has none."""
        if self.spec is None or not self.spec.narrow:
            return None
        return CutRecord(self.spec.narrow, self._partition.input_layers, str(self._protection.noise))

    # Its training

    def training_state(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All that training has changed: the whole adapter, and the optimizer's states for it (`exp_avg/NAME`, ...)."""
        middle, states = self.run.export() if self.run is not None else ({}, {})
        adapter = middle | self.local_state()
        for name, weight in self.local.items():
            for kind, state in optimizer.state.get(weight, {}).items():
                states[f"{kind}/{name}"] = torch.as_tensor(state).detach().cpu().float().clone()
        return dict(sorted(adapter.items())), dict(sorted(states.items()))

    def set_training_state(
        self, optimizer: torch.optim.Optimizer, adapter: Mapping[str, Tensor], states: Mapping[str, Tensor], step: int
    ) -> None:
        """Go back to what `training_state` gave after `step` optimizer steps, here and at the server.

        Gradients and the optimizer's other states are forgotten. Of another adapter nothing is set: ModelMismatchError.
        """
        run, middle = self.run, self._middle_layers
        self.set_state(adapter)
        self._forget_gradients()
        optimizer.state.clear()
        if run is not None:
            run.set_version(step, clear=True)
            run.load({}, {name: state for name, state in states.items() if in_middle(name.partition("/")[2], middle)})
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        local = self.local
        for full, state in states.items():
            kind, _, name = full.partition("/")
            if name in local and id(local[name]) in stepped:
                optimizer.state[local[name]][kind] = state.clone() if kind == "step" else state.to(local[name])
            if run is not None and id(run.handle) in stepped:
                # What stands for the middle's adapter has made the same steps.
                optimizer.state[run.handle][kind] = state.clone() if kind == "step" else torch.zeros_like(run.handle)

    @property
    def loss_scale(self) -> list[int] | None:
        """How a float16 model's loss is scaled in training (`LossScale.state`); None for other dtypes."""
        return self.run.scale.state() if self.run is not None and self.run.scale is not None else None

    @loss_scale.setter
    def loss_scale(self, state: Sequence[int] | None) -> None:
        """Go on with the loss scale of a checkpoint; None for that of a training's start."""
        if self.run is not None and self.run.scale is not None:
            self.run.scale.set(state)

    def end_run(self) -> None:
        """The training is over: closing the model ends its run at the server."""
        if self._middle is not None:
            self._middle.keep_run = False

    def begin_run_again(self) -> None:
        """Begin the run anew at a server that has lost it; its adapter is at its start, until it is set."""
        if self.run is not None and self._middle is not None and self.spec is not None:
            name, keep = self.run.channel.name, self._middle.keep_run
            self.run.channel.close(end=False)
            self._begin_run(self.spec, name, take_up=True)
            self._middle.keep_run = keep

    def _forget_gradients(self) -> None:
        for parameter in self._module.parameters():
            parameter.grad = None

    # A federated round

    def join_round(self, ticket: Ticket, lora: LoraConfig) -> None:
        """Take a seat in a federated round: train the adapter of the round's middle blocks with the others.

        Puts the adapter on if the model has none. The middle's weights are the round's; A's and C's are for `set_local`
        to set. An optimizer of an earlier round is of no use afterwards. The ticket's block server may be another one
        than before; RefusedTicketError, StragglerError or ModelMismatchError say why it does not admit this client.
        """
        if self._protection.noise.width is not None:
            raise UsageError("federated rounds train no narrow cuts; load the model with another mechanism")
        spec = self.spec if self.lora == lora else None
        if spec is None:
            spec = AdapterSpec.from_config(lora, self.config)
        if self.spec is not None and (different := spec.difference(self.spec)) is not None:
            raise UsageError(f"the model has another adapter: the round's has {different}; load the model again")
        if self._middle is None:
            raise UsageError("with no middle blocks there is nothing to train at a block server")
        if ticket.server != self._middle.endpoint.address:
            self._middle.move_to(ticket.server)
        if self.run is not None:
            self.run.channel.close(end=False)
        self._begin_run(spec, ticket.run, token=ticket.token)
        self._forget_gradients()  # of a round that broke off between forward and backward pass, say
        if self.spec is None:
            self._put_on(spec, lora)
        self.set_trainable(True)

    def finish_round(self) -> None:
        """The local steps are done, and others need not wait; raises what went wrong with the last steps."""
        if self.run is not None:
            self.run.finish()

    def leave_round(self) -> None:
        """Give the seat up, after an error say; the others need not wait. Raises nothing."""
        if self.run is not None:
            self.run.close(end=True)

    # What PEFT's layers ask of the one who answers for the whole adapter (`fedsea.parts.held.Holder`)

    def refusal(self, why: str) -> UsageError:
        """Undo what PEFT has begun to do to the adapter's half that is here; what is to be raised."""
        take_off(self._module)
        if self._peft_configs is not None and self.lora is not None:
            self._peft_configs.clear()
            self._peft_configs[NAME] = self.lora
        return UsageError(why)

    def has_foreign_layers(self) -> bool:
        """Whether PEFT has put layers on the client's half that are not the adapter's."""
        return bool(foreign_layers(self._module))

    def switch(self, on: bool) -> None:
        """Compute with the adapter, or without it, on all parts. What a cache holds stays as it was computed."""
        if not on and self._protection.noise.width is not None:
            raise self.refusal(NARROW_ON)
        self.on = on
        if self._middle is not None:
            self._middle.use_adapter(on)
        if not on:
            self.set_trainable(False)

    def switch_layers(self, on: bool) -> None:
        """`switch`, and PEFT's layers with it."""
        self.require_name(NAME)
        self.switch(on)
        for module in self._module.modules():
            if isinstance(module, Held):
                module.enable_adapters(on)

    def set_trainable(self, trainable: bool) -> None:
        """Train or freeze the middle's half of the adapter, as the client's half is."""
        if self.run is not None:
            self.run.handle.requires_grad_(trainable)


def _check_finite(weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise ModelMismatchError(f"the adapter cannot be used: {name} holds values that are not finite")


def _check_fits(
    shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], source: str = "the adapter"
) -> None:
    """Are the weights all there, of the right sizes, and no others?"""
    if wrong := misfit(weights, shapes):
        raise ModelMismatchError(f"{source} does not fit this model: {wrong}")
