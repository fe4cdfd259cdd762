"""Flags of version 0.2 and earlier, which work for one more release: each is rewritten, with a line that says so."""

from collections.abc import Callable, Sequence

from fedsea.cli.terminal import tell

COMMANDS = ("chat", "generate", "finetune", "evaluate", "audit")
NOISE: dict[str, Callable[[str], str]] = {
    "--noise-std": lambda value: value,
    "--noise-level": lambda value: f"relative:{value}",
    "--mechanism": lambda value: value,
}


def rewritten(arguments: Sequence[str]) -> list[str]:
    """A command line with `--noise` in place of the three flags that named the noise before."""
    if not arguments or arguments[0] not in COMMANDS:
        return [*arguments]
    found, rest = [], iter(arguments)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag not in NOISE:
            found.append(word)
            continue
        noise = NOISE[flag](value if equals else next(rest, ""))
        tell(f"{flag} goes in the next release; write --noise {noise}")
        found += ["--noise", noise]
    return found
