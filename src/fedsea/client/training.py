"""Training through the split: the adapter on all three parts, its optimizer, saving and loading them.

`TrainingMixin` is the half of `SplitModelForCausalLM` that fine-tuning needs. Generation and evaluation do without.
"""

import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from fedsea.client.channel import RunChannel
from fedsea.client.connection import Endpoint
from fedsea.client.leak_notice import IN_TRAINING, leak_notice
from fedsea.client.narrow import NarrowMixin
from fedsea.client.origin import Origin
from fedsea.client.run import LossScale, MiddleRun, keep_state
from fedsea.client.session import SessionSettings
from fedsea.client.traffic import Traffic
from fedsea.errors import ModelMismatchError, UsageError
from fedsea.partition import LIFT, PROJECT, Partition, in_middle, layer_of
from fedsea.parts.adapter_files import read_adapter, save_adapter, write_card
from fedsea.parts.adapters import AdapterSpec, adapter_parameters
from fedsea.parts.held import ANOTHER, NAME, hold
from fedsea.wire.address import is_loopback, parse_address
from fedsea.wire.pages import ADAPTER
from fedsea.wire.runs import check_run_name

HANDLE = "lora_middle"
MICRO_BATCHES = 4  # where client and server compute on machines of their own


class TrainingMixin(NarrowMixin):
    """What `SplitModelForCausalLM` is trained with. Uses its attributes, and adds:

    Attributes
    ----------
    micro_batches
        Into how many micro-batches a training batch is split by its rows, so that client, link and server work at once.
        It changes the speed, not the result. 4, but 1 if the server is on this machine and shares its cores.
    lora_middle
        The parameter that stands for the middle's adapter (`fedsea.client.run`).
    """

    config: Any
    partition: Partition
    traffic: Traffic
    named_parameters: Callable[..., Any]
    parameters: Callable[..., Any]
    _endpoint: Endpoint | None
    _settings: SessionSettings

    def _prepare_training(self) -> None:
        self.micro_batches = MICRO_BATCHES
        if self._endpoint is not None and is_loopback(parse_address(self._endpoint.address)[0]):
            # One machine: the two would only take the cores from each other, and small batches compute slower.
            self.micro_batches = 1
        self.gradient_checkpointing = False
        self._run = None
        self._run_named = False
        self._adapter = None
        self._adapter_on = True
        self._shapes: tuple[AdapterSpec, dict[str, tuple[int, ...]]] | None = None
        self._lora: LoraConfig | None = None
        self._peft_configs: dict[str, LoraConfig] | None = None  # PEFT's own, where it has put the adapter on
        self._goodbye: weakref.finalize[..., Any] | None = None
        self._weight = 1.0
        self._audited_as = ""
        self._look = None
        self._origin, self.look_ledger = Origin(), None
        if self._endpoint is not None:
            self.lora_middle = nn.Parameter(torch.zeros(1, device=self.input_blocks.device), requires_grad=False)
        module: Any = self
        module.register_state_dict_post_hook(_add_middle)
        module.register_load_state_dict_pre_hook(_take_middle)

    # The adapter

    def add_adapter(
        self,
        adapter_config: LoraConfig,
        adapter_name: str | None = None,
        *,
        run: str | None = None,
        take_up: bool = False,
        seed: int | None = None,
    ) -> None:
        """Put a LoRA adapter on all three parts; the middle's is at the block server.

        Parameters
        ----------
        adapter_config
            Rank, alpha, dropout, target modules, layers, rsLoRA, DoRA: as PEFT means them for the whole model.
        run
            The run's name at the server, to find it again from another process; None for one that ends with this
            model.
        take_up
            Go on with the run of this name if the server has it: the middle's part of the adapter is as it was left,
            and this model's part is for you to set (`set_training_state`). Otherwise a name that is there is an error.
        seed
            What the adapter starts from: the same seed gives the same adapter for every partition. None draws one from
            torch's generator, so that `torch.manual_seed` decides.

        Raises
        ------
        UsageError
            If there is an adapter already, or this one cannot be trained through the split.
        FedSEAError
            What the server refuses: too large an adapter, a run name that is taken.
        """
        if adapter_name not in (None, NAME) or self._adapter is not None:
            raise UsageError(ANOTHER)
        drawn = int(torch.randint(1 << 62, ())) if seed is None else seed
        spec = AdapterSpec.from_config(adapter_config, self.config, drawn)
        self._add(replace(spec, narrow=self.noise.width or 0), adapter_config, run, take_up=take_up)
        self._tell_of_leak(IN_TRAINING, training=True)

    def _tell_of_leak(self, why: str, *, training: bool = False) -> None:
        """Say what is known to leak, and what audits it; nothing where nothing leaves this machine."""
        layers = (self.partition.input_layers, self.partition.output_layers)
        mechanism = str(self._asked) if self.noise.alters else ""
        line = leak_notice(why, self._audited_as, layers, mechanism, training=training) if self._audited_as else None
        if line is not None:
            self._settings.notice(line)

    def check_adapter(self, adapter_config: LoraConfig) -> None:
        """Raise what `add_adapter` would say of a configuration, and do nothing."""
        AdapterSpec.from_config(adapter_config, self.config)

    def _add(self, spec: AdapterSpec, lora: LoraConfig, run: str | None, *, take_up: bool = False) -> None:
        # The server first: what it refuses leaves the model as it was.
        self._begin_run(spec, run, take_up=take_up)
        self._adapter = spec  # or else PEFT's own notice of what is put on would come here again
        spec.put_on(self._module, self._local_layers())
        self._keep(spec, lora)

    def _keep(self, spec: AdapterSpec, lora: LoraConfig) -> None:
        self._adapter, self._lora = spec, lora
        self._hf_peft_config_loaded = True
        hold(self._module, spec.within(self.partition.middle(self.config.num_hidden_layers)), self._module)
        run = self._run
        if run is None:
            return
        self.lora_middle.requires_grad_(True)
        self.narrow_cut.requires_grad_(True)
        run.local = {
            "output blocks": adapter_parameters(self.output_blocks),
            "input blocks": adapter_parameters(self.input_blocks),
        }
        if run.scale is not None:
            scale = run.scale
            for parameter in adapter_parameters(self._module).values():
                parameter.register_hook(lambda gradient: gradient * 2.0**-scale.exponent)

    def _begin_run(
        self, spec: AdapterSpec, name: str | None, *, take_up: bool = False, token: str | None = None
    ) -> None:
        if self._endpoint is None:
            return
        self._run_named = name is not None
        name = check_run_name(name) if name is not None else f"run-{secrets.token_hex(8)}"
        scale, local = (self._run.scale, self._run.local) if self._run is not None else (None, {})
        channel = RunChannel(self._endpoint, self._settings, spec, name, self.traffic)
        attached = channel.open(take_up=take_up, token=token)
        settings = replace(self._settings, run=name, narrow=spec.narrow, changes=lambda: channel.changes)
        self._run = MiddleRun(
            channel,
            self.lora_middle,
            attached.version,
            hidden_size=settings.hidden_size,
            width=settings.width,
            wire_dtype=settings.wire_dtype,
            scale=scale or (LossScale() if self._module.dtype is torch.float16 else None),
            weights=lambda: self._middle_shapes(spec),
            context=f"noise: {self.noise!r}; dtype: {str(self._module.dtype).removeprefix('torch.')}",
        )
        self._run.local = local
        self._settings = settings
        if spec.narrow and attached.new:
            # Until it is trained, the lift undoes what it can of the projection, whose rows are orthonormal.
            self._run.load({f"{ADAPTER}/{LIFT}": self._projection.T})
        # Nobody may close the model: the server should hear of its end all the same.
        if self._goodbye is not None:
            self._goodbye.detach()
        self._goodbye = weakref.finalize(self, channel.abandon, end=not self._run_named)

    def _middle_shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the adapter's weights at the server; worked out once."""
        if self._shapes is None or self._shapes[0] != spec:
            lift = {LIFT: (self.config.hidden_size, spec.narrow)} if spec.narrow else {}
            middle = self.partition.middle(self.config.num_hidden_layers)
            self._shapes = spec, spec.shapes_in(self.config, middle) | lift
        return self._shapes[1]

    @property
    def _session_settings(self) -> SessionSettings:
        """Of sessions that begin now: with the adapter, or while it is switched off, without."""
        return self._settings if self._adapter_on else replace(self._settings, run=None)

    # A federated round

    def _local_layers(self) -> list[int]:
        return [*self.input_blocks.layers, *self.output_blocks.layers]

    def active_adapters(self) -> list[str]:
        """As transformers' models: the names of the adapters that are in use."""
        return ["default"] if self._adapter is not None else []

    def adapter_state(self) -> dict[str, Tensor]:
        """The whole adapter, float32, by its names in the whole model; the middle's weights come from the server."""
        if self._adapter is None:
            raise UsageError("the model has no adapter; add one first: model.add_adapter(LoraConfig(...))")
        weights = {name: weight.detach().clone() for name, weight in adapter_parameters(self._module).items()}
        return dict(sorted({**self._middle_weights(), **weights}.items()))

    def _middle_weights(self) -> dict[str, Tensor]:
        if self._run is None:
            return {}
        return _of_kind(ADAPTER, self._run.export())

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapter of A, B and C together: a standard PEFT adapter of the whole model.

        A narrow cut goes into files beside it; the adapter alone is not the model then, and says so.

        Raises
        ------
        UsageError
            If there is no adapter, or the folder cannot be written.
        """
        self._save_adapter(folder, self.adapter_state())

    def _save_adapter(self, folder: str | Path, weights: Mapping[str, Tensor]) -> None:
        assert self._lora is not None
        cut, base = self.cut_record(), self.config.name_or_path or None
        save_adapter(folder, self._lora, weights, base, cut)
        kept = f"{self.partition.input_layers} input and {self.partition.output_layers} output layers at the client"
        write_card(folder, self._lora, base, kept, has_cut=cut is not None)

    def load_adapter(
        self,
        peft_model_id: str | Path,
        adapter_name: str | None = None,
        is_trainable: bool = True,
        *,
        run: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Load a PEFT LoRA adapter of the whole model, trained in any partition or in one place.

        A narrow cut beside it is taken up, and with it the mechanism that it was trained with, unless this model has
        one of its own: that is then done on what the cut leaves. A `notice` says which it is.

        Parameters
        ----------
        peft_model_id
            Its folder.
        is_trainable
            False freezes it.
        run
            As in `add_adapter`.

        Raises
        ------
        ModelNotFoundError, UsageError
            If the folder is no such adapter, or has no narrow cut where the model's mechanism asks for one.
        ModelMismatchError
            If the adapter is of another model, or of other targets or ranks than the one that the model has.
        PartitionError
            If it has a narrow cut after another layer.
        """
        if kwargs:
            raise UsageError(f"a split model's load_adapter does not take {', '.join(sorted(kwargs))}")
        if adapter_name not in (None, NAME):
            raise UsageError(ANOTHER)
        lora, weights = read_adapter(peft_model_id)
        cut = self._read_cut(peft_model_id)
        narrow = cut[0].rank if cut is not None else 0
        spec = replace(AdapterSpec.from_config(lora, self.config, fresh=False), narrow=narrow)
        if self._adapter is None:
            self._check_fits(spec, weights, peft_model_id)
            if cut is not None:
                self._take_up_cut(*cut, peft_model_id)
            self._add(spec, lora, run)
        else:
            different = spec.difference(self._adapter)
            if different is not None:
                raise ModelMismatchError(f"the adapter in {peft_model_id} does not fit the model's: {different}")
        self.set_adapter_state(weights)
        for parameter in adapter_parameters(self._module).values():
            parameter.requires_grad_(is_trainable)
        if self._run is not None:
            self.lora_middle.requires_grad_(is_trainable)

    def _check_fits(self, spec: AdapterSpec, weights: Mapping[str, Tensor], source: object) -> None:
        """Before anything changes: are the adapter's weights all there, of the right sizes, finite, and no others?"""
        shapes = spec.shapes_in(self.config, range(self.config.num_hidden_layers))
        found = {name: tuple(weight.shape) for name, weight in weights.items() if name not in (PROJECT, LIFT)}
        for name in sorted(shapes.keys() | found.keys()):
            here, there = shapes.get(name), found.get(name)
            if here != there:
                sizes = [f"of shape {list(shape)}" if shape is not None else "not there" for shape in (there, here)]
                raise ModelMismatchError(
                    f"the adapter in {source} does not fit this model: {name} is {sizes[0]} in it, {sizes[1]} here"
                )
        _check_finite(weights)

    @torch.no_grad()
    def set_adapter_state(self, weights: Mapping[str, Tensor]) -> None:
        """Set the whole adapter from weights named as `adapter_state` names them.

        Raises
        ------
        ModelMismatchError
            If names or shapes are others, or a weight is not finite. Nothing is set then.
        """
        _check_finite(weights)
        local = adapter_parameters(self._module)
        middle = self.partition.middle(self.config.num_hidden_layers)
        remote = {name: weight for name, weight in weights.items() if in_middle(name, middle)}
        expected = self._adapter.weight_names(middle) if self._adapter is not None else set()
        expected |= {LIFT} if self._adapter is not None and self._adapter.narrow else set()
        for name in (local.keys() | expected) ^ weights.keys():
            raise ModelMismatchError(f"the adapter does not fit this model: {name} is on one side only")
        for name, parameter in local.items():
            if weights[name].shape != parameter.shape:
                raise ModelMismatchError(
                    f"the adapter does not fit this model: {name} has shape {list(weights[name].shape)}, "
                    f"here it is {list(parameter.shape)}"
                )
        if self._run is not None and remote:
            self._run.load({f"{ADAPTER}/{name}": weight for name, weight in remote.items()})
        for name, parameter in local.items():
            parameter.copy_(weights[name])

    # The optimizer

    def create_optimizer(
        self,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> torch.optim.AdamW:
        """AdamW over A, B and C: stepping it steps the middle's adapter at the server as well.

        Any other `AdamW`, `Adam` or `SGD` of torch over `model.parameters()` does the same.
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self._adapter is None or not trained:
            raise UsageError("there is nothing to train; add an adapter first: model.add_adapter(LoraConfig(...))")
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)
        keep_state(optimizer)
        return optimizer

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradient to a norm over all three parts; returns the norm before.

        `torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)` does the same.
        """
        return torch.nn.utils.clip_grad_norm_(self.parameters(), max_norm)

    def training_state(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All that training has changed: the whole adapter, and the optimizer's states for it (`exp_avg/NAME`, ...)."""
        exported = self._run.export() if self._run is not None else {}
        adapter = _of_kind(ADAPTER, exported)
        states = {name: tensor for name, tensor in exported.items() if not name.startswith(f"{ADAPTER}/")}
        for name, weight in adapter_parameters(self._module).items():
            adapter[name] = weight.detach().clone()
            for kind, state in optimizer.state.get(weight, {}).items():
                states[f"{kind}/{name}"] = torch.as_tensor(state).detach().cpu().float().clone()
        return dict(sorted(adapter.items())), dict(sorted(states.items()))

    def set_training_state(
        self,
        optimizer: torch.optim.Optimizer,
        adapter: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        step: int,
    ) -> None:
        """Go back to what `training_state` gave after `step` optimizer steps, here and at the server.

        All of the state becomes that: gradients and whatever states the optimizer has beside are forgotten.

        Raises
        ------
        ModelMismatchError
            If it is of another adapter. Nothing is set then.
        """
        middle = self.partition.middle(self.config.num_hidden_layers)
        self.set_adapter_state(adapter)
        for parameter in self.parameters():
            parameter.grad = None
        optimizer.state.clear()
        if self._run is not None:
            self._run.set_version(step, clear=True)
            self._run.load({name: state for name, state in states.items() if in_middle(name.partition("/")[2], middle)})
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        local = adapter_parameters(self._module)
        for full, state in states.items():
            kind, _, name = full.partition("/")
            if name in local and id(local[name]) in stepped:
                optimizer.state[local[name]][kind] = state.clone() if kind == "step" else state.to(local[name])
            if self._run is not None and id(self.lora_middle) in stepped:
                # What stands for the middle's adapter has made the same steps.
                own = optimizer.state[self.lora_middle]
                own[kind] = state.clone() if kind == "step" else torch.zeros_like(self.lora_middle)

    @property
    def loss_scale(self) -> list[int] | None:
        """How a float16 model's loss is scaled in training (`LossScale.state`); None for other dtypes."""
        return self._run.scale.state() if self._run is not None and self._run.scale is not None else None

    def set_loss_scale(self, state: Sequence[int] | None) -> None:
        """Go on with the loss scale of a checkpoint; None for that of a training's start."""
        if self._run is not None and self._run.scale is not None:
            self._run.scale.set(state)

    def end_run(self) -> None:
        """The training is over: closing the model ends its run at the server, instead of keeping it."""
        self._run_named = False

    def begin_run_again(self) -> None:
        """Begin the run anew at a server that has lost it; its adapter is at its start, until it is set."""
        if self._run is not None and self._adapter is not None:
            name, named = self._run.channel.name, self._run_named
            self._run.channel.close(end=False)
            self._begin_run(self._adapter, name, take_up=True)
            self._run_named = named

    def _close_run(self) -> None:
        if self._run is not None:
            self._run.close(end=not self._run_named)


def _check_finite(weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise ModelMismatchError(f"the adapter cannot be used: {name} holds values that are not finite")


def _of_kind(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{kind}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _add_middle(module: Any, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """The state of a model with an adapter holds the middle's weights too, so that saving it saves all of it."""
    state.pop(prefix + HANDLE, None)
    if module._adapter is not None:
        for name, weight in module._middle_weights().items():
            head, tail = name.rsplit(".", 1)
            state[prefix + (name if name == LIFT else f"{head}.default.{tail}")] = weight


def _take_middle(
    module: Any,
    state: dict[str, Tensor],
    prefix: str,
    _metadata: Any,
    _strict: bool,
    _missing: list[str],
    _unexpected: list[str],
    _errors: list[str],
) -> None:
    """What a state has for the middle's adapter goes to the server."""
    middle = module.partition.middle(module.config.num_hidden_layers)
    taken = {f"{ADAPTER}/{LIFT}": state.pop(prefix + LIFT)} if prefix + LIFT in state else {}
    for full in [name for name in state if ".lora_" in name and ".default." in name]:
        name = full.removeprefix(prefix).replace(".default.", ".")
        if layer_of(name) in middle:
            taken[f"{ADAPTER}/{name}"] = state.pop(full)
    if module._endpoint is not None:
        state.setdefault(prefix + HANDLE, torch.zeros(1))
    if taken:
        if module._run is None:
            raise UsageError(
                "these weights are an adapter's; add one like it first: model.add_adapter(LoraConfig(...))"
            )
        module._run.load(taken)
