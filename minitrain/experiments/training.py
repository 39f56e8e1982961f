"""Experiments of the kind ``training``: a run, and beside it runs that each change one thing of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minitrain.experiments.job import Finding, Job
from minitrain.files import write_atomic
from minitrain.report.page import listed
from minitrain.report.story import Story
from minitrain.report.words import number

SEED = "training.rng_seed="


def make(job: Job) -> Finding:
    """Train as the preset says, then every variant, and tell what each one changed."""
    config, variants = job.config, job.variants
    results = job.results(config)
    if results["val_ppl"] is not None:
        compared = [
            compare(name, job.preset.variants[name], results, job.results(variant, name))
            for name, variant in variants.items()
        ]
        results["chance_pct"] = chance(compared)
        results["variants"] = [each | {"verdict": verdict(results, each)} for each in compared]
    story = ExperimentStory.read(job.folder, config, results, results["ngram_baseline_val_ppl"], job=job)
    write_atomic(job.folder.readme, story.page())
    problem = results["first_nonfinite_step"] is not None or bool(results["alerts"])
    return Finding(story.headline(), results, problem)


def compare(name: str, changes: Sequence[str], base: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """What a variant's results are beside those of the run that it varies; None where a number is not finite."""
    kept = {key: run[key] for key in ("ended", "val_ppl", "train_ppl", "best_val_step", "best_val_ppl", "wall_clock_s")}
    val = run["val_ppl"]
    return {"name": name, "set": list(changes), **kept, "change_pct": val and 100 * (val / base["val_ppl"] - 1)}


def is_seed(variant: Mapping[str, Any]) -> bool:
    """Whether nothing but the seed is changed: such a variant tells what chance alone does."""
    return all(change.startswith(SEED) for change in variant["set"])


def chance(variants: Sequence[Mapping[str, Any]]) -> float:
    """By how many per cent, at most, another seed moved the validation perplexity."""
    return max((abs(v["change_pct"]) for v in variants if is_seed(v) and v["change_pct"] is not None), default=0.0)


def verdict(base: Mapping[str, Any], variant: Mapping[str, Any]) -> str:
    """Why a variant ended where it did, as far as its figures say.

    ``not finite``; ``chance`` within what another seed does; ``better``; else worse, because it ``memorised`` (it knows
    the training text better than the base run does) or ``learnt less`` (that one worse, too).
    """
    if variant["change_pct"] is None:
        return "not finite"
    if abs(variant["change_pct"]) <= base["chance_pct"]:
        return "chance"
    if variant["change_pct"] < 0:
        return "better"
    return "memorised" if variant["train_ppl"] < base["train_ppl"] else "learnt less"


@dataclass(frozen=True)
class ExperimentStory(Story):
    """The page of a run that has variants."""

    job: Job

    @property
    def title(self) -> str:
        return self.job.title

    def sections(self) -> dict[str, str]:
        told = super().sections()
        if "variants" not in self.measured or not self.measured["variants"]:
            return told
        told.pop("Gradients")  # to leave room
        result = told.pop("Result")
        return {"Result": result, "What would have made it worse, and why?": self.worse(), **told}

    def worse(self) -> str:
        """Every variant that changed a setting, worst first; before them what the seed does."""
        variants = self.measured["variants"]
        seeds = [v for v in variants if is_seed(v)]
        others = sorted((v for v in variants if not is_seed(v)), key=lambda v: _rank(v["change_pct"]))
        val, train = (number(self.measured[key]) for key in ("val_ppl", "train_ppl"))
        text = (
            f"Each of these runs changed one setting; in bold its validation perplexity, to be held against {val} here "
            f"(in training {train})."
        )
        if seeds:
            named = listed([f"{_ppl(v['val_ppl'])} (seed {v['set'][0].removeprefix(SEED)})" for v in seeds])
            text += (
                f" Another seed alone gives {named}, so {self.measured['chance_pct']:.1f} % more or less says nothing."
            )
        return "\n\n".join([text, "\n".join(f"- {self.item(v)}" for v in others)])

    def item(self, variant: Mapping[str, Any]) -> str:
        """A line about one variant."""
        settings = f"`{' '.join(variant['set'])}`: **{_ppl(variant['val_ppl'])}**"
        change = variant["change_pct"]
        if change is None:
            return f"{settings}, it ended with numbers that are not finite."
        settings += f", {abs(change):,.1f} % {'worse' if change > 0 else 'better'}"
        if variant["verdict"] == "chance":
            return f"{settings}, within chance."
        why = {"memorised": ". It memorised", "learnt less": ". It learnt less", "better": ""}[variant["verdict"]]
        lowest = f"{number(variant['best_val_ppl'])} at step {variant['best_val_step']:,}"
        return f"{settings}{why}: training {number(variant['train_ppl'])}, lowest validation {lowest}."

    def why(self) -> str:
        return f"this is what the experiment is about ({self.job.preset.about})"

    def again(self) -> str:
        digest = self.manifest.get("outcome", {}).get("digest")
        return (
            f"{self.job.again()}Same version, settings and data give the same bits: the last state must have the "
            f"digest `{digest}`. runs/ holds the variants."
        )


def _rank(change_pct: float | None) -> float:
    """The worst first, and before it what is not finite."""
    return -math.inf if change_pct is None else -change_pct


def _ppl(perplexity: float | None) -> str:
    return "none" if perplexity is None else number(perplexity)
