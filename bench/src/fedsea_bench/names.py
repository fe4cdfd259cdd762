"""The topics of each bench by name, for whoever has to know them before anything slow is loaded; a test compares."""

from collections.abc import Mapping, Sequence

from fedsea.errors import UsageError

NAMES: Mapping[str, tuple[str, ...]] = {
    "inference": (
        "exactness",
        "decode-speed",
        "link-bytes",
        "row-entries",
        "kv-cache",
        "client-weights",
        "client-memory",
        "slow-link",
        "gpu",
    ),
    "training": ("exactness", "speed", "link-bytes", "slow-link", "client-memory", "server-runs", "gpu"),
    "federation": ("exactness", "speed", "server-memory", "flower", "quality", "scale"),
    "privacy": ("search", "speed", "bound", "partition", "adaptive", "paper", "frontier"),
}


def check_topics(wanted: Sequence[str], known: Sequence[str]) -> None:
    """Check that a bench has the topics that are asked for.

    Raises
    ------
    UsageError
        If it lacks one; the message has those that there are.
    """
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UsageError(f"no topic {', '.join(unknown)} in this bench; there are {', '.join(known)}")
