"""The metrics of a run: measured while it trains, stored beside its record, moving none of its bits."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import recording

from minitrain import open_run, trainer
from minitrain.errors import RunError
from minitrain.metrics import read_metrics
from minitrain.replay import Replay
from minitrain.run_folder import RunFolder
from minitrain.tensors import parameter_table

MEASURED = ["metrics.every=7", "metrics.slow_every=20", "metrics.probe=6"]


@pytest.fixture(scope="module")
def measured(place):
    """A run with metrics at steps that agree with nothing else."""
    trainer.run(recording.config(*MEASURED), place / "measured")
    return RunFolder(place / "measured")


def test_which_steps(measured):
    """Every metric has a row for each step of its cadence; validations have one for the last state too."""
    series = read_metrics(measured)
    cadences = {
        "batch_rare": range(150),
        "update_ratio": range(0, 150, 7),
        "spectral_norm": range(0, 150, 20),
        "class_loss": [60, 120, 150],
    }
    for name, steps in cadences.items():
        assert series[name].steps.tolist() == list(steps), name
    for one in series.values():
        assert one.values.shape == (len(one.steps), *map(len, one.labels)), one.name
        assert one.unit
        assert one.formula


def test_measured_is_what_a_replay_measures(measured):
    """Activations, gradients, ratios and updates of a step are those of the step when it is run again."""
    series, step = read_metrics(measured), 77
    live = Replay(measured.path).at(step)
    before = live.state.params.flat.astype(np.float64)
    seen = {}
    with live.hooks.listen(lambda site, x: seen.update({site: x.astype(np.float64)})):
        live.step()
    after = live.state.params.flat.astype(np.float64)

    def told(name):
        one = series[name]
        return dict(zip(one.labels[0], one.values[one.steps.tolist().index(step)], strict=True))

    for site, value in told("activation_mean_abs").items():
        assert value == pytest.approx(np.abs(seen[site]).mean(), rel=1e-5)
    for site, value in told("activation_std").items():
        assert value == pytest.approx(seen[site].std(), rel=1e-4)
    for name, value in told("grad_norm").items():
        assert value == pytest.approx(np.linalg.norm(seen[f"grad.{name}"]), rel=1e-5)
    for site, value in told("grad_activation_ratio").items():
        if site in ("softmax", "log_softmax"):
            assert np.isnan(value)
        else:
            assert value == pytest.approx(np.linalg.norm(seen[f"grad:{site}"]) / np.linalg.norm(seen[site]), rel=1e-4)
    ratios, offset = told("update_ratio"), 0
    for p in parameter_table(measured.stored_config().model):
        size = int(np.prod(p.shape))
        old, new = before[offset : offset + size], after[offset : offset + size]
        offset += size
        norm = np.linalg.norm(old)
        slow = np.linalg.norm(new - old) / norm if norm else np.nan
        assert ratios[p.name] == pytest.approx(slow, rel=1e-3, nan_ok=True)


def test_spectral_norms_are_near_the_largest_singular_values(measured):
    """Of the matrices of the state that the step left, from below, within 5 %."""
    one = read_metrics(measured)["spectral_norm"]
    params = open_run(measured.path).params(121)
    for name, norm in zip(one.labels[0], one.values[one.steps.tolist().index(120)], strict=True):
        largest = np.linalg.svd(params[name].astype(np.float64), compute_uv=False)[0]
        assert 0.95 * largest <= norm <= largest * (1 + 1e-5), name


def test_batches(measured):
    """Regular verbs, rare tokens and duplicates of every step, counted by hand from the record."""
    series, run = read_metrics(measured), open_run(measured.path)
    regular = [row.regularity == "regular" for row in run.data.train.labels]
    assert all(np.isfinite(series[name].values).all() for name in ("batch_regular", "batch_rare"))
    for step in (0, 63, 149):
        rows = run.batch(step).rows
        assert series["batch_regular"].values[step] == pytest.approx(np.mean([regular[row] for row in rows]))
    assert 0.01 < series["batch_rare"].values.mean() < 0.1
    assert (series["batch_duplicates"].values == 0).all()


def test_losses_by_class(measured):
    """The validation losses of the classes, weighed by their tokens, are the validation loss; the rest is by hand."""
    series, run = read_metrics(measured), open_run(measured.path)
    one = series["class_loss"]
    assert one.labels == (("train", "validation"), ("regular", "irregular"), ("verb form", "sentence"))
    val = run.data.val
    irregular = np.array([row.regularity == "irregular" for row in val.labels])
    tokens = [val.loss_mask[mask].sum() for mask in (~irregular, irregular)]
    mean = np.average(one.values[1, 1, :, 1], weights=tokens)
    logged = {line["step"]: line for line in measured.log_lines() if "val_loss" in line}
    assert mean == pytest.approx(logged[120]["val_loss"], rel=1e-5)
    assert np.isfinite(one.values).all()


def test_duplicated_batches_show(record_run, tmp_path):
    """A batch that is the one before it again has all its samples marked."""
    path = record_run(tmp_path / "dup", "injection.name=duplicate_batch", "injection.step=9", "metrics.every=5")
    series = read_metrics(RunFolder(path))
    counts = series["batch_duplicates"].values
    assert counts[9] == open_run(path).config.training.batch_size
    assert counts[:9].max() < counts[9]


def test_no_bit_moves(place, measured):
    """Metrics on or off, often or seldom: the same last state, and the same record but for its header."""
    off = trainer.run(recording.config("metrics.enabled=false"), place / "off")
    assert off.digest == json.loads(measured.manifest.read_text())["outcome"]["digest"]
    assert not off.folder.metrics.exists()
    assert read_metrics(off.folder) == {}
    for array in ("m", "digest_out", "chain"):
        ours, theirs = (sorted((f.record / array).glob("c.*")) for f in (measured, off.folder))
        assert [p.read_bytes() for p in ours] == [p.read_bytes() for p in theirs]


def test_equal_runs_measure_equally(place, measured):
    """The same run again has the same bytes in every file of its metrics."""
    again = trainer.run(recording.config(*MEASURED), place / "again").folder
    files = [
        {p.relative_to(f.metrics): p.read_bytes() for p in f.metrics.rglob("*") if p.is_file()}
        for f in (measured, again)
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("stop_at", [45, 80, 121])
def test_resumed_is_uninterrupted(place, measured, stop_at):
    """Stopped and resumed, a run has measured what the uninterrupted one has, bit for bit, and logged it."""
    path = place / f"stopped-{stop_at}"
    config = recording.config(*MEASURED)
    watch = recording.Watch(stop_at)
    trainer.run(config, path, listeners=[watch], stop=watch)
    trainer.run(config, path, resume=True)
    whole, resumed = read_metrics(measured), read_metrics(RunFolder(path))
    for name, one in whole.items():
        np.testing.assert_array_equal(resumed[name].values, one.values, err_msg=name)
    logs = [[line for line in f.log_lines() if "val_loss" in line] for f in (measured, RunFolder(path))]
    assert logs[0] == logs[1]


def test_resume_wants_the_same_cadence(place, measured):
    """Other metrics than the run began with are refused with both settings named."""
    copy = shutil.copytree(measured.path, place / "other-cadence")
    (copy / "COMPLETE").unlink()
    with pytest.raises(RunError, match="expected the settings of metrics that the run began with.*'every': 7"):
        trainer.run(recording.config("metrics.every=8"), copy, resume=True)


def test_summary_in_the_log(measured):
    """Every validation line of the log says in a few numbers what was measured since the one before."""
    lines = [line for line in measured.log_lines() if "val_loss" in line]
    series = read_metrics(measured)
    assert all(line["metrics"]["spikes"] >= 0 for line in lines)
    last = lines[-1]["metrics"]
    assert last["dead_units_largest"] == pytest.approx(series["dead_units"].values[-1].max(), abs=1e-6)
    assert last["update_ratio_median"] == pytest.approx(np.nanmedian(series["update_ratio"].values[-1]), abs=1e-6)
    assert last["activation_largest"] == pytest.approx(series["activation_mean_abs"].values[-1].max(), rel=1e-4)


def test_xarray_reads_them(measured):
    """Named dimensions, steps and units stand in the files for any Zarr client."""
    import xarray

    with xarray.open_zarr(measured.metrics, consolidated=False) as opened:
        assert opened["update_ratio"].dims == ("measured_step", "tensor")
        assert opened["spectral_norm"].attrs["units"] == "1"
        assert opened["measured_step"].values.tolist() == list(range(0, 150, 7))
        assert opened.attrs["tensor"][0] == "embed.weight"
        np.testing.assert_array_equal(opened["class_loss"], read_metrics(measured)["class_loss"].values)


def test_damaged_metrics_are_named(place, measured):
    """A flipped byte, another format and a later version are told; nothing of them is returned."""
    copy = RunFolder(shutil.copytree(measured.path, place / "damaged"))
    chunk = copy.metrics / "grad_norm" / "c.0.0"
    data = bytearray(chunk.read_bytes())
    data[40] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(RunError, match=r"grad_norm/c\.0\.0: expected crc32c"):
        read_metrics(copy)
    about = json.loads((copy.metrics / "zarr.json").read_text())
    about["attributes"]["format_version"] = 99
    (copy.metrics / "zarr.json").write_text(json.dumps(about))
    with pytest.raises(RunError, match="expected minitrain-metrics version 1, got 'minitrain-metrics' version 99"):
        read_metrics(copy)
    (copy.metrics / "zarr.json").write_text("{")
    with pytest.raises(RunError, match="expected a Zarr group of metrics"):
        read_metrics(copy)


def test_a_run_that_is_not_finite(record_run, tmp_path):
    """What was measured up to the broken step is there, and what is not finite is NaN."""
    path = record_run(
        tmp_path / "nan", "injection.name=param_nan", "injection.step=20", "metrics.every=3", "metrics.slow_every=3"
    )
    series = read_metrics(RunFolder(path))
    assert series["activation_mean_abs"].steps[-1] <= 21
    assert np.isfinite(series["activation_mean_abs"].values[:6]).all()
