"""The README of a run: told from what was measured, never from what was expected."""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from minitrain.config import Config, differing_keys
from minitrain.report.log import Log
from minitrain.report.page import listed, page
from minitrain.report.words import count, not_finite, number
from minitrain.run_folder import RunFolder
from minitrain.sections import DataConfig


def _ppl(loss: float) -> str:
    return number(math.exp(loss) if loss < 700 else loss + math.inf)


def splits(data: DataConfig) -> str:
    """How training and validation differ, without a full stop."""
    if data.named_paths():
        return "The user named the text: how alike its splits are is not known here"
    if data.heldout_policy == "verbs_4":
        return "Training never saw the verbs of validation"
    return "Both splits hold the same verbs"


def machine_name(manifest: Mapping[str, Any]) -> str:
    """Processor and instruction set, as far as they are known."""
    hardware = manifest["hardware"]
    return ", ".join(filter(None, (hardware["cpu"], hardware.get("instruction_set")))) or "machine unknown"


CONCERNS = {
    "model": "the network",
    "optimizer": "the update",
    "scheduler": "the learning rate",
    "training": "the loop",
    "data": "the text",
    "record": "what is kept of the run",
    "metrics": "what is measured of the run",
    "injections": "faults that were caused on purpose",
}
"""What the settings of a section have to do with."""
SHOWN = 3
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

    @classmethod
    def read(
        cls, folder: RunFolder, config: Config, results: Mapping[str, Any], baseline_ppl: float, **more: Any
    ) -> Self:
        """From the files of the run. Raises RunError if the log or the manifest is damaged, and OSError."""
        measured = {key: math.nan if value is None else value for key, value in results.items()}
        return cls(folder, config, folder.read_manifest(), measured, baseline_ppl, Log.read(folder), **more)

    @property
    def title(self) -> str:
        return f"Run {self.folder.path.resolve().name}"

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
        parent = self.manifest.get("parent")
        forked = f", forked from {parent['run']} at state {parent['step']:,}" if parent else ""
        return f"{name}: {count(steps, 'step')}{forked}, {lowest}"

    def sections(self) -> dict[str, str]:
        """The paragraphs by heading, in order."""
        return {
            "Result": self.result(),
            "Forked": self.forked(),
            "Not finite": self.broken(),
            "Curve": f"{self.training()} {self.validation()}",
            "Gap": self.gap(),
            "Gradients": self.gradients(),
            "Settings": self.settings(),
            "Cost": self.cost(),
            "Again": self.again(),
        }

    def page(self) -> str:
        return page(self.title, self.headline(), ("Losses by step", self.folder.curve.name), self.sections())

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

    def forked(self) -> str:
        if not (parent := self.manifest.get("parent")):
            return ""
        text = (
            f"The run began with state {parent['step']:,} of `{parent['run']}` (digest `{parent['digest'][:12]}…`), so "
            f"the numbers of its steps go on there, and it took {count(len(self.log.step), 'step')} of its own. "
        )
        if not (changed := parent["settings"]):
            return f"{text}No setting was changed: it is that run again."
        lines = "\n".join(textwrap.shorten(line, 90, placeholder=" ...") for line in changed)
        return f"{text}Changed was:\n\n```\n{lines}\n```"

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
        if (warm := self.config.scheduler.warmup_steps - self.log.start) > 0:
            landmarks.setdefault(warm, "after the warm-up")
        passed = [
            f"{number(self.log.mean_loss(i), 3)} {name} (step {int(self.log.step[i]):,})"
            for i, name in sorted(landmarks.items())
            if i < steps
        ]
        averaged = f"Averaged over up to {self.log.window:,} steps it" if self.log.window > 1 else "It"
        text += f" {averaged} was {listed(passed)}."
        top = int(np.argmax(np.nan_to_num(self.log.loss)))
        if not top:
            return text
        return f"{text} The highest was {number(self.log.loss[top], 3)}, at step {int(self.log.step[top]):,}."

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
        low = f"never fell below its first, {lowest}" if best == 0 else f"was lowest at {lowest}"
        rise = 100 * math.expm1(min(losses[last] - losses[best], 700.0))
        higher = f", {rise:,.1f} % higher" if rise >= 0.05 else ""
        lines = (min(int(steps[i]) - self.log.start, len(self.log.step) - 1) for i in (best, last))
        begin, end = (self.log.mean_loss(line) for line in lines)
        return (
            f"{times} and {low}; the last, at step {int(steps[last]):,}, was {_ppl(losses[last])}{higher}, while the "
            f"train loss went from {number(begin, 3)} to {number(end, 3)}."
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
        consequence = {
            "verbs_4": ", so the gap mixes memorising with new verbs.",
            "stratified": ", so the gap is not the price of verbs never seen.",
        }
        data = self.config.data
        return f"{text}{splits(data)}{'.' if data.named_paths() else consequence[data.heldout_policy]}"

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
            f"{text}. The clip ({listed(limits)}) was engaged in {engaged:,} of {count(of, 'finite step')} "
            f"({100 * engaged / of:.1f} %)."
        )

    def settings(self) -> str:
        changed = differing_keys(Config(), self.config)
        if not changed:
            return "Every setting is the default."
        sections = dict.fromkeys(re.split("[.:]", line)[0] for line in changed)
        more = [f"and {len(changed) - SHOWN} more, in config.yaml"] if len(changed) > SHOWN else []
        lines = "\n".join(textwrap.shorten(line, 90, placeholder=" ...") for line in changed[:SHOWN] + more)
        concerns = listed([CONCERNS[name] for name in sections])
        differ, they = ("differs", "It concerns") if len(changed) == 1 else ("differ", "They concern")
        return (
            f"{count(len(changed), 'setting')} {differ} from the default:\n\n```\n{lines}\n```\n\n"
            f"{they} {concerns}; {self.why()}."
        )

    def why(self) -> str:
        """The reason for settings that are not the default."""
        return "no file of the run says why"

    def cost(self) -> str:
        machine = f"{machine_name(self.manifest)}, {count(self.config.training.threads, 'thread')}"
        peak = number(self.measured["peak_rss_mb"], 0)
        seconds, rate = number(self.measured["wall_clock_s"]), number(float(np.median(self.log.tokens_per_s)), 0)
        return (
            f"The process that ended the run took {seconds} s up to its results and at most {peak} MB of memory, the "
            f"drawing of its picture included. The median speed was {rate} training tokens per second ({machine})."
        )

    def again(self) -> str:
        parent = self.manifest.get("parent")
        begin = f"--from {shlex.quote(parent['run'])} --step {parent['step']} " if parent else ""
        command = f"minitrain train {begin}--config {shlex.quote(str(self.folder.config))} --out-dir NEW"
        digest = self.manifest.get("outcome", {}).get("digest")
        same = f": the last state must have the digest `{digest}`" if digest and not self.log.broken else ""
        models = ", models/ the parameters" if self.measured["ended"] == "complete" else ""
        return (
            f"From the folder where this run was started:\n\n```\n{command}\n```\n\n"
            f"Same version, settings and data give the same bits{same}. train_log.jsonl holds every step, results.json "
            f"the figures, manifest.json seeds, versions and hardware{models}."
        )
