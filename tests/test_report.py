"""The picture and the page of a run: nothing lost in drawing, nothing said that was not measured."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minitrain import report, trainer
from minitrain.config import Config, differing_keys, load_config
from minitrain.report import curve
from minitrain.report.log import Log
from minitrain.report.story import CONCERNS, SHOWN, Story
from minitrain.report.words import number
from minitrain.run_folder import RunFolder

SHORT = ["scheduler.total_steps=120", "scheduler.warmup_steps=20", "training.val_every=20"]
EXPLODES = ["optimizer.lr_max=1e30", "optimizer.clip=null", "training.batch_size=2", "training.rng_seed=3"]
KINDS = {
    "default": [],
    "settings": [*SHORT, "optimizer.lr_max=3e-3", "optimizer.clip_value=0.1", "model.n_layer=1", "training.rng_seed=1"],
    "stopped": [*SHORT, *EXPLODES],
    "continued": [*SHORT, *EXPLODES, "scheduler.warmup_steps=0", "training.on_nonfinite=continue"],
    "five": ["scheduler.total_steps=5", "scheduler.warmup_steps=2"],
    "one": ["scheduler.total_steps=1", "scheduler.warmup_steps=0"],
    "own": [*SHORT, "data.train_path=own text.txt", "model.vocab_size=40"],
    "frozen": [*SHORT, "optimizer.lr_max=0", "optimizer.lr_min=0"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """A finished run of each kind, made where no name resolves and nothing connects."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("report"))
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        lines = [
            f"the {a} cat {b} a {c} mat." for a in ("old", "new", "red") for b in ("saw", "took") for c in "abcdefgh"
        ]
        Path("own text.txt").write_text("\n".join(lines))
        folders = {}
        for kind, settings in KINDS.items():
            folders[kind] = trainer.run(load_config(None, settings), Path("runs").absolute() / kind).folder
        return folders


@pytest.fixture
def run(runs: dict[str, RunFolder], request: pytest.FixtureRequest) -> RunFolder:
    return runs[request.param]


every_kind = pytest.mark.parametrize("run", KINDS, indirect=True)


def results(run: RunFolder) -> dict[str, Any]:
    return dict(json.loads(run.results.read_text()))


def page(run: RunFolder) -> str:
    """The README with its lines joined."""
    return " ".join(run.readme.read_text().split())


