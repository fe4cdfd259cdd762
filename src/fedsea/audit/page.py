"""An audit as one page that needs nothing else: for a security officer, on a screen or on paper.

Everything that comes from texts, models or the command line is escaped; the page loads nothing and runs nothing.
"""

import datetime
import platform
from collections.abc import Iterable, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fedsea
from fedsea.audit.decision import Decision, decide
from fedsea.audit.frontier import frontier
from fedsea.audit.page_style import STYLE
from fedsea.audit.report import FLOOR, Finding, Report, brief, share
from fedsea.audit.scores import Score
from fedsea.files import write_text

# Nothing may be fetched or run, whatever stands in the page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
LIBRARIES = ("torch", "transformers", "opacus")
WORDS = {
    "tokens": "tokens read",
    "exact": "exact texts",
    "rougeL": "ROUGE-L",
    "bleu4": "BLEU-4",
    "details": "names, numbers",
    "similarity": "similar in meaning",
}


GLOSSARY = (
    ("token", "A word or a piece of one, as the model reads it."),
    ("tokens read", "Share of the text's tokens that the attack names rightly, each in its place."),
    ("exact texts", "Share of the texts of which the attack names every token."),
    ("names, numbers", "Share of the capitalised words and the numbers that stand in what the attack reads."),
    ("ROUGE-L", "How much of the text's words stand in what is read, in the same order: 100 % for all."),
    ("BLEU-4", "How many runs of up to four words of what is read stand in the text: 100 % for all."),
    ("similar in meaning", "How alike text and what is read are to a sentence-embedding model: 100 % for the same."),
    (
        "loss, in nats a token",
        "How surprised the model is by the text; lower is better. 0.69 more halves the odds.",
    ),
    ("mean |h_A|", "The mean size of a number in the states that leave: what noise has to be compared with."),
)


def write_page(reports: Sequence[Report], command: str, file: Path) -> None:
    """Write `page` to a file.

    Raises
    ------
    UsageError
        If it cannot be written.
    """
    write_text(file, page(reports, command))


