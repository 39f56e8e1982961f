"""Experiments: presets that hold, runs that are what the page says, checks that can fail, and nothing ever lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitrain import trainer
from minitrain.assembly import prepare_data
from minitrain.config import Config, differing_keys, load_config
from minitrain.errors import ConfigError, RunError
from minitrain.experiments import preset, runner, training
from minitrain.experiments.place import finished
from minitrain.experiments.runner import KINDS, Made
from minitrain.loop import Listener
from minitrain.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
PRESETS = preset.names()


class Stop(Listener):
    """Asks to stop once ``n`` steps have been taken in all runs together."""

    def __init__(self, n: int = 10**9) -> None:
        self.left = n

    def __call__(self) -> bool:
        return self.left <= 0

    def __enter__(self) -> Stop:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def stepped(self, stats: object, state: object) -> None:
        self.left -= 1


@pytest.fixture
def make(tiny: list[str]) -> Callable[..., Made]:
    """``make(name, *settings, stop=…, **options)``: a tiny experiment."""

    def made(name: str, *settings: str, stop: Stop | None = None, **options: Any) -> Made:
        stop = stop or Stop()
        return runner.run(name, overrides=[*tiny, *settings], stop=stop, show=lambda *_: stop, **options)

    return made


def page(made: Made) -> str:
    return " ".join(made.folder.readme.read_text().split())


def stored(made: Made) -> dict[str, Any]:
    return dict(json.loads(made.folder.results.read_text()))


def contents(place: Path) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file() and p.name != ".lock"}


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_whole(name: str):
    """Its kind exists, its configuration and every variant load, and each variant changes exactly one thing.

    Those of an injection are settings under which it is made once more: each key that they name, and not the fault.
    """
    made = preset.load(name)
    assert made.kind in KINDS
    assert 20 < len(made.about) < 90
    base = load_config(None, made.settings)
    for variant, changes in made.variants.items():
        differing = differing_keys(base, load_config(None, [*made.settings, *changes]))
        assert len(changes) == len(differing), variant
        assert len(changes) == 1 or (made.kind == "injection" and "injections" not in str(differing)), variant


def test_the_mini_experiment_is_the_default_run():
    """Spelt out key by key, as the configuration is documented; only what is recorded of it is less."""
    mini = load_config(None, preset.load("18-train-mini").settings)
    assert differing_keys(Config(), mini) == ['record.moments: "every_step" -> "keyframes"']
    assert load_config(None, preset.load("14-ngram-baseline").settings) == Config()


def test_unknown_names():
    """The nearest one is offered; where none is near, all are."""
    with pytest.raises(ConfigError, match="experiment '18-train-mimi': .* did you mean '18-train-mini'?"):
        runner.run("18-train-mimi")
    with pytest.raises(ConfigError, match="known are 14-ngram-baseline, .*18-train-mini"):
        runner.run("x")


# The n-gram baseline


def test_ngram(make: Callable[..., Made], tiny: list[str], words: Callable[[str], int]):
    """results.json is the baseline that runs are held against; page and picture show every order."""
    made = make("14-ngram-baseline")
    data, results = prepare_data(load_config(None, tiny)), stored(made)
    assert {key: results[key] for key in data.baseline} == data.baseline
    assert results["best_perplexity"] == min(results["perplexity"].values())
    assert results["tokens"]["val"] == int(data.val.loss_mask.sum())
    text = page(made)
    for n, perplexity in results["perplexity"].items():
        assert f"| {n} | {perplexity:,.2f} | {100 * results['context_seen'][n]:.1f} % |" in text
    assert f"{results['best_perplexity']:.2f}, by the {results['best_n']}-gram" in text
    assert 200 <= words(made.folder.readme.read_text()) <= 400
    assert (made.folder.path / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert load_config(made.folder.config) == load_config(None, tiny)
    assert made.folder.read_manifest()["data_manifest_hash"] == data.manifest_hash


@pytest.mark.parametrize("best", [1, 4, 7])
def test_why_a_longer_context_helps_and_hurts(best: int):
    """The fall before the best order and the rise behind it are told where there is one."""
    from minitrain.experiments.ngram import _why

    orders = {str(n): 10.0 + abs(n - best) for n in range(1, 8)}
    text = _why(
        Config(), {"perplexity": orders, "context_seen": dict.fromkeys(orders, 0.5), "best_n": best, "vocab_size": 64}
    )
    assert (f"from n = 1 to n = {best} the perplexity falls" in text) == (best > 1)
    assert (f"From n = {best} to n = 7 the share" in text) == (best < 7)
    assert "Training never saw the verbs of validation." in text


# Training


@pytest.fixture
def few_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """18-train-mini with three variants in place of all."""
    few = {
        "high-lr": ("optimizer.lr_max=3e-2",),
        "seed-9": ("training.rng_seed=9",),
        "broken": ("optimizer.eps=1e-30",),
    }
    whole = preset.load("18-train-mini")
    short = preset.Preset(whole.name, whole.about, whole.kind, whole.settings, few)
    monkeypatch.setattr(runner, "load", lambda name: short)


@pytest.mark.usefixtures("few_variants")
def test_training_and_its_variants(make: Callable[..., Made], words: Callable[[str], int]):
    """Each variant is a run that differs in one key; results and page hold its figures, the model file the phase."""
    made = make("18-train-mini")
    results = stored(made)
    assert results["experiment"] == "18-train-mini"
    assert [v["name"] for v in results["variants"]] == ["high-lr", "seed-9", "broken"]
    for variant in results["variants"]:
        run = RunFolder(made.folder.path / "runs" / variant["name"])
        (changed,) = differing_keys(made.folder.stored_config(), run.stored_config())
        assert changed.split(":")[0] == variant["set"][0].split("=")[0]
        assert json.loads(run.results.read_text())["val_ppl"] == variant["val_ppl"]
        assert variant["change_pct"] == pytest.approx(100 * (variant["val_ppl"] / results["val_ppl"] - 1))
        assert run.require_model().name.startswith("minigpt-")
    seed = results["variants"][1]
    assert results["chance_pct"] == abs(seed["change_pct"])
    text = page(made)
    assert text.startswith("# Experiment 18-train-mini")
    assert "What would have made it worse, and why?" in text
    assert f"`optimizer.lr_max=3e-2`: **{results['variants'][0]['val_ppl']:.2f}**" in text
    assert f"Another seed alone gives {seed['val_ppl']:.2f} (seed 9)" in text
    assert f"`{made.folder.read_manifest()['outcome']['digest']}`" in text
    assert 200 <= words(made.folder.readme.read_text()) <= 400
    assert made.folder.require_model().name.startswith("minigpt-phase18-")
    assert results["model"] == f"models/{made.folder.require_model().name}"


def test_a_run_without_variants_is_told_as_one(tiny: list[str]):
    """The page keeps every section of a run's; settings that are not the default have a reason."""
    plain = preset.Preset("18-baseline", "nothing but a run", "training", tuple(tiny), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "load", lambda name: plain)
        made = runner.run("18-baseline")
    assert "## Gradients" in made.folder.readme.read_text()
    assert "this is what the experiment is about (nothing but a run)" in page(made)
    assert made.finding
    assert not made.finding.problem


