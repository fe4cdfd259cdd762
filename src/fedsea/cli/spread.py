"""How a command takes a dataclass's fields as options of its own, and what was typed."""

import dataclasses
import functools
import inspect
import shlex
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import click
import typer

from fedsea.flags import Flag

_T = typing.TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Typed:
    """Of a dataclass's fields, those that were typed: `Annotated[dict[str, Any], Typed(Settings)]`."""

    kind: Any


def spread(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the fields of its dataclass parameters as options of its own.

    typer reads options from a function's signature. There, a parameter whose type is a dataclass is replaced by the
    dataclass's fields that have a `Flag` (or are dataclasses themselves), and filled from them when the command is
    called. A dictionary that is `Typed` has such fields as well, none of which has a value by default.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    own = inspect.signature(command).parameters
    options = [one for name, parameter in own.items() for one in _options(name, hints[name], parameter.default)]

    @functools.wraps(command)
    def call(**values: Any) -> Any:
        return command(**{name: _filled(name, hints[name], values) for name in own})

    call.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return call


def _options(name: str, hint: Any, default: Any) -> Iterator[inspect.Parameter]:
    """A parameter as typer takes it; of a dataclass, each of its fields."""
    if dataclasses.is_dataclass(hint):
        for field, inner in _fields(hint):
            start = field.default if field.default is not dataclasses.MISSING else inspect.Parameter.empty
            yield from _options(field.name, inner, start)
        return
    if (typed := _noted(hint, Typed)) is not None:
        for field, inner in _fields(typed.kind):
            if (own := _noted(inner, Flag)) is not None:
                default = "" if field.default in ((), dataclasses.MISSING) else str(field.default)
                kind = typing.get_args(inner)[0]
                kind = list[str] if typing.get_origin(kind) is tuple else kind  # an option that is given several times
                shown_flag = dataclasses.replace(own, default=own.default or default)
                yield from _options(field.name, Annotated[kind | None, shown_flag], None)
        return
    flag = _noted(hint, Flag)
    if flag is not None:
        shown: Any = flag.default or not (default in ("", None, inspect.Parameter.empty) or default is False)
        option = typer.Option(
            *_names(name, hint, flag),
            help=flag.help,
            metavar=flag.metavar or None,
            min=flag.min,
            max=flag.max,
            show_default=shown,
            hidden=flag.hidden,
        )
        hint = Annotated[typing.get_args(hint)[0], option]
        default = default // flag.unit if flag.unit > 1 and default is not None else default
    yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _names(name: str, hint: Any, flag: Flag) -> list[str]:
    if flag.name:
        return [flag.name]
    # By itself typer would give a bool two names, --json and --no-json.
    return [f"--{name.replace('_', '-')}"] if typing.get_args(hint)[0] is bool else []


def _filled(name: str, hint: Any, values: Mapping[str, Any]) -> Any:
    """The value of a parameter, from what typer has read."""
    if dataclasses.is_dataclass(hint):
        kind: Any = hint
        return kind(**{field.name: _filled(field.name, inner, values) for field, inner in _fields(kind)})
    if (typed := _noted(hint, Typed)) is not None:
        found = {field.name: values[field.name] for field, _ in _fields(typed.kind)}
        return {key: value for key, value in found.items() if value not in (None, [])}
    flag, value = _noted(hint, Flag), values[name]
    return value * flag.unit if flag is not None and flag.unit > 1 and value is not None else value


def _fields(kind: Any) -> "Iterator[tuple[dataclasses.Field[Any], Any]]":
    """A dataclass's fields that the command line has, with their types."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is Annotated:
            yield field, hint


def _noted(hint: Any, kind: type[_T]) -> _T | None:
    """What `Annotated` says of this kind."""
    return next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, kind)), None)


def given_options() -> set[str]:
    """Names of the running command's parameters that were typed."""
    context = click.get_current_context()
    typed = click.core.ParameterSource.COMMANDLINE
    return {name for name in context.params if context.get_parameter_source(name) is typed}


def command_line(*more: str) -> str:
    """The command that is running, as it would be typed, with `more` at its end."""
    context = click.get_current_context(silent=True)
    typed = context.find_root().obj if context is not None else None
    return shlex.join(["fedsea", *(word for word in typed or () if word not in more), *more])
