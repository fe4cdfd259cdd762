"""`fedsea federation`: many data owners, one adapter, on Flower."""

import contextlib
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedsea.cli.options import AsJson, ComputeDtype, Device, Threads, WireDtype, spread
from fedsea.cli.terminal import interrupt_on, print_json, tell
from fedsea.errors import UsageError

if TYPE_CHECKING:  # --help needs neither torch nor Flower
    from fedsea.federation.coordinator.up import Federation, UpOptions
    from fedsea.federation.settings import Settings

app = typer.Typer(help="Train one adapter with several data owners, none of whom shows its text.", no_args_is_help=True)
Mode = Literal["sequential", "client-batch", "server-hierarchical"]
LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class FederationOptions:
    """What is trained and how. None: as before in DIR, else the default of `Settings`."""

    model: Annotated[str | None, typer.Option(help="What to train.", show_default="smollm2-135m")] = None
    task: Annotated[str | None, typer.Option(help="What all learn.", show_default="the first client's")] = None
    mode: Annotated[
        Mode | None, typer.Option(help="How the middle is trained.", show_default="server-hierarchical")
    ] = None
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds in all.", show_default="3")] = None
    min_clients: Annotated[
        int | None, typer.Option(min=1, help="So many must be there for a round.", show_default="1")
    ] = None
    local_steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps of each client a round.", show_default="10")
    ] = None
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples a batch.", show_default="4")] = None
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="0.0005")] = None
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Rank of the adapter.", show_default="8")] = None
    eval_every: Annotated[
        int | None, typer.Option(min=0, help="Rounds between two evaluations.", show_default="never")
    ] = None
    strategy: Annotated[str | None, typer.Option(help="Flower's: FedAvg, FedProx, FedAdam…", show_default="FedAvg")] = (
        None
    )
    set: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Any other setting (docs/federation.md); may be given several times."),
    ] = None

    def given(self) -> dict[str, Any]:
        """What was given, by the settings' keys."""
        found = {field.name.replace("_", "-"): getattr(self, field.name) for field in fields(self)}
        extra = found.pop("set") or []
        return {key: value for key, value in found.items() if value is not None} | dict(map(_assignment, extra))


@dataclass(frozen=True)
class PlaceOptions:
    """Where the servers run. None: as before in DIR."""

    clients: Annotated[str | None, typer.Option(metavar="NAMES", help="The data owners, such as a,b,c.")] = None
    listen: Annotated[
        str | None, typer.Option(help="Address of this machine to listen on.", show_default="127.0.0.1")
    ] = None
    host: Annotated[
        list[str] | None,
        typer.Option(help="What data owners reach this machine under; may be given several times, the first is told."),
    ] = None
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Of the block server.", show_default="7070")] = None
    superlink_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Of Flower's SuperLink.", show_default="7071")
    ] = None
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="A block server that runs elsewhere; may be given several times."),
    ] = None

    def given(self) -> dict[str, Any]:
        """What was given, by the fields of `UpOptions`."""
        found: dict[str, Any] = {"listen": self.listen, "port": self.port, "superlink_port": self.superlink_port}
        found |= {"hosts": self.host or None, "servers": self.server or None}
        if self.clients is not None:
            found["clients"] = [name.strip() for name in self.clients.split(",") if name.strip()]
        return {key: value for key, value in found.items() if value is not None}


@dataclass(frozen=True)
class PrivacyOptions:
    """Local differential privacy of what the coordinator gets. None: as the coordinator says."""

    dp_clip: Annotated[
        float | None,
        typer.Option(help="Clip your update to this norm, and add noise.", show_default="the federation's"),
    ] = None
    dp_epsilon: Annotated[float | None, typer.Option(help="Of one round; goes with --dp-clip.")] = None
    dp_delta: Annotated[float | None, typer.Option(help="Of one round.", show_default="0.00001")] = None

    def given(self) -> dict[str, float]:
        """What was given, by the settings' keys."""
        found = {"dp-clip": self.dp_clip, "dp-epsilon": self.dp_epsilon, "dp-delta": self.dp_delta}
        given = {key: value for key, value in found.items() if value is not None}
        if given and "dp-clip" not in given:
            raise UsageError("--dp-epsilon and --dp-delta go with --dp-clip")
        return given


