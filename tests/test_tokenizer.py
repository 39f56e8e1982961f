"""The tokenizer: deterministic, lossless on what it knows, and never at a loss for what it does not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitrain.data.corpus import CORPUS_SEED, sentences, split
from minitrain.data.tokenizer import BOS, EOS, SPECIALS, UNK, Tokenizer
from minitrain.errors import DataError

TEXTS = [row.text for row in split(sentences(CORPUS_SEED), "verbs_4", CORPUS_SEED)[0]]
ENGLISH = Tokenizer.train(TEXTS, 64)

texts = st.lists(st.text("ab .<pad>\n", max_size=12), max_size=6)


@given(texts=texts, vocab_size=st.integers(20, 60))
def test_decode_inverts_encode(texts: list[str], vocab_size: int):
    """decode(encode(text)) is the text for characters seen, also many spaces and names of specials."""
    tokenizer = Tokenizer.train(texts, vocab_size)
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


@given(texts=texts, vocab_size=st.integers(5, 60))
def test_training_is_a_function(texts: list[str], vocab_size: int):
    """Training twice gives the same bytes, no more ids than asked for, and no piece twice."""
    tokenizer = Tokenizer.train(texts, vocab_size)
    assert tokenizer.to_json() == Tokenizer.train(iter(texts), vocab_size).to_json()
    assert tokenizer.size <= vocab_size
    assert len(set(tokenizer.pieces[UNK:])) == tokenizer.size - UNK


@given(texts=texts, vocab_size=st.integers(5, 60))
def test_file_round_trip(texts: list[str], vocab_size: int):
    """A tokenizer read from its file is the same tokenizer."""
    tokenizer = Tokenizer.train(texts, vocab_size)
    again = Tokenizer.from_json(tokenizer.to_json())
    assert (again.pieces, again.hash) == (tokenizer.pieces, tokenizer.hash)
    assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]


@given(text=st.text(max_size=30))
def test_any_text_encodes(text: str):
    """An unseen character becomes <unk>, and the known ones around it stay."""
    ids = ENGLISH.encode(text)
    assert ENGLISH.decode(ids) == "".join(c if c in ENGLISH.characters else "\ufffd" for c in text)
    assert UNK not in ENGLISH.encode("She has written the letter.")


def test_default_tokenizer_is_pinned():
    """The default corpus gives this tokenizer on every machine."""
    assert ENGLISH.hash == "d896d06f6695b475172d79fd759f3fc66295c02c8de45ca2a2148ed814e77311"
    assert ENGLISH.size == 64
    assert len(ENGLISH.characters) == 30


def test_vocabulary_512():
    """512 works too: the corpus has fewer patterns, so the tokenizer is smaller."""
    tokenizer = Tokenizer.train(TEXTS, 512)
    assert 64 < tokenizer.size <= 512
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS


def test_merges_by_hand():
    """In "ab ab abc": (a, b) stands three times, then (space, ab) twice; what stands once is not merged."""
    tokenizer = Tokenizer.train(["ab ab abc"], 64)
    assert tokenizer.pieces[len(SPECIALS) :] == [" ", "a", "b", "c", "ab", " ab"]
    assert tokenizer.encode("ab abc") == [8, 9, 7]
    assert tokenizer.sequence("ab") == [BOS, 8, EOS]


def test_ties_go_to_the_first_by_code_points():
    """Equal counts: the lexicographically smallest pair of pieces is merged."""
    assert Tokenizer.train(["cd ab", "cd ab"], 10).pieces[-1] == " a"
    assert Tokenizer.train(["cd", "ab", "ab", "cd"], 9).pieces[-1] == "ab"


def test_rare_characters_give_way():
    """Where not all characters fit, the most frequent ones stay and the others become <unk>."""
    tokenizer = Tokenizer.train(["aaabbbc"], 6)
    assert tokenizer.characters == "ab"
    assert tokenizer.encode("abc") == [4, 5, UNK]


def test_smallest_vocabulary():
    """Specials and one character are the least."""
    with pytest.raises(DataError, match="expected at least 5, for 4 specials and one character, got 4"):
        Tokenizer.train(["a"], 4)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"format": "other"}, "format"),
        ({"characters": "aa"}, "characters"),
        ({"characters": ["a"]}, "characters"),
        ({"merges": None}, "merges"),
        ({"merges": [[4]]}, "merges"),
        ({"merges": [[4, True]]}, "merges"),
        ({"merges": [[4, 6]]}, "merges"),
        ({"merges": [[3, 4]]}, "merges"),
        ({"merges": [[4, 5], [4, 5]]}, "merges"),
    ],
)
def test_file_refusals(change: dict[str, object], field: str):
    """A file that no tokenizer wrote is refused, naming the field."""
    good = {"format": "minitrain-bpe-1", "characters": "ab", "merges": [[4, 5]]}
    Tokenizer.from_json(json.dumps(good).encode())
    with pytest.raises(DataError, match=f"tokenizer, field {field}: expected .*, got .*; train the tokenizer"):
        Tokenizer.from_json(json.dumps(good | change).encode())


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"[" * 100_000])
def test_content_refusals(content: bytes):
    """What is no JSON object at all is refused as well."""
    with pytest.raises(DataError, match="train the tokenizer anew"):
        Tokenizer.from_json(content)
