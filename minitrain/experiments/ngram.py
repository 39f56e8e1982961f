"""Experiments of the kind ``ngram``: the baseline on its own. Nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from minitrain.assembly import prepare_data
from minitrain.config import Config, to_yaml
from minitrain.data.ngram import ALPHA
from minitrain.environment import peak_rss_mb
from minitrain.experiments.job import Finding, Job
from minitrain.files import write_atomic, write_json
from minitrain.report import orders
from minitrain.report.page import page
from minitrain.report.story import machine_name, splits
from minitrain.report.words import count, number
from minitrain.trainer import manifest

PICTURE = "perplexity.png"


def make(job: Job) -> Finding:
    """Fit and evaluate every order; a folder with the table, the picture and the page."""
    started = perf_counter()
    folder, config = job.folder, job.config
    data = prepare_data(config)
    about = manifest(config, data, None, job.command_line, job.preset.name)
    results = {
        **data.baseline,
        "alpha": ALPHA,
        "vocab_size": data.tokenizer.size,
        "samples": about["samples"],
        "tokens": {"train": int(data.train.loss_mask.sum()), "val": int(data.val.loss_mask.sum())},
        "data_manifest_hash": data.manifest_hash,
        "wall_clock_s": round(perf_counter() - started, 3),
    }
    best = data.baseline["best_n"]
    headline = (
        f"Validation perplexity {number(data.baseline['best_perplexity'])}, by the {best}-gram: the baseline to beat"
    )
    with folder.hold(new=not folder.manifest.exists()):
        write_atomic(folder.config, to_yaml(config))
        write_json(folder.manifest, about)
        subtitle = (
            f"{job.preset.name}: add-alpha n-gram models, alpha {ALPHA:g}, of {count(data.tokenizer.size, 'token')}"
        )
        picture = orders.draw(data.baseline["perplexity"], best, headline, subtitle)
        write_atomic(folder.path / PICTURE, picture)
        results["peak_rss_mb"] = peak_rss_mb()
        told = {
            "Result": _result(results),
            "Why": _why(config, results),
            "Cost": _cost(about, results),
            "Again": f"{job.again()}The figures depend on the data and the tokenizer alone. results.json holds them, "
            "manifest.json versions, machine and the hash of the data, config.yaml the settings.",
        }
        write_atomic(folder.readme, page(job.title, headline, ("Perplexity by order", PICTURE), told))
    return Finding(headline, results)


def _result(r: Mapping[str, Any]) -> str:
    tokens, samples = r["tokens"], r["samples"]
    rows = [f"| {n} | {number(p)} | {100 * r['context_seen'][n]:.1f} % |" for n, p in r["perplexity"].items()]
    table = "\n".join(["| n | validation perplexity | contexts seen in training |", "|---|---|---|", *rows])
    return (
        "An n-gram model predicts a token from the n − 1 before it, by counting. These were counted on "
        f"{count(tokens['train'], 'token')} of {count(samples['train'], 'training sample')} and evaluated on "
        f"{count(tokens['val'], 'token')} of {count(samples['val'], 'validation sample')}, cut by the tokenizer "
        "that a training run uses, so that their perplexities can be compared. Every count has "
        f"{r['alpha']:g} added to it (alpha), contexts that reach before the start see `<bos>`, and `<eos>` is "
        "predicted like any token. Perplexity is exp of the mean negative log-likelihood per token; guessing all "
        f"{count(r['vocab_size'], 'token')} alike gives {r['vocab_size']}.\n\n{table}"
    )


def _why(config: Config, r: Mapping[str, Any]) -> str:
    perplexity, seen, best, V = r["perplexity"], r["context_seen"], str(r["best_n"]), r["vocab_size"]
    first, last = min(perplexity), max(perplexity)
    text = []
    if best != first:
        text.append(
            f"A longer context says more about the next token: from n = {first} to n = {best} the perplexity falls "
            f"from {number(perplexity[first])} to {number(perplexity[best])}."
        )
    if best != last:
        text.append(
            f"A context helps only if training held it, though. From n = {best} to n = {last} the share of "
            f"validation tokens whose context was seen goes from {100 * seen[best]:.1f} % to {100 * seen[last]:.1f} %, "
            f"and the perplexity from {number(perplexity[best])} to {number(perplexity[last])}: after a context that "
            f"was never seen all tokens are alike to it, and the right one costs ln {V} = {math.log(V):.3f} nats."
        )
    return " ".join([*text, f"{splits(config.data)}."])


def _cost(about: Mapping[str, Any], r: Mapping[str, Any]) -> str:
    return (
        f"Reading the data, fitting and evaluating took {number(r['wall_clock_s'])} s, and the process held at most "
        f"{number(r['peak_rss_mb'], 0)} MB of memory, the drawing of the picture included ({machine_name(about)})."
    )
