"""Reading data files: every row is checked at the door, and a refusal names file, row and field.

Two kinds of samples come in. A `Row` is a sentence of the verb corpus with all its labels; a `Text` is the
user's own and has no labels. A JSONL file with any label in it is a corpus; any other suffix is plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from minitrain.data.corpus import Row, fingerprint
from minitrain.data.verbs import FINITE_TENSES, PERSONS, REGULARITIES, TENSES, VERBS, conjugate
from minitrain.errors import DataError, did_you_mean

LABELS = ("verb", "tense", "person", "regularity", "verb_span", "fingerprint")


class Text(NamedTuple):
    """A sample of the user's own text."""

    id: str
    text: str


class _Record(NamedTuple):
    """One JSON object of a file, with the words that tell a person where it stands."""

    where: str
    number: int
    fields: Mapping[str, Any]


Sample = TypeVar("Sample", Row, Text)


def load(path: Path) -> list[Row]:
    """The rows of a corpus file. Raises DataError at the first row that breaks a rule."""
    return _distinct(path, [_row(record) for record in _records(path)])


def load_texts(path: Path) -> list[Text]:
    """The samples of a file of own text: JSONL with ``text`` and perhaps ``id``, or any plain UTF-8 text.

    Plain text is cut at line ends and after ``.``, ``!`` and ``?``; blank lines are left out.
    Raises DataError for a file that cannot be read or holds no text.
    """
    if not is_plain_text(path):
        return _distinct(path, [_text(record) for record in _records(path)])
    return [
        Text(f"line.{number}.{place}", piece)
        for number, line in enumerate(_content(path).split("\n"), 1)
        for place, piece in enumerate(re.split(r"(?<=[.!?])\s+", line.strip()), 1)
        if piece
    ]


def load_any(path: Path) -> list[Row] | list[Text]:
    """`load` where the file has labels, `load_texts` where it has none."""
    if is_plain_text(path):
        return load_texts(path)
    labelled = any(label in record.fields for record in _records(path) for label in LABELS)
    return load(path) if labelled else load_texts(path)


def is_plain_text(path: Path) -> bool:
    """Whether a file is read as plain text: all but ``.jsonl``."""
    return path.suffix != ".jsonl"


def check_splits(train_path: Path, train: Sequence[Row], val_path: Path, val: Sequence[Row]) -> None:
    """What no single row can tell: the splits share nothing, and no verb of theirs lacks a finite form.

    Raises DataError.
    """
    owners = {row.fingerprint: row for row in train}
    ids = {row.id for row in train}
    for row in val:
        if row.fingerprint in owners:
            raise DataError(
                f"{val_path}, row {row.id!r}, field fingerprint: expected a sentence that is not trained on, "
                f"got {row.text!r}, which is row {owners[row.fingerprint].id!r} of {train_path}; "
                "take it out of one split"
            )
        if row.id in ids:
            raise DataError(
                f"{val_path}, row {row.id!r}, field id: expected an id of its own, got one that also stands "
                f"in {train_path}; rename one"
            )
    cells = {(row.verb, row.tense, row.person) for row in (*train, *val)}
    verbs = [verb for verb in VERBS if any(cell[0] == verb for cell in cells)]
    for cell in product(verbs, FINITE_TENSES, PERSONS):
        if cell not in cells:
            raise DataError(
                f"{train_path} and {val_path}: expected a row of every finite form, got none with "
                f"verb {cell[0]!r}, tense {cell[1]!r}, person {cell[2]!r}; add one or take the verb out"
            )


