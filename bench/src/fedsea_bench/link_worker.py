"""The process behind a `LinkProcess`: a link, told what to do over standard input and output."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import IO

from fedsea.errors import UsageError
from fedsea_bench.link import Link


def _serve(link: Link, requests: IO[str], replies: IO[str]) -> None:
    """Answer requests, one word a line, with one line of JSON each, until they end."""
    actions: dict[str, Callable[[], object]] = {
        "counters": lambda: asdict(link.counters()),
        "reset_counters": link.reset_counters,
        "cut": link.cut,
        "refuse": link.refuse,
        "accept": lambda: link.refuse(False),
        "pause": link.pause,
        "resume": link.resume,
    }
    print(json.dumps({"result": link.address}), file=replies, flush=True)
    for line in requests:
        print(json.dumps({"result": actions[line.strip()]()}), file=replies, flush=True)


def main() -> None:
    """Run a link as a process that a `LinkProcess` speaks with over standard input and output."""
    parser = argparse.ArgumentParser(prog="python -m fedsea_bench.link_worker", description=main.__doc__)
    parser.add_argument("target")
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--rate-mbit", type=float)
    arguments = parser.parse_args()
    try:
        link = Link(arguments.target, delay_ms=arguments.delay_ms, rate_mbit=arguments.rate_mbit)
    except UsageError as error:
        print(json.dumps({"usage": str(error)}), flush=True)
        return
    with link:
        _serve(link, sys.stdin, sys.stdout)


if __name__ == "__main__":
    main()
