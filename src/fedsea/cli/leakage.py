"""What a provider reads of a chat, shown as it goes on."""

import sys
from typing import TYPE_CHECKING

from fedsea.cli.terminal import working
from fedsea.text import one_line

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.audit.live import LiveLeakage


def show_turn(view: "LiveLeakage") -> None:
    """Print on standard error what a provider could have read of the turn that has just ended. Ctrl-C skips it."""
    try:
        with working("reading what was sent, as the provider could", told=True):
            readings = view.turn()
    except KeyboardInterrupt:
        print("  (what the provider reads: skipped)", file=sys.stderr)
        return
    for one in readings:
        if one.tokens:
            read = f"{one.right / one.tokens:.0%} of the {one.part}'s {one.tokens} tokens ({one.attack})"
            print(f"  the provider reads {read}: {one_line(one.text)}", file=sys.stderr, flush=True)


def prepare_view(view: "LiveLeakage") -> None:
    """Make the attackers' tables, and say why that takes a while."""
    with working("getting the attacks ready, once: a run of the input blocks over the whole vocabulary", told=True):
        view.prepare()
