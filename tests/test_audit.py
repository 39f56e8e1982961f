"""`verify --audit` and the recurrence: every faulty step, none of a healthy run, and what each of the two can see."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from minitrain._ext.plan import call
from minitrain.cli import main
from minitrain.model import make_backend
from minitrain.optim import hyper_row
from minitrain.record.recorded import open_run
from minitrain.replay import verify
from minitrain.replay.follows import Excess, Follows, numbers, places
from minitrain.replay.segments import recurrence, work_of
from minitrain.sections import OptimizerConfig

FLOATS = st.integers(0, 2**32 - 1).map(lambda bits: np.uint32(bits).view(np.float32))
"""Any of them: subnormal, zeros of both signs, Inf, NaN."""


def updated(config: OptimizerConfig, backend, g, m, v):
    """m' and v' of the engine's own update."""
    m, v = m.copy(), v.copy()
    offsets, decays = np.array([0, len(m)]), np.zeros(1, np.uint8)
    call(backend, "adamw", np.zeros_like(m), m, v, g, offsets, decays, np.array(hyper_row(config, 0.0, 1)))
    return m, v


def bump(tensor, bit: int = 0) -> None:
    tensor.reshape(-1).view(np.uint32)[3] ^= np.uint32(1 << bit)


def hit(tensor) -> None:
    tensor.reshape(-1)[3] *= 1.5


# The check of one step


@pytest.fixture(params=["compiled", "reference"])
def backend(request):
    return make_backend(request.param, 1)


BETAS = st.sampled_from([(0.9, 0.95), (0.9, 0.999), (0.0, 0.0), (0.5, 0.99999), (0.999999, 0.1)])


@pytest.mark.parametrize("name", ["compiled", "reference"])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(FLOATS, FLOATS, FLOATS), min_size=1, max_size=40), BETAS)
def test_what_was_computed_is_never_accused(name, elements, betas):
    """For any numbers whatever, and any betas, in the arithmetic of either backend."""
    config, backend = OptimizerConfig(beta1=betas[0], beta2=betas[1]), make_backend(name, 1)
    m, v, g = (np.array(column, np.float32) for column in zip(*elements, strict=True))
    assert not len(Follows(config, backend)(m, v, *updated(config, backend, g, m, v)).elements)


@pytest.mark.parametrize("magnitude", [-42, -38, -22, -19, -10, -4, 0, 10, 18, 37])
@pytest.mark.parametrize("ratio", [1e-4, 1.0, 1e4])
def test_no_magnitude_is_accused(backend, magnitude, ratio):
    """Moments and gradients as they occur together, from subnormal to where squares overflow; 10000 elements each."""
    rng, config = np.random.default_rng(magnitude + 50), OptimizerConfig()
    with np.errstate(all="ignore"):
        m = (rng.standard_normal(10_000) * 10.0**magnitude).astype(np.float32)
        v = (np.float64(m) ** 2 * rng.random(10_000)).astype(np.float32)
        g = (rng.standard_normal(10_000) * 10.0**magnitude * ratio).astype(np.float32)
    g[:1000] = 0
    assert not len(Follows(config, backend)(m, v, *updated(config, backend, g, m, v)).elements)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 22), st.sampled_from(["m", "v"]), st.sampled_from([0.03, 1.0, 30.0]))
def test_an_element_is_accused_if_and_only_if_no_gradient_explains_it(seed, bit, kind, ratio):
    """One bit of m' or v' flipped, against each of the 40001 gradients around the one that m' tells, as a rule more
    than m' leaves open: who is accused has none among them, who is not has one; the nearest told is the nearest.
    """
    rng, config, backend = np.random.default_rng(seed), OptimizerConfig(), make_backend("compiled", 1)
    m, g = (rng.standard_normal(8) * scale for scale in (1, ratio))
    m, g, v = m.astype(np.float32), g.astype(np.float32), (m**2 * rng.random(8)).astype(np.float32)
    m_after, v_after = updated(config, backend, g, m, v)
    changed = m_after if kind == "m" else v_after
    changed.view(np.uint32)[:] ^= np.uint32(1 << bit)
    found = Follows(config, backend)(m, v, m_after, v_after)
    for element in range(8):
        told = (m_after[element] - np.float64(0.9) * m[element]) / 0.1
        tried = numbers(places(np.array([told], np.float32)) + np.arange(-20_000, 20_001))
        to_m, to_v = updated(config, backend, tried, *(np.full(40_001, x[element]) for x in (m, v)))
        led = to_m == m_after[element]
        if led[[0, -1]].any():
            continue  # the gradient is so small beside m that there are more
        at = np.nonzero(found.elements == element)[0]
        assert len(at) == (not (led & (to_v == v_after[element])).any())
        if len(at):
            assert found.of_m[at[0]] == (not led.any())
            reached, wanted = (to_v[led], v_after) if led.any() else (to_m, m_after)
            ulps = np.abs(places(reached) - places(wanted[element : element + 1]))
            assert found.ulps[at[0]] == ulps.min()
            assert found.nearest[at[0]] in reached[ulps == ulps.min()]


