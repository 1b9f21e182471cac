"""The pages: what waits for a person, and one request with what its answer should rest on."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence

from contracts.errors import RatchetError
from contracts.settings import Settings
from resources import release_diff, releases, report
from resources.approvals import Request
from resources.release_card.evidence import Evidence

#: Answers that differ and are shown; the rest is counted.
SHOWN = 20
_GOOD = {"waiting": None, "approved": True, "used": True, "refused": False, "outdated": False}
#: Reads the token out of the address; it never reaches a server's log that way.
SCRIPT = """
const field = document.querySelector('input[name=token]');
if (field && location.hash.startsWith('#token=')) field.value = location.hash.slice(7);
"""


def index(requests: Sequence[Request]) -> str:
    """Every request, the newest first."""
    rows = [
        (
            report.Markup(f'<a href="/approvals/{r.seq}">{r.seq}</a>'),
            report.badge(r.state, _GOOD[r.state]),
            r.entry.release,
            r.entry.channel,
            r.risk.level,
            r.entry.actor,
            r.entry.time[:19].replace("T", " "),
        )
        for r in reversed(requests)
    ]
    columns = ["request", "state", "release", "channel", "risk", "asked by", "time (UTC)"]
    body = report.table(rows, columns) if rows else "No release has asked for an approval."
    waiting = sum(r.state == "waiting" for r in requests)
    said = f"{waiting} waiting" if waiting else "nothing waits"
    return report.html_report("Approvals", [body], report.badge(said, None if waiting else True))


def detail(request: Request, settings: Settings, nonce: str) -> str:
    """One request: risk, the gate's reasons, the differences, answers side by side, the form."""
    parts = list(_parts(request, settings))
    if request.state == "waiting":
        parts.append(_form(request, nonce))
    title = f"Release {request.entry.release} on {request.entry.channel}"
    return report.html_report(
        title, parts, report.badge(f"{request.state}, risk {request.risk.level}",
                                   _GOOD[request.state])
    )  # fmt: skip


def problem(error: RatchetError, seq: int | None) -> str:
    """What went wrong, and the way back."""
    back = f"/approvals/{seq}" if seq is not None else "/approvals"
    link = report.Markup(f'<p><a href="{back}">back</a></p>')
    return report.html_report("That did not work", [report.preformatted(str(error)), link])


def _parts(request: Request, settings: Settings) -> Iterator[str]:
    entry, answer = request.entry, request.answer
    asked = f"Asked by {entry.actor} at {entry.time[:19].replace('T', ' ')} UTC."
    yield report.section(
        "Why it waits", asked, report.preformatted("\n".join(request.risk.reasons))
    )
    if answer is not None:
        said = f"{answer.kind} by {answer.actor} at {answer.time[:19].replace('T', ' ')} UTC"
        yield report.section("Answer", said, answer.reason or "No reason was given.")
    try:
        release = releases.load(settings, entry.release).release
        live = releases.load(settings, request.against).release if request.against else None
    except RatchetError as error:
        yield report.section("Not here", report.preformatted(str(error)))
        return
    new = Evidence(release, settings)
    yield report.section("The gate", *_gate(new, request.seq))
    if live is None:
        yield report.section("Against the live release", "Nothing is live on this channel.")
        return
    changes = release_diff.diff(live, release)
    rows = [(c.kind, c.name, _short(c.before), _short(c.after)) for c in changes]
    table = report.table(rows, ["what", "name", f"live: {live.id}", f"new: {release.id}"])
    prompt = release_diff.prompt_texts(live, release, settings)
    yield report.section(
        "Against the live release",
        table,
        *([report.preformatted("\n".join(prompt))] if prompt else []),
    )
    yield report.section("Answers side by side", *_answers(Evidence(live, settings), new))


def _short(value: object) -> object:
    """A digest by its beginning; its whole is in `ratchet release diff --json`."""
    digest = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32,64}(\.dir)?", value)
    return f"{value[:12]} ..." if digest and isinstance(value, str) else value


def _gate(evidence: Evidence, seq: int) -> Iterator[str]:
    verdict = evidence.verdict
    if not verdict:
        yield "The verdict's file is not here: run dvc pull at the release's commit."
        return
    word = str(verdict.get("verdict"))
    yield report.badge(word, word == "PASS")
    yield report.preformatted("\n".join(map(str, verdict.get("reasons", []))))
    yield report.Markup(f'<p><a href="/approvals/{seq}/gate">the gate\'s whole report</a></p>')


def _answers(live: Evidence, new: Evidence) -> Iterator[str]:
    before, after = live.answers, new.answers
    common = [name for name in after if name in before]
    if not common:
        yield "Answers of both releases to the same questions are not here (dvc pull brings them)."
        return
    moved = [name for name in common if before[name]["answer"] != after[name]["answer"]]
    yield f"{len(moved)} of {len(common)} golden questions are answered in other words."
    rows = [
        (after[name]["question"], before[name]["answer"], after[name]["answer"])
        for name in moved[:SHOWN]
    ]
    if rows:
        yield report.table(rows, ["question", "live", "new"])
    if len(moved) > SHOWN:
        yield f"{len(moved) - SHOWN} more are not shown."


def _form(request: Request, nonce: str) -> str:
    field = '<p><label>{0}<br><input name="{1}" size="60" maxlength="{2}" {3}></label></p>'
    fields = "".join(
        field.format(html.escape(label), name, most, more)
        for label, name, most, more in (
            ("Your name", "name", 200, 'required autocomplete="name"'),
            ("Reason (a refusal needs one)", "reason", 2000, ""),
            ("Token (the link brings it)", "token", 200, 'required autocomplete="off"'),
        )
    )
    return report.section(
        "Your answer",
        "It is written into the ledger under your name, once, and cannot be taken back.",
        report.Markup(
            f'<form method="post" action="/approvals/{request.seq}">{fields}'
            '<button name="decision" value="approve">Approve</button> '
            '<button name="decision" value="refuse">Refuse</button></form>'
            f'<script nonce="{nonce}">{SCRIPT}</script>'
        ),
    )
