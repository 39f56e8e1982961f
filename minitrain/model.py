"""MiniGPT, a pre-LN decoder-only transformer: its parameters and the border to its passes (passes.py)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain._ext import engine
from minitrain._ext.plan import Backend, CompiledBackend, Plan, ReferenceBackend
from minitrain.errors import DataError, KernelArgumentError
from minitrain.hooks import Hooks
from minitrain.passes import Passes
from minitrain.rng import Purpose
from minitrain.sections import ModelConfig
from minitrain.tensors import Tensors, parameter_table, sites

INIT_STD = 0.02
UNFIT = -2
"""What `Inputs.load` says of arrays that it does not take."""

Array = NDArray[Any]


def make_backend(name: str, threads: int = 1) -> Backend:
    """``compiled`` or ``reference`` (the NumPy twins, one thread)."""
    return CompiledBackend(threads) if name == "compiled" else ReferenceBackend()


def initialise(params: Tensors, n_layer: int, seed: int) -> None:
    """Normal weights of std 0.02 (residual projections times 1/sqrt(2 n_layer)), zero biases, unit gains, in place."""
    std = {"normal": INIT_STD, "residual": INIT_STD / math.sqrt(2 * n_layer)}
    for i, parameter in enumerate(params.table):
        tensor = params[parameter.name]
        if parameter.init in std:
            engine.normal(tensor.reshape(-1), std[parameter.init], seed, Purpose.INIT, 0, i)
        else:
            tensor[...] = 1 if parameter.init == "ones" else 0


class MiniGPT:
    """The model for those who write their own loop.

    >>> model = MiniGPT(ModelConfig(), seed=42)
    >>> logits, loss = model.forward(inputs, targets, attn_pad_mask, loss_mask)
    >>> grads = model.backward()

    ``params`` and the returned gradients are :class:`~minitrain.tensors.Tensors`: named float32 views of one flat
    buffer. A pass allocates its memory the first time it sees a batch shape (B, T), T <= max_seq_len, and never again.
    """

    def __init__(
        self, config: ModelConfig | None = None, *, seed: int = 42, threads: int = 1, backend: Backend | None = None
    ) -> None:
        self.config = config or ModelConfig()
        self.backend = backend or CompiledBackend(threads)
        self.params = Tensors(parameter_table(self.config))
        self.grads = self.params.like()
        self.hooks = Hooks(sites(self.config))
        self.seed = seed
        self.step = 0
        self._key = np.array([seed, Purpose.DROPOUT, 0], np.uint32)
        self._passes: dict[tuple[int, int], Passes] = {}
        self._last: Passes | None = None
        self._work: Passes | None = None
        self._trained = self._running = False
        with engine.Environment():
            initialise(self.params, self.config.n_layer, seed)

    @property
    def step(self) -> int:
        """The step that the next pass belongs to: dropout is drawn for it, and hooks go by it."""
        return self.hooks.step

    @step.setter
    def step(self, step: int) -> None:
        self.hooks.step = step

    def reseed(self, seed: int) -> None:
        """Draw dropout from this seed from now on."""
        self.seed = seed
        self._key[0] = seed

    @property
    def loss_sum(self) -> tuple[float, int]:
        """Sum of the losses of the last forward pass and the number of tokens they are of."""
        if self._last is None:
            raise RuntimeError("loss_sum needs a forward() before it")
        _, total, tokens = self._last.loss.tolist()
        return total, int(tokens)

    def activations(self) -> dict[str, Array]:
        """The arrays of the last pass, or the one that is running, by name; gradients begin with ``grad:``."""
        return {} if self._work is None else dict(self._work.arrays)

    def passes(self, B: int, T: int) -> Passes:
        """The memory and plans for this batch shape, made at first use. Raises DataError if T is over the context."""
        if self.config.max_seq_len < T:
            raise DataError(f"batch: expected at most model.max_seq_len = {self.config.max_seq_len} positions, got {T}")
        if (B, T) not in self._passes:
            with engine.Environment():
                self._passes[B, T] = Passes(self.config, self.backend, self.params, self.grads, self._key, B, T)
        return self._passes[B, T]

    def forward(
        self,
        input: NDArray[np.int32],
        target: NDArray[np.int32],
        attn_pad_mask: NDArray[np.bool_],
        loss_mask: NDArray[np.bool_],
        *,
        training: bool = True,
    ) -> tuple[NDArray[np.float32], float]:
        """Logits (B, T, V), a view that the next pass overwrites, and the mean loss over the tokens in ``loss_mask``.

        ``input`` and ``target`` are (B, T) int32 token ids, C-contiguous; the masks (B, T) bool: True where the input
        is a real token, and where the target counts. ``training`` applies dropout, drawn for ``self.step``, and shows
        the sites to ``self.hooks``. The loss of an empty mask is NaN. Raises KernelArgumentError and DataError.
        """
        self._refuse_reentry()
        batch = (input, target, attn_pad_mask, loss_mask)
        work = self._passes.get(getattr(input, "shape", (0, 0)))
        bad = work.inputs.load(*batch) if work else UNFIT
        if not work or bad == UNFIT:  # the first of its shape, or no good
            self._check(*batch)
            work = self.passes(*input.shape)
            bad = work.inputs.load(*batch)
            assert bad != UNFIT
        self._work, self._last, self._trained = work, None, False  # until this pass is through
        if bad >= 0:
            self._refuse_token(*divmod(bad, input.size), batch)
        self._key[2] = self.step
        self._run(work.training if training else work.evaluation, self.hooks if training else None)
        self._last, self._trained = work, training
        return work.arrays["logits"], float(work.loss[0])

    def backward(self) -> Tensors:
        """Gradients of the last training forward pass, in a buffer that the next backward pass overwrites."""
        if self._last is None or not self._trained:
            raise RuntimeError("backward() needs a training forward() before it")
        self._refuse_reentry()
        self._run(self._last.backward, self.hooks)
        return self.grads

    def _refuse_reentry(self) -> None:
        if self._running:
            raise RuntimeError("a listener cannot run the model it listens to: the pass would go on with other numbers")

    def _run(self, plan: Plan, hooks: Hooks | None) -> None:
        self._running = True
        try:
            plan.run(hooks)
        finally:
            self._running = False

    def _refuse_token(self, which: int, place: int, batch: tuple[Array, ...]) -> None:
        name, array, last = ("input", "target")[which], batch[which], self.config.vocab_size - 1
        at = tuple(int(i) for i in np.unravel_index(place, array.shape))
        raise DataError(f"{name}: expected token ids 0 to {last}, got {array.flat[place]} at {at}")

    @staticmethod
    def _check(input: Array, target: Array, attn_pad_mask: Array, loss_mask: Array) -> None:
        """The border of the model: same rules as the kernels'. Raises KernelArgumentError."""

        def check(name: str, array: Array, dtype: type[Any], shape: tuple[int, ...] | None) -> None:
            def refuse(expected: object, got: object) -> None:
                raise KernelArgumentError(f"forward: argument {name}: expected {expected}, got {got}")

            if not isinstance(array, np.ndarray):
                refuse(f"a NumPy array of {np.dtype(dtype)}", type(array).__name__)
            if array.dtype != dtype:
                refuse(f"dtype {np.dtype(dtype)}", f"dtype {array.dtype}")
            if array.ndim != 2 or 0 in array.shape or (shape is not None and array.shape != shape):
                refuse(f"shape {shape or '(B, T)'}", f"shape {array.shape}")
            if not array.flags.c_contiguous:
                refuse("a C-contiguous array", f"strides {array.strides} for shape {array.shape}")

        check("input", input, np.int32, None)
        check("target", target, np.int32, input.shape)
        check("attn_pad_mask", attn_pad_mask, np.bool_, input.shape)
        check("loss_mask", loss_mask, np.bool_, input.shape)
