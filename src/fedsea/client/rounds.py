"""A data owner's part in a federated round: a seat at a block server, and the adapter of its own blocks."""

from collections.abc import Mapping

import torch
from peft import LoraConfig
from torch import Tensor

from fedsea.client.connection import Endpoint
from fedsea.client.training import TrainingMixin
from fedsea.errors import ModelMismatchError, UsageError
from fedsea.parts.adapters import AdapterSpec, adapter_parameters
from fedsea.wire.rounds import Ticket


class RoundMixin(TrainingMixin):
    """What `SplitModelForCausalLM` takes part in federated rounds with."""

    def join_round(self, ticket: Ticket, adapter_config: LoraConfig) -> None:
        """Take a seat in a federated round: train the adapter of the round's middle blocks with the others.

        Puts the adapter on if the model has none. The middle's weights are the round's; A's and C's are for
        `set_local_adapter` to set. An optimizer of an earlier round is of no use afterwards: create another one.

        Parameters
        ----------
        ticket
            From the coordinator. Its block server may be another one than before.
        adapter_config
            The round's adapter; the same in each round of a model.

        Raises
        ------
        UsageError
            If the model has another adapter, or a narrow cut.
        RefusedTicketError, StragglerError, ModelMismatchError
            Why the block server does not admit it.
        """
        if self.noise.width is not None:
            raise UsageError("federated rounds train no narrow cuts; load the model with another mechanism")
        spec = self._adapter if self._lora == adapter_config else None
        if spec is None:
            spec = AdapterSpec.from_config(adapter_config, self.config)
        if self._adapter is not None and (different := spec.difference(self._adapter)) is not None:
            raise UsageError(f"the model has another adapter: the round's has {different}; load the model again")
        if self._endpoint is None:
            raise UsageError("with no middle blocks there is nothing to train at a block server")
        if ticket.server != self._endpoint.address:
            self._move_to(ticket.server)
        if self._run is not None:
            self._run.channel.close(end=False)
        self._begin_run(spec, ticket.run, token=ticket.token)
        for parameter in self._module.parameters():
            parameter.grad = None  # of a round that broke off between its two passes, say
        if self._adapter is None:
            self._adapter = spec
            spec.put_on(self._module, self._local_layers())
            self._keep(spec, adapter_config)
        self.lora_middle.requires_grad_(True)

    def _move_to(self, address: str) -> None:
        """Use another block server from now on; it is met when the first run or session begins."""
        assert self._endpoint is not None
        before = self._endpoint
        self._endpoint = Endpoint(address, before.credentials)
        before.close()

    def finish_round(self) -> None:
        """The local steps are done: nobody need wait for this client. The middle's adapter stays for the average.

        Raises
        ------
        FedSEAError
            What went wrong with the last steps.
        """
        if self._run is not None:
            self._run.finish()

    def leave_round(self) -> None:
        """Give the seat up, after an error say; the others need not wait. Raises nothing."""
        if self._run is not None:
            self._run.close(end=True)

    def local_adapter_state(self) -> dict[str, Tensor]:
        """The adapter of the input and output blocks, float32, by its names in the whole model."""
        return {
            name: weight.detach().float().cpu().clone() for name, weight in adapter_parameters(self._module).items()
        }

    @torch.no_grad()
    def set_local_adapter(self, weights: Mapping[str, Tensor]) -> None:
        """Set the adapter of the input and output blocks; weights of the middle's layers are not looked at.

        Raises
        ------
        ModelMismatchError
            If a weight is missing or has another shape. Nothing is set then.
        """
        local = adapter_parameters(self._module)
        for name, parameter in local.items():
            if name not in weights or weights[name].shape != parameter.shape:
                found = f"has shape {list(weights[name].shape)}" if name in weights else "is missing"
                raise ModelMismatchError(
                    f"the adapter does not fit this model: {name} {found}, here it has {list(parameter.shape)}"
                )
        for name, parameter in local.items():
            parameter.copy_(weights[name])
