"""The audit's demonstration: what a provider reads of a few private sentences, with and without protection.

The sentences go through real sessions with a block server that keeps what it sees.
"""

from collections.abc import Iterator

import torch

from fedsea.audit import SAMPLES, Auditor, Plan, Report
from fedsea.checkpoints import open_checkpoint
from fedsea.checkpoints.packaged import opening
from fedsea.demo.screen import Screen
from fedsea.privacy import parse_mechanism

TEXTS, TOKENS, ANSWER = 2, 24, 8
LEVELS = (0, 5, 15)  # of noise, as multiples of the mean |h_A|
ATTACKS = ("search", "read-out")


def run_audit_demo(name: str, screen: Screen, *, threads: int) -> Iterator[Report]:
    """Audit a model on a few short texts under one protection after another, the weakest first: a report of each.

    Raises
    ------
    FedSEAError
        If the model cannot be used.
    """
    torch.set_num_threads(threads)
    with screen.step(opening(name)):
        checkpoint = open_checkpoint(name)
        plan = Plan(SAMPLES[:TEXTS], tokens=TOKENS, answer_tokens=ANSWER, attacks=ATTACKS)
        auditor = Auditor(checkpoint, plan)
    for level in LEVELS:
        how = f"with noise of {level} × the mean |h_A|" if level else "as it is"
        with screen.step(f"Sending {TEXTS} texts through a session, {how}, and attacking what was seen"):
            report = auditor.report(parse_mechanism(f"relative:{level}"))
        yield report