def test_how_much_is_seen(backend):
    """At magnitudes as in training: a lowest bit of v is seen nearly always, where the gradient is small."""
    rng, config = np.random.default_rng(0), OptimizerConfig()
    m, g = (rng.standard_normal(20_000).astype(np.float32) * np.float32(scale) for scale in (1e-3, 1e-3))
    v = (m**2).astype(np.float32)
    m_after, v_after = updated(config, backend, g, m, v)

    def share(kind: str, factor: float) -> float:
        told = {"m": m_after, "v": v_after}
        other = told[kind].copy()
        if factor == 0:
            other.view(np.uint32)[:] ^= 1
        else:
            other *= np.float32(factor)
        found: Excess = Follows(config, backend)(m, v, *(told | {kind: other}).values())
        return len(found.elements) / len(m)

    assert share("v", 100) == share("v", 1.0001) == 1.0
    assert share("m", 100) > 0.999
    assert share("v", 0) > 0.5
    assert share("m", 0) > 0.2


# Whole runs


@pytest.mark.parametrize("seed", range(8))
def test_a_healthy_run_is_accused_of_nothing(tmp_path, record_run, seed):
    """Over betas, clips, decay, dropout, rates, backends: all steps of all tensors follow, and every step replays."""
    run = record_run(
        tmp_path / "run",
        *(f"training.rng_seed={seed}", f"model.dropout={0.1 * (seed % 3)}", f"optimizer.weight_decay={seed % 2}"),
        *(f"optimizer.clip={('null', 1.0, 0.01)[seed % 3]}", f"optimizer.beta1={(0.9, 0.0, 0.99)[seed // 3 % 3]}"),
        *(f"optimizer.beta2={(0.95, 0.999)[seed // 2 % 2]}", f"optimizer.lr_max={(3e-4, 0.1)[seed // 4 % 2]}"),
        f"training.backend={('compiled', 'reference')[seed % 5 == 4]}",
    )
    recorded, shown = open_run(run), []
    found = verify(recorded, audit=True, workers=1 + seed % 2, show=shown.append)
    assert (found.faults, found.unverified, found.steps_checked) == ([], [], 30)
    assert sum(shown) == work_of(recorded, audit=True)
    report = found.recurrence
    assert report is not None
    assert (report.faults, report.unverified, report.unverified_params) == ([], [], [])
    assert (report.steps_checked, report.verified, found.verified) == (30, True, True)


SEVERAL = (
    "injections=[{name: v_corrupt, step: 9}, {name: scale, step: 11}, {name: m_corrupt, step: 12, target: ln_f.bias},"
    " {name: bit_flip, step: 13, target: 'm.ln_f.weight', element: [2]}, {name: v_corrupt, step: 20, factor: 1.5}]"
)


@pytest.fixture(scope="module")
def several(tmp_path_factory, record_run, book) -> Path:
    """Five injections, four of them in one segment; unclipped, so that `scale` shows."""
    path = tmp_path_factory.mktemp("several") / "config.yaml"
    path.write_text(SEVERAL.replace("=", ": ", 1))
    return record_run(path.parent / "run", "optimizer.clip=null", yaml=path)


def test_all_faulty_steps_are_found_blind(several):
    """Each with kind and tensor, and none behind it; a segment's first does not hide the others."""
    found = verify(open_run(several, blind=True), audit=True)
    assert [(f.step, f.kind, f.tensor) for f in found.faults] == [
        (9, "v", "lm_head.bias"),
        (11, "grad_norm", None),
        (12, "m", "ln_f.bias"),
        (13, "m", "ln_f.weight"),
        (20, "v", "lm_head.bias"),
    ]
    assert (found.steps_checked, found.unverified) == (30, [])
    left_out = verify(open_run(several), audit=True, injections=False)
    assert left_out.faults == found.faults


def test_what_the_recurrence_sees(several):
    """Moments that were changed by themselves, with the element; no gradient that was wrong in itself."""
    report = recurrence(open_run(several, blind=True))
    moments = [f for f in report.faults if f.kind in ("m", "v")]
    assert {(f.step, f.tensor) for f in moments} == {(9, "lm_head.bias"), (12, "ln_f.bias"), (20, "lm_head.bias")}
    first = moments[0]
    assert first.differing == first.elements == 24
    assert first.recorded == pytest.approx(100 * first.nearest, rel=1e-6)
    assert f"v.lm_head.bias{list(first.index)} = " in first.message
    assert [(f.step, f.tensor) for f in report.faults if f.kind == "param"] == [
        (9, "lm_head.bias"),
        (12, "ln_f.bias"),
        (20, "lm_head.bias"),
    ]
    assert 13 not in {f.step for f in report.faults}, "one ulp of one element of m: only the replay sees it"
    assert report.unverified_params == [*range(10, 16), *range(21, 24)]
    assert not report.verified


