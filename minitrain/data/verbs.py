"""Twenty English verbs: how they are spelled in each tense and person, and what may follow them.

Regular forms come from the spelling rules below; every irregular form is written out by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

PERSONS = ("1sg", "2sg", "3sg")
FINITE_TENSES = ("present_simple", "past_simple", "present_perfect", "future_will", "future_going_to")
TENSES = ("infinitive", *FINITE_TENSES)
REGULARITIES = ("regular", "irregular")

VOWELS = "aeiou"


def with_s(base: str) -> str:
    """Third person singular: work -> works, watch -> watches, study -> studies."""
    if base.endswith(("s", "x", "z", "ch", "sh", "o")):
        return base + "es"
    if base.endswith("y") and base[-2] not in VOWELS:
        return base[:-1] + "ies"
    return base + "s"


def with_ed(base: str) -> str:
    """Past and participle: work -> worked, like -> liked, study -> studied, stop -> stopped."""
    if base.endswith("e"):
        return base + "d"
    if base.endswith("y") and base[-2] not in VOWELS:
        return base[:-1] + "ied"
    if _doubles(base):
        return base + base[-1] + "ed"
    return base + "ed"


def _doubles(base: str) -> bool:
    """One short syllable that ends consonant, vowel, consonant: stop, but not look, want, play or listen."""
    short = sum(letter in VOWELS for letter in base) == 1
    return short and base[-2] in VOWELS and base[-1] not in VOWELS + "wxy"


@dataclass(frozen=True)
class Verb:
    """One verb: its forms by person, and its complements from the most common to the rarest."""

    base: str
    regularity: str
    present: Mapping[str, str]
    past: Mapping[str, str]
    participle: str
    complements: tuple[str, ...]


def _by_person(first: str, second: str, third: str) -> Mapping[str, str]:
    return MappingProxyType(dict(zip(PERSONS, (first, second, third), strict=True)))


_HAVE = _by_person("have", "have", "has")
_BE = _by_person("am", "are", "is")
_WAS = _by_person("was", "were", "was")


def _regular(base: str) -> Verb:
    past = with_ed(base)
    return _verb(base, "regular", with_s(base), past, past)


def _verb(base: str, regularity: str, third: str, past: str, participle: str) -> Verb:
    present, pasts = _by_person(base, base, third), _by_person(past, past, past)
    return Verb(base, regularity, present, pasts, participle, _complements(base))


def _complements(base: str) -> tuple[str, ...]:
    return tuple(_COMPLEMENTS[base].split(", "))


_COMPLEMENTS = {
    "work": "at home, in the garden, in the shop, with a friend, all day, at the school, late, alone",
    "play": "the game, with a friend, in the garden, the piano, in the park, football, chess, all day",
    "walk": "to the school, home, in the park, with a friend, by the river, to the shop, all day, alone",
    "talk": "to a friend, about the film, to the teacher, about math, a lot, all day, to the dog, alone",
    "listen": "to music, to the teacher, to a friend, to the story, to the song, to the birds, all day, late",
    "watch": "the film, the game, the birds, the news, the dog, the river, the race, the sea",
    "study": "math, music, at home, the book, with a friend, the map, at the school, all day",
    "finish": "the book, the letter, the game, the work, the story, the soup, the race, the song",
    "start": "the work, the game, the film, the car, the book, a song, the race, at home",
    "look": "at the book, at the birds, for the key, at the map, happy, for a friend, tired, at the sea",
    "want": "the book, a car, an apple, a friend, the key, the soup, a dog, a plan",
    "like": "the film, music, the game, the book, math, the soup, the song, the rain",
    "be": "at home, happy, tired, in the garden, at the school, a teacher, late, a doctor",
    "have": "a car, the book, a dog, the key, a friend, the map, a plan, an apple",
    "do": "the work, math, a lot, the shopping, a good job, the same, it well, it alone",
    "go": "home, to the school, to the shop, to the park, by car, to the river, alone, to the sea",
    "come": "home, to the school, to the park, with a friend, to the shop, by car, late, alone",
    "see": "the film, a friend, the birds, the river, the doctor, the car, the sea, the rain",
    "eat": "an apple, the soup, at home, with a friend, in the garden, the bread, a lot, the fish",
    "write": "the letter, the story, the book, to a friend, a song, at home, a plan, the news",
}

_TABLE = (
    *map(_regular, ("work", "play", "walk", "talk", "listen", "watch")),
    *map(_regular, ("study", "finish", "start", "look", "want", "like")),
    Verb("be", "irregular", _BE, _WAS, "been", _complements("be")),
    _verb("have", "irregular", "has", "had", "had"),
    _verb("do", "irregular", "does", "did", "done"),
    _verb("go", "irregular", "goes", "went", "gone"),
    _verb("come", "irregular", "comes", "came", "come"),
    _verb("see", "irregular", "sees", "saw", "seen"),
    _verb("eat", "irregular", "eats", "ate", "eaten"),
    _verb("write", "irregular", "writes", "wrote", "written"),
)

VERBS: Mapping[str, Verb] = MappingProxyType({verb.base: verb for verb in _TABLE})
"""The twenty verbs by base form, regular ones first."""


def conjugate(verb: Verb, tense: str, person: str | None) -> str:
    """The words that carry the tense: ``has written``, ``is going to study``, ``to write``.

    ``person`` is None for the infinitive and one of PERSONS for every other tense. Raises KeyError otherwise.
    """
    if tense == "infinitive" and person is None:
        return f"to {verb.base}"
    if tense not in FINITE_TENSES or person is None:
        raise KeyError((tense, person))
    return {
        "present_simple": verb.present[person],
        "past_simple": verb.past[person],
        "present_perfect": f"{_HAVE[person]} {verb.participle}",
        "future_will": f"will {verb.base}",
        "future_going_to": f"{_BE[person]} going to {verb.base}",
    }[tense]
