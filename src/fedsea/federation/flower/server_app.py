"""The coordinator: Flower's ServerApp. It has neither data nor weights of the model, only its configuration."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from transformers import PreTrainedConfig

from fedsea.checkpoints import Fingerprint, open_checkpoint
from fedsea.checkpoints.fingerprint import config_digest
from fedsea.errors import FedSEAError, ModelMismatchError, UsageError
from fedsea.federation.arrays import Arrays, Shapes
from fedsea.federation.coordinator.block_server_admin import BlockServerAdmin
from fedsea.federation.coordinator.block_servers import BlockServers
from fedsea.federation.coordinator.exchange import FederationContext
from fedsea.federation.coordinator.folder import FederationFolder
from fedsea.federation.coordinator.members import Directory, Requirements
from fedsea.federation.coordinator.rounds import FederatedTraining
from fedsea.federation.flower.strategy import make_strategy, set_strategy_state
from fedsea.federation.owner.data import task_schema
from fedsea.federation.recipe import lora_config
from fedsea.federation.settings import Settings
from fedsea.parts.adapter_files import read_adapter
from fedsea.parts.adapters import AdapterSpec, misfit
from fedsea.parts.cut_files import read_cut
from fedsea.tasks import get_task

log = logging.getLogger("flwr")  # what Flower shows and collects
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run configuration describes (`fedsea.federation.settings`)."""
    try:
        run_federation(grid, Settings.from_run_config(context.run_config))
    except FedSEAError as error:
        log.error("fedsea: %s", error)
        raise


def run_federation(
    grid: Grid,
    settings: Settings,
    admins: Sequence[BlockServerAdmin] | None = None,
    notice: Callable[[str], None] = lambda line: log.warning("fedsea: %s", line),
) -> Path:
    """Run a federation, or go on with one; returns the folder of its adapter.

    `admins` are the block servers, where the settings' addresses are not to be used; `notice` gets one line about what
    is unusual. FedSEAError if it cannot be begun, no block server answers, or no client has trained in any round; the
    rounds that are done are saved.
    """
    config = open_checkpoint(settings.model).config
    lora = lora_config(settings.lora())
    spec = AdapterSpec.from_config(lora, config, settings.seed)
    strategy = make_strategy(settings)
    folder = FederationFolder(Path(settings.output), lora, config.name_or_path or settings.model, notice)
    state = folder.begin(settings.identity(), resume=settings.resume)
    shapes = spec.shapes_in(config, range(config.num_hidden_layers))
    if state is None:
        done, source, weights = 0, settings.adapter, first_adapter(settings, spec, config, shapes)
    else:
        done, source = state.step, settings.output
        weights = {name: tensor.numpy() for name, tensor in state.adapter.items()}
        set_strategy_state(strategy, {name: tensor.numpy() for name, tensor in state.optimizer.items()})
        notice(f"going on after round {done} of {settings.rounds}")
    if problem := misfit(weights, shapes):
        raise ModelMismatchError(f"the adapter in {source} does not fit the model: {problem}")
    with ExitStack() as opened:
        chosen = admins if admins is not None else [opened.enter_context(admin) for admin in _admins(settings)]
        servers = BlockServers(chosen, spec, shapes, config.num_hidden_layers, settings, notice)
        directory = Directory(grid, _requirements(settings, config, servers), notice)
        federation = FederationContext(grid, settings, servers, directory, folder, notice)
        training = FederatedTraining(federation, strategy, weights, done)
        adapter = folder.finish(training.run())
        training.hand_over(adapter)
    folder.show(doing="done", round=training.done, rounds=settings.rounds, name=settings.name, mode=settings.mode)
    log.info("fedsea: the adapter is in %s", adapter)
    return adapter


def _admins(settings: Settings) -> list[BlockServerAdmin]:
    credentials = Path(settings.credentials) if settings.credentials else None
    places = zip(settings.addresses, settings.dialled, strict=True)
    return [BlockServerAdmin(address, credentials, insecure=settings.insecure, dial=dial) for address, dial in places]


def _requirements(settings: Settings, config: PreTrainedConfig, servers: BlockServers) -> Requirements:
    requirements = Requirements(
        settings, config.num_hidden_layers, servers.holding, Fingerprint(config_digest(config), {})
    )
    for address, described in servers.described.items():
        if different := requirements.difference(described.fingerprint):
            raise ModelMismatchError(f"the block server {address} has another model than {settings.model}: {different}")
        requirements.learn_model(described.fingerprint)
    if settings.task:
        task = get_task(settings.task)
        requirements.task, requirements.schema = task.name, task_schema(task)
    return requirements


def first_adapter(settings: Settings, spec: AdapterSpec, config: PreTrainedConfig, shapes: Shapes) -> Arrays:
    """The adapter before the first round: the given one, or as every part would start it."""
    if settings.adapter:
        given, weights = read_adapter(settings.adapter)
        if read_cut(settings.adapter) is not None:
            raise UsageError(f"the adapter in {settings.adapter} has a narrow cut; a federation does not train those")
        different = AdapterSpec.from_config(given, config, fresh=False).difference(spec)
        if different is not None:
            raise UsageError(f"the adapter in {settings.adapter} is not as the lora settings say: it has {different}")
        return {name: weight.float().numpy() for name, weight in weights.items()}
    if spec.use_dora:
        # Its magnitudes begin as the norms of base weights, which the coordinator does not have.
        raise UsageError("lora-kind dora needs an adapter to start from: set `adapter` to a folder")
    return {
        name: spec.start(name, shape).numpy() if ".lora_A." in name else np.zeros(shape, np.float32)
        for name, shape in shapes.items()
    }