def test_a_run_that_is_not_finite_is_a_problem_and_has_no_variants(make: Callable[..., Made]):
    """There is nothing to hold them against; the page says where it broke."""
    made = make("18-train-mini", "optimizer.lr_max=1e30", "optimizer.clip=null")
    assert made.finding
    assert made.finding.problem
    assert "variants" not in stored(made)
    assert "Not finite" in page(made)
    assert finished(made.folder)


RUN = {"val_ppl": 10.0, "train_ppl": 5.0, "chance_pct": 2.0}


@pytest.mark.parametrize(
    ("val", "train", "expected", "told"),
    [
        (10.1, 4.0, "chance", "1.0 % worse, within chance."),
        (9.9, 6.0, "chance", "1.0 % better, within chance."),
        (9.0, 6.0, "better", "10.0 % better: training 6.00, lowest validation 8.00 at step 7."),
        (20.0, 4.0, "memorised", "100.0 % worse. It memorised: training 4.00, lowest validation 8.00 at step 7."),
        (20.0, 6.0, "learnt less", "100.0 % worse. It learnt less: training 6.00, lowest validation 8.00 at step 7."),
        (None, None, "not finite", "it ended with numbers that are not finite."),
    ],
)
def test_verdicts(val: float | None, train: float | None, expected: str, told: str):
    """Worse than chance and better known: memorised; both worse: learnt less; a variant that is better is told so."""
    run = {
        "ended": "complete",
        "val_ppl": val,
        "train_ppl": train,
        "best_val_step": 7,
        "best_val_ppl": 8.0,
        "wall_clock_s": 1,
    }
    variant = training.compare("x", ["optimizer.eps=1"], RUN, run)
    assert training.verdict(RUN, variant) == expected
    story = object.__new__(training.ExperimentStory)
    assert told in story.item(variant | {"verdict": expected})


