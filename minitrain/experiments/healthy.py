"""Experiments of the kind ``healthy``: the default run with all metrics, and what is healthy in it, panel by panel."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain.config import Config
from minitrain.errors import ConfigError
from minitrain.experiments.expected import Line
from minitrain.experiments.job import Finding, Job
from minitrain.experiments.panels import CHANGE, EARLY, LATE, panels
from minitrain.files import write_atomic
from minitrain.metrics import Series, read_metrics
from minitrain.metrics.formulas import ONE_KEY
from minitrain.report.lines import Panel, draw
from minitrain.report.log import Log
from minitrain.report.page import listed, page
from minitrain.report.words import count, number

PICTURE = "healthy.png"
LAYERS = ("embed", "block.{i}.attn.out", "block.{i}.ffn.out", "ln_f", "logits")
"""The sites that are told of each layer: what goes into the residual stream, and what comes out of it."""

Figures = Mapping[str, Any]


def check(job: Job) -> None:
    """Raises ConfigError where nothing would be measured."""
    if not job.config.metrics.enabled:
        raise ConfigError("metrics.enabled: expected true, since the experiment is about them, got false")


def make(job: Job) -> Finding:
    """Train as the preset says, and tell what each panel shows of it."""
    config, folder = job.config, job.folder
    results = job.results(config)
    if results["ended"] != "complete":
        return Finding("Nothing was looked into: the run ended with numbers that are not finite", results, True)
    log, series = Log.read(folder), read_metrics(folder)
    rates = np.array([line["lr"] for line in folder.log_lines() if "lr" in line])
    figures = panels(log, rates, series, config)
    told = list(lines(figures, results, config))
    results |= {"panels": figures, "expectations": [line._asdict() for line in told]}
    headline = _headline(told)
    write_atomic(folder.path / PICTURE, draw(_drawn(series), headline, f"{job.preset.name}: all metrics of the run"))
    shown = ("Activations, spectral norms, updates and verb classes by step", PICTURE)
    write_atomic(folder.readme, page(job.title, headline, shown, _told(job, config, figures, told)))
    return Finding(headline, results, bool(results["alerts"]))


def _headline(told: list[Line]) -> str:
    return f"A healthy run in seven panels: {sum(line.as_expected for line in told)} of {len(told)} signs as expected"


# The picture


def _drawn(series: Mapping[str, Series]) -> list[Panel]:
    """Of the seven panels those whose lines are many; losses, rates and norms are in loss_curve.png and the page."""
    panels = (_activations(series), _spectral(series), _updates(series), _tax(series))
    return [panel for panel in panels if panel]


def _activations(series: Mapping[str, Series]) -> Panel:
    one = series["activation_mean_abs"]
    last = max(int(site.split(".")[1]) for site in one.labels[0] if site.startswith("block."))
    wanted = ["embed", "block.0.ffn.out", f"block.{last}.ffn.out", "ln_f", "logits"]
    return Panel("mean |x|", one.steps.astype(float), {n: one.values[:, one.labels[0].index(n)] for n in wanted})


def _spectral(series: Mapping[str, Series]) -> Panel:
    one = series["spectral_norm"]
    lines: dict[str, NDArray[np.floating]] = {}  # of the layers the largest
    for i, name in enumerate(one.labels[0]):
        kind = name.removesuffix(".weight").split(".", 2)[-1] if name.startswith("block.") else name
        lines[kind] = np.maximum(lines[kind], one.values[:, i]) if kind in lines else one.values[:, i]
    return Panel("largest spectral norm", one.steps.astype(float), lines)


def _updates(series: Mapping[str, Series]) -> Panel:
    one = series["update_ratio"]
    matrices = [one.labels[0].index(name) for name in series["spectral_norm"].labels[0]]
    values = one.values[:, matrices]
    lines = {"largest": values.max(axis=1), "median": np.median(values, axis=1), "least": values.min(axis=1)}
    return Panel("|update| / |matrix|", one.steps.astype(float), lines, level=1e-3)


def _tax(series: Mapping[str, Series]) -> Panel | None:
    one = series["class_loss"]
    if len(one.steps) < 2 or not np.isfinite(one.values).all():
        return None
    splits, kinds, scopes = one.labels
    a, b = kinds.index("irregular"), kinds.index("regular")
    lines = {
        f"{split}, {scope}": one.values[:, i, a, k] - one.values[:, i, b, k]
        for i, split in enumerate(splits)
        for k, scope in enumerate(scopes)
    }
    return Panel("irregular − regular, nats", one.steps.astype(float), lines, logarithmic=False, level=0.0)


# What was expected


def lines(f: Figures, results: Figures, config: Config) -> Iterator[Line]:
    """What theory, the stability check or a prototype expect of a healthy run, and what was measured of it."""
    prototype = not config.data.named_paths()  # it learnt sentences like those of the built-in corpus
    yield from _loss_lines(f["loss"], results, prototype)
    differs = f["learning_rate"]["largest_difference"]
    yield Line("the learning rate as configured in every step", f"off by at most {differs:.1g}", differs == 0)
    yield from _norm_lines(f["grad_norm"], prototype)
    a = f["activations"]
    fastest, growth = a["fastest"]["site"], a["fastest"]["growth"]
    yield Line("no activation grows 50 ×", f"at most {number(growth, 1)} × (`{fastest}`)", growth < 50)
    peak = a["largest_peak"]
    yield Line(f"no head on one key ({ONE_KEY:g})", f"largest weight {number(peak)} on average", peak < ONE_KEY)
    if (s := f["spectral_norm"]["fastest"]) is not None:
        seen = f"{number(s['ratio'])} × (`{s['matrix']}`, from step {s['from_step']:,})"
        yield Line(f"no spectral norm changes 2 × in {CHANGE} steps behind the warm-up", seen, s["ratio"] < 2)
    u = f["units_and_updates"]
    dead, ratio = u["dead_pct_largest"], u["update_ratio_median"]
    yield Line("no dead unit", f"at most {number(dead, 1)} % of a layer", dead == 0)
    yield Line("updates of about 1e-3 of the matrices", f"median {ratio:.1e}", 3e-4 <= ratio <= 3e-3)
    for split, scopes in (f["classes"]["last"]["tax"] if f["classes"] else {}).items():
        seen = listed([f"{tax:+.2f} on the {scope}" for scope, tax in scopes.items()])
        yield Line(f"irregular verbs cost more ({split})", seen, min(scopes.values()) > 0)


def _loss_lines(loss: Figures, results: Figures, prototype: bool) -> Iterator[Line]:
    first, chance = loss["first"], loss["chance"]
    yield Line(f"first loss within {number(chance, 3)} ± 0.5", number(first, 3), abs(first - chance) <= 0.5)
    better = f"perplexity {number(results['val_ppl'])} against {number(results['ngram_baseline_val_ppl'])}"
    yield Line("the n-gram baseline is beaten", better, results["beats_baseline"])
    if prototype and (best := results["best_val_ppl"]) is not None:
        seen = f"{number(best)} at step {results['best_val_step']:,}, {number(results['val_ppl'])}"
        near = abs(results["best_val_step"] - 1400) <= 100 and abs(best / 8.5 - 1) <= 0.1
        yield Line("least validation perplexity 8.5 at step 1,400, 8.7 at the end (prototype)", seen, near)
    onset, least = loss["overfit_onset"], loss["best_val_step"]
    if onset is not None:
        yield Line(
            "overfit onset within 100 steps of the least validation",
            f"steps {onset:,} and {least:,}",
            abs(onset - least) <= 100,
        )
    flagged = loss["spikes"]
    back = [s["recovery"] for s in flagged]
    seen = f"{len(flagged)}" + (f", {_back(back)}" if flagged else "")
    yield Line("2 to 5 spikes by chance, each back", seen, 2 <= len(flagged) <= 5 and None not in back)


def _norm_lines(norm: Figures, prototype: bool) -> Iterator[Line]:
    if prototype and norm["late"] is not None:
        expected = f"norm about 2 at step {EARLY}, 4 to 4.6 from {LATE} on (prototype)"
        seen = f"{number(norm['early'])} and {number(norm['late'])}"
        yield Line(expected, seen, 1.5 <= norm["early"] <= 2.5 and 4 <= norm["late"] <= 4.6)
    yield Line(
        "no norm 30 × the usual",
        f"at most {number(norm['largest_over_median'], 1)} × the median",
        norm["largest_over_median"] < 30,
    )


# The page


def _told(job: Job, config: Config, f: Figures, told: list[Line]) -> dict[str, str]:
    otherwise = [f"- Expected: {line.expected}. Seen: {line.seen}." for line in told if not line.as_expected]
    run, digest = shlex.quote(str(job.folder.path)), job.folder.read_manifest()["outcome"]["digest"]
    return {
        "Panel by panel": "\n".join(f"- {item}" for item in _items(config, f)),
        "Otherwise than expected": "\n".join(otherwise) or "Nothing.",
        "Again": f"{job.again()}The last state has the digest `{digest}`. The panels themselves, from log and "
        f"metrics.zarr, and every figure in results.json:\n\n```\nminitrain dashboard {run}\n```",
    }


def _items(config: Config, f: Figures) -> Iterator[str]:
    loss, rate, norm, a = f["loss"], f["learning_rate"], f["grad_norm"], f["activations"]
    spectral, u = f["spectral_norm"], f["units_and_updates"]
    onset = loss["overfit_onset"]
    yield (
        f"**1, loss**: {number(loss['first'], 3)} → {number(loss['last_mean'])}; validation least at step "
        f"{loss['best_val_step']:,}, "
        + (f"overfit onset {onset:,}" if onset is not None else "no overfitting")
        + f"; {count(len(loss['spikes']), 'spike')} flagged"
        + (f", {_back([s['recovery'] for s in loss['spikes']])}." if loss["spikes"] else ".")
    )
    yield (
        f"**2, learning rate**: a ramp to {rate['largest']:.0e} at step {rate['largest_step']:,}, {rate['last']:.0e} "
        "at the end."
    )
    batches = norm["batches"]
    made = [
        f"{number(100 * batches[k], 1)} % {name}"
        for k, name in (("batch_regular", "regular verbs"), ("batch_rare", "rare tokens"))
        if batches[k] is not None
    ]
    yield (
        f"**3, gradient norm**: median {number(norm['median'])}, largest {number(norm['largest'])} (step "
        f"{norm['largest_step']:,}); the clip engaged in {number(norm['clipped_pct'], 1)} % of the steps. Batches: "
        f"{listed(made)}."
    )
    levels = [f"`{site}` {_arrow(a['mean_abs'][site])}" for site in sites(config)]
    entropy = a["entropy"]
    yield (
        f"**4, activations**, mean |x| at steps {_steps(a['steps'])} (the last measured): {', '.join(levels)}. "
        f"Entropy of the heads {number(entropy['first'])} → {number(entropy['last_mean'])} nats, "
        f"largest weight {number(a['largest_peak'])}."
    )
    most, least, top = spectral["most_grown"], spectral["least_grown"], spectral["largest"]
    yield (
        f"**5, spectral norms** grew {number(least['growth'], 1)} × (`{least['matrix']}`) to "
        f"{number(most['growth'], 1)} × (`{most['matrix']}`); the largest ends at {number(top['norm'])}."
    )
    yield (
        f"**6, units and updates**: {number(u['dead_pct_largest'], 1)} % dead; update ratio of the matrices "
        f"{' → '.join(f'{x:.1e}' for x in u['update_ratio'])} at the same steps, most {u['update_ratio_largest']:.1e} "
        f"at step {u['update_ratio_largest_step']:,}."
    )
    held_out = config.data.heldout_policy == "verbs_4" and not config.data.named_paths()
    few = " Validation has two unseen verbs of each class: that compares four words, not two patterns."
    yield f"**7, verb classes**: {_told_tax(f['classes'])}{few if held_out else ''}"


def sites(config: Config) -> list[str]:
    """The sites that are told, each layer's in turn."""
    blocks = [name.format(i=i) for i in range(config.model.n_layer) for name in LAYERS if "{i}" in name]
    return [LAYERS[0], *blocks, *LAYERS[-2:]]


def _told_tax(classes: Figures | None) -> str:
    if classes is None:
        return "this text has none."
    last = classes["last"]
    each = [
        f"{split} {listed([f'{tax:+.2f} ({scope})' for scope, tax in scopes.items()])}"
        for split, scopes in last["tax"].items()
    ]
    return f"irregular minus regular, nats per token at step {last['step']:,}: {'; '.join(each)}."


def _back(recoveries: list[int | None]) -> str:
    known = [r for r in recoveries if r is not None]
    if len(known) < len(recoveries):
        return f"{len(recoveries) - len(known)} not back"
    return f"all back within {count(max(known), 'step')}"


def _steps(steps: list[int]) -> str:
    return listed([f"{step:,}" for step in steps])


def _arrow(values: list[float | None]) -> str:
    return " → ".join("not finite" if x is None else f"{x:.2g}" for x in values)
