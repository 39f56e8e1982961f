"""The dashboard as a file and a command: one file, all escaped, small, and made of whatever a run folder holds."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import altair as alt
import numpy as np
import pytest
from click.testing import CliRunner, Result
from dashboards import HOSTILE, bare, broken, changed, healthy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from minitrain.cli import main
from minitrain.dashboard.gather import RunData
from minitrain.dashboard.header import first_difference
from minitrain.dashboard.lanes import Line, line_json, means_settled, packed_steps, running_mean
from minitrain.dashboard.page import bundle, embedded, page, replay_command
from minitrain.dashboard.panels import panels
from minitrain.dashboard.pictures import overview
from minitrain.dashboard.selection import styled
from minitrain.dashboard.specs import specification
from minitrain.record.journal import Journal, read_journal
from minitrain.run_folder import RunFolder

KINDS: dict[str, Callable[[], list[RunData]]] = {
    "healthy": lambda: [healthy(300)],
    "bare": lambda: [bare(60)],
    "none": lambda: [bare(0)],
    "one": lambda: [bare(1)],
    "nan": lambda: [broken(healthy(120))],
    "two": lambda: [healthy(300), healthy(200, "optimizer.clip=null", name="b")],
    "two, one of them bare": lambda: [healthy(300), bare(60)],
    "hostile": lambda: [replace(healthy(60), name=HOSTILE, path=HOSTILE, notes=[HOSTILE], results={"x": HOSTILE})],
}


@pytest.fixture(params=KINDS)
def runs(request: pytest.FixtureRequest) -> list[RunData]:
    return KINDS[request.param]()


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.lasttag == "script":
            self.scripts.append(data)


def data_of(text: str) -> dict:
    return dict(json.loads(re.search(r'id="data">(.*?)</script>', text)[1]))


def numbers(line: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(line["f4"]), "<f4")


# The file


def test_a_page_needs_nothing_but_itself(runs):
    """No tag loads anything from elsewhere, and the browser is told to refuse it."""
    text = page(runs)
    tags = Tags(text).tags
    for tag, attributes in tags:
        for name in ("src", "href", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    policy = next(a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_seven_sections_in_order_each_with_question_and_readings(runs):
    text = page(runs)
    tags = Tags(text).tags
    sections = [a["id"] for tag, a in tags if tag == "section"]
    assert sections == ["p-loss", "p-lr", "p-norm", "p-activations", "p-spectral", "p-units", "p-classes"]
    assert sum(a.get("class") == "question" for _, a in tags) == 7
    assert sum(a.get("class") == "reading" for _, a in tags) == 7 * len(runs)


def test_every_text_of_the_data_is_escaped(runs):
    """What a name, a note or a sample holds begins no tag: the scripts of the page are the three that it has."""
    text = page(runs)
    assert HOSTILE not in text
    assert sum(tag == "script" for tag, _ in Tags(text).tags) == 3
    assert text.count("</script>") == 3
    assert not re.search(r"<[^>]*alert\(1\)|>alert\(1\)", text)


@settings(deadline=None)
@given(st.recursive(st.text() | st.integers() | st.booleans(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_embedded_json_ends_no_script_and_reads_back(value):
    text = embedded(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value


@pytest.mark.parametrize("runs", ["two", "none"], indirect=True)
def test_every_picture_is_valid_vega_lite(runs):
    """As Altair's schema has it; the page itself does not take the time."""
    for lane in [overview(runs), *(lane for panel in panels(runs) for lane in panel.lanes)]:
        spec = specification(lane, "what it shows", overview=lane.id == "overview")
        alt.Chart.from_dict(spec, validate=True)
        assert spec["description"] == "what it shows"


def test_numbers_are_strict_json_and_every_line_has_its_colour(runs):
    told = data_of(page(runs))
    for lane in told["lanes"].values():
        names = [line["name"] for line in lane["lines"]]
        assert len(set(names)) == len(names)
        assert not any("." in key for line in lane["lines"] for key in line)


# Numbers


