"""The engine's own parts: exp and log, the border where arguments are checked, the floating-point environment, and
which instruction set runs."""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from minitrain._ext import engine
from minitrain._ext.plan import CompiledBackend, Plan, ReferenceBackend, call, instruction_set
from minitrain._ext.signatures import SIGNATURES
from minitrain.errors import DataError, KernelArgumentError, MinitrainError
from minitrain.model import MiniGPT
from minitrain.optim import AdamW
from minitrain.sections import ModelConfig

f4 = np.float32


# exp and log


def ulps(actual: np.ndarray, exact: np.ndarray) -> float:
    """Largest error in units of the last place of the exact value, as float32."""
    return float((np.abs(actual - exact) / np.spacing(np.abs(exact).astype(f4)).astype(np.float64)).max())


def unary(backend: CompiledBackend, kernel: str, x: Any) -> np.ndarray:
    x = np.asarray(x, f4)
    y = np.empty_like(x)
    call(backend, kernel, y, x)
    return y


def test_exp(isa_backend):
    """At most 1.1 ulp from -87 to 88.7, where results are normal numbers."""
    x = np.concatenate([np.linspace(-87, 88.7, 400_003), np.linspace(-1, 1, 100_003)]).astype(f4)
    assert ulps(unary(isa_backend, "exp", x), np.exp(x.astype(np.float64))) <= 1.1


def test_log(isa_backend):
    """At most 1.5 ulp over all normal numbers, and around 1, where ln x is small."""
    every = np.arange(0x00800000, 0x7F800000, 4099, dtype=np.uint32).view(f4)
    near_one = np.linspace(0.5, 2, 100_003, dtype=f4)
    x = np.concatenate([every, near_one[near_one != 1]])
    assert ulps(unary(isa_backend, "log", x), np.log(x.astype(np.float64))) <= 1.5


def test_special_values(isa_backend):
    """What overflows is Inf, what underflows 0, and exp 0 and ln 1 are exact."""
    inf, nan = np.inf, np.nan
    x = [0, -0.0, 1e-40, -87.5, -1000, -inf, 88.8, 1000, inf, nan]
    np.testing.assert_array_equal(unary(isa_backend, "exp", x), [1, 1, 1, 0, 0, 0, inf, inf, inf, nan])
    x = [1, 0, -0.0, -1, -1e-30, -inf, inf, nan]
    np.testing.assert_array_equal(unary(isa_backend, "log", x), [0, -inf, -inf, nan, nan, nan, inf, nan])


# The border


def good(kernel: str, kernels: Any) -> list[Any]:
    """Arguments that are accepted, with every optional array."""
    sizes = {"B": 2, "T": 3, "N": 4, "K": 5, "C": 4, "V": 7, "H": 2, "P": 8, "S": 1, "E": 2, "G": 1, "W": 3, "L": 4}
    sizes["R"] = 6 if kernel.startswith("adamw") else {"mean_loss": 3, "cross_entropy_backward": 3}.get(kernel, 1)
    signature = SIGNATURES[kernel]
    for seed in range(100):
        arguments = kernels.arguments(kernel, sizes, np.random.default_rng(seed))
        if all(a is not None for a in arguments[: len(signature.arrays)]):
            return arguments
    raise AssertionError(kernel)