def test_chance_is_what_the_seeds_do():
    """The larger of their moves; none without seeds; one that is not finite says nothing of it."""
    seeds = [{"set": ["training.rng_seed=1"], "change_pct": x} for x in (-3.0, 2.0, None)]
    other = {"set": ["optimizer.eps=1"], "change_pct": 50.0}
    assert training.chance([*seeds, other]) == 3.0
    assert training.chance([other]) == 0.0


# What stands there


@pytest.mark.parametrize("stopped_after", [25, 75])
@pytest.mark.usefixtures("few_variants")
def test_stopped_and_gone_on_with(make: Callable[..., Made], stopped_after: int):
    """In the run or in a variant: the same command makes what is left, to the same bits, and nothing twice."""
    whole = make("18-train-mini", out_dir=Path("whole"))
    told: list[str] = []
    stopped = make("18-train-mini", stop=Stop(stopped_after))
    assert (stopped.finding, stopped.resumes) == (None, True)
    assert finished(stopped.folder) is None
    rest = Stop()
    again = make("18-train-mini", stop=rest, tell=told.append)
    assert told == ["going on with experiments/18-train-mini, which was not finished"]
    assert 10**9 - rest.left == 160 - stopped_after
    clocks = ("wall_clock_s", "peak_rss_mb")

    def timeless(made: Made) -> dict[str, Any]:
        results = stored(made)
        for each in (results, *results["variants"]):
            for clock in clocks:
                each.pop(clock, None)
        return results

    assert timeless(again) == timeless(whole)


def test_a_finished_one_is_left_alone_and_force_puts_it_aside(make: Callable[..., Made]):
    """Refused with what stands there; with --force it stands beside, whole, under the next free name."""
    first = make("18-checkpoint-roundtrip")
    before = contents(first.folder.path)
    digest = first.folder.complete.read_text().strip()
    with pytest.raises(RunError, match=f"got this experiment, finished .started .*, digest {digest}.; --force puts it"):
        make("18-checkpoint-roundtrip")
    assert contents(first.folder.path) == before
    for aside in ("18-checkpoint-roundtrip-old", "18-checkpoint-roundtrip-old-2"):
        told: list[str] = []
        make("18-checkpoint-roundtrip", force=True, tell=told.append)
        assert told == [f"experiments/18-checkpoint-roundtrip is now experiments/{aside}"]
    assert contents(Path("experiments/18-checkpoint-roundtrip-old")) == before


def test_what_else_may_stand_there(make: Callable[..., Made], tiny: list[str]):
    """Another experiment, a plain run, other settings, one that cannot be gone on with, a foreign folder, a file."""

    def refused(match: str, name: str = "18-train-mini", *settings: str, **options: Any) -> None:
        place = Path("experiments") / name
        before = contents(place)
        with pytest.raises(RunError, match=match):
            make(name, *settings, **options)
        assert contents(place) == before

    make("18-checkpoint-roundtrip", stop=Stop(5))
    refused("not finished, which cannot be gone on with; --force", "18-checkpoint-roundtrip")
    Path("experiments/18-checkpoint-roundtrip").rename("experiments/18-train-mini")
    refused("got experiment 18-checkpoint-roundtrip; --force")
    Path("experiments/18-train-mini").rename("elsewhere")
    make("18-train-mini", stop=Stop(5))
    refused(
        "with other settings .training.batch_size: 4 -> 5., not finished; --force",
        "18-train-mini",
        "training.batch_size=5",
    )
    with RunFolder(Path("experiments/18-train-mini")).hold(new=False):
        refused("another process is at work there", force=True)
    Path("experiments/18-train-mini").rename("elsewhere-too")
    trainer.run(load_config(None, tiny), Path("experiments/18-train-mini"))
    refused("got another run; --force")
    Path("experiments/18-train-mini/manifest.json").unlink()
    refused("got one with other files; choose another", force=True)
    Path("file").write_text("x")
    with pytest.raises(RunError, match="got a file"):
        make("18-train-mini", out_dir=Path("file"), force=True)


def test_settings_that_a_variant_cannot_bear(make: Callable[..., Made]):
    """Told with the variant's name, before anything is written."""
    with pytest.raises(ConfigError, match=r"lr_min 0.01 is above optimizer.lr_max 0.003.*\n.in the variant high-lr"):
        make("18-train-mini", "optimizer.lr_min=1e-2", "optimizer.lr_max=2e-2")
    assert not Path("experiments").exists()
