"""A report of runs as one HTML file: no network, no script, light and dark, from the width of a phone on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from torchrl_chat.evaluation.report import interval_text, p_of, power, verdict


def as_page(report: Mapping[str, Any]) -> str:
    """The page of a report.

    Args:
        report: what :func:`~torchrl_chat.evaluation.report.report` returned.

    Example:
        >>> page = as_page({"runs": [], "comparisons": [], "steps": None, "notes": ["<none>"], "metric": "success"})
        >>> "&lt;none&gt;" in page, "<script" in page
        (True, False)
    """
    names = [run["name"] for run in report["runs"]]
    title = (
        f"{names[1]} against {names[0]}" if len(names) == 2 else f"Evaluation of {', '.join(names) or 'nothing'}"
    )
    if len(names) > 3:
        title = f"Evaluation of {len(names)} models"
    comparisons = report["comparisons"]
    parts = [
        _lead(comparisons),
        _section("runs", "Runs", _runs(report)),
        _section("curve", "By training step", _curve(report)) if len(report["steps"] or ()) > 2 else "",
        *(
            _section(f"c{i}", _title(c), _comparison(c, alone=len(comparisons) == 1))
            for i, c in enumerate(comparisons)
        ),
        _section("notes", "Notes", _list(report["notes"])) if report["notes"] else "",
        _section("method", "How to read this", _METHOD),
    ]
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(part for part in parts if part))


def _lead(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The verdicts, first of all, with links to where they come from."""
    if len(comparisons) == 1:
        return f'<p class="lead">{escape(_sentence(comparisons[0]))}</p>'
    items = [
        f'<li><a href="#c{i}">{escape(_title(c))}</a>: {escape(verdict(c))}</li>' for i, c in enumerate(comparisons)
    ]
    return f'<nav aria-label="Comparisons"><ul>{"".join(items)}</ul></nav>' if items else ""


def _sentence(c: Mapping[str, Any]) -> str:
    """The verdict with the figures that it rests on."""
    if not c["questions"]:
        return verdict(c)
    told = f"{verdict(c)} {interval_text(c)}"
    return told if c["p"] is None else f"{told}, McNemar's exact p {p_of(c['p'])}"


