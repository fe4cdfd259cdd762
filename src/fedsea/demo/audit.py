"""The audit's demonstration: what a provider reads of a few private sentences, with and without protection.

Everything in an `AuditDemo` was measured in the run that made it: the sentences went through real sessions with a block
server that keeps what it sees.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedsea.audit import SAMPLES, Auditor, Plan, Report
from fedsea.checkpoints import open_checkpoint
from fedsea.checkpoints.packaged import opening
from fedsea.demo.audience import Audience
from fedsea.partition import Partition
from fedsea.privacy import GaussianNoise, Noise, RelativeGaussianNoise, Unit

TEXTS, TOKENS, ANSWER = 2, 24, 8
LEVELS = (0.0, 5.0, 15.0)
ATTACKS = ("search", "read-out")


@dataclass(frozen=True)
class AuditDemo:
    """What the demonstration has measured: a report for each protection, the weakest first."""

    reports: tuple[Report, ...]


def protections() -> list[Noise]:
    """None, and noise of several strengths."""
    return [RelativeGaussianNoise(level) if level else GaussianNoise(0.0) for level in LEVELS]


def run_audit_demo(
    name: str, audience: Audience, *, threads: int, on_report: Callable[[Report], None] = lambda _report: None
) -> AuditDemo:
    """Audit a model on a few short texts under one protection after another.

    Parameters
    ----------
    name
        A model with a tokenizer, as `open_checkpoint` takes it.
    audience
        Told what happens while it happens.
    threads
        CPU threads.
    on_report
        Told of each protection's report as soon as there is one.

    Raises
    ------
    FedSEAError
        If the model cannot be used.
    """
    torch.set_num_threads(threads)
    with audience.step(opening(name)):
        checkpoint = open_checkpoint(name)
        plan = Plan(checkpoint, SAMPLES[:TEXTS], Partition(1, 1), tokens=TOKENS, answer=ANSWER, attacks=ATTACKS)
        auditor = Auditor(plan)
    reports = []
    for noise in protections():
        with audience.step(f"Sending {TEXTS} texts through a session, {described(noise)}, and attacking what was seen"):
            reports.append(auditor.report(noise))
        on_report(reports[-1])
    return AuditDemo(tuple(reports))


def described(noise: Noise) -> str:
    """A protection in words."""
    return f"with noise of {noise.strength:g} × the mean |h_A|" if noise.unit is Unit.RELATIVE else "as it is"
