"""The baseline to beat: add-alpha n-gram models over the same tokens that the model is trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from minitrain.data.tokenizer import BOS

ALPHA = 0.01
ORDERS = (1, 2, 3, 4, 5, 6, 7)


class Baseline(TypedDict):
    """Validation perplexity of each order, keyed "1" to "7" as in JSON, and the best of them.

    ``context_seen`` is the share of the scored validation tokens whose context stands in training.
    """

    perplexity: dict[str, float]
    context_seen: dict[str, float]
    best_n: int
    best_perplexity: float


def baseline(train: Sequence[Sequence[int]], val: Sequence[Sequence[int]], vocab_size: int) -> Baseline:
    """Fit n-grams on ``train`` and evaluate them on ``val``, for n = 1 to 7.

    Each sequence starts with a token that is context only (``<bos>``, or the end of the window before), and
    every later token is scored, ``<eos>`` included. Contexts that reach before the start see ``<bos>``.

    p(token | context) = (count(context token) + alpha) / (count(context) + alpha * vocab_size)
    perplexity         = exp(-mean over the scored tokens of log p)
    """
    tokens, scored, trained = _stream([*train, *val], len(train))
    in_train, in_val = scored & trained, scored & ~trained

    # Each position holds the number of the gram that ends there. The gram of order n is the gram of order n-1
    # one place to the left, and the token: distinct pairs are numbered anew, so no order can overflow.
    gram = np.zeros_like(tokens)
    perplexity, context_seen = {}, {}
    for n in ORDERS:
        context = np.roll(gram, 1)
        gram = np.unique(context * vocab_size + tokens, return_inverse=True)[1]
        seen = np.bincount(gram[in_train], minlength=gram.max() + 1)[gram[in_val]]
        seen_context = np.bincount(context[in_train], minlength=context.max() + 1)[context[in_val]]
        context_seen[str(n)] = float(np.count_nonzero(seen_context) / len(seen_context))
        p = (seen + ALPHA) / (seen_context + ALPHA * vocab_size)
        # math.log and fsum: np.log may differ in the last bit from one instruction set to the next.
        perplexity[str(n)] = math.exp(-math.fsum(map(math.log, p.tolist())) / len(p))

    best = min(ORDERS, key=lambda n: perplexity[str(n)])
    return {
        "perplexity": perplexity,
        "context_seen": context_seen,
        "best_n": best,
        "best_perplexity": perplexity[str(best)],
    }


def _stream(
    sequences: Sequence[Sequence[int]], n_train: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """All sequences in one line, (N,) each: the tokens, whether each is scored, whether it is of training.

    Before each sequence stand as many ``<bos>`` as the longest context can reach back.
    """
    padding = [BOS] * (ORDERS[-1] - 2)
    lengths = np.array([len(padding) + len(sequence) for sequence in sequences])
    tokens = np.fromiter((token for sequence in sequences for token in (*padding, *sequence)), np.int64)
    place = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    trained = np.repeat(np.arange(len(sequences)) < n_train, lengths)
    return tokens, place > len(padding), trained