@app.command()
@spread
def up(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The federation's folder; made if it is not there.")],
    federation: FederationOptions,
    place: PlaceOptions,
    dtype: ComputeDtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Run block server and coordinator on this machine until all rounds are done. Given again, it goes on."""
    from fedsea.federation.coordinator.up import Federation

    settings, options = _what_and_where(directory, federation, place)
    serve = ["--dtype", dtype, "--device", device, *([] if threads is None else ["--threads", str(threads)])]
    with interrupt_on(signal.SIGTERM), Federation(directory, settings, options, tell, tuple(serve)) as running:
        running.start()
        _invite(running, as_json=as_json)
        try:
            with _progress(directory, quiet=as_json) as look:
                running.run(look)
        except KeyboardInterrupt:
            tell("stopped; the same command goes on after the last round that is done")
            raise
    adapter = running.deployment.output / "adapter"
    if as_json:
        print_json({"done": True, "adapter": str(adapter)})
    else:
        print(f"The adapter is in {adapter}")


@app.command()
@spread
def join(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that the coordinator gave you.")],
    data: Annotated[str, typer.Option(metavar="PATH", help="A file, a folder with its splits, or hub:NAME.")],
    task: Annotated[str, typer.Option(help="As for fedsea finetune.", show_default="the federation's")] = "",
    model: Annotated[str, typer.Option(help="Your own copy of the model.", show_default="by its name")] = "",
    input_layers: Annotated[int, typer.Option(min=0, help="Decoder layers to run here, after the embedding.")] = 1,
    output_layers: Annotated[int, typer.Option(min=0, help="Decoder layers to run here, before the head.")] = 1,
    noise_level: Annotated[
        float, typer.Option(min=0.0, help="Noise on what leaves, as a multiple of the mean |h_A|.")
    ] = 0.0,
    mechanism: Annotated[
        str,
        typer.Option(metavar="TEXT", help="Another protection, as for fedsea chat.", show_default="none"),
    ] = "",
    shard: Annotated[
        str,
        typer.Option(
            help="For experiments: iid:0/4, dirichlet=0.5:0/4, source=COLUMN:0/4, folders.", show_default="all of PATH"
        ),
    ] = "",
    shard_seed: Annotated[int, typer.Option(min=0, help="Of the shards; the same for all clients.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest text.")] = 512,
    private_ends: Annotated[
        bool, typer.Option("--private-ends", help="Take part only if the adapter of your own blocks stays here.")
    ] = False,
    max_looks: Annotated[
        int,
        typer.Option(
            min=0, help="With noise: how often each text may leave under fresh noise, in all; 0 for no end of it."
        ),
    ] = 64,
    looks: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where that is counted.", show_default="looks.db in FOLDER")
    ] = None,
    *,
    privacy: PrivacyOptions,
    dtype: ComputeDtype = "float32",
    wire_dtype: WireDtype = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Take part in a federation with your own text, until it is over or Ctrl-C. The text stays here."""
    from fedsea.client.leak_notice import IN_TRAINING, leak_notice
    from fedsea.federation.owner.join import OwnerProcess
    from fedsea.federation.owner.participant_options import ParticipantOptions

    options = ParticipantOptions(
        model=model,
        task=task,
        data=data if data.startswith("hub:") else str(Path(data).expanduser().absolute()),
        input_layers=input_layers,
        output_layers=output_layers,
        noise_level=noise_level,
        mechanism=mechanism,
        shard=shard,
        shard_seed=shard_seed,
        max_tokens=max_tokens,
        insist_private=private_ends,
        max_looks=max_looks,
        looks=str(looks.expanduser().absolute()) if looks is not None else "",
        dtype=dtype,
        wire_dtype=wire_dtype,
        device=device,
        threads=threads,
    )
    with interrupt_on(signal.SIGTERM), OwnerProcess(folder, options, tell, privacy.given()) as member:
        try:
            tell(f"reading the data and the model's files, as {member.name} of {member.invitation.federation}")
            ready = member.start()
            warning = leak_notice(
                IN_TRAINING,
                model or member.invitation.model,
                (input_layers, output_layers),
                mechanism or (f"relative:level={noise_level}" if noise_level else ""),
                training=True,
                learnt=(ready["task"], options.data),
            )
            if warning is not None:
                tell(warning)
            tell(f"{ready['examples']} examples of {ready['task']}; connecting to {member.invitation.superlink}")
            member.watch()
            tell("the federation is over; saying goodbye")
            member.say_goodbye()
        except KeyboardInterrupt:
            tell("leaving")
        if member.adapter is not None:
            print(f"The adapter is in {member.adapter}")
            use = ["fedsea", "chat", options.model or member.invitation.model, "--adapter", str(member.adapter)]
            print(f"Where a block server runs: {shlex.join([*use, '--credentials', str(folder)])} --server HOST:PORT")


@app.command()
@spread
def status(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder of fedsea federation up, or its output.")
    ],
    watch: Annotated[bool, typer.Option("--watch", help="Show it live, until Ctrl-C or all rounds are done.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show rounds, clients, losses, bytes and stragglers of a federation."""
    from rich.console import Console
    from rich.live import Live

    from fedsea.cli.federation_view import tables
    from fedsea.federation.coordinator.status import read_status

    found = read_status(directory)
    if as_json:
        while True:
            print_json(found.to_body())
            if not watch or found.doing == "done":
                return
            time.sleep(LOOK_SECONDS)
            found = read_status(directory)
    console = Console(highlight=False)
    if not watch:
        console.print(tables(found))
        return
    with Live(tables(found), console=console, auto_refresh=False) as live:
        while found.doing != "done":
            time.sleep(LOOK_SECONDS)
            found = read_status(directory)
            live.update(tables(found), refresh=True)


def _what_and_where(
    directory: Path, federation: FederationOptions, place: PlaceOptions
) -> "tuple[Settings, UpOptions]":
    from fedsea.federation.coordinator.deployment import Deployment
    from fedsea.federation.coordinator.up import UpOptions
    from fedsea.federation.invitation import federation_name
    from fedsea.federation.settings import Settings

    before = Deployment(directory.expanduser()).before()
    options = UpOptions.from_body({**before.get("options", {}), **place.given()})
    given = {"name": federation_name(directory), "clients": len(options.clients)}
    given |= {**before.get("settings", {}), **federation.given()}
    if place.clients is not None and "clients" not in federation.given():
        given["clients"] = len(options.clients)
    return Settings.from_run_config(given), options


def _assignment(text: str) -> tuple[str, Any]:
    """`KEY=VALUE`, the value of the type that the setting has."""
    from fedsea.federation.settings import Settings

    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set takes KEY=VALUE, such as lora-rank=16; got {text!r}")
    kind: Any = type(getattr(Settings, key.strip().replace("-", "_"), ""))
    try:
        return key.strip(), {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        words = {int: "a whole number", float: "a number", bool: "true or false"}
        raise UsageError(f"{key.strip()} must be {words[kind]}; got {value!r}") from None


def _invite(running: "Federation", *, as_json: bool) -> None:
    commands = running.commands()
    if as_json:
        clients = {
            name: {"folder": str(running.deployment.client(name)), "command": command}
            for name, command in commands.items()
        }
        body = {"superlink": running.superlink, "servers": list(running.settings.addresses), "clients": clients}
        print_json(body)
        return
    print(f"The federation {running.settings.name} is up: block server {running.settings.servers}, ", end="")
    print(f"Flower's SuperLink {running.superlink}.")
    print("Give each data owner its folder, over a channel you trust. There it runs, with its own data:")
    for command in commands.values():
        print(f"  {command}")
    print(f"See how it goes:  fedsea federation status {quote(str(running.deployment.path))} --watch", flush=True)


@contextlib.contextmanager
def _progress(directory: Path, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """Shows a run: live tables in a terminal, else a line for each round; nothing if `quiet`."""
    if quiet:
        yield lambda: None
        return
    from rich.console import Console
    from rich.live import Live

    from fedsea.cli.federation_view import evaluation_line, round_line, tables
    from fedsea.federation.coordinator.status import read_status

    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        with Live(tables(read_status(directory)), console=console, auto_refresh=False) as live:
            yield lambda: live.update(tables(read_status(directory)), refresh=True)
            live.update(tables(read_status(directory)), refresh=True)
        return
    told: set[tuple[Any, str]] = {
        (report["round"], kind) for report in read_status(directory).reports for kind in _kinds(report)
    }

    def lines() -> None:
        status = read_status(directory)
        for report in status.reports:
            for kind in _kinds(report):
                if (report["round"], kind) not in told:
                    told.add((report["round"], kind))
                    tell(round_line(report) if kind == "trained" else evaluation_line(report))
        for name, client in status.clients.items():
            if client.state == "refused" and (name, client.note) not in told:
                told.add((name, client.note))
                tell(f"{name} is refused: {client.note}")

    yield lines
    lines()


def _kinds(report: Mapping[str, Any]) -> tuple[str, ...]:
    return ("trained", "evaluated") if "evaluation" in report else ("trained",)
