"""Flags of version 0.2 and earlier, which work for one more release: each is rewritten, with a line that says so."""

from collections.abc import Callable, Sequence

from fedsea.cli.terminal import tell
from fedsea.errors import UsageError

COMMANDS = ("chat", "generate", "finetune", "evaluate", "audit", "federation")
NOISE: dict[str, Callable[[str], str]] = {
    "--noise": lambda value: value,
    "--noise-std": lambda value: value,
    "--noise-level": lambda value: f"relative:{value}",
    "--mechanism": lambda value: value,
}


def rewritten(arguments: Sequence[str]) -> list[str]:
    """A command line with `--noise` in place of the three flags that named the noise before.

    UsageError if the noise is given twice, and the command does not compare mechanisms.
    """
    if not arguments or arguments[0] not in COMMANDS:
        return [*arguments]
    found, given, rest = [], [], iter(arguments)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag not in NOISE:
            found.append(word)
            continue
        given.append(NOISE[flag](value if equals else next(rest, "")))
        found += ["--noise", given[-1]]
        if flag != "--noise":
            tell(f"{flag} goes in the next release; write --noise {given[-1]}")
    if len(given) > 1 and arguments[0] != "audit":
        raise UsageError(f"give --noise once; got {' and '.join(given)}")
    return found