def test_declared_injections_are_no_faults(several):
    """With the injections of the record the run is what it says it is; the recurrence tells which changed the state."""
    found = verify(open_run(several), audit=True)
    assert (found.verified, found.faults, found.unverified) == (True, [], [])
    assert found.recurrence is not None
    assert found.recurrence.wrong == []
    assert found.recurrence.faults[0].declared.startswith("v_corrupt at step 9 (lm_head.bias")
    assert not verify(open_run(several, blind=True), audit=True).verified


@pytest.mark.parametrize("name", ["decay_zero", "decay_huge", "no_clip", "inverse_cosine", "lr_jump"])
def test_settings_that_were_injected(tmp_path, record_run, name):
    """With them every tensor follows; blind, each step from K on is faulty, and nothing before it."""
    run = record_run(tmp_path / "run", f"injection.name={name}", "injection.step=11", "optimizer.clip=0.5")
    report = recurrence(open_run(run))
    assert (report.faults, report.verified) == ([], True)
    found = verify(open_run(run, blind=True), audit=True)
    assert min(f.step for f in found.faults) == 11
    if name == "lr_jump":
        assert {f.step for f in found.faults} == {11}
    elif name in ("no_clip", "inverse_cosine"):
        assert {f.step for f in found.faults} == {*range(11, 30)}


def test_faults_that_no_injection_makes(tmp_path, record_run, fault):
    """Two in a segment and one in another, in gradients; memory between steps, kept as it was read."""
    strikes = [fault(t, lambda parts: hit(parts.model.grads["ln_f.bias"]), "clip") for t in (10, 12, 22)]
    strikes += [fault(14, lambda parts: bump(parts.optimizer.v["ln_f.bias"], 22))]
    run = record_run(tmp_path / "run", watchers=strikes)
    found = verify(open_run(run), audit=True)
    assert [(f.step, f.kind, f.tensor) for f in found.faults] == [
        *((t, "m", "ln_f.bias") for t in (10, 12)),
        (14, "memory", "ln_f.bias"),
        (22, "m", "ln_f.bias"),
    ]
    assert (found.steps_checked, found.unverified) == (30, [])
    report = found.recurrence
    assert report is not None
    assert [(f.step, f.kind) for f in report.faults] == [(14, "memory")]
    open_run(run).folder.incident(14).unlink()
    again = verify(open_run(run), audit=True)
    assert again.unverified == [14, 15]
    assert again.recurrence is not None
    assert (again.recurrence.unverified, again.recurrence.unverified_params) == ([14], [14, 15])


def test_parameters_that_are_lost(tmp_path, record_run):
    """They are neither replayed nor follow: unverified up to the next keyframe, with the reason; then all is well."""
    settings = ("injection.name=bit_flip", "injection.step=11", "injection.target=param.embed.weight[2,1]")
    run = record_run(tmp_path / "run", *settings)
    found = verify(open_run(run, blind=True), audit=True)
    assert [(f.step, f.kind, f.tensor) for f in found.faults] == [(11, "param", "embed.weight")]
    assert (found.steps_checked, found.unverified) == (26, [12, 13, 14, 15])
    assert len(found.lost) == 1
    assert found.lost[0].startswith("state 12: expected param.embed.weight with digest ")
    assert found.recurrence is not None
    assert found.recurrence.unverified_params == [12, 13, 14, 15]


def test_an_incident_gives_a_lost_state_back(tmp_path, record_run):
    """A NaN in a parameter is kept with the state that the next step read, so the audit goes on from there."""
    settings = ("injection.name=param_nan", "injection.step=11", "training.on_nonfinite=continue")
    found = verify(open_run(record_run(tmp_path / "run", *settings), blind=True), audit=True)
    assert [(f.step, f.kind, f.tensor) for f in found.faults] == [(11, "param", "lm_head.bias")]
    assert (found.steps_checked, found.unverified) == (30, [])


def test_without_moments(tmp_path, record_run, fault):
    """With keyframes only an audit can do what verify does, and says why the rest cannot be done."""
    strike = fault(10, lambda parts: hit(parts.model.grads["ln_f.bias"]), "clip")
    found = verify(open_run(record_run(tmp_path / "run", "record.moments=keyframes", watchers=[strike])), audit=True)
    assert found.unverified == [11, 12, 13, 14, 15]
    assert "state 11: expected a keyframe" in found.lost[0]
    assert found.recurrence is not None
    assert "record.moments: keyframes keeps m and v at keyframes only" in found.recurrence.reason
    assert not found.recurrence.verified