@pytest.mark.parametrize("kernel", SIGNATURES)
@pytest.mark.parametrize("reference", [False, True], ids=["compiled", "reference"])
def test_every_argument_is_checked(kernel, reference, kernels):
    """Whichever array of whichever kernel is wrong, the error names it, what was expected and what came."""
    backend = ReferenceBackend() if reference else CompiledBackend()
    arguments = good(kernel, kernels)
    signature = SIGNATURES[kernel]
    Plan(backend).add(kernel, *arguments)

    def refused(position: int, value: Any, words: str) -> None:
        changed = [*arguments[:position], value, *arguments[position + 1 :]]
        pattern = rf"{kernel}: argument {signature.arrays[position].name}: expected .*{words}"
        with pytest.raises(KernelArgumentError, match=pattern):
            Plan(backend).add(kernel, *changed)

    for i, a in enumerate(signature.arrays):
        x = arguments[i]
        refused(i, x.tolist(), r"NumPy array of \w+, got list")
        refused(i, np.zeros(x.shape, np.int16), rf"dtype {a.dtype}, got dtype int16")
        if x.itemsize > 1:
            refused(i, x.astype(x.dtype.newbyteorder(">")), "dtype")
        refused(i, x[None], r"shape \(.*\), got shape \(1, ")
        refused(i, x[:0], r"shape \(.*\), got shape \(0,")
        if x.shape[-1] > 1:
            refused(i, np.concatenate([x, x], -1)[..., ::2], "a C-contiguous array, got strides")
        if not a.optional:
            refused(i, None, "got NoneType")
        if a.output:
            frozen = x.copy()
            frozen.flags.writeable = False
            refused(i, frozen, "a writeable array, got a read-only one")


@pytest.mark.parametrize("kernel", SIGNATURES)
def test_sizes_must_agree(kernel, kernels):
    """Any dimension of any array, made longer by one, is refused with the array's name or a later one's, unless it
    is free: its letter stands nowhere else, and no kernel counts on its length."""
    free = {"B", "T", "N", "K", "V", "P", ("norm", "R"), ("norm", "G"), ("scale", "R"), ("clamp", "R")}
    arguments = good(kernel, kernels)
    signature = SIGNATURES[kernel]
    letters = [d for a in signature.arrays for d in a.dims]
    names = [a.name for a in signature.arrays]
    for i, a in enumerate(signature.arrays):
        for axis, letter in enumerate(a.dims):
            if letters.count(letter) == 1 and free & {letter, (kernel, letter)}:
                continue
            longer = np.concatenate([arguments[i], arguments[i].take([0], axis)], axis)
            with pytest.raises(KernelArgumentError, match=f"{kernel}: argument ({'|'.join(names)}): expected"):
                Plan(CompiledBackend()).add(kernel, *arguments[:i], longer, *arguments[i + 1 :])


@pytest.mark.parametrize(
    ("kernel", "changes", "words"),
    [
        ("rope", {"C": 5}, r"argument x: expected \(B, T, C\) with C even, got shape \(2, 3, 5\)"),
        ("attention_forward", {"C": 7}, r"argument p: expected \(B, H, T, T\) with H heads that divide C"),
        ("attention_backward", {"C": 7}, r"argument p: expected \(B, H, T, T\) with H heads that divide C"),
        ("mean_loss", {"R": 1}, r"argument result: expected mean, sum and count, got shape \(1,\)"),
        ("cross_entropy_backward", {"R": 2}, "argument result: expected mean, sum and count"),
        ("dropout", {"W": 2}, "argument key: expected seed, purpose and step"),
        ("square_sums", {"P": 4097}, "argument sums: expected one sum for each 4096 elements of g"),
        ("adamw", {"R": 5}, "argument hyper: expected lr, beta1, beta2, eps, decay and t"),
        ("adamw", {"S": 2}, "argument offsets: expected one more than segments in decays"),
        ("adamw_copying", {"L": 3}, "argument sums: expected one for theta, m and v each, and one more"),
        ("adamw_copying", {"P": 4097}, "argument sums: expected one sum for each 4096 elements of g"),
        ("adamw_theta", {"R": 5}, "argument hyper: expected lr, beta1, beta2, eps, decay and t"),
        ("adamw_theta", {"S": 2}, "argument offsets: expected one more than segments in decays"),
    ],
)
def test_rules_between_sizes(kernel, changes, words):
    """What a kernel needs beyond equal letters is checked too: nothing reads or writes past the end of an array."""
    sizes = {"B": 2, "T": 3, "V": 7, "H": 2, "C": 6, "P": 8, "S": 1, "E": 2, "G": 1, "W": 3, "L": 4}
    sizes |= {"R": 6 if kernel.startswith("adamw") else 3} | changes
    arrays = [np.zeros([sizes[d] for d in a.dims], a.dtype) for a in SIGNATURES[kernel].arrays]
    with pytest.raises(KernelArgumentError, match=f"{kernel}: {words}"):
        Plan(CompiledBackend()).add(kernel, *arrays, *(0 for _ in SIGNATURES[kernel].numbers))


