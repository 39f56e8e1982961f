"""What a person reads of a finished run: the picture of its losses and a page that tells it in words.

`write` reads the log back and makes both from what was measured, never from what was expected: where a figure is
missing the page says so. Drawing takes half a second and about 120 MB; Altair and V8 load inside `draw` only.
"""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain.config import Config, differing_keys
from minitrain.environment import peak_rss_mb
from minitrain.files import write_atomic
from minitrain.run import RunFolder

Floats = NDArray[np.float64]


def write(folder: RunFolder, config: Config, results: Mapping[str, Any], baseline_ppl: float) -> None:
    """Write loss_curve.png and README.md into ``folder``; what is missing in ``results`` is NaN or None.

    Raises RunError if the log or the manifest is damaged, and OSError.
    """
    measured = {key: math.nan if value is None else value for key, value in results.items()}
    story = Story(folder, config, folder.read_manifest(), measured, baseline_ppl, Log.read(folder))
    picture = draw(story.log, baseline_ppl, story.baseline_name, story.headline(), story.subtitle())
    write_atomic(folder.curve, picture)
    write_atomic(folder.readme, story.page())


# The log as columns


@dataclass(frozen=True)
class Log:
    """train_log.jsonl by column. NaN stands for every number that was not finite."""

    step: Floats
    loss: Floats
    norm: Floats
    norm_clipped: Floats
    tokens_per_s: Floats
    val_step: Floats
    val_loss: Floats
    broken: Sequence[Mapping[str, Any]]
    """The steps that were not finite, as they were logged."""

    @classmethod
    def read(cls, folder: RunFolder) -> Log:
        of_step, of_validation = (
            ("step", "loss", "grad_norm", "grad_norm_clipped", "tokens_per_s"),
            ("step", "val_loss"),
        )
        steps, validations, broken = [], [], []
        for line in folder.log_lines():
            if "val_loss" in line:
                validations.append([line[key] for key in of_validation])
                continue
            steps.append([line[key] for key in of_step])
            if "nonfinite" in line:
                broken.append(line)
        step, loss, norm, clipped, rate = np.array(steps, np.float64).reshape(-1, len(of_step)).T  # null becomes NaN
        val_step, val_loss = np.array(validations, np.float64).reshape(-1, len(of_validation)).T
        return cls(step, loss, norm, clipped, rate, val_step, val_loss, broken)

    @property
    def window(self) -> int:
        """Over how many steps the train loss is averaged: 51 in a default run, a single one in a tiny run."""
        return len(self.step) // 40 // 2 * 2 + 1

    def mean_loss(self, i: int) -> float:
        """The mean of what is finite in the window around line ``i``, NaN where line ``i`` is not.

        The window is narrower towards both ends, at the start on both sides so that the first steep steps stay steep.
        """
        half = min(self.window // 2, i)
        near = self.loss[i - half : i + half + 1]
        return float(np.mean(near[np.isfinite(near)])) if math.isfinite(self.loss[i]) else math.nan


def extremes(values: Floats, buckets: int = 1000) -> NDArray[np.intp]:
    """Indices that draw the same curve: of each bucket its lowest, its highest and its first value that is not finite.

    So no spike and no gap is lost, and up to ``2 * buckets`` finite values are all kept.
    """
    kept = {0, len(values) - 1} if len(values) else set()
    for part in np.array_split(np.arange(len(values)), buckets):
        finite = np.isfinite(values[part])
        kept.update(part[~finite][:1].tolist())
        if finite.any():
            inside = part[finite]
            kept.update((int(inside[values[inside].argmin()]), int(inside[values[inside].argmax()])))
    return np.array(sorted(kept), np.intp)


# The picture

EACH, MEAN, VALIDATION, BASELINE, BROKEN = "#56B4E9", "#0072B2", "#D55E00", "#000000", "#CC79A7"
"""Okabe and Ito's colours, which colour-blind eyes tell apart; dashes, points and widths tell them apart in grey."""


def draw(log: Log, baseline_ppl: float, baseline_name: str, title: str, subtitle: str) -> bytes:
    """The loss curves as a PNG, without the network."""
    import altair as alt
    import vl_convert

    end = max([1.0, *log.step + 1, *log.val_step])
    base = math.log(baseline_ppl) if 0 < baseline_ppl < math.inf else math.nan
    kept, kept_val = extremes(log.loss), extremes(log.val_loss)
    mean = f"train, mean of {log.window:,} steps"
    curves = {  # name: colour, width, dashes, steps, losses
        "train, each step": (EACH, 0.8, [1, 0], log.step[kept], log.loss[kept]),
        mean: (MEAN, 2.4, [1, 0], log.step[kept], np.array([log.mean_loss(i) for i in kept])),
        baseline_name: (BASELINE, 1.5, [6, 4], np.array([0, end]), np.array([base, base])),
        "validation": (VALIDATION, 1.8, [1, 0], log.val_step[kept_val], log.val_loss[kept_val]),
    }
    if log.window == 1:
        del curves[mean]
    names, (colours, widths, dashes, *_) = list(curves), zip(*curves.values(), strict=True)
    rows = [row for name, (*_, steps, losses) in curves.items() for row in _rows(name, steps, losses)]
    heights = [row["loss"] for row in rows if row["loss"] is not None] or [1.0]
    logarithmic = min(heights) > 0 and max(heights) > 20 * min(heights)

    def by_series(values: Iterable[Any]) -> dict[str, Any]:
        legend = alt.Legend(orient="top", title=None, symbolType="stroke", symbolSize=500, labelLimit=300)
        scale = alt.Scale(type="ordinal", domain=names, range=list(values))
        return {"shorthand": "series:N", "sort": names, "scale": scale, "legend": legend}

    unit = "nats per token, log scale" if logarithmic else "nats per token"
    scale = alt.Scale(type="log" if logarithmic else "linear", zero=False, nice=True)
    x = alt.X(
        "step:Q", title="step", scale=alt.Scale(domain=[0, end], nice=False), axis=alt.Axis(tickCount=int(min(end, 10)))
    )
    y = alt.Y("loss:Q", title=f"loss ({unit})", scale=scale)
    series = alt.Chart(alt.NamedData("rows")).encode(x, y, alt.Color(**by_series(colours)))
    layers: list[alt.Chart] = [
        series.mark_line().encode(alt.StrokeWidth(**by_series(widths)), alt.StrokeDash(**by_series(dashes))),
        series.mark_point(filled=True, opacity=1, size=30).transform_filter("datum.point"),
    ]

    def note(text: str, step: float, y: Any, **place: Any) -> None:
        row = {"step": step, "text": text} | ({"loss": base} if math.isfinite(base) else {})
        at = alt.Chart(alt.InlineData(values=[row])).encode(x, y=y, text="text:N")
        layers.append(at.mark_text(fontSize=12, stroke="white", strokeWidth=5, strokeJoin="round", **place))
        layers.append(at.mark_text(fontSize=12, **place))

    if math.isfinite(base):
        over = log.val_loss[np.isfinite(log.val_loss)][-1:].sum() > base  # the label stands where the curve does not
        note(
            f"{baseline_name}: perplexity {number(baseline_ppl)}", end, y, align="right", dx=-6, dy=13 if over else -11
        )
    for line in log.broken[:1]:
        step, align = line["step"], "right" if line["step"] > end / 2 else "left"
        wall = alt.Chart(alt.InlineData(values=[{"step": step}])).mark_rule(strokeWidth=2, color=BROKEN)
        layers.append(wall.encode(x))
        note(f"step {step:,}: {not_finite(line)}", step, alt.value(-10), align=align)  # above the marks
    chart = (
        alt.layer(*layers)
        .properties(width=760, height=380, title=alt.Title(title, subtitle=subtitle), description=title)
        .configure(font="Helvetica, Arial, sans-serif", padding=16, background="white")
        .configure_view(stroke=None)
        .configure_title(anchor="start", fontSize=17, subtitleFontSize=13, subtitleColor="#555555", offset=10)
        .configure_axis(gridColor="#ebebeb", domainColor="#888888", tickColor="#888888")
        .configure_axisX(labelFontSize=12, titleFontSize=13, titleFontWeight="normal")
        .configure_axisY(labelFontSize=12, titleFontSize=13, titleFontWeight="normal")
        .configure_legend(labelFontSize=12, columnPadding=18, offset=28)
    )
    # The rows join the finished specification: Altair would hold every one of them against its schema.
    spec = chart.to_dict()
    spec.setdefault("datasets", {})["rows"] = rows
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return bytes(vl_convert.vegalite_to_png(spec, vl_version=version, scale=2))


def _rows(series: str, steps: Floats, losses: Floats) -> list[dict[str, Any]]:
    """A row for each value, null where not finite. A value that no line reaches is a point, as each validation is."""
    finite = [False, *np.isfinite(losses).tolist(), False]
    return [
        {
            "series": series,
            "step": float(step),
            "loss": float(loss) if here else None,
            "point": here and (series == "validation" or not (before or after)),
        }
        for step, loss, before, here, after in zip(steps, losses, finite, finite[1:], finite[2:], strict=False)
    ]


# The words


def number(x: float, digits: int = 2) -> str:
    """As a person writes it: ``9.50``, ``12,345.68``, ``1.2e+09``, ``infinite``; NaN is ``not finite``."""
    if not math.isfinite(x):
        return "not finite" if math.isnan(x) else "infinite"
    small = x != 0 and abs(x) < 10**-digits
    return f"{x:.{digits}g}" if small or abs(x) >= 1e6 else f"{x:,.{digits}f}"


def count(n: float, what: str) -> str:
    """``1 step``, ``2,000 steps``."""
    return f"{int(n):,} {what}{'' if n == 1 else 's'}"


def not_finite(line: Mapping[str, Any]) -> str:
    """Which numbers of a logged step were not finite: ``loss nan, grad_norm nan``."""
    return ", ".join(f"{key} {line['nonfinite'][key]}" for key in ("loss", "grad_norm") if key in line["nonfinite"])


def _ppl(loss: float) -> str:
    return number(math.exp(loss) if loss < 700 else loss + math.inf)


def _listed(parts: Sequence[str]) -> str:
    """``a, b and c``"""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _wrapped(text: str) -> str:
    """Paragraphs as lines of at most 100 characters; code stays as it is."""
    parts = text.split("\n\n")
    return "\n\n".join(
        part if part.startswith("```") else textwrap.fill(part, 100, break_long_words=False, break_on_hyphens=False)
        for part in parts
    )


CONCERNS = {
    "model": "the size of the network",
    "optimizer": "the update rule",
    "scheduler": "the course of the learning rate",
    "training": "the training loop",
    "data": "the text that is read",
}
"""What the settings of a section have to do with."""
SHOWN = 4
"""So many changed settings are listed; the page stays a page."""


@dataclass(frozen=True)
class Story:
    """The README of a run, a paragraph by method; ``measured`` is results.json with NaN for null."""

    folder: RunFolder
    config: Config
    manifest: Mapping[str, Any]
    measured: Mapping[str, Any]
    baseline: float
    log: Log

    @property
    def baseline_name(self) -> str:
        return f"{int(self.measured['ngram_best_n'])}-gram baseline"

    def headline(self) -> str:
        baseline, gain = f"{self.baseline_name} {number(self.baseline)}", self.measured["ppl_improvement_pct"]
        if not math.isfinite(gain):
            return f"No finite validation perplexity at the end; {baseline}"
        verdict = f"{abs(gain):,.1f} % {'better' if gain > 0 else 'worse'}" if abs(gain) >= 0.05 else "level"
        return f"Validation perplexity {number(self.measured['val_ppl'])}, {baseline}: {verdict}"

    def subtitle(self) -> str:
        name, steps, best = (
            self.folder.path.resolve().name,
            self.measured["steps"],
            self.measured["best_val_step"],
        )
        lowest = (
            f"lowest validation perplexity {number(self.measured['best_val_ppl'])} at step {int(best):,}"
            if math.isfinite(best)
            else "no finite validation"
        )
        return f"{name}: {count(steps, 'step')}, {lowest}"

    def page(self) -> str:
        sections = {
            "Result": self.result(),
            "Not finite": self.broken(),
            "Curve": f"{self.training()} {self.validation()}",
            "Gap": self.gap(),
            "Gradients": self.gradients(),
            "Settings": self.settings(),
            "Cost": self.cost(),
            "Again": self.again(),
        }
        top = f"# Run {self.folder.path.resolve().name}\n\n**{self.headline()}**\n\n"
        picture = f"![Losses by step]({self.folder.curve.name})\n"
        told = [f"\n## {name}\n\n{_wrapped(text)}\n" for name, text in sections.items() if text]
        return top + picture + "".join(told)

    def result(self) -> str:
        samples, batch = self.manifest["samples"], self.config.training.batch_size
        steps, val, gain = (self.measured[key] for key in ("steps", "val_ppl", "ppl_improvement_pct"))
        passes, order = number(steps * batch / samples["train"], 1), int(self.measured["ngram_best_n"])
        text = (
            f"A MiniGPT of {count(self.manifest['parameters'], 'parameter')} took {steps:,} of "
            f"{count(self.config.scheduler.total_steps, 'planned step')} of {count(batch, 'sample')}: {passes} times "
            f"the {count(samples['train'], 'training sample')}. The best n-gram model of the same tokens (n = {order}) "
            f"has a perplexity of {number(self.baseline)} on the {count(samples['val'], 'validation sample')}"
        )
        if not math.isfinite(gain):
            text += "; the run ends with no finite perplexity to set against it."
        elif self.measured["beats_baseline"]:
            text += f"; the run ends at {number(val)} and beats it by {gain:,.1f} %."
        else:
            text += f"; the run ends at {number(val)}, {abs(gain):,.1f} % more, and does not beat it."
        return " ".join([text, *(f"Alert: {alert}." for alert in self.measured["alerts"])])

    def broken(self) -> str:
        if not self.log.broken:
            return ""
        first, run = self.log.broken[0], shlex.quote(str(self.folder.path))
        text = f"Step {first['step']:,} was the first with a number that is not finite ({not_finite(first)}); "
        if self.measured["ended"] == "complete":
            text += f"the run went on and had {count(len(self.log.broken), 'such step')}."
        else:
            text += "the run stopped there."
        before = int(np.searchsorted(self.log.step, first["step"])) - 1
        if before >= 0:
            loss, norm = number(self.log.loss[before], 3), number(self.log.norm[before], 3)
            text += f" The step before it had loss {loss} and gradient norm {norm}."
        replay = f"minitrain replay {run} --step {first['step']} --nan-bisect"
        return (
            f"{text} The learning rate was {first['lr']:.3g}. To find the place where the number arose:\n\n"
            f"```\n{replay}\n```\n\n"
            "Look there, then at the gradient norms and learning rates before it in train_log.jsonl."
        )

    def training(self) -> str:
        vocab, steps = self.config.model.vocab_size, len(self.log.step)
        text = (
            f"The train loss began at {number(self.log.loss[0], 3)} nats per token; guessing all "
            f"{count(vocab, 'token')} alike costs ln {vocab} = {math.log(vocab):.3f}."
        )
        if steps == 1:
            return text
        landmarks: dict[int, str] = {steps - 1: "at the end"}
        landmarks.setdefault(steps // 2, "half way")
        if self.config.scheduler.warmup_steps:
            landmarks.setdefault(self.config.scheduler.warmup_steps, "after the warm-up")
        passed = [
            f"{number(self.log.mean_loss(i), 3)} {name} (step {int(self.log.step[i]):,})"
            for i, name in sorted(landmarks.items())
            if i < steps
        ]
        averaged = f"Averaged over up to {self.log.window:,} steps it" if self.log.window > 1 else "It"
        text += f" {averaged} was {_listed(passed)}."
        top = int(np.argmax(np.nan_to_num(self.log.loss)))
        return f"{text} The highest was {number(self.log.loss[top], 3)}, at step {top:,}." if top else text

    def validation(self) -> str:
        steps, losses = self.log.val_step, self.log.val_loss
        if not len(losses):
            return "It ended before its first validation."
        times = f"Validation ran {'once' if len(losses) == 1 else f'{len(losses):,} times'}"
        if not np.isfinite(losses).any():
            return f"{times}, with no finite loss."
        best, last = int(np.nanargmin(losses)), len(losses) - 1
        lowest = f"perplexity {_ppl(losses[best])} at step {int(steps[best]):,}"
        if last == 0:
            return f"{times}: {lowest}."
        if best == last:
            return f"{times} and was lowest at the last, {lowest}: it had not turned."
        rise = math.expm1(losses[last] - losses[best]) if math.isfinite(losses[last]) else math.nan
        begin, end = (min(int(s), len(self.log.step) - 1) for s in (steps[best], steps[last]))
        train = f"{number(self.log.mean_loss(begin), 3)} to {number(self.log.mean_loss(end), 3)}"
        first = " and never fell below the first" if best == 0 else ""
        return (
            f"{times}{first}. The lowest was {lowest}; the last, at step {int(steps[last]):,}, was "
            f"{_ppl(losses[last])}"
            + (f", {number(100 * rise, 1)} % higher" if math.isfinite(rise) else "")
            + f", while the train loss went from {train}."
        )

    def gap(self) -> str:
        train, val = self.measured["train_ppl"], self.measured["val_ppl"]
        if not (math.isfinite(train) and math.isfinite(val)):
            return (
                "There is no gap to report: at the end the perplexity on the training text is "
                f"{number(train)}, on the validation text {number(val)}."
            )
        ratio, nats = number(val / train), number(math.log(val / train))
        text = (
            f"At the end the perplexity over the whole split is {number(train)} in training and {number(val)} in "
            f"validation, {ratio} times as much: a gap of {nats} nats per token. "
        )
        data = self.config.data
        if data.named_paths():
            return text + "The text is the user's own: how alike its splits are is not known here."
        if data.heldout_policy == "verbs_4":
            return text + (
                "Training never saw the four verbs of validation: the gap holds what was memorised and what is new in "
                "them, and one run cannot tell the two apart."
            )
        return text + "Both splits hold the same verbs, so the gap is not the price of verbs never seen."

    def gradients(self) -> str:
        norms, clipped, optimizer = self.log.norm, self.log.norm_clipped, self.config.optimizer
        finite = np.isfinite(norms)
        if not finite.any():
            return "No step had a finite gradient norm."
        median, top = float(np.median(norms[finite])), int(np.nanargmax(norms))
        text = f"Before clipping, the gradient norm had a median of {number(median)}"
        if finite.sum() > 1:
            times = f" ({number(norms[top] / median, 1)} times the median)" if median else ""
            text += f"; the largest was {number(norms[top])}{times}, at step {int(self.log.step[top]):,}"
        limits = []
        if optimizer.clip_value is not None:
            limits.append(f"elements within ±{optimizer.clip_value:g}")
        if optimizer.clip is not None:
            limits.append(f"norm at most {optimizer.clip:g}")
        if not limits:
            return f"{text}. Nothing clipped it: optimizer.clip and optimizer.clip_value are null."
        engaged, of = int((clipped[finite] < norms[finite]).sum()), int(finite.sum())
        return (
            f"{text}. The clip ({_listed(limits)}) was engaged in {engaged:,} of {count(of, 'finite step')} "
            f"({100 * engaged / of:.1f} %)."
        )

    def settings(self) -> str:
        changed = differing_keys(Config(), self.config)
        if not changed:
            return "Every setting is the default."
        sections = dict.fromkeys(line.partition(".")[0] for line in changed)
        one = len(changed) == 1
        more = [f"and {len(changed) - SHOWN} more, in config.yaml"] if len(changed) > SHOWN else []
        lines = "\n".join(textwrap.shorten(line, 90, placeholder=" ...") for line in changed[:SHOWN] + more)
        concerns = _listed([CONCERNS[name] for name in sections])
        differ, they, them = ("differs", "It concerns", "it") if one else ("differ", "They concern", "them")
        return (
            f"{count(len(changed), 'setting')} {differ} from the default:\n\n```\n{lines}\n```\n\n"
            f"{they} {concerns}. Whoever started the run chose {them}; no file of the run says why."
        )

    def cost(self) -> str:
        hardware, threads = self.manifest["hardware"], self.config.training.threads
        machine = ", ".join(filter(None, (hardware["cpu"], hardware.get("instruction_set"), count(threads, "thread"))))
        held, drawn = (number(mb, 0) for mb in (self.measured["peak_rss_mb"], peak_rss_mb() or math.nan))
        seconds, rate = number(self.measured["wall_clock_s"]), number(float(np.median(self.log.tokens_per_s)), 0)
        return (
            f"Up to its results, the process that ended the run took {seconds} s and at most {held} MB of memory; the "
            f"one that drew this page, {drawn} MB. The median step made {rate} training tokens per second ({machine})."
        )

    def again(self) -> str:
        command = f"minitrain train --config {shlex.quote(str(self.folder.config))} --out-dir NEW"
        digest = self.manifest.get("outcome", {}).get("digest")
        same = f": the last state must have the digest `{digest}`" if digest and not self.log.broken else ""
        return (
            f"From the folder where this run was started:\n\n```\n{command}\n```\n\n"
            f"Same version, settings and data give the same bits{same}. Every step is in train_log.jsonl, the figures "
            "in results.json, seeds, versions and hardware in manifest.json, the parameters of a complete run in "
            "models/."
        )
