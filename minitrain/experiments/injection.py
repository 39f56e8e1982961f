"""Experiments of the kind ``injection``: a run with one fault, and beside it the same run without, held to the bit.

Each variant is another setting, under which both are made once more.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from minitrain.config import Config
from minitrain.errors import ConfigError
from minitrain.experiments.effect import PLATEAU, TRACED, effect, within
from minitrain.experiments.expected import Line, lines, sigmas, way_back
from minitrain.experiments.job import Finding, Job
from minitrain.files import write_atomic
from minitrain.report import around
from minitrain.report.log import Log
from minitrain.report.page import listed, page
from minitrain.report.story import machine_name
from minitrain.report.words import count, number
from minitrain.run_folder import RunFolder
from minitrain.stability import CALM, WINDOW

TWIN = "baseline"
"""The run inside the experiment that is the same without the injection."""
PICTURE = "injection.png"


def check(job: Job) -> None:
    """Raises ConfigError where there is not one injection with enough steps around it."""
    for name, config in {"": job.config, **job.variants}.items():
        total = config.scheduler.total_steps
        steps = [one.step for one in config.injections]
        if len(steps) != 1 or not within(steps[0], total):
            found = listed([str(step) for step in steps]) if steps else "none"
            where = f" (in the variant {name})" if name else ""
            raise ConfigError(
                f"injections: expected one, at a step from {WINDOW + 1} to {total - PLATEAU - 1} in a run of {total} "
                f"steps, so that there is something before and behind it, got {found}"
                f"{where}; --set injection.step=K moves it"
            )


def make(job: Job) -> Finding:
    """Both runs, and both once more for every variant; each pair compared, the page written."""
    config = job.config
    results = job.results(config)
    pairs: dict[str, dict[str, Any]] = {}
    for name, each in {"": config, **job.variants}.items():
        pair = _pair(job, each, name, f"{name}-{TWIN}" if name else TWIN)
        if pair is None:
            what = f"under {' '.join(job.preset.variants[name])} a run" if name else "a run"
            return Finding(f"Nothing was compared: {what} ended with numbers that are not finite", results, True)
        pairs[name] = pair
    whole, others = pairs[""], {name: pair for name, pair in pairs.items() if name}
    told = lines(whole, config)
    headline = _headline(config, whole, told)
    results |= {
        "injection": config.injections[0].model_dump(exclude_none=True),
        "expectations": [line._asdict() for line in told],
        "effect": whole,
        "variants": [{"name": n, "set": list(job.preset.variants[n]), "effect": e} for n, e in others.items()],
    }
    write_atomic(job.folder.path / PICTURE, _picture(job, config, headline, whole, others))
    shown = (f"Loss and gradient norm around step {whole['step']:,}", PICTURE)
    write_atomic(job.folder.readme, page(job.title, headline, shown, _told(job, config, whole, told, others)))
    return Finding(headline, results, not whole["before"]["same_bits"])


def _pair(job: Job, config: Config, name: str, twin: str) -> dict[str, Any] | None:
    """The effect of the injection of this configuration, None where a run ended early. Raises Stopped."""
    inside = _light(config) if name else config
    runs = (inside, name), (_light(config.model_copy(update={"injections": []})), twin)
    if any(job.results(each, inner)["ended"] != "complete" for each, inner in runs):
        return None
    return effect(_folder(job, name), job.inner(twin), config.injections[0].target if _of_parameter(config) else None)


def _light(config: Config) -> Config:
    """Of a run inside, no moments but those of the keyframes: every step's would take 1.7 GB each."""
    return config.model_copy(update={"record": config.record.model_copy(update={"moments": "keyframes"})})


def _folder(job: Job, name: str) -> RunFolder:
    return job.inner(name) if name else job.folder


def _of_parameter(config: Config) -> bool:
    """Whether the injection is about a moment of one parameter."""
    return config.injections[0].name in ("v_corrupt", "m_corrupt")


def _headline(config: Config, e: Mapping[str, Any], told: list[Line]) -> str:
    met = sum(line.as_expected for line in told)
    return (
        f"`{config.injections[0].name}` at step {e['step']:,}: {met} of {len(told)} as expected; gradient norm "
        f"× {number(e['norm_ratio'])}, highest loss {sigmas(e['loss']['peak_sigmas'])} "
        f"(baseline {sigmas(e['loss']['baseline_peak_sigmas'])})"
    )


def _picture(
    job: Job, config: Config, headline: str, e: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]
) -> bytes:
    """Loss and norm of both runs; v, where that was changed; the loss under the setting where it rose highest."""
    name, K = config.injections[0].name, config.injections[0].step
    log, twin = Log.read(job.folder), Log.read(job.inner(TWIN))
    panels = [around.loss(log, twin), around.norm(log, twin, config.optimizer.clip)]
    if name == "v_corrupt":
        panels.append(around.ratio(f"v of {config.injections[0].target} ÷ baseline", K, e["trace"]["v"]))
    if others:
        top = max(others, key=lambda n: others[n]["loss"]["peak_sigmas"])
        setting = " ".join(job.preset.variants[top])
        panels.append(around.loss(Log.read(job.inner(top)), Log.read(job.inner(f"{top}-{TWIN}")), setting))
    return around.draw(panels, K, name, headline.replace("`", ""), f"{job.preset.name}: {name} at step {K:,}")