def _title(c: Mapping[str, Any]) -> str:
    return f"{c['second']} against {c['first']}, {c['task'] or 'all tasks'}"


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(title)}</h2>{body}</section>'


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table that scrolls by itself where it is too wide.

    Args:
        name: what it is called for those who do not see it.
        head: the columns' names.
        rows: cells, HTML already.
        words: how many of the first columns are words; the others are numbers.
    """
    top = "".join(
        f'<th scope="col"{"" if i < words else _NUMBER}>{escape(cell)}</th>' if cell else "<td></td>"
        for i, cell in enumerate(head)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{cell}</th>' if i == 0 else f"<td{'' if i < words else _NUMBER}>{cell}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" role="region" aria-label="Table: {escape(name)}" tabindex="0">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


_NUMBER = ' class="n"'


def _runs(report: Mapping[str, Any]) -> str:
    ks = sorted(
        {int(k) for run in report["runs"] for s in run["tasks"].values() for k in s["pass_at_k"] if int(k) > 1}
    )
    head = ["Model", "Task", "Questions", "Accuracy", "95 % interval"]
    head += [f"pass@{ks[-1]}", f"maj@{ks[-1]}"] if ks else []
    head += ["Cut", "Sampled tokens", "Prompt tokens", "Seconds"]
    rows = []
    for run in report["runs"]:
        for task, summary in run["tasks"].items():
            low, high = summary["interval"]
            at_k = [summary[name].get(str(ks[-1])) for name in ("pass_at_k", "maj_at_k")] if ks else []
            cost = summary["cost"]
            row = [
                run["name"],
                task,
                f"{summary['questions']:,}",
                f"{summary['accuracy']:.4f}",
                f"{low:.4f} to {high:.4f}",
            ]
            row += ["" if entry is None else f"{entry['value']:.4f}" for entry in at_k]
            row += [f"{summary['cut_share']:.1%}", f"{cost['sampled_tokens']:,}", f"{cost['prompt_tokens']:,}"]
            rows.append([*map(escape, row), f"{cost['seconds']:,.1f}"])
    return _table("Runs", head, rows, words=2)


def _comparison(c: Mapping[str, Any], alone: bool) -> str:
    if not c["questions"]:
        return f"<p>{escape(_sentence(c))}</p>{_left_out(c)}"
    values = [("all questions", c)]
    values += [(f"{column}: {value}", s) for column, of in c["slices"].items() for value, s in of.items()]
    reach = 1.02 * max(
        [abs(s["difference"]) for _, s in values] + [abs(end) for _, s in values for end in s["interval"] or ()]
    )
    reach = reach or 1.0  # nothing differs
    rows = []
    for label, s in values:
        cells = [
            label,
            f"{s['questions']:,}",
            f"{s['first_mean']:.4f}",
            f"{s['second_mean']:.4f}",
            f"{s['difference']:+.4f}",
        ]
        cells.append("" if s["interval"] is None else "{:+.4f} to {:+.4f}".format(*s["interval"]))
        rows.append([*map(escape, cells), _bar(s, reach), escape(p_of(s["p"])), escape(p_of(s["mid_p"]))])
    head = [
        "Questions",
        "Number",
        c["first"],
        c["second"],
        "Difference",
        "95 % interval",
        f"-{reach:.2f} to +{reach:.2f}",
        "Exact p",
        "Mid-p",
    ]
    parts = [
        "" if alone else f'<p class="verdict">{escape(_sentence(c))}</p>',
        f"<p>{escape(' '.join(power(c)))}</p>",
        _table(_title(c), head, rows),
        _two_by_two(c),
        _left_out(c),
    ]
    for kind, count, better, worse in (
        ("gained", "ahead", "second", "first"),
        ("lost", "behind", "first", "second"),
    ):
        shown = c.get("examples", {}).get(kind)
        if shown:
            name = f"Where {c[better]} is ahead of {c[worse]}: {len(shown)} of {c[count]:,} questions"
            items = "".join(_example(c, example) for example in shown)
            parts.append(f"<details><summary>{escape(name)}</summary>{items}</details>")
    return "".join(parts)


def _bar(s: Mapping[str, Any], reach: float) -> str:
    """The difference and its interval on a line whose middle is 0; what it says stands beside it."""

    def at(value: float) -> str:
        return f"{100 + 95 * value / reach:.1f}"

    line = ""
    if s["interval"] is not None:
        line = f'<line class="span" x1="{at(s["interval"][0])}" x2="{at(s["interval"][1])}" y1="10" y2="10"/>'
    return (
        '<svg class="bar" viewBox="0 0 200 20" width="200" height="20" aria-hidden="true">'
        f'<line class="zero" x1="100" x2="100" y1="0" y2="20"/>{line}<circle cx="{at(s["difference"])}" cy="10" r="4"/></svg>'
    )


def _two_by_two(c: Mapping[str, Any]) -> str:
    """How often each was right, with the other and alone."""
    if c["p"] is None:
        return ""
    both = round(c["first_mean"] * c["questions"]) - c["lost"]
    neither = c["questions"] - both - c["lost"] - c["gained"]
    head = ["", f"{c['second']} right", f"{c['second']} wrong"]
    rows = [
        [escape(f"{c['first']} right"), f"{both:,}", f"{c['lost']:,}"],
        [escape(f"{c['first']} wrong"), f"{c['gained']:,}", f"{neither:,}"],
    ]
    return _table(f"{_title(c)}: who has them right", head, rows)


def _left_out(c: Mapping[str, Any]) -> str:
    parts = []
    for name in ("first", "second"):
        count, shown = c.get(f"only_{name}"), c.get("left_out", {}).get(name, [])
        if count:
            more = f"<p>and {count - len(shown):,} more</p>" if count > len(shown) else ""
            items = "".join(f"<li><pre>{escape(text)}</pre></li>" for text in shown)
            parts.append(
                f"<details><summary>Left out: {count:,} questions that only {escape(c[name])} has</summary><ul>{items}</ul>{more}</details>"
            )
    return "".join(parts)


def _example(c: Mapping[str, Any], example: Mapping[str, Any]) -> str:
    answers = "".join(
        f'<div><h4>{escape(c[name])} <span class="soft">{escape(_values(example[name]["values"]))}</span></h4>'
        f'<pre dir="auto">{escape(example[name]["answer"])}</pre></div>'
        for name in ("first", "second")
    )
    return (
        f'<article><h3>Question</h3><pre dir="auto">{escape(example["question"])}</pre>'
        f'<h4>Reference</h4><pre dir="auto">{escape(example["reference"])}</pre><div class="two">{answers}</div></article>'
    )


def _values(values: Sequence[float]) -> str:
    if len(values) == 1:
        return {0.0: "wrong", 1.0: "right"}.get(values[0], f"{values[0]:.3f}")
    if set(values) <= {0.0, 1.0}:
        return f"{sum(values):.0f} of {len(values)} right"
    return f"mean {sum(values) / len(values):.3f} of {len(values)}"


_COLOURS = 4  # of lines in a curve


def _curve(report: Mapping[str, Any]) -> str:
    """The accuracy of each task over the training steps, with intervals; the numbers are in the table of runs."""
    steps = report["steps"]
    left, top, width, height = 46, 12, 580, 200
    last, begin = max(steps), min(steps)

    def x(step: float) -> float:
        return left + width * (step - begin) / max(1, last - begin)

    def y(share: float) -> float:
        return top + height * (1 - share)

    drawn = [
        f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y(s):.1f}" y2="{y(s):.1f}"/>'
        f'<text x="{left - 8}" y="{y(s) + 4:.1f}" text-anchor="end">{s:.2f}</text>'
        for s in (0, 0.25, 0.5, 0.75, 1)
    ]
    shown, free = [], -1.0
    for step in sorted(steps):
        if x(step) >= free:  # labels do not stand on each other
            free = x(step) + 48
            shown.append(f'<text x="{x(step):.1f}" y="{top + height + 18}" text-anchor="middle">{step}</text>')
    tasks = list(dict.fromkeys(task for run in report["runs"] for task in run["tasks"]))
    for place, task in enumerate(tasks):
        points = sorted(
            (step, run["tasks"][task]["accuracy"], run["tasks"][task]["interval"])
            for step, run in zip(steps, report["runs"], strict=True)
            if task in run["tasks"]
        )
        path = " ".join(f"{x(step):.1f},{y(share):.1f}" for step, share, _ in points)
        marks = "".join(
            f'<line x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}"/>'
            f'<circle cx="{x(step):.1f}" cy="{y(share):.1f}" r="3.5"/>'
            for step, share, (low, high) in points
        )
        label = f'<text class="name" x="{x(points[-1][0]) - 8:.1f}" y="{y(points[-1][1]) + 18 + 15 * place:.1f}" text-anchor="end">{escape(task)}</text>'
        drawn.append(f'<g class="line l{place % _COLOURS}"><polyline points="{path}"/>{marks}{label}</g>')
    told = escape(
        f"Accuracy of {', '.join(tasks)} over training steps {begin} to {last}; the numbers are in the table of runs."
    )
    return (
        f'<div class="wide" role="region" aria-label="Drawing" tabindex="0"><svg class="curve" role="img" aria-label="{told}" '
        f'viewBox="0 0 {left + width + 24} {top + height + 30}">{"".join(drawn)}{"".join(shown)}</svg></div>'
    )


_METHOD = """<p>Questions that both have are paired. The difference is the second model's mean less the first's, each question
weighing alike; its interval comes from resampling whole questions, with all their answers. With one answer to each question
the exact test of McNemar decides at 5 %: it looks at the questions that one model alone has right. Mid-p is less cautious. With
several answers the interval decides: 0 is outside of it, or it is not. The interval of an accuracy is Wilson's, and says nothing
of a difference: two that overlap may well differ.</p>"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
<footer>torchrl-chat eval</footer>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light; --bg: #fff; --pane: #f7f8f8; --line: #dfe2e4; --edge: #868d94; --ink: #1b1f23; --soft: #5b636b;
  --accent: #0b6b64; --l1: #8a4b00; --l2: #3b4fa8; --l3: #8f2a5b;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
