"""The corpus and the door to the data room: what is generated, what is read, and what is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minitrain.data.corpus import (
    CORPUS_SEED,
    HELD_OUT_VERBS,
    POLICIES,
    PROBE,
    fingerprint,
    generate,
    sentences,
    split,
)
from minitrain.data.manifest import MANIFEST_NAME, manifest_hash
from minitrain.data.prepare import Prepared, prepare
from minitrain.data.reading import Text, check_splits, load, load_any, load_texts, split_own_text
from minitrain.data.verbs import FINITE_TENSES, PERSONS, VERBS, conjugate
from minitrain.errors import DataError

ROWS = sentences(CORPUS_SEED)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the default corpus."""
    generate(tmp_path / "train.jsonl", tmp_path / "val.jsonl", CORPUS_SEED, "verbs_4")
    return tmp_path


def run_prepare(folder: Path, train: str = "train.jsonl", val: str | None = "val.jsonl", **changes) -> Prepared:
    """`prepare` with the defaults of a run."""
    defaults = {"heldout_policy": "verbs_4", "vocab_size": 64, "max_seq_len": 32, "generate_missing": True}
    return prepare(folder / train, None if val is None else folder / val, **(defaults | changes))


def refusal(action, *arguments, **settings) -> str:
    """The message with which ``action`` refuses."""
    with pytest.raises(DataError) as error:
        action(*arguments, **settings)
    return str(error.value)


# --- the generated corpus ---------------------------------------------------------------------------------


def test_default_corpus_is_pinned(folder: Path):
    """One seed gives one corpus on every machine; its hash changes only with the generator's version."""
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    assert manifest["data_manifest_hash"] == ("1ec875254b4487473391d07bfec105f7347676ab70cf61a1f474cb43ccd8ea93")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), policy=st.sampled_from(POLICIES))
@example(seed=265, policy="stratified")  # every infinitive sentence of one verb stands three times or more
def test_corpus_laws(seed: int, policy: str):
    """For every seed: unique ids, spans that spell the form, short sentences, clean splits, a rare probe."""
    rows = sentences(seed)
    train, val = split(rows, policy, seed)
    assert len({row.id for row in rows}) == len(rows) == len(train) + len(val)
    assert max(len(row.text) for row in rows) <= 39
    assert all(row.text[slice(*row.verb_span)] == conjugate(VERBS[row.verb], row.tense, row.person) for row in rows)
    assert 0.2 <= len(val) / len(rows) <= 0.25
    assert 1 <= sum(row.text == PROBE for row in train) <= 5
    check_splits(Path("train"), train, Path("val"), val)
    if policy == "stratified":
        assert len({(row.verb, row.tense) for row in val}) == 20 * 6
    else:
        assert {row.verb for row in val} == set(HELD_OUT_VERBS)


def test_long_tail():
    """Some sentences stand in several rows and many in one."""
    copies = Counter(Counter(row.fingerprint for row in ROWS).values())
    assert copies[1] > copies[2] > copies[3] > copies[4] > 0


def test_fingerprint_ignores_case_and_spacing():
    """The same sentence has the same fingerprint."""
    assert fingerprint(" I  go Home.") == fingerprint("i go home.") != fingerprint("I go home")


def test_rows_survive_the_file(folder: Path):
    """What is loaded is what was generated, in order."""
    train, val = split(ROWS, "verbs_4", CORPUS_SEED)
    assert (load(folder / "train.jsonl"), load(folder / "val.jsonl")) == (train, val)


def test_generating_twice_changes_nothing(folder: Path):
    """The second time returns the same manifest and leaves the files alone."""
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    manifest = generate(folder / "train.jsonl", folder / "val.jsonl", CORPUS_SEED, "verbs_4")
    assert manifest == json.loads((folder / MANIFEST_NAME).read_bytes())
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_manifest_counts_and_hash(folder: Path):
    """Counts by verb, tense and person; the hash is that of all the rest."""
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    assert manifest["counts"]["train.jsonl"]["write"]["present_perfect"] == {"1sg": 5, "2sg": 5, "3sg": 10}
    assert manifest["counts"]["val.jsonl"]["eat"]["infinitive"] == {"none": 10}
    assert manifest["data_manifest_hash"] == manifest_hash(manifest)
    assert set(manifest["files"]) == {"train.jsonl", "val.jsonl"}