def pixels(png: bytes) -> NDArray[np.uint8]:
    """Height by width by RGBA, of a PNG as resvg writes it: 8 bits, each row as differences from the pixel before."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, data = 8, b""
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        body = png[at + 8 : at + 8 + size]
        assert zlib.crc32(kind + body) == struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0]
        if kind == b"IHDR":
            width, height, *form = struct.unpack(">IIBBBBB", body)
            assert form == [8, 6, 0, 0, 0]
        if kind == b"IDAT":
            data += body
        at += 12 + size
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, 1 + 4 * width)
    assert (rows[:, 0] == 1).all()
    return np.cumsum(rows[:, 1:].reshape(height, width, 4), axis=1, dtype=np.uint8)


def drawn(png: bytes, colour: str) -> int:
    """How many pixels have exactly this colour."""
    return int((pixels(png)[..., :3] == list(bytes.fromhex(colour[1:]))).all(axis=-1).sum())


# The page


@every_kind
def test_a_page_has_200_to_400_words_whether_code_and_headings_count_or_not(run: RunFolder) -> None:
    def bounded(text: str) -> None:
        prose = re.sub(r"```.*?```|^#.*?$|^!.*?$", "", text, flags=re.DOTALL | re.MULTILINE)
        assert 200 <= len(re.findall(r"\S*\w\S*", prose)) <= len(text.split()) <= 400

    bounded(run.readme.read_text())
    manifest = run.read_manifest()
    measured: dict[str, Any] = {k: math.nan if x is None else x for k, x in results(run).items()}
    manifest["hardware"]["cpu"] = "Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz"
    alert = "not learning: debug before scaling up (no loss below 4.00 in 200 steps)"
    measured["alerts"] = [alert]
    story = Story(run, run.stored_config(), manifest, measured, 10.0, Log.read(run))
    bounded(story.page())
    assert f"Alert: {alert}." in " ".join(story.page().split())


@every_kind
def test_the_headline_numbers_are_those_of_the_results(run: RunFolder) -> None:
    measured = results(run)
    headline = run.readme.read_text().split("**")[1]
    if run.path.name == "default":
        assert measured["beats_baseline"]
    if measured["val_ppl"] is None:
        assert headline.startswith("No finite validation perplexity")
        assert headline.endswith(f"-gram baseline {measured['ngram_baseline_val_ppl']:.2f}")
        return
    val, order, baseline, percent, verdict = re.fullmatch(
        r"Validation perplexity ([\d,.]+), (\d)-gram baseline ([\d.]+): ([\d,.]+) % (better|worse)", headline
    ).groups()  # type: ignore[union-attr]
    assert val == f"{measured['val_ppl']:,.2f}"
    assert (int(order), baseline) == (measured["ngram_best_n"], f"{measured['ngram_baseline_val_ppl']:.2f}")
    assert percent == f"{abs(measured['ppl_improvement_pct']):,.1f}"
    assert (verdict == "better") == measured["beats_baseline"]
    assert ("does not beat it" in page(run)) != measured["beats_baseline"]


@every_kind
def test_no_number_is_shown_raw(run: RunFolder) -> None:
    prose = re.sub(r"```.*?```|\(loss [^)]*\)", "", run.readme.read_text(), flags=re.DOTALL)
    assert not re.search(r"\b(nan|inf|None)\b|\d\.\d{5}|\b1 (steps|samples|settings|threads|parameters)\b", prose)


@every_kind
def test_what_differs_from_the_defaults_is_told(run: RunFolder) -> None:
    text = page(run)
    changed = differing_keys(Config(), run.stored_config())
    if not changed:
        assert "Every setting is the default." in text
        return
    assert f"{len(changed)} setting" in text
    assert all(line in text for line in changed[:SHOWN])
    assert (f"and {len(changed) - SHOWN} more" in text) == (len(changed) > SHOWN)


def test_every_setting_has_a_concern() -> None:
    """A section of the configuration that the page has no words for would end a run without a page."""
    assert set(CONCERNS) == set(Config.model_fields)


def test_the_shape_of_a_default_run_is_told_from_its_log(runs: dict[str, RunFolder]) -> None:
    run = runs["default"]
    text, measured, log = page(run), results(run), Log.read(run)
    assert f"began at {log.loss[0]:.3f} nats" in text
    assert "ln 64 = 4.159" in text
    for step, name in ((100, "after the warm-up"), (1000, "half way")):
        assert f"{log.loss[step - 25 : step + 26].mean():.3f} {name} (step {step:,})" in text
    assert f"{log.loss[1974:].mean():.3f} at the end (step 1,999)" in text
    assert f"perplexity {measured['best_val_ppl']:.2f} at step {measured['best_val_step']:,}" in text
    engaged = int((log.norm > 1).sum())
    assert f"engaged in {engaged:,} of 2,000 finite steps ({engaged / 20:.1f} %)" in text
    assert f"median of {np.median(log.norm):.2f}; the largest was {log.norm.max():.2f}" in text
    assert f"at step {log.norm.argmax():,}. The clip" in text
    assert (
        f"took {measured['wall_clock_s']:.2f} s up to its results and at most {measured['peak_rss_mb']:.0f} MB" in text
    )
    assert run.read_manifest()["outcome"]["digest"] in text


def test_a_run_that_was_not_finite_names_the_step_and_how_to_look_into_it(runs: dict[str, RunFolder]) -> None:
    for kind, ending in (("stopped", "the run stopped there"), ("continued", "the run went on and had")):
        step, text = results(runs[kind])["first_nonfinite_step"], page(runs[kind])
        assert f"Step {step} was the first with a number that is not finite (loss nan, grad_norm nan); {ending}" in text
        assert f"minitrain replay {runs[kind].path} --step {step} --nan-bisect" in text


def test_what_validation_did_is_told(runs: dict[str, RunFolder]) -> None:
    assert "It ended before its first validation." in page(runs["stopped"])
    assert "Validation ran 6 times, with no finite loss." in page(runs["continued"])
    assert "Validation ran once: perplexity" in page(runs["five"])
    assert "was lowest at the last" in page(runs["own"])
    assert "Validation ran 6 times and never fell below its first, perplexity" in page(runs["frozen"])
    assert re.search(r"was lowest at perplexity [\d.]+ at step [\d,]+; the last, .* % higher", page(runs["default"]))


def test_the_command_of_the_page_makes_the_same_run(
    runs: dict[str, RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs["own"]
    monkeypatch.chdir(run.path.parent.parent)
    command = re.search(r"minitrain (train --config .*) --out-dir NEW", run.readme.read_text())
    assert command
    subprocess.run(
        f"{sys.executable} -m minitrain {command[1]} --out-dir NEW", shell=True, check=True, capture_output=True
    )
    digest = RunFolder(Path("NEW")).read_manifest()["outcome"]["digest"]
    assert f"digest `{digest}`" in page(run)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (9.504, "9.50"),
        (12345.678, "12,345.68"), (1.25e9, "1.2e+09"), (0.0041, "0.0041"), (0.0, "0.00"), (-0.5, "-0.50"),
        (math.inf, "infinite"), (math.nan, "not finite"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_a_person_writes_them(x: float, text: str) -> None:
    assert number(x) == text


# The picture


@every_kind
def test_the_picture_shows_each_series_that_there_is(run: RunFolder) -> None:
    log, png = Log.read(run), run.curve.read_bytes()
    assert pixels(png).shape[1] > 1500
    assert drawn(png, curve.EACH) > 30
    assert (drawn(png, curve.MEAN) > 100) == (log.window > 1)
    assert drawn(png, curve.BASELINE) > 1000
    assert drawn(png, curve.VALIDATION) > 60
    assert (drawn(png, curve.BROKEN) > 1000) == bool(log.broken)


def test_drawing_needs_no_results_no_validation_and_no_finite_number(runs: dict[str, RunFolder]) -> None:
    """Every series may be empty or not finite throughout; what there is is drawn."""
    none, two, bad = np.array([]), np.array([0.0, 1.0]), np.array([math.nan, math.inf])
    line = {"step": 0, "nonfinite": {"grad_norm": "inf"}}
    for log in (
        Log(none, none, none, none, none, none, none, []),
        Log(two, bad, bad, bad, two, two, bad, [line]),
        Log(two, two, two, two, two, none, none, []),  # zeros: no logarithm
    ):
        for baseline in (math.nan, math.inf, 1.0, 0.0):
            assert curve.draw(log, baseline, "1-gram baseline", "title", "subtitle").startswith(b"\x89PNG")


def test_a_spike_and_a_gap_stay_in_the_picture_of_a_long_run() -> None:
    step = np.arange(100_000.0)
    loss, calm = np.full(100_000, 2.0), Log(step, step * 0 + 2, step, step, step, step[:0], step[:0], [])
    loss[43_210], loss[70_000:75_000] = 11.0, math.nan
    wild = Log(step, loss, step, step, step, step[:0], step[:0], [])
    before, after = (pixels(curve.draw(log, 11.0, "4-gram baseline", "t", "s")) for log in (calm, wild))
    is_each = [(p[..., :3].astype(int) - [0x56, 0xB4, 0xE9] == 0).all(axis=-1) for p in (before, after)]
    assert (
        is_each[1].sum(axis=0).max() > is_each[0].sum(axis=0).max() + 300
    )  # a column of the picture, high as the spike
    is_mean = (after[..., :3] == [0x00, 0x72, 0xB2]).all(axis=-1)[300:].any(axis=0)  # below the legend
    inside = np.flatnonzero(is_mean)
    assert np.diff(inside).max() > 50  # a hole in the line as wide as the gap


@given(st.lists(st.floats(width=32), max_size=400), st.integers(1, 60))
def test_down_sampling_loses_no_extreme_and_no_gap(values: list[float], buckets: int) -> None:
    array = np.array(values, np.float64)
    kept = curve.extremes(array, buckets)
    assert (np.diff(kept) > 0).all()
    assert len(kept) <= 3 * buckets + 2
    for part in np.array_split(np.arange(len(array)), buckets):
        mine = array[kept[np.isin(kept, part)]]
        finite, mine_finite = array[part][np.isfinite(array[part])], mine[np.isfinite(mine)]
        assert len(mine_finite) == len(mine) or not np.isfinite(array[part]).all()
        assert np.isfinite(mine).all() == np.isfinite(array[part]).all()
        if len(finite):
            assert (mine_finite.min(), mine_finite.max()) == (finite.min(), finite.max())


@given(st.lists(st.floats(0, 100), max_size=400))
def test_a_short_run_is_drawn_whole(values: list[float]) -> None:
    assert curve.extremes(np.array(values), max(1, (len(values) + 1) // 2)).tolist() == list(range(len(values)))


def test_the_mean_is_of_finite_losses_around_and_missing_where_the_loss_is() -> None:
    step = np.arange(400.0)
    loss = step.copy()
    loss[100] = math.nan
    log = Log(step, loss, step, step, step, step[:0], step[:0], [])
    assert log.window == 11
    assert log.mean_loss(0) == 0
    assert log.mean_loss(200) == 200
    assert log.mean_loss(101) == np.mean([*range(96, 100), *range(101, 107)])
    assert math.isnan(log.mean_loss(100))


# The room


def test_writing_again_from_the_files_alone_makes_the_same(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    """results.json has null where the trainer had NaN; nothing else is needed, nothing is left behind."""
    for kind in ("settings", "stopped"):
        copy = RunFolder(tmp_path / kind)
        shutil.copytree(runs[kind].path, copy.path)
        copy.curve.unlink()
        copy.readme.unlink()
        measured = results(copy)
        report.write_curve(copy, copy.stored_config(), measured, measured["ngram_baseline_val_ppl"])
        report.write_page(copy, copy.stored_config(), measured, measured["ngram_baseline_val_ppl"])
        assert copy.curve.read_bytes() == runs[kind].curve.read_bytes()
        assert page(copy) == page(runs[kind]).replace(str(runs[kind].path), str(copy.path))
        assert sorted(p.name for p in copy.path.iterdir()) == sorted(p.name for p in runs[kind].path.iterdir())


def test_the_plotting_library_is_not_loaded_before_it_draws_and_fits_in_400_mb(runs: dict[str, RunFolder]) -> None:
    program = (
        "import sys, json; from pathlib import Path; from minitrain import report, environment, run_folder as run\n"
        "assert not {'altair', 'vl_convert'} & set(sys.modules)\n"
        "run = run.RunFolder(Path(sys.argv[1])); measured = json.loads(run.results.read_text())\n"
        "report.write_curve(run, run.stored_config(), measured, measured['ngram_baseline_val_ppl'])\n"
        "print(environment.peak_rss_mb())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, runs["default"].path], check=True, capture_output=True, text=True
    )
    assert float(done.stdout) < 400