@media (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --bg: #14171a; --pane: #1d2125; --line: #2e3439; --edge: #727b83; --ink: #e3e6e8; --soft: #9ba3aa;
    --accent: #5cc8bd; --l1: #e0a35c; --l2: #9fb0ff; --l3: #ee95bd; } }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.5 var(--sans); color: var(--ink); background: var(--bg); -webkit-text-size-adjust: 100%; }
main, footer { max-width: 72rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; line-height: 1.25; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
h3, h4 { font-size: .8rem; color: var(--soft); margin: .75rem 0 .25rem; overflow-wrap: anywhere; }
p, ul { max-width: 46rem; margin: .5rem 0; }
ul { padding-left: 1.25rem; }
a { color: var(--accent); }
.lead, .verdict { font-size: 1.1rem; font-weight: 600; overflow-wrap: anywhere; }
.soft, footer { color: var(--soft); font-weight: 400; }
footer { padding-top: 2rem; padding-bottom: 2rem; font-size: .8rem; }
.wide { overflow-x: auto; margin: .75rem 0; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; vertical-align: middle; }
th.n, td.n { text-align: right; }
thead th { font-size: .8rem; color: var(--soft); font-weight: 600; }
tbody th { font-weight: 400; }
.bar { display: block; }
.zero { stroke: var(--edge); }
.span { stroke: var(--accent); stroke-width: 2; }
.bar circle { fill: var(--accent); }
.curve { display: block; min-width: 34rem; max-width: 44rem; width: 100%; font: 12px var(--sans); }
.curve text { fill: var(--soft); }
.grid { stroke: var(--line); }
.line { --colour: var(--accent); } .l1 { --colour: var(--l1); } .l2 { --colour: var(--l2); } .l3 { --colour: var(--l3); }
.line polyline { fill: none; stroke: var(--colour); stroke-width: 2; }
.line line { stroke: var(--colour); }
.line circle, .line .name { fill: var(--colour); }
details { margin: .75rem 0; border-top: 1px solid var(--line); padding-top: .5rem; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
article { background: var(--pane); padding: .25rem 1rem 1rem; margin: .75rem 0; border-radius: 4px; }
pre { font: 13px/1.5 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.two { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 1.5rem; }
@media (max-width: 40rem) { .two { grid-template-columns: minmax(0, 1fr); } }
@media print { details { break-inside: avoid; } .wide { overflow: visible; } }
"""
