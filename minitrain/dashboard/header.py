"""The top of the page: which run, how it ended, whether it is wired as it should be, and what made it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from minitrain.config import Config, differing_keys
from minitrain.dashboard.checks import Check, checks, verdict
from minitrain.dashboard.gather import ENDED, RunData, spike_size
from minitrain.dashboard.lanes import letters
from minitrain.report.words import count, number

MARK_COLOURS = {
    "injection": "var(--red)",
    "alert": "var(--pink)",
    "broken": "var(--pink)",
    "forked": "var(--black)",
    "best": "var(--green)",
    "onset": "var(--amber)",
}


def header(runs: Sequence[RunData]) -> str:
    """HTML."""
    parts = [f"<header><h1>{escape(' against '.join(run.name for run in runs))}</h1>"]
    if len(runs) == 2:
        parts.append(_difference(*runs))
    for letter, run in zip(letters(runs), runs, strict=True):
        parts.append(_run(f"<b>{letter}</b> " if letter else "", run))
    return "".join(parts) + "</header>"


def headline(run: RunData) -> str:
    """State, steps, perplexity against the baseline, speed: one line of text."""
    state = ENDED.get(run.ended, run.ended)
    told = [f"{state}, {count(run.steps, 'step')} of {run.config.scheduler.total_steps - run.start:,}"]
    final = run.results.get("val_ppl")
    if isinstance(final, int | float):
        gain = run.results.get("ppl_improvement_pct")
        side = ""
        if isinstance(gain, int | float) and math.isfinite(run.baseline_ppl):
            word = "better" if gain > 0 else "worse"
            side = f", {abs(gain):,.1f} % {word} than the {run.baseline_name} ({number(run.baseline_ppl)})"
        told.append(f"validation perplexity {number(final)}{side}")
    parameters = run.manifest.get("parameters")
    if parameters:
        told.append(f"{parameters:,} parameters")
    rate = run.log.tokens_per_s[np.isfinite(run.log.tokens_per_s)]
    if len(rate):
        told.append(f"{number(float(np.median(rate)) / 1000, 1)}k tokens/s in the median")
    if wall := run.results.get("wall_clock_s"):
        told.append(f"{number(float(wall), 1)} s")
    return "; ".join(told)


def first_difference(a: RunData, b: RunData) -> int | None:
    """The first step that both have whose loss differs; None where there is none."""
    common, at, other = np.intersect1d(a.log.step, b.log.step, return_indices=True)
    left, right = a.log.loss[at], b.log.loss[other]
    differs = np.flatnonzero((left != right) & ~(np.isnan(left) & np.isnan(right)))
    return int(common[differs[0]]) if len(differs) else None


def _difference(a: RunData, b: RunData) -> str:
    step, keys = first_difference(a, b), differing_keys(a.config, b.config)
    where = "The losses are equal in all steps that both have."
    if step is not None:
        where = f'The losses first differ at <button type="button" data-step="{step}">step {step:,}</button>.'
    rows = "".join(f"<li><code>{escape(line)}</code></li>" for line in keys)
    settings = f"<p>Settings that differ, A to B:</p><ul>{rows}</ul>" if keys else "<p>No setting differs.</p>"
    return f"<p>{where}</p>{settings}"


def _run(letter: str, run: RunData) -> str:
    found = checks(run)
    failed = any(check.verdict == "fail" for check in found)
    badge = f'<span class="badge {"fail" if failed else "pass"}">{escape(verdict(found))}</span>'
    notes = "".join(f'<p class="note">{letter}{escape(note)}</p>' for note in run.notes)
    alerts = "".join(f'<p class="note">{letter}Alert: {escape(str(one))}.</p>' for one in run.results.get("alerts", ()))
    kind = "headline fail" if run.ended == "nonfinite" else "headline"
    return (
        f'<p class="{kind}">{letter}{escape(headline(run))}</p><p>{badge}</p>{notes}{alerts}{_events(run)}'
        f'<div class="boxes">{_checks(found, failed)}{_configuration(run.config)}'
        f"{_table('Digests', digests(run), code=True)}{_table('Environment', environment(run))}"
        f"{_table('Results', _results(run))}</div>"
    )


def _events(run: RunData) -> str:
    """A button for what happened, which shows the steps around it."""
    if not run.marks and not run.spikes:
        return ""
    items = [
        f'<li><button type="button" data-step="{mark.step}" style="border-left-color:{MARK_COLOURS[mark.kind]}">'
        f"step {mark.step:,}: {escape(mark.text)}</button></li>"
        for mark in run.marks[:12]
    ]
    if len(run.marks) > 12:
        items.append(f"<li>and {len(run.marks) - 12:,} more events</li>")
    for spike in run.largest_spikes[:3]:
        back = f"back after {spike.recovery}" if spike.recovery else "not back in 50 steps"
        items.append(
            f'<li><button type="button" data-step="{spike.step}" style="border-left-color:var(--red)">'
            f"step {spike.step:,}: loss spike {spike_size(spike)}, {back}</button></li>"
        )
    return f'<ul class="chips" aria-label="Events">{"".join(items)}</ul>'


def _checks(found: Sequence[Check], failed: bool) -> str:
    words = {"pass": "✓ pass", "fail": "✗ fail", "not measured": "– not measured"}
    rows = "".join(
        f'<tr><td class="{check.verdict.split()[0]}">{words[check.verdict]}</td><td>{escape(check.question)}</td>'
        f"<td>{escape(check.measured)}</td><td>{escape(check.threshold)}</td>"
        f"<td>{escape(check.advice) if check.verdict == 'fail' else ''}</td></tr>"
        for check in found
    )
    titles = "<tr><th>verdict</th><th>question</th><th>measured</th><th>healthy</th><th>look at</th></tr>"
    return (
        f"<details{' open' if failed else ''}><summary>Checks of the configuration</summary>"
        f'<div class="wide"><table>{titles}{rows}</table></div></details>'
    )


def _configuration(config: Config) -> str:
    """Every setting; those that are not the default stand out."""
    usual, rows = Config().model_dump(), []
    for section, body in config.model_dump().items():
        if isinstance(body, Mapping):
            cells = []
            for key, value in body.items():
                text = f"{key} {value}"
                cells.append(f"<b>{escape(text)}</b>" if value != usual[section].get(key) else escape(text))
            rows.append(f"<tr><th>{escape(section)}</th><td>{' · '.join(cells)}</td></tr>")
        elif body:
            told = "<br>".join(escape(", ".join(f"{k} {v}" for k, v in one.items() if v is not None)) for one in body)
            rows.append(f"<tr><th>{escape(section)}</th><td><b>{told}</b></td></tr>")
    table = f'<div class="wide"><table>{"".join(rows)}</table></div>'
    return f"<details><summary>Configuration (other than default in bold)</summary>{table}</details>"


def digests(run: RunData) -> dict[str, str]:
    """What proves that two runs are the same."""
    told = run.manifest
    outcome = told.get("outcome") or {}
    found = {
        "parameters, m, v at the end": outcome.get("digest"),
        "configuration": told.get("config_hash"),
        "data": told.get("data_manifest_hash"),
        "tokenizer": told.get("tokenizer_hash"),
        "git": f"{told['git_sha']}{' (changed since)' if told.get('git_dirty') else ''}"
        if told.get("git_sha")
        else None,
        "numerics version": told.get("numerics_version"),
    }
    return {key: str(value) for key, value in found.items() if value is not None}


def environment(run: RunData) -> dict[str, str]:
    """Where it ran and with what."""
    told = run.manifest
    hardware: Mapping[str, Any] = told.get("hardware") or {}
    ram = hardware.get("ram_bytes")
    found = {
        "processor": hardware.get("cpu"),
        "cores": hardware.get("cores"),
        "memory": f"{ram / 2**30:.1f} GiB" if ram else None,
        "instruction set": hardware.get("instruction_set"),
        "dtype": told.get("dtype"),
        "backend": told.get("backend"),
        "started": told.get("started_at"),
        "command": " ".join(map(str, told.get("command_line") or [])) or None,
        "versions": ", ".join(f"{name} {version}" for name, version in (told.get("versions") or {}).items()) or None,
    }
    return {key: str(value) for key, value in found.items() if value is not None}


def _results(run: RunData) -> dict[str, str]:
    """The plain figures of results.json."""
    return {
        key: number(value, 3) if isinstance(value, float) else str(value)
        for key, value in run.results.items()
        if isinstance(value, int | float | str) and value != ""
    }


def _table(title: str, rows: Mapping[str, str], code: bool = False) -> str:
    if not rows:
        return ""
    kind = ' class="digest"' if code else ""
    body = "".join(f"<tr><th>{escape(key)}</th><td{kind}>{escape(value)}</td></tr>" for key, value in rows.items())
    return f'<details><summary>{title}</summary><div class="wide"><table>{body}</table></div></details>'
