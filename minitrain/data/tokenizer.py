"""Byte-pair merges over characters: the same text and size give the same tokenizer, byte for byte.

The vocabulary is four specials, then the characters of the training text in order, then merges in the order
they were learnt. Merges never cross a word, and a word owns the space before it: counting runs over distinct
words instead of the whole text, and ``" the"`` can become one token. No two tokens spell the same piece.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NoReturn

from minitrain.errors import DataError

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(4)
SMALLEST_VOCABULARY = len(SPECIALS) + 1

# Padding and sentence ends are no text; an unknown character is shown as one that is not known.
_SPECIAL_PIECES = ("", "", "", "\N{REPLACEMENT CHARACTER}")
_FORMAT = "minitrain-bpe-1"
_WORD = re.compile(r" ?\S+|\s+", re.ASCII)

Pair = tuple[int, int]


class Tokenizer:
    """Text to token ids and back. ``pieces[id]`` is the text of an id, and ``size`` the number of ids."""

    def __init__(self, characters: str, merges: Sequence[Pair]) -> None:
        self.characters = characters
        self.merges = tuple(merges)
        self.pieces = [*_SPECIAL_PIECES, *characters]
        self._characters = {character: id for id, character in enumerate(characters, len(SPECIALS))}
        self._merged: dict[Pair, int] = {}
        for left, right in self.merges:
            self._merged[left, right] = len(self.pieces)
            self.pieces.append(self.pieces[left] + self.pieces[right])
        self._words: dict[str, list[int]] = {}

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn up to ``vocab_size`` tokens; a short text gives fewer.

        The characters that do not fit are the rarest ones, and become ``<unk>``. Raises DataError for a size
        that has no room for a single character.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise DataError(
                f"model.vocab_size: expected at least {SMALLEST_VOCABULARY}, for {len(SPECIALS)} specials "
                f"and one character, got {vocab_size}; raise model.vocab_size"
            )
        words = Counter(word for text in texts for word in _WORD.findall(text))
        counts: Counter[str] = Counter()
        for word, times in words.items():
            for character in word:
                counts[character] += times
        by_count = sorted(counts, key=lambda character: (-counts[character], character))
        characters = "".join(sorted(by_count[: vocab_size - len(SPECIALS)]))
        return cls(characters, _learn(words, characters, vocab_size))

    @property
    def size(self) -> int:
        """Number of ids in use: at most the ``vocab_size`` that was asked for."""
        return len(self.pieces)

    @property
    def hash(self) -> str:
        """sha256 of `to_json`."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without sentence ends. A character that is not known becomes ``<unk>``."""
        ids: list[int] = []
        for word in _WORD.findall(text):
            if word not in self._words:
                self._words[word] = self._encode_word(word)
            ids += self._words[word]
        return ids

    def sequence(self, text: str) -> list[int]:
        """``<bos> text <eos>``."""
        return [BOS, *self.encode(text), EOS]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``. Raises IndexError for an id that is not in use."""
        return "".join(self.pieces[id] for id in ids)

    def to_json(self) -> bytes:
        """The tokenizer as a file. Equal tokenizers give equal bytes."""
        content = {"format": _FORMAT, "characters": self.characters, "merges": self.merges}
        return (json.dumps(content, separators=(",", ":")) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes) -> Tokenizer:
        """The inverse of `to_json`. Raises DataError for content that no tokenizer wrote."""
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError) as error:
            _refuse("content", "JSON", str(error))
        if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
            _refuse("format", repr(_FORMAT), repr(fields)[:60])
        characters, merges = fields.get("characters"), fields.get("merges")
        if not isinstance(characters, str) or len(set(characters)) < len(characters):
            _refuse("characters", "distinct characters", repr(characters)[:60])
        if not isinstance(merges, list):
            _refuse("merges", "a list", repr(merges)[:60])
        for size, merge in enumerate(merges, len(SPECIALS) + len(characters)):
            if not (isinstance(merge, list) and [type(id) for id in merge] == [int, int]):
                _refuse("merges", "pairs of ids", repr(merge)[:60])
            if not all(len(SPECIALS) <= id < size for id in merge):
                _refuse("merges", f"ids from {len(SPECIALS)} to {size - 1}", repr(merge))
        tokenizer = cls(characters, [(left, right) for left, right in merges])
        if len(set(tokenizer.pieces[UNK:])) < tokenizer.size - UNK:
            _refuse("merges", "pieces that differ", "two ways to spell one piece")
        return tokenizer

    def _encode_word(self, word: str) -> list[int]:
        ids = [self._characters.get(character, UNK) for character in word]
        first_merge = len(SPECIALS) + len(self.characters)
        while known := [self._merged[pair] for pair in pairwise(ids) if pair in self._merged]:
            earliest = min(known)  # ids of merges grow in the order they were learnt
            ids = _merge(ids, self.merges[earliest - first_merge], earliest)
        return ids


def _learn(words: Mapping[str, int], characters: str, vocab_size: int) -> list[Pair]:
    """The merges that fill the vocabulary, given how often each word stands in the text.

    Next comes the pair that stands most often; among equals, the one whose pieces are first by code points.
    A pair that stands once is no pattern and ends it.
    """
    pieces = [*_SPECIAL_PIECES, *characters]
    ids = {character: id for id, character in enumerate(characters, len(SPECIALS))}
    spellings = [[ids.get(character, UNK) for character in word] for word in words]
    times = list(words.values())
    counts: Counter[Pair] = Counter()
    places: dict[Pair, set[int]] = {}
    refused: set[Pair] = set()
    merges: list[Pair] = []

    def count(word: int, sign: int) -> None:
        for pair in pairwise(spellings[word]):
            if UNK not in pair and pair not in refused:
                counts[pair] += sign * times[word]
                places.setdefault(pair, set()).add(word)

    for word in range(len(spellings)):
        count(word, +1)
    while len(pieces) < vocab_size and (most := max(counts.values(), default=0)) > 1:
        equals = (pair for pair, stands in counts.items() if stands == most)
        best = min(equals, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
        piece = pieces[best[0]] + pieces[best[1]]
        if piece in pieces:  # another way to spell what is a token already
            refused.add(best)
            del counts[best]
            continue
        for word in places.pop(best):  # a set: the counts are integers, so its order cannot show
            count(word, -1)
            spellings[word] = _merge(spellings[word], best, len(pieces))
            count(word, +1)
        del counts[best]
        merges.append(best)
        pieces.append(piece)
    return merges


def _merge(ids: Sequence[int], pair: Pair, merged: int) -> list[int]:
    """``ids`` with each ``pair`` in it, from the left, replaced by ``merged``."""
    out: list[int] = []
    position = 0
    while position < len(ids):
        if position + 1 < len(ids) and (ids[position], ids[position + 1]) == pair:
            out.append(merged)
            position += 2
        else:
            out.append(ids[position])
            position += 1
    return out


def _refuse(field: str, expected: str, got: str) -> NoReturn:
    raise DataError(f"tokenizer, field {field}: expected {expected}, got {got}; train the tokenizer anew")
