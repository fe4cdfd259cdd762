"""`fedsea federation`: many data owners, one adapter, on Flower."""

import contextlib
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.cli.options import AsJson, tell_notice
from fedsea.cli.spread import Typed, spread
from fedsea.cli.terminal import interrupt_on, print_json, tell
from fedsea.errors import UsageError
from fedsea.federation import ParticipantOptions, Settings, UpOptions
from fedsea.flags import ComputeDtype, Device, Flag, Threads

if TYPE_CHECKING:  # --help needs neither torch nor Flower
    from fedsea.federation import Federation

app = typer.Typer(help="Train one adapter with several data owners, none of whom shows its text.", no_args_is_help=True)
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class PrivacyOptions:
    """Local differential privacy of what the coordinator gets. None: as the coordinator says."""

    dp_clip: Annotated[
        float | None, Flag("Clip your update to this norm, and add noise to it.", default="as the federation does")
    ] = None
    dp_epsilon: Annotated[float | None, Flag("Epsilon of one round; needs --dp-clip.")] = None
    dp_delta: Annotated[float | None, Flag("Delta of one round; needs --dp-clip.", default="0.00001")] = None

    def given(self) -> dict[str, float]:
        """What was given, by the settings' keys."""
        given = {key.replace("_", "-"): value for key, value in asdict(self).items() if value is not None}
        if given and "dp-clip" not in given:
            raise UsageError("--dp-epsilon and --dp-delta need --dp-clip")
        return given


@app.command()
@spread
def up(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The federation's folder; may be new.")],
    settings: Annotated[dict[str, Any], Typed(Settings)],
    place: Annotated[dict[str, Any], Typed(UpOptions)],
    others: Annotated[
        list[str] | None,
        Flag("Any other setting of docs/federation.md; may be given several times.", "--set", metavar="KEY=VALUE"),
    ] = None,
    dtype: ComputeDtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Run block server and coordinator on this machine until all rounds are done.

    Given again, the command continues the federation in DIR, with the settings that it had.
    """
    from fedsea.federation import Federation

    typed = {key.replace("_", "-"): value for key, value in settings.items()} | dict(map(_assignment, others or []))
    chosen, options = _settled(directory, typed, place)
    serve = ["--dtype", dtype, "--device", device, *([] if threads is None else ["--threads", str(threads)])]
    with interrupt_on(signal.SIGTERM), Federation(directory, chosen, options, tell, tuple(serve)) as running:
        running.start()
        _invite(running, as_json=as_json)
        try:
            with _progress(directory, quiet=as_json) as show:
                running.run(show)
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
    options: ParticipantOptions,
    privacy: PrivacyOptions,
) -> None:
    """Take part in a federation with your own text, until it is over or Ctrl-C. The text stays here."""
    from fedsea.client import IN_TRAINING, leak_notice
    from fedsea.federation import OwnerProcess

    # The worker that reads them runs in another folder.
    data, looks = options.data, options.looks
    options = replace(
        options,
        data=data if data.startswith("hub:") else str(Path(data).expanduser().absolute()),
        looks=str(Path(looks).expanduser().absolute()) if looks else "",
    )
    with interrupt_on(signal.SIGTERM), OwnerProcess(folder, options, tell, privacy.given()) as member:
        model = options.model or member.invitation.model
        try:
            tell(f"reading the data and the model's files, as {member.name} of {member.invitation.federation}")
            ready = member.start()
            layers = (options.partition.input_layers, options.partition.output_layers)
            warning = leak_notice(IN_TRAINING, model, layers, options.noise, training=True)
            if warning is not None:
                tell_notice(warning, (ready["task"], options.data))
            tell(f"{ready['examples']} examples of {ready['task']}; connecting to {member.invitation.superlink}")
            member.watch()
            tell("the federation is over; disconnecting")
            member.say_goodbye()
        except KeyboardInterrupt:
            tell("leaving")
        if member.adapter is not None:
            print(f"The adapter is in {member.adapter}")
            use = ["fedsea", "chat", model, "--adapter", str(member.adapter), "--credentials", str(folder)]
            print(f"Where a block server runs: {shlex.join(use)} --server HOST:PORT")


@app.command()
@spread
def status(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder of fedsea federation up, or its output.")
    ],
    watch: Annotated[bool, Flag("Show it live, until Ctrl-C or all rounds are done.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show rounds, clients, losses, bytes and stragglers of a federation."""
    from rich.console import Console
    from rich.live import Live

    from fedsea.cli.federation_view import tables
    from fedsea.federation import read_status

    found = read_status(directory)
    console = Console(highlight=False)
    show = print_json if as_json else console.print
    if not watch or as_json:
        show(found.to_body() if as_json else tables(found))
        while as_json and watch and found.doing != "done":
            time.sleep(POLL_SECONDS)
            found = read_status(directory)
            print_json(found.to_body())
        return
    with Live(tables(found), console=console, auto_refresh=False) as live:
        while found.doing != "done":
            time.sleep(POLL_SECONDS)
            found = read_status(directory)
            live.update(tables(found), refresh=True)


def _settled(directory: Path, typed: Mapping[str, Any], place: Mapping[str, Any]) -> tuple[Settings, UpOptions]:
    """What was typed; what was not is as before in the folder, or the default."""
    from fedsea.federation import Deployment
    from fedsea.federation.invitation import federation_name

    before = Deployment(directory.expanduser()).before()
    place = dict(place)
    if typed_names := "clients" in place:
        place["clients"] = [one.strip() for some in place["clients"] for one in some.split(",") if one.strip()]
    options = UpOptions.from_body({**before.get("options", {}), **place})
    count = {"clients": len(options.clients)}
    given = {"name": federation_name(directory), **count, **before.get("settings", {})}
    return Settings.from_run_config({**given, **(count if typed_names else {}), **typed}), options


def _assignment(text: str) -> tuple[str, Any]:
    """`KEY=VALUE`, the value of the type that the setting has."""
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
        folder = running.deployment.client
        clients = {name: {"folder": str(folder(name)), "command": command} for name, command in commands.items()}
        print_json({"superlink": running.superlink, "servers": list(running.settings.addresses), "clients": clients})
        return
    print(f"The federation {running.settings.name} is up: block server {running.settings.servers}, ", end="")
    print(f"Flower's SuperLink {running.superlink}.")
    print("Give each data owner its folder, over a channel you trust. Each one then runs, with its own data:")
    for command in commands.values():
        print(f"  {command}")
    print(f"Watch it:  fedsea federation status {shlex.quote(str(running.deployment.path))} --watch", flush=True)


@contextlib.contextmanager
def _progress(directory: Path, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """Shows a run: live tables in a terminal, in a log a line for each round; nothing if `quiet`."""
    if quiet:
        yield lambda: None
        return
    from rich.console import Console
    from rich.live import Live

    from fedsea.cli.federation_view import round_lines, tables
    from fedsea.federation import read_status

    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        with Live(tables(read_status(directory)), console=console, auto_refresh=False) as live:
            yield lambda: live.update(tables(read_status(directory)), refresh=True)
            live.update(tables(read_status(directory)), refresh=True)
        return
    told = set(round_lines(read_status(directory)))

    def lines() -> None:
        status = read_status(directory)
        refused = [f"{name} is refused: {one.note}" for name, one in status.clients.items() if one.state == "refused"]
        for line in (*round_lines(status), *refused):
            if line not in told:
                told.add(line)
                tell(line)

    yield lines
    lines()