def page(reports: Sequence[Report], command: str) -> str:
    """A report as HTML.

    Parameters
    ----------
    reports
        Of one model and the same texts; several if mechanisms or strengths are compared.
    command
        What made it, as it is typed.
    """
    first = reports[0]
    title = f"What a provider reads of {first.model}"
    body = [f"<h1>{escape(title)}</h1>", _subtitle(first), _decision(decide(reports))]
    if len(reports) == 1:
        body += [_verdict(first), *_parts(first, "h2")]
    else:
        body += [_comparison(reports), *frontier(reports)]
        for report in reports:
            summary = f"{brief(report.asked)}: {_headline(report)}"
            body.append(f"<details><summary>{escape(summary)}</summary>{_verdict(report)}")
            body += [*_parts(report, "h3"), "</details>"]
    body += [_assumptions(first), _glossary(), _repeat(command)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _subtitle(report: Report) -> str:
    p, q = report.partition.input_layers, report.partition.output_layers
    looks = f", each sent {report.looks} times" if report.looks > 1 else ""
    adapter = ""
    if report.adapter:
        adapter = (
            f"; with the client's own adapter, which attackers {'have' if report.attacker_has_adapter else 'lack'}"
        )
    if report.train_steps:
        looks = f", learnt in a training (optimizer steps: {report.train_steps})"
    return (
        f'<p class="soft">{len(report.texts)} texts, {report.tokens} tokens{looks}; the client keeps {_layers(p)} '
        f"after the embedding and {_layers(q)} before the head; {escape(report.wire_dtype)} on the wire{adapter}. "
        f"{datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC')}.</p>"
    )


def _layers(count: int) -> str:
    return "no layer" if count == 0 else "1 layer" if count == 1 else f"{count} layers"


def _headline(report: Report) -> str:
    if report.best is None:
        return "nothing was attacked"
    read = report.best.prompt["tokens"].mean
    steps = (
        (1.0, "everything is read"),
        (0.9, "nearly everything is read"),
        (0.5, "most of it is read"),
        (0.1, "part of it is read"),
    )
    return next((words for least, words in steps if read >= least), "these attacks read little")


def _decision(decision: Decision) -> str:
    action = decision.action[0].upper() + decision.action[1:]
    with_it = f" with <code>--mechanism {escape(decision.mechanism)}</code>" if decision.mechanism else ""
    options = "".join(f"<li>{escape(option)}</li>" for option in decision.options)
    listed = f"<p>What you can do:</p><ul>{options}</ul>" if options else ""
    return f'<div class="verdict"><p><strong>{action}{with_it}.</strong></p><p>{escape(decision.why)}</p>{listed}</div>'


def _verdict(report: Report) -> str:
    headline = _headline(report)
    lines = [f"<strong>{headline[0].upper()}{headline[1:]}.</strong>", escape(report.verdict), escape(report.limit)]
    if report.loss is not None and report.public_loss is not None:
        lines.append(
            f"What it costs: the model's loss on these texts is {report.loss:.2f} nats a token here and "
            f"{report.public_loss:.2f} for the public model without protection."
        )
    lines.append(f"Protection: <code>{escape(brief(report.asked))}</code>, {_strength(report)}.")
    return '<div class="found">' + "".join(f"<p>{line}</p>" for line in lines) + "</div>"


def _strength(report: Report) -> str:
    if report.noise_level == 0:
        return "which adds no noise"
    return f"whose noise has a standard deviation of {report.noise_level:.3g} × the mean |h_A|"


def _parts(report: Report, level: str) -> Iterable[str]:
    yield f"<{level}>Attacks</{level}>"
    yield _attacks(report)
    yield f"<{level}>Text by text</{level}>"
    answers = " Right of an upright line stands the model's answer." if any(report.answers) else ""
    yield (
        '<p class="said"><b>Read correctly</b> is highlighted and underlined; <i>guessed wrongly</i> is grey and '
        f"struck through; <u>_</u> is no guess, or what everybody knows.{answers}</p>"
    )
    for place in range(len(report.texts)):
        yield _text(report, place)
    yield f"<{level}>What no attacker gets past</{level}>"
    yield _limits(report)


def _attacks(report: Report) -> str:
    answered, learnt = any(report.answers), any(finding.labels for finding in report.findings)
    names = [name for name in WORDS if any(name in finding.prompt for finding in report.findings)]
    head = ["attack", WORDS["tokens"], "95 %", *(WORDS[name] for name in names if name != "tokens")]
    head += [*(["answer's tokens"] if answered else []), *(["learnt tokens"] if learnt else []), "seconds a token"]
    rows = []
    for finding in report.findings:
        cells = _scores(finding.prompt, names) + ([_number(finding.answer.get("tokens"))] if answered else [])
        cells += [_number(finding.labels.get("labels"))] if learnt else []
        cells.append(f"{finding.seconds_per_token:.3f}")
        rows.append(_row(finding.attack, f"knows {escape(finding.knows)}", head, cells, floor=finding.attack == FLOOR))
    told = _scores(report.told["prompt"], names) + ([_number(report.told["answer"].get("tokens"))] if answered else [])
    told += [*([""] if learnt else []), ""]
    knows = "no attack: the model's own guess of each token if it is told all before it"
    rows.append(_row("told all before", knows, head, told, floor=True))
    caption = "Means over texts; the interval is of the mean, by resampling the texts."
    if any(finding.attack.endswith("decoder") for finding in report.findings):
        colluder = f" and {report.colluder} texts of a colluding client" if report.colluder else ""
        caption += f" Decoders learnt from public text{colluder}."
    return _table(head, rows, caption)


def _scores(scores: dict[str, Score], names: Sequence[str]) -> list[str]:
    tokens = scores.get("tokens")
    interval = "–" if tokens is None else f"{share(tokens.low)[:-2]} … {share(tokens.high)}"
    return [_number(tokens), interval, *(_number(scores.get(name)) for name in names if name != "tokens")]


def _number(score: Score | None) -> str:
    return "–" if score is None else share(score.mean)


def _row(name: str, more: str, head: Sequence[str], cells: Iterable[str], *, floor: bool = False) -> str:
    """A row: its name, HTML that says more of it, and figures that carry their headings for narrow screens."""
    figures = "".join(
        f'<td class="n" data-label="{escape(label)}">{escape(value)}</td>'
        for label, value in zip(head[1:], cells, strict=True)
    )
    kind = ' class="floor"' if floor else ""
    return f"<tr{kind}><th>{escape(name)}<small>{more}</small></th>{figures}</tr>"


def _table(head: Sequence[str], rows: Iterable[str], caption: str) -> str:
    heads = "".join(f"<th{' class=n' if place else ''}>{escape(name)}</th>" for place, name in enumerate(head))
    return (
        f'<table class="figures"><caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _text(report: Report, place: int) -> str:
    ids, prompt = report.ids[place], report.prompts[place]
    sent = [(_piece(report.words[token]), "") for token in ids]
    rows = [f'<tr><th>sent</th><td class="said">{_said(sent, prompt)}</td></tr>']
    for finding in report.findings:
        rows.append(f"<tr><th>{escape(finding.attack)}</th>{_recovered(report, finding, place)}</tr>")
    return f'<table class="text"><tbody>{"".join(rows)}</tbody></table>'


def _recovered(report: Report, finding: Finding, place: int) -> str:
    ids, prompt = report.ids[place], report.prompts[place]
    pieces = []
    for at, (token, guess) in enumerate(zip(ids, finding.recoveries[place].tokens, strict=True)):
        if guess is None or at < report.known:
            pieces.append(("_", "u"))
        else:
            pieces.append((_piece(report.words[guess]), "b" if guess == token else "i"))
    right = sum(kind == "b" for _, kind in pieces)
    counted = len(ids) - report.known
    return f'<td class="said">{_said(pieces, prompt)} <span class="soft">{right} of {counted}</span></td>'


def _said(pieces: Sequence[tuple[str, str]], prompt: int) -> str:
    """Pieces of a text, each in the element that says how it was recovered, the answer's in one of their own."""
    marked = [f"<{kind}>{text}</{kind}>" if kind else text for text, kind in pieces]
    answer = "".join(marked[prompt:])
    return "".join(marked[:prompt]) + (f'<span class="answer">{answer}</span>' if answer else "")


def _piece(text: str) -> str:
    """A token as it is shown: what cannot be seen, or would change how the rest is shown, by a sign of its own."""
    return escape("".join(one if one.isprintable() else "⏎" if one == "\n" else "·" for one in text)) or "·"


def _limits(report: Report) -> str:
    head = ["kind of text", "bits a token, at most", "tokens named, at most"]
    rows = []
    for limit in report.limits.limits:
        bits = "no bound" if limit.bits == float("inf") else f"{limit.bits:.3g}"
        cells = [f"{bits} ({_sure(limit.bits_guaranteed)})"]
        cells.append(f"{share(limit.accuracy)} ({_sure(limit.accuracy_guaranteed)})")
        rows.append(_row(limit.source, "", head, cells))
    looks = f" over {report.limits.looks} looks with fresh noise" if report.limits.looks > 1 else ""
    found = _table(head, rows, f"For any attacker with any method{looks}; 100 % rules nothing out.")
    only = "<p>Of states only: gradients tell more, and nothing bounds that.</p>" if report.train_steps else ""
    return found + only + f"<p>{escape(_epsilon(report))}</p>"


def _sure(guaranteed: bool) -> str:
    return "guarantee" if guaranteed else "estimate"


def _epsilon(report: Report) -> str:
    state, text = report.limits.state, report.limits.text
    if state is None or text is None:
        return f"Differential privacy: none ({report.limits.no_epsilon})."
    return (
        f"Local differential privacy, at delta {state.delta:g}: epsilon {state.epsilon:.4g} for one token's state, "
        f"{text.epsilon:.4g} for the longest text as a whole ({text.releases} releases). A guarantee; "
        "above 10 it says little."
    )


def _comparison(reports: Sequence[Report]) -> str:
    head = ["protection", "noise, × mean |h_A|", "best attack", "tokens read", "95 %"]
    head += ["any attacker, at most (estimate)", "loss, nats a token"]
    rows = []
    for report in reports:
        best, of_text = report.best, report.limits.of_text
        tokens = None if best is None else best.prompt["tokens"]
        cells = [f"{report.noise_level:.3g}", "–" if best is None else best.attack]
        cells += _scores({} if tokens is None else {"tokens": tokens}, ())
        cells += ["–" if of_text is None else share(of_text.accuracy)]
        cells += ["–" if report.loss is None else f"{report.loss:.2f}"]
        rows.append(_row(brief(report.asked), escape(_headline(report)), head, cells))
    caption = f"Blind guessing has a loss of {reports[0].blind_loss:.2f}."
    if reports[0].public_loss is not None:
        caption += f" The public model's on these texts, without protection, is {reports[0].public_loss:.2f}."
    return "<h2>In short</h2>" + _table(head, rows, caption)


def _assumptions(report: Report) -> str:
    points = [
        "Attackers know the public weights, the tokenizer, the partition, the mechanism and its strength, and keep all "
        "that crosses the wire. They do not know the mechanism's draws"
        + (", or the client's adapter." if report.adapter and not report.attacker_has_adapter else "."),
        "Only the attacks named here were made. Somebody may know a better one: what that could get at most is bounded "
        "above, as far as it can be.",
        "The texts are few. The interval says how much the mean would move with other texts of the same kind, and "
        "nothing about texts of another kind.",
        "A bound on bits that is a guarantee holds for every text. An estimate is made from the states of these texts. "
        "How many tokens can be named depends on how well text can be guessed anyway: for real text it is an estimate, "
        "and somebody with a better language model may get past it.",
        "Bounds are on averages over the tokens of a text: single tokens may be read with more certainty. They do not "
        "cover gradients in training, lengths and timing, or that two texts begin alike, which is plain to see.",
        f"Each text was seen {'once' if report.looks == 1 else f'{report.looks} times'}. Every further process that "
        "sends the same text, and in training every further epoch, is a further look with fresh noise.",
        "This page calls no configuration secure. It says what was read, and what can be ruled out.",
    ]
    return "<h2>What this assumes</h2><ul>" + "".join(f"<li>{escape(point)}</li>" for point in points) + "</ul>"


def _glossary() -> str:
    items = "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in GLOSSARY)
    return f"<h2>Words on this page</h2><dl>{items}</dl>"


def _repeat(command: str) -> str:
    versions = [f"fedsea {fedsea.__version__}", f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"no {name}")
    return (
        f"<h2>How to repeat it</h2><pre>{escape(command)}</pre>"
        f'<p class="soft">Noise is drawn anew each time, so figures under noise move within their intervals. '
        f"{escape(', '.join(versions))}.</p>"
    )