def test_damaged_rows(tmp_path, record_run):
    """What cannot be read is unverified in the recurrence; the audit of the files tells what is wrong with it."""
    run = record_run(tmp_path / "run")
    shard = next((run / "record.zarr/v").glob("c.*"))
    data = bytearray(shard.read_bytes())
    stride = open_run(run).layout.arrays["v"].stride
    data[9 * stride + 5] ^= 1
    shard.write_bytes(data)
    found = verify(open_run(run), audit=True)
    assert [(f.step, f.kind) for f in found.faults] == [(9, "v")]
    assert found.recurrence is not None
    assert (found.recurrence.faults, found.recurrence.unverified) == ([], [9, 10])
    assert found.recurrence.unverified_params == [9, 10, *range(11, 16)]


def test_a_run_that_began_elsewhere(tmp_path, record_run, monkeypatch):
    """State 0 is not the seed's: that is the one fault; the steps are checked from the recorded state."""
    from minitrain import trainer

    assemble = trainer.assemble

    def altered(config, data):
        parts = assemble(config, data)
        bump(parts.model.params["embed.weight"])
        return parts

    monkeypatch.setattr(trainer, "assemble", altered)
    found = verify(open_run(record_run(tmp_path / "run")), audit=True)
    assert [(f.step, f.kind) for f in found.faults] == [(0, "keyframe")]
    assert (found.steps_checked, found.unverified) == (30, [])


# At the command line


def minitrain(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def test_audit_tells_a_person(several):
    """What was done about injections, each fault, what the recurrence cannot see, what to type next; exit code 1."""
    result = minitrain("verify", several, "--audit", "--blind")
    assert result.exit_code == 1
    for words in (
        "fault: step 9: expected v.lm_head.bias (update) as recorded",
        "fault: step 13: expected m.ln_f.weight",
        "30 steps checked, 5 faults",
        "recurrence fault: step 9: no gradient that explains m leads to v.lm_head.bias[",
        "recurrence unverified: parameters of steps 10 to 15, 21 to 23",
        "it cannot see a gradient that is wrong in itself; the replay can",
        "blind: what the record says of injections was not read",
        f"next: minitrain replay {several} --step 9",
    ):
        assert words in result.stdout
    assert "v_corrupt" not in result.stdout
    assert "without the injections of the record: v_corrupt at" in minitrain("verify", several, "--no-injection").stdout
    result = minitrain("verify", several, "--audit")
    assert result.exit_code == 0
    assert "every one replayed" in result.stdout
    assert "recurrence declared (v_corrupt at step 9" in result.stdout
    assert "with the injections of the record: v_corrupt at step 9" in result.stdout


STABLE = ["verified", "steps_checked", "faulty_steps", "unverified_steps"]


def test_json(several):
    """The stable keys, with and without a replay."""
    told = json.loads(minitrain("verify", several, "--audit", "--blind", "--json").stdout)
    assert list(told) == [*STABLE, "recurrence", "injections"]
    assert told["injections"] == "not read"
    assert [f["step"] for f in told["faulty_steps"]] == [9, 11, 12, 13, 20]
    recurred = told["recurrence"]
    assert list(recurred) == ["steps_checked", "faults", "unverified_steps", "unverified_params", "reason"]
    assert {"step", "kind", "tensor", "index", "recorded", "nearest", "ulps", "differing"} <= set(recurred["faults"][0])
    only = json.loads(minitrain("verify", several, "--recurrence-only", "--blind", "--json").stdout)
    assert list(only) == list(told)
    assert only["recurrence"] == recurred
    assert sorted({f["step"] for f in only["faulty_steps"]}) == [9, 12, 20]
    assert list(only["faulty_steps"][0]) == ["step", "kind", "tensor", "message"]
    assert not only["verified"]
    for option, how in (["--audit"], "as recorded"), (["--audit", "--no-injection"], "left out"):
        assert json.loads(minitrain("verify", several, *option, "--json").stdout)["injections"] == how
    assert list(json.loads(minitrain("verify", several, "--json").stdout)) == STABLE


def test_recurrence_only(tmp_path, record_run):
    """It needs neither the data nor a model; what cannot be done is said; two ways at once are refused."""
    run = record_run(tmp_path / "run")
    result = minitrain("verify", run, "--recurrence-only")
    assert (result.exit_code, "30 steps held against those before them, every tensor follows" in result.stdout) == (
        0,
        1,
    )
    result = minitrain("verify", run, "--recurrence-only", "--audit")
    assert result.exit_code == 2
    assert "--recurrence-only: expected it without --audit" in result.stderr
    sparse = record_run(tmp_path / "sparse", "record.moments=keyframes")
    result = minitrain("verify", sparse, "--recurrence-only")
    assert result.exit_code == 1
    assert "recurrence: not checked: record.moments: keyframes" in result.stdout
