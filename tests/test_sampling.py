"""Text from a model: drawn as the model predicts, the same everywhere, and never what no target of training is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitrain._ext.plan import CompiledBackend
from minitrain.data.tokenizer import BOS, EOS, PAD, UNK, Tokenizer
from minitrain.errors import ConfigError, RunError
from minitrain.model import MiniGPT
from minitrain.sampling import NEVER, Sampling, choose, encode, generate
from minitrain.sections import ModelConfig
from minitrain.tensors import canonical_bits

TOKENIZER = Tokenizer("abc ", [(4, 5), (8, 6)])
SIZES = ModelConfig(n_layer=1, n_head=2, d_model=12, d_ff=20, vocab_size=16, max_seq_len=7)
logits_lists = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30)
uniforms = st.floats(0, 1, exclude_max=True)
temperatures = st.floats(0, allow_infinity=False)


def model(backend: CompiledBackend | None = None, **sizes: int) -> MiniGPT:
    """Untrained, with weights large enough that it has opinions."""
    made = MiniGPT(SIZES.model_copy(update=sizes), seed=3, backend=backend)
    for name, tensor in made.params.items():
        if tensor.ndim == 2:
            made.params[name][...] *= 10
    return made


@given(logits=logits_lists, uniform=uniforms, temperature=temperatures)
def test_one_of_the_k_likeliest_is_chosen(logits: list[float], uniform: float, temperature: float):
    """At every temperature down to the smallest double; greedy and top_k 1 are the likeliest, the first of equals."""
    likeliest = int(np.argmax(logits))
    assert choose(logits, Sampling(0.0), uniform) == likeliest
    assert choose(logits, Sampling(temperature, top_k=1), uniform) == likeliest
    for k in (2, 5, 100):
        chosen = choose(logits, Sampling(temperature, top_k=k), uniform)
        assert sum(x > logits[chosen] for x in logits) < k


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_drawn_with_the_weights_of_a_softmax(temperature: float, top_k: int | None):
    """Over evenly spread draws each token comes as often as exp(logit / temperature) says."""
    logits = [0.5, -2.0, 1.5, 1.5, 0.0, -0.25]
    n = 5000
    drawn = [choose(logits, Sampling(temperature, top_k), (i + 0.5) / n) for i in range(n)]
    weights = np.exp(np.array(logits) / temperature)
    if top_k:
        weights[np.argsort(-weights, kind="stable")[top_k:]] = 0
    np.testing.assert_allclose(np.bincount(drawn, minlength=6) / n, weights / weights.sum(), atol=2 / n)


def test_the_ends_of_the_scale():
    """A temperature next to 0 is greedy, a huge one draws all alike; the largest draw still finds a token."""
    logits = [1.0, 1.5, -3.0, 0.0]
    draws = [(i + 0.5) / 400 for i in range(400)]
    assert {choose(logits, Sampling(5e-324), u) for u in draws} == {1}
    assert np.bincount([choose(logits, Sampling(1e308), u) for u in draws]).tolist() == [100] * 4
    assert choose(logits, Sampling(0.1), 1 - 2**-53) in range(4)


def test_the_same_everywhere(isa_backend: CompiledBackend):
    """These ids, on every instruction set and machine."""
    drawn = [
        generate(model(isa_backend), TOKENIZER, [BOS, 5], Sampling(t, k, max_tokens=12, seed=5), number).tokens
        for t, k, number in ((0.0, None, 0), (1.0, None, 0), (1.0, None, 1), (3.0, 4, 0))
    ]
    assert drawn == [
        [9, 9, 9, 9, 9, 5, 5, 5, 5, 5, 5, 5],
        [9, 6, 4, 4, 4, 8, 4],
        [8, 8, 9, 6, 6, 6, 6, 8, 8, 8, 6, 4],
        [8, 6, 4, 4, 3, 8, 4],
    ]


def test_a_seed_and_a_number_give_a_text():
    """The same again for the same two, another for another seed or number."""
    how = Sampling(5.0, max_tokens=20)
    texts = {
        (seed, number): generate(model(), TOKENIZER, [BOS], Sampling(5.0, max_tokens=20, seed=seed), number).tokens
        for seed in range(3)
        for number in range(3)
    }
    assert texts[0, 1] == generate(model(), TOKENIZER, [BOS], how, 1).tokens
    assert len({tuple(tokens) for tokens in texts.values()}) == 9


@given(
    prompt=st.lists(st.integers(3, 9), max_size=20).map(lambda ids: [BOS, *ids]),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_a_long_text_is_seen_through_a_window(prompt: list[int], temperature: float):
    """What comes next depends on the last max_seq_len tokens alone, and is what a pass over just these says."""
    how = Sampling(temperature, max_tokens=1)
    net = model()
    window = prompt[-SIZES.max_seq_len :]
    assert generate(net, TOKENIZER, prompt, how) == generate(net, TOKENIZER, window, how)
    tokens = np.array([window], np.int32)
    bare, _ = net.forward(tokens, tokens, tokens >= 0, tokens >= 0, training=False)
    if temperature == 0:
        row = bare[0, -1, : TOKENIZER.size].copy()
        row[list(NEVER)] = -math.inf
        (token,) = generate(net, TOKENIZER, prompt, how).tokens or [EOS]
        assert token == row.argmax()


def test_padding_moves_no_bit():
    """The logits of a prompt are those of the padded window, to the bit."""
    net, T = model(), SIZES.max_seq_len
    tokens = np.full((1, T), PAD, np.int32)
    tokens[0, :4] = [BOS, 5, 6, 7]
    full, _ = net.forward(tokens, tokens, tokens != PAD, tokens != PAD, training=False)
    full = full[0, :4].copy()
    short = np.ascontiguousarray(tokens[:, :4])
    bare, _ = net.forward(short, short, short != PAD, short != PAD, training=False)
    assert (canonical_bits(full) == canonical_bits(bare[0])).all()


def test_only_what_training_could_have_targeted_comes_out():
    """Neither <pad> nor <bos> nor an id without a token, however wild the draw; <eos> ends and is not shown."""
    seen, finished = set(), 0
    for number in range(40):
        found = generate(model(), TOKENIZER, [BOS], Sampling(1e6, max_tokens=30), number)
        seen |= set(found.tokens)
        finished += found.finished
        assert found.finished == (len(found.tokens) < 30)
    assert seen == set(range(UNK, TOKENIZER.size))
    assert 0 < finished < 41


def test_what_the_model_does_not_know_is_named():
    """Once each, in the order of the prompt; a half of a surrogate pair is refused."""
    assert encode(TOKENIZER, "zab¿z") == ([BOS, UNK, 8, UNK, UNK], ["z", "¿"])
    assert encode(TOKENIZER, "") == ([BOS], [])
    with pytest.raises(ConfigError, match="prompt: expected UTF-8 text"):
        encode(TOKENIZER, "a\udcff")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected a finite number, 0 .greedy. or more, got -1.0"),
        ({"temperature": math.nan}, "temperature: expected a finite number, 0 .greedy. or more, got nan"),
        ({"temperature": math.inf}, "got inf"),
        ({"top_k": 0}, "top_k: expected an integer of at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens: expected an integer of at least 1, got 0"),
        ({"seed": -1}, "seed: expected an integer from 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "got 4294967296"),
    ],
)
def test_settings_that_make_no_sense(values: dict, message: str):
    """Each is refused with its name, what was expected and what came."""
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)


def test_a_model_that_diverged():
    """A NaN among the weights is told, not sampled from."""
    net = model()
    net.params["lm_head.bias"][5] = math.nan
    with pytest.raises(RunError, match="expected finite logits, got NaN or infinity"):
        generate(net, TOKENIZER, [BOS], Sampling())