def test_generate_refuses(folder: Path):
    """Unknown policy, two folders, other content in the way, a folder that is a file."""
    train, val = folder / "train.jsonl", folder / "val.jsonl"
    assert "did you mean 'verbs_4'?" in refusal(generate, train, val, 7, "verb_4")
    assert "two files of one folder" in refusal(generate, train, folder / "deeper" / "val.jsonl", 7, "verbs_4")
    assert "is not overwritten" in refusal(generate, train, val, 8, "verbs_4")
    assert "cannot be written" in refusal(generate, train / "a", train / "b", 7, "verbs_4")


# --- reading: rows ----------------------------------------------------------------------------------------


def rewrite(path: Path, number: int, **changes: object) -> None:
    """Change fields of one row of a file; a field changed to ``...`` is left out."""
    lines = path.read_text().splitlines()
    fields = json.loads(lines[number]) | changes
    lines[number] = json.dumps({name: value for name, value in fields.items() if value is not ...})
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verb": "writte"}, "field verb: expected one of .*, got 'writte'; did you mean 'write'"),
        ({"tense": "past_simpel"}, "field tense: .*did you mean 'past_simple'"),
        ({"person": "3pl"}, "field person: expected one of 1sg, 2sg, 3sg, got '3pl'"),
        ({"person": None}, "field person: expected a string that is not empty, got None"),
        ({"regularity": "regularr"}, "field regularity: .*did you mean 'regular'"),
        ({"regularity": "irregular"}, "field regularity: expected 'regular' for 'work', got 'irregular'"),
        ({"text": ...}, "field text: the field is missing"),
        ({"verb_span": ..., "verb_spam": [2, 6]}, "field verb_span: .*did you mean 'verb_spam'"),
        ({"text": 3}, "field text: expected a string that is not empty, got 3"),
        ({"text": "\ud800"}, "field text: expected text that can be written as UTF-8"),
        ({"fingerprint": "00"}, "field fingerprint: expected [0-9a-f]{64} for 'I work .*', got '00'"),
        ({"verb_span": [2, True]}, r"field verb_span: expected two integers \[start, end\]"),
        (
            {"verb_span": [2, 99]},
            r"field verb_span: expected the place of 'work' in 'I work .*', got \[2, 99\]",
        ),
        ({"verb_span": [0, 4]}, "field verb_span: expected the place of 'work'"),
    ],
)
def test_row_refusals(folder: Path, changes: dict[str, object], message: str):
    """Each rule of a row is checked, and the refusal names file, row, field, and what to do."""
    path = folder / "train.jsonl"
    rewrite(path, 10, **changes)
    got = refusal(load, path)
    assert got.startswith(f"{path}, row 'work.present_simple.1sg.i.01', field ")
    assert re.search(message, got), got


def test_infinitive_has_no_person(folder: Path):
    """A person at an infinitive is refused."""
    rewrite(folder / "train.jsonl", 0, person="1sg")
    assert "expected null, for an infinitive has none, got '1sg'" in refusal(load, folder / "train.jsonl")


def test_row_without_id_is_named_by_its_line(folder: Path):
    """Where there is no id, the line number stands for it."""
    rewrite(folder / "train.jsonl", 4, id=...)
    assert "train.jsonl, line 5, field id: the field is missing" in refusal(load, folder / "train.jsonl")


def test_id_twice_in_a_file(folder: Path):
    """Ids are unique."""
    rewrite(folder / "train.jsonl", 4, id=ROWS[0].id)
    assert f"row '{ROWS[0].id}', field id: expected an id of its own" in refusal(load, folder / "train.jsonl")


