"""The corpus generator: short sentences with conjugated verbs, the same bytes on every machine for one seed.

A *slot* is one verb, tense and subject. Each slot holds five rows: one with the verb's first complement, and
four with complements drawn from its eight, of which five are common and three rare. A common sentence
therefore stands in several rows, each with an id of its own, and a rare one in few.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import numpy as np

from minitrain.data.manifest import MANIFEST_NAME, build_manifest
from minitrain.data.verbs import FINITE_TENSES, PERSONS, VERBS, Verb, conjugate
from minitrain.errors import DataError, did_you_mean
from minitrain.files import write_atomic
from minitrain.rng import Purpose, Stream

GENERATOR_VERSION = 1
CORPUS_SEED = 7
"""The seed of the default corpus. Not ``data_seed``: runs that shuffle differently read the same rows."""

POLICIES = ("verbs_4", "stratified")
HELD_OUT_VERBS = ("listen", "finish", "come", "eat")
PROBE = "She has written the letter."
"""The sentence of the ``bad_batch`` injection. It is always trained on, one to five times."""

_SUBJECTS = {"1sg": ("I",), "2sg": ("You",), "3sg": ("He", "She")}
_OPENERS = ("It is good", "We hope")
_WEIGHTS = (4, 4, 4, 4, 4, 3, 2, 1)
_DRAWS = 4
_VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class Row:
    """One sentence with its labels. ``person`` is None for the infinitive, which has none."""

    id: str
    text: str
    verb: str
    tense: str
    person: str | None
    regularity: str
    verb_span: tuple[int, int]
    fingerprint: str


def fingerprint(text: str) -> str:
    """sha256 of the text without regard to case and spacing: what "the same sentence" means."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()


def sentences(seed: int) -> list[Row]:
    """All rows of the corpus, before the split, ordered by verb, tense, subject and number."""
    slots: list[tuple[str, str | None, str]] = [("infinitive", None, opener) for opener in _OPENERS]
    for tense, person in product(FINITE_TENSES, PERSONS):
        slots += [(tense, person, subject) for subject in _SUBJECTS[person]]

    stream = Stream(seed, Purpose.CORPUS)
    shares = list(accumulate(_WEIGHTS))
    rows = []
    for number, (verb, slot) in enumerate(product(VERBS.values(), slots)):
        draws = stream.integers(_DRAWS, below=shares[-1], step=number)
        tail = np.searchsorted(shares, draws, side="right")
        rows += [_row(verb, *slot, verb.complements[rank], copy) for copy, rank in enumerate([0, *tail], 1)]
    return rows


def _row(verb: Verb, tense: str, person: str | None, subject: str, complement: str, copy: int) -> Row:
    form = conjugate(verb, tense, person)
    start = len(subject) + 1
    text = f"{subject} {form} {complement}."
    word = subject.split()[0].lower()
    return Row(
        id=f"{verb.base}.{tense}.{person or 'none'}.{word}.{copy:02d}",
        text=text,
        verb=verb.base,
        tense=tense,
        person=person,
        regularity=verb.regularity,
        verb_span=(start, start + len(form)),
        fingerprint=fingerprint(text),
    )


def split(rows: Sequence[Row], policy: str, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and validation rows, each in the order of ``rows``. Raises DataError for an unknown policy.

    ``verbs_4`` holds out four whole verbs. ``stratified`` holds out at least a fifth of each verb and
    tense, by whole sentences, so that no sentence stands on both sides.
    """
    if policy == "verbs_4":
        held_out = {row.fingerprint for row in rows if row.verb in HELD_OUT_VERBS}
    elif policy == "stratified":
        held_out = _stratified(rows, seed)
    else:
        raise DataError(
            f"data.heldout_policy: expected one of {', '.join(POLICIES)}, got {policy!r}"
            f"{did_you_mean(policy, POLICIES)}"
        )
    train = [row for row in rows if row.fingerprint not in held_out]
    return train, [row for row in rows if row.fingerprint in held_out]


def _stratified(rows: Sequence[Row], seed: int) -> set[str]:
    copies: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        stratum = copies.setdefault((row.verb, row.tense), {})
        stratum[row.fingerprint] = stratum.get(row.fingerprint, 0) + 1

    stream = Stream(seed, Purpose.SPLIT)
    probe = fingerprint(PROBE)
    held_out = set()
    for number, stratum in enumerate(copies.values()):
        wanted = round(_VALIDATION_SHARE * sum(stratum.values()))
        prints = [candidate for candidate in stratum if candidate != probe]
        for place in stream.permutation(len(prints), step=number):
            if wanted > 0:
                held_out.add(prints[place])
                wanted -= stratum[prints[place]]
    return held_out


def generate(train_path: Path, val_path: Path, seed: int, heldout_policy: str) -> dict[str, Any]:
    """Write both splits, then ``MANIFEST.json`` beside them, and return the manifest.

    A file that already holds the same bytes is left as it is. Raises DataError where a file of other content
    would be overwritten, where the two paths are not two files of one folder, and where writing fails.
    """
    if train_path.parent != val_path.parent or train_path == val_path:
        raise DataError(
            f"a generated corpus is two files of one folder, got {train_path} and {val_path}: "
            "set data.train_path and data.val_path accordingly"
        )
    train, val = split(sentences(seed), heldout_policy, seed)
    splits = {train_path.name: train, val_path.name: val}
    contents = {name: _jsonl(rows) for name, rows in splits.items()}
    counts = {name: _counts(rows) for name, rows in splits.items()}
    manifest = build_manifest(generator_info(seed, heldout_policy), contents, counts)

    contents[MANIFEST_NAME] = (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()
    for name, content in contents.items():  # the manifest is last: where it stands, the files stand
        _write_new(train_path.parent / name, content)
    return manifest


def generator_info(seed: int, heldout_policy: str) -> dict[str, Any]:
    """What decides the bytes of a generated corpus."""
    return {"version": GENERATOR_VERSION, "seed": seed, "heldout_policy": heldout_policy}


def _jsonl(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode()


def _counts(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, int]]]:
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for row in rows:
        persons = counts.setdefault(row.verb, {}).setdefault(row.tense, {})
        persons[row.person or "none"] = persons.get(row.person or "none", 0) + 1
    return counts


def _write_new(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_atomic(path, content)
        elif path.read_bytes() != content:
            raise DataError(
                f"{path}: expected no file or the generated corpus, found other content, which is not "
                "overwritten; move it away to generate the corpus here, or name your own data with "
                "data.train_path and data.val_path"
            )
    except OSError as error:
        raise DataError(f"{path}: the generated corpus cannot be written ({error.strerror})") from error
