"""What the place of the cuts changes: what is read of the text and of the answer, and what noise costs the model."""

from collections.abc import Iterator
from pathlib import Path

from fedsea.partition import Partition
from fedsea.privacy import RelativeGaussianNoise
from fedsea_bench.plots import drawing
from fedsea_bench.privacy_case import Case
from fedsea_bench.results import SHARE, Line
from fedsea_bench.workbench import Workbench, described

LEVEL = 10.0
DEPTHS, QUICK_DEPTHS = (0, 1, 2, 3, 4), (0, 1)
Cells = dict[tuple[int, int], float]


def partition_study(bench: Workbench) -> Iterator[Line]:
    """For each p the text that is read and the loss under noise; for each p and q the answer that is read."""
    case = Case.of(bench, grid=True)
    depths = QUICK_DEPTHS if bench.settings.quick else DEPTHS
    noise = RelativeGaussianNoise(LEVEL)
    text: Cells = {}
    answer: Cells = {}
    losses: dict[int, tuple[float, float]] = {}
    for p in depths:
        for q in depths:
            partition = Partition(p, q)
            # What is read of the text depends on h_A, so on p; it is attacked once.
            attacks = ("search", "search-map", "read-out") if q == depths[0] else ("read-out",)
            auditor = case.auditor(bench, partition, attacks=attacks, answer_tokens=8)
            with bench.step(f"attacks at partition {described(partition)}"):
                report = auditor.report(noise)
            for finding in report.findings:
                if finding.attack == "read-out":
                    answer[p, q] = finding.answer["tokens"].mean
                else:
                    text[p, q] = max(text.get((p, q), 0.0), finding.prompt["tokens"].mean)
            if q == depths[0]:
                assert report.public_loss is not None
                assert report.loss is not None
                losses[p] = report.public_loss, report.loss
        note = f"noise level {LEVEL:g}; {case.words(bench, Partition(p, depths[0]))}"
        name = f"p = {p}: share of the text's tokens that the better search reads"
        yield Line.of(name, text[p, depths[0]], SHARE, conditions=note)
        note, name = f"{losses[p][0]:.3f} without noise; level {LEVEL:g}", "loss of the untrained model under noise"
        yield Line.of(f"p = {p}: {name}", losses[p][1], "nats a token", conditions=note)
        note = f"q = {', '.join(map(str, depths))}, in this order; 8 tokens, greedy; level {LEVEL:g}"
        name, read = "share of the answer that read-out reads, largest over q", [answer[p, q] for q in depths]
        yield Line.largest(f"p = {p}: {name}", read, SHARE, conditions=note)
    if bench.settings.plots is not None:
        draw(depths, text, answer, losses, bench.settings.plots / "partition.png", bench.settings.model)


def draw(
    depths: tuple[int, ...], text: Cells, answer: Cells, losses: dict[int, tuple[float, float]], path: Path, model: str
) -> None:
    """Draw, as a PNG: what is read of the text and the loss over p, and what is read of the answer over p and q."""
    with drawing(path, 10, 4, columns=2) as ((left, right),):
        read = left.plot(depths, [text[p, depths[0]] for p in depths], "o-", label="share of the text read")
        left.set(xlabel="input layers p", ylabel="share of tokens read", ylim=(-0.02, 1.02), xticks=depths)
        left.set_title(f"{model}, noise level {LEVEL:g}")
        cost = left.twinx()
        noisy = [losses[p][1] for p in depths]
        cost.set(ylabel="loss (nats a token)")
        shown = [*read, *cost.plot(depths, noisy, "s--", color="tab:red", label="loss under noise")]
        cost.legend(handles=shown, fontsize="small")
        cells = [[answer[p, q] for q in depths] for p in depths]
        image = right.imshow(cells, vmin=0, vmax=1, cmap="viridis", origin="lower")
        right.set(xlabel="output layers q", ylabel="input layers p", title="share of the answer that read-out reads")
        right.set_xticks(range(len(depths)), depths)
        right.set_yticks(range(len(depths)), depths)
        for row, values in enumerate(cells):
            for column, value in enumerate(values):
                color = "black" if value > 0.5 else "white"
                right.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
        right.figure.colorbar(image, ax=right)