def test_splits_share_nothing(folder: Path):
    """No sentence and no id in both splits, and no empty cell among the finite forms."""
    train, val = split(ROWS, "verbs_4", CORPUS_SEED)
    paths = folder / "train.jsonl", folder / "val.jsonl"

    def check(train_rows, val_rows) -> str:
        return refusal(check_splits, paths[0], train_rows, paths[1], val_rows)

    shared = check(train, [*val, train[0]])
    assert f"row '{train[0].id}', field fingerprint" in shared
    assert f"'{train[0].text}'" in shared
    stolen = [type(row)(**(vars(row) | {"id": train[0].id})) for row in val[:1]]
    assert "one that also stands" in check(train, stolen + val[1:])
    hollow = [row for row in train if (row.verb, row.tense, row.person) != ("see", "past_simple", "2sg")]
    assert "got none with verb 'see', tense 'past_simple', person '2sg'" in check(hollow, val)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b"\n \n", "got an empty file"),
        (b'{"text": "a"}\n{"text": \n', "line 2: expected one JSON object, got '{\"text\": '"),
        (b"[1]\n", r"line 1: expected one JSON object, got '\[1\]'"),
        (b"[" * 100_000, r"line 1: expected one JSON object, got '\[+\.\.\.'"),
        (b'{"text": "a\xff"}', "expected UTF-8, got byte 0xff at byte offset 11"),
        (b'{"text": ""}', "line 1, field text: expected a string that is not empty, got ''"),
        (b'{"txt": "a"}', "line 1, field text: the field is missing; did you mean 'txt'?"),
        (b'{"text": "a", "id": 3}', "line 1, field id: expected a string"),
    ],
)
def test_file_refusals(tmp_path: Path, content: bytes, message: str):
    """A file that is empty, no JSON or no UTF-8 is refused, naming the line or the byte."""
    path = tmp_path / "own.jsonl"
    path.write_bytes(content)
    got = refusal(load_any, path)
    assert got.startswith(str(path))
    assert re.search(message, got), got


def test_missing_and_unreadable_files(tmp_path: Path):
    """A path without a file, a folder in the place of a file, and a name that the system refuses."""
    assert "expected a data file, found none" in refusal(load, tmp_path / "none.jsonl")
    assert "expected a regular file" in refusal(load_texts, tmp_path)
    assert "expected a file that can be read" in refusal(load_texts, tmp_path / ("x" * 300))


# --- reading: own text ------------------------------------------------------------------------------------


def test_own_jsonl(tmp_path: Path):
    """Only ``text`` is needed; other fields are the user's business; U+2028 is no line end."""
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "One\u2028two", "source": 1}\n\n{"text": "Three", "id": "x"}\n')
    assert load_any(path) == [Text("line.1", "One\u2028two"), Text("x", "Three")]


def test_own_plain_text(tmp_path: Path):
    """Lines and sentences become samples; blank lines, a byte order mark and carriage returns do not."""
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffIt was late. Very late!\r\n\r\nHe slept\n".encode())
    texts = [Text("line.1.1", "It was late."), Text("line.1.2", "Very late!"), Text("line.3.1", "He slept")]
    assert load_any(path) == texts