def test_number_of_arguments(kernels):
    """One too few or too many is told with the names."""
    arguments = good("rope", kernels)
    for wrong in (arguments[:-1], [*arguments, 1]):
        words = rf"rope: expected 4 arguments \(x, cosine, sine, direction\), got {len(wrong)}"
        with pytest.raises(KernelArgumentError, match=words):
            Plan(CompiledBackend()).add("rope", *wrong)


@pytest.fixture(scope="module")
def model(odd_config: ModelConfig) -> MiniGPT:
    return MiniGPT(odd_config)


FORWARD = ("input", "target", "attn_pad_mask", "loss_mask")


@pytest.mark.parametrize("position", range(4), ids=FORWARD)
def test_border_of_the_model(position, model, odd_config, make_batch):
    """MiniGPT.forward names the argument, what was expected and what came."""
    batch = list(make_batch(odd_config, 3))
    x = batch[position]
    other = np.int64 if position < 2 else np.uint8
    shape = r"\(3, 13\)" if position else r"\(B, T\)"
    for wrong, words in (
        (x.tolist(), rf"a NumPy array of {x.dtype}, got list"),
        (x.astype(other), rf"dtype {x.dtype}, got dtype {other.__name__}"),
        (x[0], rf"shape {shape}, got shape \(13,\)"),
        (x[:, :0], rf"shape {shape}, got shape \(3, 0\)"),
        (np.asfortranarray(x), "a C-contiguous array, got strides"),
        *([(x[:2].copy(), r"shape \(3, 13\), got shape \(2, 13\)")] if position else []),
    ):
        changed = [*batch[:position], wrong, *batch[position + 1 :]]
        with pytest.raises(KernelArgumentError, match=f"forward: argument {FORWARD[position]}: expected {words}"):
            model.forward(*changed)


@pytest.mark.parametrize("position", [0, 1], ids=["input", "target"])
@pytest.mark.parametrize("token", [-1, 37, 2**31 - 1, -(2**31)])
def test_token_out_of_range(position, token, model, odd_config, make_batch):
    """A token id that the vocabulary does not hold is told with its place."""
    batch = list(make_batch(odd_config, 3))
    batch[position] = batch[position].copy()
    batch[position][1, 5] = token
    with pytest.raises(DataError, match=rf"{FORWARD[position]}: expected token ids 0 to 36, got {token} at \(1, 5\)"):
        model.forward(*batch)


def test_batch_over_the_context(model, odd_config):
    """More positions than max_seq_len are refused; fewer are not."""
    ids, mask = np.zeros((1, 14), np.int32), np.ones((1, 14), bool)
    with pytest.raises(DataError, match="max_seq_len = 13 positions, got 14"):
        model.forward(ids, ids, mask, mask)
    assert np.isfinite(model.forward(ids[:, :3].copy(), ids[:, :3].copy(), mask[:, :3].copy(), mask[:, :3].copy())[1])


def test_read_only_batches_are_accepted(model, odd_config, make_batch):
    """The model only reads its batch."""
    batch = list(make_batch(odd_config, 2))
    loss = model.forward(*batch)[1]
    for array in batch:
        array.flags.writeable = False
    assert model.forward(*batch)[1] == loss


def test_backward_needs_a_training_forward(odd_config, make_batch):
    """Before the first pass there is nothing to go back through, and an evaluation is no pass to go back through."""
    fresh = MiniGPT(odd_config)
    with pytest.raises(RuntimeError, match=r"backward\(\) needs a training forward\(\)"):
        fresh.backward()
    with pytest.raises(RuntimeError, match=r"loss_sum needs a forward\(\)"):
        _ = fresh.loss_sum
    fresh.forward(*make_batch(odd_config, 2), training=False)
    with pytest.raises(RuntimeError, match=r"backward\(\) needs a training forward\(\)"):
        fresh.backward()


