"""Global norm, clipping and AdamW over the flat buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minitrain._ext.plan import Backend, CompiledBackend, Plan
from minitrain.errors import KernelArgumentError
from minitrain.hooks import Hooks
from minitrain.sections import OptimizerConfig
from minitrain.state import State
from minitrain.tensors import Layer, Tensors

BLOCK = 4096
"""Elements: squares of a block are summed in float32 lanes, the blocks' sums in double (square_sums, norm); a block is
updated or left alone as a whole (adamw_copying)."""


UNCHANGED, ALWAYS = 2, 1
"""When a block is updated: if it is as the last update left it, or as it is (``todo`` of adamw_copying)."""

Changed = Callable[[list[slice]], object]
"""Called with parts of the flat buffers."""


class Norms(NamedTuple):
    """The global L2 norm of the gradients before and after clipping."""

    before: float
    after: float


class _NormPlan:
    """sqrt(sum of squares) of one flat buffer."""

    def __init__(self, backend: Backend, flat: NDArray[np.float32], layers: Sequence[Layer] = ()) -> None:
        """Threads share the ``layers`` one by one, if there are any; a block belongs to that in which it begins."""
        self._sums = np.zeros(-(-len(flat) // BLOCK))
        self._result = np.zeros(1)
        self.plan = Plan(backend)
        blocks = len(self._sums)
        for a, b in pairwise(sorted({0, blocks, *(-(-layer.start // BLOCK) for layer in layers)})):
            self.plan.add("square_sums", self._sums[a:b], flat[BLOCK * a : BLOCK * b])
        self.plan.add("norm", self._result, self._sums)

    def __call__(self) -> float:
        self.plan.run()
        return float(self._result[0])


def global_grad_norm(grads: Mapping[str, NDArray[np.float32]]) -> float:
    """L2 norm over all gradients, by the compiled kernels: NaN or Inf if any element is."""
    flat = grads.flat if isinstance(grads, Tensors) else np.concatenate([g.ravel() for g in grads.values()])
    return _NormPlan(CompiledBackend(), np.ascontiguousarray(flat, np.float32))()


def hyper_row(config: OptimizerConfig, lr: float, t: int) -> tuple[float, ...]:
    """What the kernels take as ``hyper`` for update ``t``, counted from 1."""
    return lr, config.beta1, config.beta2, config.eps, config.weight_decay, t


class Recurrence:
    """The parameters of the next state from its moments alone: the last line of AdamW, to the same bits."""

    def __init__(self, config: OptimizerConfig, params: Tensors, backend: Backend) -> None:
        self._config, self._hyper = config, np.zeros(6)
        self._m, self._v = np.zeros_like(params.flat), np.zeros_like(params.flat)
        decays = np.array([p.decays for p in params.table], np.uint8)
        self._plan = Plan(backend)
        self._plan.add("adamw_theta", params.flat, self._m, self._v, params.offsets, decays, self._hyper)

    def __call__(
        self, m: NDArray[np.float32], v: NDArray[np.float32], lr: float, t: int, config: OptimizerConfig | None = None
    ) -> None:
        """Update ``t``, counted from 1, of ``params`` in place; m and v (P,) are those that it left.

        ``config`` is what this update goes by, where it is another.
        """
        self._m[:], self._v[:] = m, v
        self._hyper[:] = hyper_row(config or self._config, lr, t)
        self._plan.run()


class AdamW:
    """AdamW with decoupled weight decay, after element-wise and global-norm clipping.

    Give it the model's ``backend`` and ``hooks``; without them it uses the compiled kernels on one thread, and hooks of
    its own, whose step is the number of updates done.

    ``m`` and ``v`` are Tensors with the parameters' names; they exist from the first step (or `bind`) on. ``lr`` is the
    rate of the next update, ``updates`` the number done. ``step(params, grads)`` clips and updates in place; ``norms``
    then holds the gradient norm before and after clipping.
    """

    def __init__(
        self,
        config: OptimizerConfig | None = None,
        *,
        lr: float | None = None,
        backend: Backend | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        self.config = config or OptimizerConfig()
        self.lr = self.config.lr_max if lr is None else lr
        self.backend = backend or CompiledBackend()
        self.hooks = Hooks() if hooks is None else hooks
        self._own_hooks = hooks is None
        self.updates = 0
        self.norms = Norms(0.0, 0.0)
        self.m: Tensors | None = None
        self.v: Tensors | None = None
        self.copy_to: State | None = None
        """Where the next update leaves its results as well."""
        self.changed: Changed | None = None
        """Told of what is no longer as the last update left it, before the next one with ``copy_to`` makes it anew."""
        self._bound: tuple[Tensors, Tensors] | None = None

    def bind(self, params: Tensors, grads: Tensors) -> tuple[Tensors, Tensors]:
        """Prepare for these buffers and return (m, v), made of zeros at the first call. Raises KernelArgumentError."""
        if self.m is None or self.v is None:
            self.m, self.v = params.like(), params.like()
        if self._bound is None or self._bound[0] is not params or self._bound[1] is not grads:
            for name, tensors in ("gradients", grads), ("m", self.m), ("v", self.v):
                if tensors.flat.shape != params.flat.shape:
                    raise KernelArgumentError(
                        f"AdamW: {name}: expected {params.flat.size} elements, as of the parameters, "
                        f"got {tensors.flat.size}"
                    )
            self._bound = (params, grads)
            self._plan(params, grads, self.m, self.v)
        return self.m, self.v

    def _plan(self, params: Tensors, grads: Tensors, m: Tensors, v: Tensors) -> None:
        self._factor, self._limit, self._hyper = np.zeros(1), np.zeros(1), np.zeros(6)
        self._norm = _NormPlan(self.backend, grads.flat, params.layers)
        self._clamp, self._scale = Plan(self.backend), Plan(self.backend)
        for layer in params.layers:
            part = grads.flat[layer.start : layer.end]
            self._clamp.add("clamp", part, self._limit)
            self._scale.add("scale", part, self._factor)
        self._adamw = self._update_plan(params, grads, m, v)
        self._copying: dict[int, tuple[State, Plan]] = {}
        self._blocks = [
            slice(start, min(start + BLOCK, layer.end))
            for layer in params.layers
            for start in range(layer.start, layer.end, BLOCK)
        ]
        self._sums = np.zeros((len(self._blocks), 4), np.uint32)
        self._todo = np.zeros(len(self._blocks), np.uint8)
        self._clipped, self._updated = Plan(self.backend), Plan(self.backend)
        self._clipped.site("clip", grads.flat)
        for kind, tensors in ("m", m), ("v", v), ("param", params):
            for name, tensor in tensors.items():
                self._updated.site(f"{kind}.{name}", tensor)

    def _update_plan(self, params: Tensors, grads: Tensors, m: Tensors, v: Tensors, copy: State | None = None) -> Plan:
        plan, decays = Plan(self.backend), np.array([p.decays for p in params.table], np.uint8)
        done = 0  # blocks
        for layer in params.layers:  # a thread updates what it has made the gradient of

            def of(*tensors: Tensors, a: int = layer.start, b: int = layer.end) -> list[NDArray[np.float32]]:
                return [t.flat[a:b] for t in tensors]

            offsets = params.offsets[layer.first : layer.last + 1] - layer.start
            rest = (*of(grads), offsets, decays[layer.first : layer.last], self._hyper)
            if copy is None:
                plan.add("adamw", *of(params, m, v), *rest)
            else:
                blocks = slice(done, done + -(-(layer.end - layer.start) // BLOCK))
                done = blocks.stop
                watched = self._sums[blocks], self._todo[blocks]
                plan.add("adamw_copying", *of(params, m, v, copy.params, copy.m, copy.v), *watched, *rest)
        return plan

    @property
    def plans(self) -> list[Plan]:
        """What a step with clipping runs, in order; for measuring it."""
        return [self._norm.plan, self._scale, self._adamw]

    def clip(self, params: Tensors, grads: Tensors, config: OptimizerConfig | None = None) -> Norms:
        """Clip in place: elements to +-clip_value, then the whole to norm clip, by min(1, clip / (norm + 1e-12)).

        ``before`` is the norm of the gradients as they came, ``after`` of what they became. ``clip_value`` cuts Inf off
        and leaves NaN. A norm that is not finite scales nothing: that would spread one NaN over all gradients, and the
        evidence would be gone. (Squares are summed in float32: a gradient above 1.8e19 overflows, below 1e-23 it
        counts as 0.) ``config`` is what this update goes by, where it is another.
        """
        by = config or self.config
        self.bind(params, grads)
        before = norm = self._norm()
        if by.clip_value is not None:
            self._limit[0] = by.clip_value
            self._clamp.run()
            norm = self._norm()
        if by.clip is not None and math.isfinite(norm):
            factor = by.clip / (norm + 1e-12)
            if factor < 1:
                self._factor[0] = factor
                self._scale.run()
                norm *= factor
        self.norms = Norms(before, norm)
        if self._own_hooks:
            self.hooks.step = self.updates
        if self.hooks:
            self._clipped.run(self.hooks)
        return self.norms

    def update(self, params: Tensors, grads: Tensors, config: OptimizerConfig | None = None) -> None:
        """One AdamW update in place with ``self.lr``; t counts from 1. Its results are left in ``copy_to`` as well.

        ``config`` as for `clip`.
        """
        m, v = self.bind(params, grads)
        copy, self.copy_to = self.copy_to, None
        if self._own_hooks:
            self.hooks.step = self.updates
        self.updates += 1
        self._hyper[:] = hyper_row(config or self.config, self.lr, self.updates)
        if copy is None:
            self._adamw.run()
        else:
            if id(copy) not in self._copying:
                self._copying[id(copy)] = copy, self._update_plan(params, grads, m, v, copy)
            self._update_copying(self._copying[id(copy)][1])
        if self.hooks:
            self._updated.run(self.hooks)

    def _update_copying(self, plan: Plan) -> None:
        """With ``changed``, blocks that are not what the last such update left wait until that has been told."""
        self._todo[:] = ALWAYS if self.changed is None else UNCHANGED
        plan.run()
        if self.changed is not None and self._todo.any():
            self.changed([block for block, waits in zip(self._blocks, self._todo, strict=True) if waits])
            self._todo[self._todo != 0] = ALWAYS
            plan.run()

    def stop_copying(self) -> None:
        """Forget every ``copy_to`` there was."""
        self.copy_to = self.changed = None
        self._copying.clear()

    @property
    def copied_finite(self) -> bool:
        """Whether all that the last update with ``copy_to`` left is finite."""
        return not self._sums[:, 3].any()

    def step(self, params: Tensors, grads: Tensors) -> Norms:
        """`clip`, then `update`."""
        norms = self.clip(params, grads)
        self.update(params, grads)
        return norms