@given(n=st.integers(2, 200))
def test_own_text_split(n: int):
    """Nothing is lost, the order stays, and about a tenth is held out."""
    samples = [Text(str(number), "a") for number in range(n)]
    train, val = split_own_text(Path("book.txt"), samples)
    assert train + val == samples
    assert len(val) == max(1, n // 10)


def test_own_text_too_short_to_split():
    """One sample cannot be in two splits."""
    assert "expected at least 2 lines" in refusal(split_own_text, Path("a.txt"), [Text("line.1.1", "a")])


# --- prepare ----------------------------------------------------------------------------------------------


def test_prepare_generates_once(tmp_path: Path):
    """Missing default files are generated; the second run reads the same data from them."""
    first, second = run_prepare(tmp_path / "data"), run_prepare(tmp_path / "data")
    assert (first.generated, second.generated) == (True, False)
    assert first.manifest_hash == second.manifest_hash
    assert first.tokenizer.to_json() == second.tokenizer.to_json()
    assert first.baseline == second.baseline
    assert first.labelled
    assert (first.train.tokens == second.train.tokens).all()


def test_prepare_completes_what_a_crash_left(folder: Path):
    """A missing file is generated beside the one that stands, also without a manifest."""
    before = (folder / "val.jsonl").read_bytes()
    (folder / "val.jsonl").unlink()
    (folder / MANIFEST_NAME).unlink()
    assert run_prepare(folder).generated
    assert (folder / "val.jsonl").read_bytes() == before


def test_prepare_never_generates_where_the_user_pointed(tmp_path: Path):
    """A named path that is missing is an error, and nothing is written."""
    assert "found none" in refusal(run_prepare, tmp_path, generate_missing=False)
    assert not list(tmp_path.iterdir())


def test_prepare_holds_files_against_the_manifest(folder: Path):
    """A changed file, another policy and a changed manifest are refused; without manifest the files count."""
    generated = run_prepare(folder).manifest_hash
    assert "field generator.heldout_policy: expected 'stratified', got 'verbs_4'" in refusal(
        run_prepare, folder, heldout_policy="stratified"
    )
    path = folder / "train.jsonl"
    path.write_text(path.read_text() + "\n")
    assert f"{path}: expected sha256" in refusal(run_prepare, folder)
    (folder / MANIFEST_NAME).write_text("{}")
    assert "damaged or edited" in refusal(run_prepare, folder)
    (folder / MANIFEST_NAME).unlink()
    assert run_prepare(folder).manifest_hash != generated


def test_prepare_wants_the_default_seed_only_at_the_default_paths(tmp_path: Path):
    """A corpus of another seed trains when it is named, and is refused where the default one is expected."""
    generate(tmp_path / "train.jsonl", tmp_path / "val.jsonl", 8, "verbs_4")
    assert run_prepare(tmp_path, generate_missing=False).labelled
    assert "field generator.seed: expected 7, got 8" in refusal(run_prepare, tmp_path)


def test_prepare_trains_on_a_book(tmp_path: Path):
    """Own text has no labels, is cut to the context, and each of its tokens is a target exactly once."""
    (tmp_path / "book.txt").write_text("A very long line without an end " * 20 + "\n" + "Short one. Two.\n" * 5)
    data = run_prepare(tmp_path, "book.txt", None, generate_missing=False, max_seq_len=8, vocab_size=30)
    assert not data.labelled
    assert data.train.labels is data.val.labels is data.train.strata is None
    assert data.train.verb_mask(data.tokenizer) is None
    assert data.train.tokens.shape[1] == 9
    assert data.train.ids[:2] == ("line.1.1/0", "line.1.1/1")
    assert data.train.texts[0] == data.tokenizer.decode(data.train.tokens[0])
    samples, _ = split_own_text(tmp_path, load_texts(tmp_path / "book.txt"))
    assert data.train.loss_mask.sum() == sum(len(data.tokenizer.encode(text)) + 1 for _, text in samples)
    assert data.baseline["best_perplexity"] > 1


def test_prepare_refusals(folder: Path):
    """A corpus without its validation file, one file for both, and a row longer than the context."""
    (folder / "own.jsonl").write_text('{"text": "one"}\n{"text": "two and more"}\n')
    named = {"generate_missing": False}
    assert "name its validation file" in refusal(run_prepare, folder, val=None, **named)
    assert "got the training file" in refusal(run_prepare, folder, "own.jsonl", "own.jsonl", **named)
    long = refusal(run_prepare, folder, "own.jsonl", None, max_seq_len=4, **named)
    assert "row 'line.2', field text: expected at most 5 tokens with <bos> and <eos>, got" in long
    assert "raise model.max_seq_len to" in long


def test_corpus_fits_the_default_context(folder: Path):
    """At most 33 tokens with <bos> and <eos>, and every finite cell is there."""
    data = run_prepare(folder)
    assert data.train.tokens.shape == (1760, 33)
    assert data.val.tokens.shape == (440, 33)
    cells = {(row.verb, row.tense, row.person) for row in (*data.train.labels, *data.val.labels)}
    assert len(cells) == 20 * (len(FINITE_TENSES) * len(PERSONS) + 1)


def test_verb_mask_marks_the_form(folder: Path):
    """The masked targets spell the conjugated form, and with words as they are cut nothing but it."""
    data = run_prepare(folder)
    mask = data.val.verb_mask(data.tokenizer)
    for row, targets, marked in zip(data.val.labels, data.val.targets, mask, strict=True):
        assert data.tokenizer.decode(targets[marked]).strip() == row.text[slice(*row.verb_span)]
