"""The one table: what derives from it agrees with it."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from minitrain.model import MiniGPT
from minitrain.passes import rope_tables
from minitrain.sections import ModelConfig
from minitrain.state import State
from minitrain.tensors import Tensors, activation_table, canonical_bits, digest, gradient_table, parameter_table, sites

configs = st.builds(
    lambda heads, pairs, **sizes: ModelConfig(n_head=heads, d_model=2 * heads * pairs, **sizes),
    heads=st.integers(1, 4),
    pairs=st.integers(1, 5),
    n_layer=st.integers(1, 4),
    d_ff=st.integers(1, 30),
    vocab_size=st.integers(5, 50),
    max_seq_len=st.integers(1, 9),
    dropout=st.sampled_from([0.0, 0.25]),
    tie_weights=st.booleans(),
)


def test_number_of_parameters():
    """103,744 at the defaults; a head of its own is another V x C."""
    assert len(MiniGPT().params.flat) == 103_744
    assert len(MiniGPT(ModelConfig(tie_weights=False)).params.flat) == 103_744 + 64 * 64


@given(configs)
def test_number_of_parameters_by_formula(c):
    """V C, and in each block four square matrices, the two of the FFN with biases, two norms; a norm and the head."""
    C, F, V = c.d_model, c.d_ff, c.vocab_size
    block = 4 * C * C + 2 * C * F + F + C + 4 * C
    expected = V * C + c.n_layer * block + 2 * C + V + (0 if c.tie_weights else V * C)
    assert Tensors(parameter_table(c)).flat.size == expected


@given(configs)
def test_names_are_unique(c):
    """Each array and each site is named once; matrices decay, vectors do not."""
    tables = [p.name for p in parameter_table(c)], [a.name for a in activation_table(c, 2, 3) + gradient_table(c, 2, 3)]
    for names in (*tables, sites(c)):
        assert len(names) == len(set(names))
    assert all(p.decays == p.name.endswith("weight") for p in parameter_table(c) if "ln" not in p.name)
    assert not any(p.decays for p in parameter_table(c) if "ln" in p.name or p.name.endswith("bias"))


@given(configs)
def test_layers_divide_the_buffer(c):
    """Layers follow each other without gaps, a block's parameters are one, and each knows its place in its layer."""
    tensors = Tensors(parameter_table(c))
    layers = tensors.layers
    assert [layer.name for layer in layers] == ["embed", *(f"block.{i}" for i in range(c.n_layer)), "ln_f", "lm_head"]
    assert [layer.start for layer in layers] + [tensors.flat.size] == [0, *(layer.end for layer in layers)]
    assert [layer.first for layer in layers] + [len(tensors)] == [0, *(layer.last for layer in layers)]
    names = list(tensors)
    for layer in layers:
        within = names[layer.first : layer.last]
        assert all(name.startswith(f"{layer.name}.") for name in within)
        before = np.cumsum([0, *(tensors[name].size for name in within)])
        assert [tensors.place(name) for name in within] == [(n, before[-1]) for n in before[:-1]]


@given(configs)
def test_tensors_are_views_of_one_buffer(c):
    """Tensors stand one after the other without gaps, in the table's order; writing one writes the buffer."""
    tensors = Tensors(parameter_table(c))
    tensors.flat[:] = np.arange(len(tensors.flat))
    assert list(tensors) == [p.name for p in tensors.table]
    at = 0
    for p, offset in zip(tensors.table, tensors.offsets, strict=False):
        view = tensors[p.name]
        assert (view.shape, int(offset)) == (p.shape, at)
        assert view.flags.c_contiguous
        assert view.ravel()[0] == np.float32(at)
        at += view.size
    assert int(tensors.offsets[-1]) == at == len(tensors.flat)
    tensors["ln_f.bias"][0] = -1
    assert -1 in tensors.flat
    other = tensors.like()
    assert list(other) == list(tensors)
    assert not other.flat.any()
    assert len(other) == len(tensors)


# Digests


def test_canonical_bits():
    """Every NaN is 0x7FC00000; -0.0, denormals and infinities keep their bits; the array itself is not touched."""
    kept = [0x80000000, 0, 1, 0x7F800000, 0xFF800000, 0x3F800000]
    raw = np.array([0x7FC00000, 0xFFC00001, 0x7F800001, *kept], np.uint32)
    expected = np.array([0x7FC00000] * 3 + kept, np.uint32)
    x = raw.view(np.float32).copy()
    assert np.array_equal(canonical_bits(x), expected)
    assert np.array_equal(x.view(np.uint32), raw)
    assert np.array_equal(canonical_bits(x[3:]), expected[3:])


@given(st.binary(min_size=4, max_size=256).map(lambda b: np.frombuffer(b[: len(b) // 4 * 4], "<f4")))
def test_digest_is_of_the_bits(x):
    """xxh3-128 of the canonical bits; equal for payloads of NaN, for views and copies; split makes no difference."""
    assert digest(x) == xxhash.xxh3_128(canonical_bits(x).tobytes()).hexdigest()
    padded = np.zeros((len(x), 2), np.float32)
    padded[:, 0] = x
    assert digest(padded[:, 0]) == digest(x)
    if len(x) > 1:
        assert digest(x[:1], x[1:]) == digest(x)


@pytest.mark.parametrize(("a", "b"), [(0.0, -0.0), (1.0, np.nextafter(np.float32(1), np.float32(2))), (np.inf, np.nan)])
def test_digest_tells_apart(a, b):
    """One bit of one element is another digest."""
    x = np.linspace(0, 1, 100, dtype=np.float32)
    y = x.copy()
    x[57], y[57] = a, b
    assert digest(x) != digest(y)


def test_digest_of_a_state():
    """Over parameters, m and v in this order; the step is not part of it."""
    tensors = [Tensors(parameter_table(ModelConfig())) for _ in range(3)]
    for i, t in enumerate(tensors):
        t.flat[:] = i
    p, m, v = tensors
    assert State(3, p, m, v).digest() == digest(p.flat, m.flat, v.flat) == State(4, p, m, v).digest()
    assert State(3, p, v, m).digest() != State(3, p, m, v).digest()


# Rotary tables


@pytest.mark.parametrize(("T", "C", "H"), [(32, 64, 4), (13, 12, 2), (1, 2, 1), (70, 40, 1)])
def test_rotary_tables(T, C, H):
    """RoFormer, eq. 34: pair i of each head turns by position * 10000^(-2i/D), sine negative on the even lane."""
    D = C // H
    angle = np.arange(T)[:, None] * 10000.0 ** (-2 * (np.arange(D) // 2) / D)
    sign = np.tile([-1, 1], D // 2)
    cosine, sine = rope_tables(T, C, H)
    np.testing.assert_allclose(cosine, np.tile(np.cos(angle), H), atol=4e-8)
    np.testing.assert_allclose(sine, np.tile(sign * np.sin(angle), H), atol=4e-8)