# Instruction sets


@pytest.mark.parametrize("isa", engine.instruction_sets())
def test_forced_instruction_set(isa, monkeypatch):
    """MINITRAIN_ISA chooses; the best one runs where it is not set."""
    monkeypatch.setenv("MINITRAIN_ISA", isa)
    assert CompiledBackend().isa == isa
    monkeypatch.delenv("MINITRAIN_ISA")
    assert instruction_set() == engine.instruction_sets()[0]


def test_unknown_instruction_set(monkeypatch):
    """There is no silent fallback."""
    monkeypatch.setenv("MINITRAIN_ISA", "nonsense")
    with pytest.raises(MinitrainError, match=r"MINITRAIN_ISA: expected one of .*portable.*, got 'nonsense'; unset it"):
        CompiledBackend()


@pytest.mark.parametrize("folder", ["_ext", "replay"])
def test_a_second_copy_is_refused(folder, repository, run_python):
    """From the repository's root the folders can be found under their own names; they are not importable by these."""
    done = run_python(f"import {folder}", cwd=repository, PYTHONPATH=str(repository))
    assert done.returncode == 1
    assert f"ImportError: this folder is minitrain.{folder}" in done.stderr


# The floating-point environment


@contextmanager
def mxcsr(value: int) -> Iterator[None]:
    """Run with this control word of SSE, as an imported library may leave it. The word is set by five bytes of code."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(bytes.fromhex("0fae17c3") + bytes(12) + bytes.fromhex("0fae1fc3"))  # ldmxcsr/stmxcsr [rdi]; ret
        start = ctypes.addressof(view := ctypes.c_char.from_buffer(page))
        load, store = (ctypes.CFUNCTYPE(None, ctypes.c_void_p)(start + at) for at in (0, 16))
        word = ctypes.c_uint32(value)
        before = ctypes.c_uint32()
        store(ctypes.byref(before))
        load(ctypes.byref(word))
        try:
            yield
            after = ctypes.c_uint32()
            store(ctypes.byref(after))
        finally:
            load(ctypes.byref(before))
            del view
    assert after.value & ~0x3F == value & ~0x3F, "the engine did not restore the environment"


FLUSH_TO_ZERO = 0x1F80 | 0x8040
ROUND_DOWN = 0x1F80 | 0x2000


@pytest.mark.skipif(platform.machine() != "x86_64", reason="MXCSR is x86's")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("word", [FLUSH_TO_ZERO, ROUND_DOWN], ids=["flush to zero", "round down"])
def test_floating_point_environment(word, threads, kernels, odd_config, make_batch):
    """Kernels, passes and normals have the same bits whatever environment they are called in, and restore it."""
    batch = make_batch(odd_config, 3)
    half, denormal = np.array([0.5]), np.full(100, 1e-39, f4)

    def work(model: MiniGPT) -> list[bytes]:
        loss = model.forward(*batch)[1]
        tiny, normals = denormal.copy(), np.empty(1000, f4)
        call(model.backend, "scale", tiny, half)
        engine.normal(normals, 0.02, 1, 2, 3, 4)
        return [kernels.bits(x) for x in (np.array(loss), model.backward().flat, normals, tiny)]

    model = MiniGPT(odd_config, threads=threads)
    expected = work(model)
    with mxcsr(word):
        actual = work(model)
        assert work(MiniGPT(odd_config, threads=threads)) == expected
    assert actual == expected
    assert np.frombuffer(expected[-1], f4).all()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="MXCSR is x86's")
def test_update_under_flush_to_zero(kernels, odd_config):
    """Moments decay into denormals instead of stopping at 0."""
    model = MiniGPT(odd_config)
    optimizer = AdamW(backend=model.backend)
    m, v = optimizer.bind(model.params, model.grads)
    with mxcsr(FLUSH_TO_ZERO):
        m.flat[:], v.flat[:] = 1.3e-38, 1.3e-38
        optimizer.step(model.params, model.grads)
    assert ((m.flat > 0) & (m.flat < np.finfo(f4).tiny)).all()