@settings(deadline=None)
@given(
    arrays.arrays(np.float64, st.integers(0, 300), elements=st.floats(width=32)),
    st.integers(4, 40),
)
def test_a_thinned_line_keeps_extremes_and_gaps(values, most):
    """Lowest, highest and that there is a gap survive; what is left is as measured, to float32."""
    told = line_json(Line("x", np.arange(len(values)), values, most=most))
    found, finite = numbers(told), values[np.isfinite(values)]
    assert all(x in found for x in ((finite.min(), finite.max()) if len(finite) else ()))
    assert np.isfinite(found).all() == (len(finite) == len(values))
    assert len(found) <= max(len(values) if len(values) <= most else 0, 3 * most // 2 + 2)


def test_a_running_mean_is_of_every_step():
    """Where the line under it is thinned, it is computed before that; a mean of extremes would lie too high."""
    rare = np.random.default_rng(0).beta(2, 40, 20_000)
    each, mean = Line("each", np.arange(20_000), rare, most=4000), Line("mean", rare[:0], rare[:0], mean_of="each")
    settled = line_json(means_settled([each, mean], 501)[1])
    assert abs(numbers(settled)[100:-100] - rare.mean()).max() < 0.01
    np.testing.assert_allclose(numbers(settled).max(), running_mean(rare, 501).max(), rtol=1e-6)
    assert line_json(means_settled([Line("each", rare[:9], rare[:9]), mean], 501)[1])["mean_of"] == "each"


def test_even_steps_are_three_numbers():
    assert packed_steps(np.arange(10, 100, 5)) == {"first": 10, "by": 5, "n": 18}
    assert packed_steps(np.array([7])) == {"first": 7, "by": 1, "n": 1}
    odd = packed_steps(np.array([1, 2, 4]))
    assert np.frombuffer(base64.b64decode(odd["i4"]), "<i4").tolist() == [1, 2, 4]


@pytest.fixture(scope="module")
def long_run() -> RunData:
    """100,000 steps with one spike in loss and norm."""
    run = healthy(100_000)
    loss, norm = run.log.loss.copy(), run.log.norm.copy()
    loss[50_003], norm[50_003] = 9, 400
    return changed(run, loss=loss, norm=norm)


def test_100_000_steps_fit_into_3_mb_and_no_spike_is_lost(long_run):
    """Loss and norm are there step by step, everything else by its extremes."""
    text = page([long_run])
    assert len(text) - len(bundle()) <= 3_000_000
    lanes = data_of(text)["lanes"]
    each = {line["name"]: line for lane in lanes.values() for line in lane["lines"]}
    np.testing.assert_array_equal(numbers(each["train, each step"]), long_run.log.loss.astype("f4"))
    np.testing.assert_array_equal(numbers(each["before the clip"]), long_run.log.norm.astype("f4"))
    assert numbers(lanes["overview"]["lines"][0]).max() == np.float32(9)
    assert any(spike["step"] == 50_003 for spike in data_of(text)["spikes"])


def test_a_default_run_is_small():
    assert len(page([healthy(2000)])) - len(bundle()) <= 1_000_000


def test_lines_differ_by_more_than_colour():
    """Same colour, other dash: matrices of two layers, and more kinds than there are colours."""
    names = [f"block.{i}.{kind}" for i in range(2) for kind in ("q", "k", "v", "out", "up", "down")] + ["embed", "head"]
    styles = styled(names)
    assert len(set(styles.values())) == len(names)


def test_the_step_where_losses_part():
    a, loss = healthy(100), healthy(100).log.loss.copy()
    assert first_difference(a, a) is None
    loss[37] += 1
    assert first_difference(a, changed(a, loss=loss)) == 37


def test_the_command_names_the_run_as_a_shell_takes_it():
    run = replace(healthy(20), path="my runs/it's")
    assert replay_command(run) == "minitrain replay 'my runs/it'\"'\"'s' --step {step}"


# The command


def minitrain(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["dashboard", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(record_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded run of 30 steps, with an injection."""
    place = tmp_path_factory.mktemp("dashboard")
    return record_run(place / "run", "injection=scale", "injection_step=12", "record.moments=keyframes")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "run"))


def test_the_page_of_a_run_stands_in_its_folder(copy):
    """Without metrics the other panels say so; injection, batches and the replay command are there."""
    result = minitrain(copy)
    assert result.exit_code == 0
    assert str(copy / "dashboard.html") in result.stdout
    told = data_of((copy / "dashboard.html").read_text())
    assert [mark["step"] for mark in told["marks"] if mark["kind"] == "injection"] == [12]
    assert told["runs"] == [{"recorded": [0, 30], "command": f"minitrain replay {copy} --step {{step}}"}]
    assert told["batches"]["size"] == 3
    assert told["lanes"]["loss"]["lines"][0]["steps"] == {"first": 0, "by": 1, "n": 30}


def test_a_run_ends_with_the_page_that_the_command_makes(copy, run_python):
    """Byte for byte, so what was written before the last file of the run says that it is complete."""
    (copy / "COMPLETE").unlink()  # as it stands when training writes the page
    code = (
        "from minitrain.dashboard import write_dashboard; from minitrain.run_folder import RunFolder; import pathlib;"
    )
    done = run_python(f"{code} write_dashboard(RunFolder(pathlib.Path({str(copy)!r})))")
    assert done.returncode == 0, done.stderr
    at_the_end = (copy / "dashboard.html").read_text()
    assert "complete, 30 steps of 30" in at_the_end
    (copy / "COMPLETE").write_text("digest")
    assert minitrain(copy).exit_code == 0
    assert (copy / "dashboard.html").read_text() == at_the_end


def test_batches_are_those_of_the_journal(copy):
    run = RunData.read(RunFolder(copy))
    journal: Journal = read_journal(copy / "journal.msgpack")
    for step in range(30):
        assert run.rows[step].tolist() == journal.frame(step).rows.tolist()


def test_json_has_stable_keys(copy):
    result = minitrain(copy, "--json")
    told = json.loads(result.stdout)
    assert list(told) == [
        *("run", "other", "page", "bytes", "panels", "checks", "marks", "spikes", "notes", "first_difference")
    ]
    assert [panel["panel"] for panel in told["panels"]] == [1, 2, 3, 4, 5, 6, 7]
    assert {check["verdict"] for check in told["checks"]} <= {"pass", "fail", "not measured"}


def test_text_goes_to_the_terminal_alone(copy):
    before = sorted(copy.iterdir())
    result = minitrain(copy, "--text")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "injection scale" in result.stdout
    assert "\033" not in result.stdout
    assert sorted(copy.iterdir()) == before


def test_two_runs_and_another_place(copy, folder, tmp_path):
    other = Path(shutil.copytree(folder, tmp_path / "b"))
    assert minitrain(copy, other).exit_code == 0
    assert (copy / "dashboard-b.html").exists()
    assert "dashboard.html, or dashboard-<name of OTHER>.html" in " ".join(minitrain("--help").stdout.split())
    result = minitrain(copy, other, "--out", tmp_path / "both.html")
    assert result.exit_code == 0
    assert "No setting differs." in (tmp_path / "both.html").read_text()


@pytest.mark.parametrize("lost", ["results.json", "journal.msgpack", "COMPLETE", "tokenizer.json"])
def test_a_run_that_lacks_a_file_has_a_page(copy, lost):
    """Killed, or tidied up: what is missing is said, and it is no failure."""
    (copy / lost).unlink()
    result = minitrain(copy)
    assert result.exit_code == 0
    text = (copy / "dashboard.html").read_text()
    if lost == "results.json":
        assert "the baseline and the final perplexities are not known" in text
    if lost == "journal.msgpack":
        assert "events and batches are not known" in text
        assert data_of(text)["runs"][0]["recorded"] == [0, 0]


def test_a_torn_log_is_read_as_far_as_it_goes(copy):
    log = (copy / "train_log.jsonl").read_text()
    (copy / "train_log.jsonl").write_text(log[: len(log) // 2])
    (copy / "results.json").write_text("{")
    assert minitrain(copy).exit_code == 0
    assert "results.json cannot be read" in (copy / "dashboard.html").read_text()


def test_what_is_no_run_is_refused(copy, tmp_path):
    """Exit code 2 and one message that says what was expected, what came and what to do."""
    for arguments, words in [
        ([tmp_path / "none"], ["expected a run folder", "no such folder"]),
        ([tmp_path], ["expected a run folder", "no manifest.json"]),
        ([copy, tmp_path / "none"], ["expected a run folder"]),
        ([copy, "--text", "--json"], ["--text", "expected it alone"]),
        ([copy, "--out", tmp_path / "no" / "such.html"], ["--out", "expected a file in a folder that exists"]),
        ([copy, "--out", f"{'x' * 300}.html"], ["expected a file that can be written", "name another with --out"]),
        ([], ["Missing argument 'RUN'"]),
    ]:
        result = minitrain(*arguments)
        assert result.exit_code == 2
        assert all(word in result.stderr for word in words), result.stderr
        assert "Traceback" not in result.output
    (copy / "train_log.jsonl").write_text("{}\n")
    result = minitrain(copy)
    assert result.exit_code == 2
    assert "train_log.jsonl:1: expected a JSON object with a step" in result.stderr
    assert not (copy / "dashboard.html").exists()