def split_own_text(path: Path, samples: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """Training and validation samples: the last tenth is held out, at least one sample.

    The tail, not a random tenth: neighbouring sentences of a book share their words, so a scattered tenth
    would be easier than text the model has not come to. Raises DataError for fewer than two samples.
    """
    if len(samples) < 2:
        raise DataError(
            f"{path}: expected at least 2 lines or sentences to hold some out, got {len(samples)}; "
            "add text or name a validation file with data.val_path"
        )
    held_out = max(1, len(samples) // 10)
    return list(samples[:-held_out]), list(samples[-held_out:])


def _content(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for ever, a device might not end
            raise DataError(f"{path}: expected a regular file, got something else; name another file")
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: expected a data file, found none; correct data.train_path or data.val_path") from None
    except OSError as error:
        raise DataError(
            f"{path}: expected a file that can be read, got an error ({error.strerror}); "
            "correct data.train_path or data.val_path"
        ) from error
    try:
        text = content.decode().removeprefix("\N{BYTE ORDER MARK}")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8, got byte 0x{content[error.start]:02x} at byte offset {error.start}; "
            "save the file as UTF-8"
        ) from None
    if not text.strip():
        raise DataError(f"{path}: expected at least one line of data, got an empty file; name another file")
    return text


def _records(path: Path) -> list[_Record]:
    # Not splitlines(): JSON strings may hold U+2028 and its kin.
    lines = enumerate(_content(path).split("\n"), 1)
    return [_record(path, number, line) for number, line in lines if line.strip()]


def _record(path: Path, number: int, line: str) -> _Record:
    where = f"{path}, line {number}"
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected one JSON object, got {_short(line)} ({error}); correct the line") from None
    if not isinstance(fields, dict):
        raise DataError(f'{where}: expected one JSON object, got {_short(line)}; write {{"text": "..."}}')
    if isinstance(fields.get("id"), str):
        where = f"{path}, row {fields['id']!r}"
    return _Record(where, number, fields)


def _short(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:57] + "...")


def _refuse(record: _Record, field: str, expected: str, got: object, hint: str = "") -> NoReturn:
    raise DataError(f"{record.where}, field {field}: expected {expected}, got {got!r}{hint}; correct the row")


def _field(record: _Record, name: str) -> Any:
    if name not in record.fields:
        known = did_you_mean(name, record.fields)
        raise DataError(
            f"{record.where}, field {name}: the field is missing{known}; a corpus row needs id, text, "
            f"{', '.join(LABELS)}, own text only text"
        )
    return record.fields[name]


def _string(record: _Record, name: str) -> str:
    value = _field(record, name)
    if not isinstance(value, str) or not value:
        _refuse(record, name, "a string that is not empty", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        _refuse(record, name, "text that can be written as UTF-8", value, " with half of a surrogate pair")
    return value


def _choice(record: _Record, name: str, known: Iterable[str]) -> str:
    value = _string(record, name)
    if value not in known:
        _refuse(record, name, f"one of {', '.join(known)}", value, did_you_mean(value, known))
    return value


def _row(record: _Record) -> Row:
    verb = VERBS[_choice(record, "verb", VERBS)]
    tense = _choice(record, "tense", TENSES)
    if tense == "infinitive":
        person = None
        if _field(record, "person") is not None:
            _refuse(record, "person", "null, for an infinitive has none", record.fields["person"])
    else:
        person = _choice(record, "person", PERSONS)
    if _choice(record, "regularity", REGULARITIES) != verb.regularity:
        _refuse(record, "regularity", f"{verb.regularity!r} for {verb.base!r}", record.fields["regularity"])
    text = _string(record, "text")
    if _string(record, "fingerprint") != fingerprint(text):
        _refuse(record, "fingerprint", f"{fingerprint(text)} for {text!r}", record.fields["fingerprint"])
    return Row(
        id=_string(record, "id"),
        text=text,
        verb=verb.base,
        tense=tense,
        person=person,
        regularity=verb.regularity,
        verb_span=_span(record, text, conjugate(verb, tense, person)),
        fingerprint=fingerprint(text),
    )


def _span(record: _Record, text: str, form: str) -> tuple[int, int]:
    span = _field(record, "verb_span")
    if not (isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)):
        _refuse(record, "verb_span", "two integers [start, end]", span)
    start, end = span
    if not 0 <= start < end <= len(text) or text[start:end] != form:
        _refuse(record, "verb_span", f"the place of {form!r} in {text!r}", span)
    return start, end


def _text(record: _Record) -> Text:
    name = _string(record, "id") if "id" in record.fields else f"line.{record.number}"
    return Text(name, _string(record, "text"))


def _distinct(path: Path, samples: list[Sample]) -> list[Sample]:
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise DataError(
                f"{path}, row {sample.id!r}, field id: expected an id of its own, got one that stands twice; rename one"
            )
        seen.add(sample.id)
    return samples
