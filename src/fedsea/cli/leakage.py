"""What a provider can read, told where text is about to leave: the warning at the start, and a chat's live view."""

import os
import shlex
import sys
from typing import TYPE_CHECKING

from fedsea.cli.terminal import tell, working
from fedsea.text import one_line

if TYPE_CHECKING:  # --help needs no torch
    from fedsea.audit.live import LiveLeakage
    from fedsea.cli.options import ClientOptions
    from fedsea.client.model import SplitModelForCausalLM

WARNING = "FEDSEA_LEAK_WARNING"


def warn_of_leakage(options: "ClientOptions", model: "SplitModelForCausalLM") -> None:
    """Say in one line on standard error that a configuration is known to leak, and what to measure it by.

    Not without TLS, which stays on this machine, and not if the environment variable FEDSEA_LEAK_WARNING is `off`.
    """
    if options.insecure or os.environ.get(WARNING) == "off":
        return
    if not model.partition.middle(model.config.num_hidden_layers):
        return
    from fedsea.checkpoints import open_checkpoint
    from fedsea.privacy.calibrate import measure_magnitude
    from fedsea.privacy.warning import leak_warning

    why = leak_warning(
        model.noise,
        model.partition,
        model.config.hidden_size,
        lambda: measure_magnitude(model.input_blocks, open_checkpoint(options.model)),
    )
    if why is not None:
        tell(f"{why}; see how much", _audit_command(options), f"({WARNING}=off hides this)")


def _audit_command(options: "ClientOptions") -> str:
    words = ["fedsea", "audit", options.model]
    words += ["--input-layers", str(options.input_layers), "--output-layers", str(options.output_layers)]
    for name, value in (
        ("--noise-std", options.noise_std),
        ("--noise-level", options.noise_level),
        ("--mechanism", options.mechanism),
    ):
        words += [] if value is None else [name, str(value)]
    return shlex.join(words)


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
