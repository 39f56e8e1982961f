"""The verbs: spelling rules, irregular forms, and the words that carry a tense."""

from __future__ import annotations

from collections import Counter

import pytest

from minitrain.data.verbs import VERBS, conjugate, with_ed, with_s


@pytest.mark.parametrize(
    ("base", "third", "past"),
    [
        ("work", "works", "worked"),
        ("watch", "watches", "watched"),
        ("finish", "finishes", "finished"),
        ("study", "studies", "studied"),
        ("play", "plays", "played"),
        ("like", "likes", "liked"),
        ("listen", "listens", "listened"),
        ("look", "looks", "looked"),
        ("want", "wants", "wanted"),
        ("stop", "stops", "stopped"),
        ("fix", "fixes", "fixed"),
        ("go", "goes", "goed"),
    ],
)
def test_spelling_rules(base: str, third: str, past: str):
    """-s, -es and -ies; -ed, -d, -ied and the doubled letter; rules only, so "go" comes out wrong here."""
    assert (with_s(base), with_ed(base)) == (third, past)


def test_twenty_verbs_of_two_kinds():
    """Twelve regular verbs and eight irregular ones, and every complement of a verb is another one."""
    assert Counter(verb.regularity for verb in VERBS.values()) == {"regular": 12, "irregular": 8}
    assert all(len(set(verb.complements)) == len(verb.complements) == 8 for verb in VERBS.values())


@pytest.mark.parametrize(
    ("verb", "tense", "person", "form"),
    [
        ("write", "present_perfect", "3sg", "has written"),
        ("study", "future_going_to", "3sg", "is going to study"),
        ("be", "present_simple", "1sg", "am"),
        ("be", "past_simple", "2sg", "were"),
        ("have", "present_perfect", "1sg", "have had"),
        ("eat", "future_will", "2sg", "will eat"),
        ("go", "infinitive", None, "to go"),
    ],
)
def test_conjugation(verb: str, tense: str, person: str | None, form: str):
    """The words that carry the tense, auxiliaries included."""
    assert conjugate(VERBS[verb], tense, person) == form


@pytest.mark.parametrize(("tense", "person"), [("infinitive", "1sg"), ("past_simple", None), ("pluperfect", "1sg")])
def test_forms_that_do_not_exist(tense: str, person: str | None):
    """An infinitive has no person, and every finite form has one."""
    with pytest.raises(KeyError):
        conjugate(VERBS["go"], tense, person)
