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
from fedsea.audit.audit import Finding, Report, share
from fedsea.audit.frontier import frontier
from fedsea.audit.page_style import STYLE
from fedsea.audit.scores import Score
from fedsea.errors import UsageError

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


def write_page(reports: Sequence[Report], command: str, file: Path) -> None:
    """Write `page` to a file.

    Raises
    ------
    UsageError
        If it cannot be written.
    """
    try:
        file.write_text(page(reports, command), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}") from None


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
    body = [f"<h1>{escape(title)}</h1>", _subtitle(first)]
    if len(reports) == 1:
        body += [_verdict(first), *_parts(first, "h2")]
    else:
        body += [_comparison(reports), *frontier(reports)]
        for report in reports:
            summary = f"{report.asked}: {_headline(report)}"
            body.append(f"<details><summary>{escape(summary)}</summary>{_verdict(report)}")
            body += [*_parts(report, "h3"), "</details>"]
    body += [_assumptions(first), _repeat(command)]
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
        f"after the embedding and {_layers(q)} before the head; {escape(report.wire_dtype)} on the wire{adapter}.</p>"
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


def _verdict(report: Report) -> str:
    headline = _headline(report)
    lines = [f"<strong>{headline[0].upper()}{headline[1:]}.</strong>", escape(report.verdict), escape(report.limit)]
    if report.loss is not None and report.public_loss is not None:
        lines.append(
            f"What it costs: the model's loss on these texts is {report.loss:.2f} nats a token here and "
            f"{report.public_loss:.2f} for the public model without protection."
        )
    lines.append(f"Protection: <code>{escape(report.asked)}</code>, {_strength(report)}.")
    return '<div class="verdict">' + "".join(f"<p>{line}</p>" for line in lines) + "</div>"


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
        f"struck through; <u>▯</u> is no guess, or what everybody knows.{answers}</p>"
    )
    for place in range(len(report.texts)):
        yield _text(report, place)
    yield f"<{level}>What no attacker gets past</{level}>"
    yield _limits(report)


def _attacks(report: Report) -> str:
    answered, learnt = any(report.answers), any(finding.labels for finding in report.findings)
    names = [name for name in WORDS if any(name in finding.prompt for finding in report.findings)]
    head = ["attack", "what the attacker knows beside what is sent", WORDS["tokens"], "95 %"]
    head += [WORDS[name] for name in names if name != "tokens"]
    head += [*(["answer's tokens"] if answered else []), *(["learnt tokens"] if learnt else []), "seconds a token"]
    rows = []
    for finding in report.findings:
        cells = _scores(finding.prompt, names) + ([_number(finding.answer.get("tokens"))] if answered else [])
        cells += [_number(finding.labels.get("labels"))] if learnt else []
        cells.append(f"{finding.seconds_per_token:.3f}")
        floor = ' class="floor"' if finding.attack == "prior" else ""
        rows.append(f"<tr{floor}><th>{escape(finding.attack)}</th><td>{escape(finding.knows)}</td>{_cells(cells)}</tr>")
    told = _scores(report.told["prompt"], names) + ([_number(report.told["answer"].get("tokens"))] if answered else [])
    told += [*([""] if learnt else []), ""]
    knows = "no attack: the model's own guess of each token if it is told all tokens before it"
    rows.append(f'<tr class="floor"><th>told all before</th><td>{knows}</td>{_cells(told)}</tr>')
    caption = "From 0 to 1, means over texts; the interval is of the mean, by resampling the texts."
    if any(finding.attack.endswith("decoder") for finding in report.findings):
        colluder = f" and {report.colluder} texts of a colluding client" if report.colluder else ""
        caption += f" Decoders learnt from public text{colluder}."
    return _table(head, rows, caption)


def _scores(scores: dict[str, Score], names: Sequence[str]) -> list[str]:
    tokens = scores.get("tokens")
    interval = "–" if tokens is None else f"{tokens.low:.2f} … {tokens.high:.2f}"
    return [_number(tokens), interval, *(_number(scores.get(name)) for name in names if name != "tokens")]


def _number(score: Score | None) -> str:
    return "–" if score is None else f"{score.mean:.3f}"


def _cells(values: Iterable[str]) -> str:
    return "".join(f'<td class="n">{escape(value)}</td>' for value in values)


def _table(head: Sequence[str], rows: Iterable[str], caption: str, left: int = 2) -> str:
    heads = "".join(f"<th{'' if place < left else ' class=n'}>{escape(name)}</th>" for place, name in enumerate(head))
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
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
            pieces.append(("▯", "u"))
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
    rows = []
    for limit in report.limits.limits:
        bits = "no bound" if limit.bits == float("inf") else f"{limit.bits:.3g}"
        cells = _cells([bits, _sure(limit.bits_guaranteed), share(limit.accuracy), _sure(limit.accuracy_guaranteed)])
        rows.append(f"<tr><th>{escape(limit.source)}</th>{cells}</tr>")
    looks = f" over {report.limits.looks} looks with fresh noise" if report.limits.looks > 1 else ""
    head = ["kind of text", "bits a token, at most", "which is a", "tokens named, at most", "which is a"]
    found = _table(head, rows, f"For any attacker with any method{looks}; 100 % rules nothing out.", left=1)
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
    rows = []
    for report in reports:
        best, of_text = report.best, report.limits.of_text
        tokens = None if best is None else best.prompt["tokens"]
        cells = [f"{report.noise_level:.3g}", "–" if best is None else best.attack]
        cells += ["–", "–"] if tokens is None else [share(tokens.mean), f"{tokens.low:.2f} … {tokens.high:.2f}"]
        cells += ["–" if of_text is None else share(of_text.accuracy)]
        cells += ["–" if report.loss is None else f"{report.loss:.2f}"]
        rows.append(f"<tr><th>{escape(report.asked)}</th><td>{escape(_headline(report))}</td>{_cells(cells)}</tr>")
    head = ["protection", "in words", "noise, × mean |h_A|", "best attack", "tokens read", "95 %"]
    head += ["any attacker, at most (estimate)", "loss, nats a token"]
    public = reports[0].public_loss
    caption = "" if public is None else f"The public model's loss on these texts, without protection, is {public:.2f}."
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


def _repeat(command: str) -> str:
    versions = [f"fedsea {fedsea.__version__}", f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"no {name}")
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"<h2>How to repeat it</h2><pre>{escape(command)}</pre>"
        f'<p class="soft">Noise is drawn anew each time, so figures under noise move within their intervals. '
        f"{escape(', '.join(versions))}; {today}.</p>"
    )