# The page


def _told(
    job: Job, config: Config, e: Mapping[str, Any], told: list[Line], others: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    about, run = job.folder.read_manifest(), shlex.quote(str(job.folder.path))
    verdict = {True: "as expected", False: "**otherwise**"}
    rows = [f"| {line.expected} | {line.seen} | {verdict[line.as_expected]} |" for line in told]
    return {
        "Expected and seen": "\n".join(["| expected | seen | |", "|---|---|---|", *rows])
        + f"\n\nσ is the deviation of the loss in the {WINDOW} steps before.",
        f"What differs in step {e['step']:,}": _differs(e, config.injections[0].factor),
        "Why": _why(config, e),
        "Afterwards": _afterwards(e),
        "Other settings": _settings(job, others),
        "Again": (
            f"{job.again()}The step itself, from its record:\n\n```\nminitrain replay {run} --step {e['step']}\n```\n\n"
            f"results.json holds every figure, runs/{TWIN}/ the baseline ({machine_name(about)})."
        ),
    }


def _differs(e: Mapping[str, Any], factor: float | None) -> str:
    """Part by part, from both runs of the step."""
    changed = [p for p in e["parts"] if p["different"]]
    same = [p["part"] for p in e["parts"] if not p["different"]]
    rows = [
        f"| {p['part']} | {p['different_elements']:,} of {p['elements']:,} "
        f"| {f'{factor:g}, to the bit' if p['exact'] else _ratio(p['ratio'])} |"
        for p in changed
    ]
    table = "\n".join(["| part | elements | ÷ baseline |", "|---|---|---|", *rows])
    text = f"The same to the bit: {listed(same)}." if same else ""
    return "\n\n".join(filter(None, (table if changed else "Nothing.", text)))


def _ratio(ratio: list[float] | None) -> str:
    if ratio is None:
        return "-"
    low, high = ratio
    off = max(abs(low - 1), abs(high - 1))
    if off < 1e-2:
        return f"1 ± {off:.1e}"
    return f"{low:.3g} to {high:.3g}" if low > 0 and high < 10 * low else "anything"


def _why(config: Config, e: Mapping[str, Any]) -> str:
    """In numbers, the way from the fault to the loss."""
    one, clip, norm = config.injections[0], config.optimizer.clip, e["usual"]["grad_norm"]["mean"]
    if _of_parameter(config):
        ratios = [(n, e["trace"]["update"][n]) for n in (1, PLATEAU, TRACED - 1) if n < len(e["trace"]["update"])]
        told = [f"{number(ratio)} × after {count(n, 'step')}" for n, ratio in ratios if ratio is not None]
        return f"The update of `{one.target}`, against the baseline's, is {listed(told)}." if told else ""
    if clip is None or norm is None:
        return ""
    if norm <= clip:
        return f"The usual norm, {number(norm)}, lies below the clip of {clip:g}."
    usual = f"The usual norm, {number(norm)}, is above the clip of {clip:g}"
    if one.name == "scale":
        return f"{usual}, which divides any factor out again: only the norm before the clip shows it."
    return f"{usual}, which makes every step alike in size, this one too ({number(e['clipped_at_step'])})."


def _afterwards(e: Mapping[str, Any]) -> str:
    K, left, back = e["step"], e["left_band"], e["back_in_band"]
    text = f"The loss was at most {sigmas(e['excess_sigmas'], 3)} above the baseline's (step {e['excess_step']:,}). It "
    if left is None:
        text += f"never left ±{CALM:g} σ around it."
    elif back is None:
        text += f"left ±{CALM:g} σ around it at step {left:,} and was not back to stay."
    else:
        text += f"left ±{CALM:g} σ around it at step {left:,} and was back to stay from step {back:,} on."
    near, far = e["trace"]["distance"], e["distance"]
    states = [f"{_small(near[n - 1])} in state {K + n:,}" for n in (1, 10, 50) if n <= len(near)]
    if far:
        states.append(f"{_small(far[-1]['l2'])} in state {far[-1]['state']:,} ({100 * far[-1]['relative']:.2g} %)")
    return f"{text} The parameters' distance from the baseline's: {listed(states)}."


def _small(x: float | None) -> str:
    return "not finite" if x is None else f"{x:.3g}"


def _settings(job: Job, others: Mapping[str, Mapping[str, Any]]) -> str:
    """The same injection under other settings, a line each."""
    if not others:
        return ""
    rows = [
        f"| `{' '.join(job.preset.variants[name])}` | {number(e['norm_ratio'])} | {number(e['clipped_at_step'])} "
        f"| {sigmas(e['loss']['peak_sigmas'])} ({sigmas(e['loss']['baseline_peak_sigmas'])}) "
        f"| {way_back(e) if e['spikes'] else '-'} | {sigmas(e['plateau_sigmas'])} |"
        for name, e in others.items()
    ]
    head = f"| setting | norm × | clipped | highest loss (baseline) | recovery | mean of {PLATEAU} steps |"
    seen = [f"`{' '.join(job.preset.variants[name])}`" for name, e in others.items() if e["spikes"]]
    text = f"A spike shows with {listed(seen)}." if seen else "No spike shows with any of these."
    return "\n".join([head, "|---|---|---|---|---|---|", *rows]) + f"\n\n{text}"
