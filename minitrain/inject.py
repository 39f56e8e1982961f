"""Faults that are caused on purpose, at step K or (settings) from step K on; deterministic: they change the numbers.

`FAULTS` is the table of them. `maybe_inject` stands at each point of the step in `loop.py`, and an injection is part of
the step: what the recorder hears has it. At a point several act in the order of the list, and the points follow
the step: batch, site (forward and backward), gradients, optimizer, lr, state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from minitrain.config import Config, Injection, OptimizerConfig
from minitrain.data.batches import FILL, Batch
from minitrain.data.tokenizer import PAD, Tokenizer
from minitrain.errors import ConfigError, did_you_mean
from minitrain.hooks import Hooks
from minitrain.state import State
from minitrain.tensors import Tensors, activation_table, gradient_table, parameter_table, sites

Point = Literal["batch", "site", "gradients", "optimizer", "lr", "state"]
T = TypeVar("T")

SENTENCE = "She has written the letter."
KINDS = ("param", "m", "v")


class Fault(NamedTuple):
    """A kind of injection: where in the step it acts, what it does, and what it takes, with its defaults."""

    point: Point
    does: str
    target: str | None = None
    """None where it takes none; `targets` says among what it is chosen."""
    among: Literal["parameters", "state", "sites"] | None = None
    element: bool = False
    """Whether it is about one element: by default the first of the target."""
    factor: float | None = None
    bit: int | None = None
    lasts: bool = False
    """A setting: from step K on."""


FAULTS: dict[str, Fault] = {
    "bad_batch": Fault("batch", f"the batch is copies of {SENTENCE!r}"),
    "duplicate_batch": Fault("batch", "the batch is the one that the data gave the step before"),
    "nan_activation": Fault("site", "one element is NaN at a site", "logits", "sites", True),
    "scale": Fault("gradients", "every gradient is multiplied by factor", factor=50.0),
    "grad_nan": Fault("gradients", "one element of a gradient is NaN", "lm_head.bias", "parameters", True),
    "no_clip": Fault("optimizer", "from K on no gradient is clipped", lasts=True),
    "decay_zero": Fault("optimizer", "from K on weight_decay is 0", lasts=True),
    "decay_huge": Fault("optimizer", "from K on weight_decay is multiplied by factor", factor=100.0, lasts=True),
    "lr_jump": Fault("lr", "the learning rate is multiplied by factor", factor=10.0),
    "inverse_cosine": Fault("lr", "from K on the schedule is upside down: lr_max + lr_min - lr", lasts=True),
    "v_corrupt": Fault("state", "v of a tensor is multiplied by factor", "lm_head.bias", "parameters", factor=100.0),
    "m_corrupt": Fault("state", "m of a tensor is multiplied by factor", "lm_head.bias", "parameters", factor=100.0),
    "param_nan": Fault("state", "one element of a parameter is NaN", "lm_head.bias", "parameters", True),
    "bit_flip": Fault(
        "state", "one bit of a parameter or moment is flipped", "param.lm_head.bias", "state", True, bit=0
    ),
}
"""By name, in the order of the step. Bit 0 is the lowest of the mantissa, bit 31 the sign."""


def maybe_inject(point: Point, step: int, value: T, injector: Injector | None) -> T:
    """``value`` as step ``step`` goes on with it at this point: another only where something is injected there."""
    return injector.inject(point, step, value) if injector else value


class Injector:
    """The injections of a run: falsy where there are none, or while they are switched ``off``."""

    def __init__(
        self,
        config: Config,
        batches: Callable[[int], Batch] | None = None,
        tokenizer: Callable[[], Tokenizer] | None = None,
    ) -> None:
        """``batches(t)`` is what the data give step t, and ``tokenizer`` is asked where a sentence is injected.

        Raises ConfigError as `resolved` does.
        """
        self.config = resolved(config)
        self.injections = self.config.injections
        self.off = False
        self._batches, self._tokenizer = batches, tokenizer

    def __bool__(self) -> bool:
        return bool(self.injections) and not self.off

    def at(self, point: Point, step: int) -> list[Injection]:
        """Those that act there, in order."""
        return [one for one in self.injections if FAULTS[one.name].point == point and acts(one, step)]

    def inject(self, point: Point, step: int, value: T) -> T:
        """As `maybe_inject`. Arrays are changed in place."""
        changed: Any = value
        for one in self.at(point, step):
            changed = getattr(self, f"_{point}")(changed, one, step)
        return changed  # type: ignore[no-any-return]

    def listen(self, hooks: Hooks, arrays: Callable[[], Mapping[str, NDArray[Any]]]) -> None:
        """Act at the sites that are meant, before anybody who begins to listen later. ``arrays()`` are the engine's."""
        for one in self.injections:
            if FAULTS[one.name].point == "site":
                hooks.listen(self._at_site(one, hooks, arrays), one.target or "")

    def _at_site(
        self, one: Injection, hooks: Hooks, arrays: Callable[[], Mapping[str, NDArray[Any]]]
    ) -> Callable[[str, NDArray[Any]], None]:
        def hear(site: str, view: NDArray[Any]) -> None:
            if self and acts(one, hooks.step):
                place = view.ctypes.data  # the view is read-only, and some sites share an array
                array = next(a for a in arrays().values() if a.ctypes.data == place and a.shape == view.shape)
                array[_index(one)] = np.float32(np.nan)

        return hear

    # One for each point: a pure function of the value, the injection and the step

    def _batch(self, batch: Batch, one: Injection, step: int) -> Batch:
        if one.name == "duplicate_batch":
            if self._batches is None:
                raise ConfigError(
                    "injection duplicate_batch: expected batches that can be asked for by step, got others"
                )
            return self._batches(step - 1)
        if self._tokenizer is None:
            raise ConfigError("injection bad_batch: expected a run with a tokenizer, got none")
        return copies(self._tokenizer().sequence(SENTENCE), batch)

    def _gradients(self, grads: Tensors, one: Injection, step: int) -> Tensors:
        if one.name == "scale":
            _multiply(grads.flat, one)
        else:
            grads[one.target or ""][_index(one)] = np.float32(np.nan)
        return grads

    def _optimizer(self, config: OptimizerConfig, one: Injection, step: int) -> OptimizerConfig:
        match one.name:
            case "no_clip":
                return config.model_copy(update={"clip": None, "clip_value": None})
            case "decay_zero":
                return config.model_copy(update={"weight_decay": 0.0})
        return config.model_copy(update={"weight_decay": config.weight_decay * (one.factor or 0.0)})

    def _lr(self, lr: float, one: Injection, step: int) -> float:
        if one.name == "inverse_cosine":
            return self.config.optimizer.lr_max + self.config.optimizer.lr_min - lr
        return lr * (one.factor or 0.0)

    def _state(self, state: State, one: Injection, step: int) -> State:
        target, groups = one.target or "", {"param": state.params, "m": state.m, "v": state.v}
        match one.name:
            case "v_corrupt" | "m_corrupt":
                _multiply(groups[one.name[0]][target], one)
            case "param_nan":
                state.params[target][_index(one)] = np.float32(np.nan)
            case "bit_flip":
                kind, _, name = target.partition(".")
                groups[kind][name].view(np.uint32)[_index(one)] ^= np.uint32(1 << (one.bit or 0))
        return state


def acts(one: Injection, step: int) -> bool:
    """Whether it acts at this step."""
    return one.step == step or (FAULTS[one.name].lasts and one.step < step)


def optimizer_at(config: Config, step: int) -> OptimizerConfig:
    """What the optimizer goes by at this step."""
    return Injector(config).inject("optimizer", step, config.optimizer) if config.injections else config.optimizer


def event(one: Injection) -> dict[str, Any]:
    """What the journal says of it."""
    return {"event": "injection", **one.model_dump(exclude_none=True)}


def copies(tokens: list[int], like: Batch) -> Batch:
    """A batch of one sequence over and over, cut to the context; its rows are FILL."""
    B, T = like.inputs.shape
    row = np.full(T + 1, PAD, np.int32)
    row[: len(tokens)] = tokens[: T + 1]
    both = np.tile(row, (B, 1))
    inputs, targets = np.ascontiguousarray(both[:, :-1]), np.ascontiguousarray(both[:, 1:])
    return replace(
        like,
        inputs=inputs,
        targets=targets,
        attn_pad_mask=np.not_equal(inputs, PAD),
        loss_mask=np.not_equal(targets, PAD),
        rows=np.full(B, FILL, np.int64),
    )


def _multiply(tensor: NDArray[np.float32], one: Injection) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        tensor *= np.float32(one.factor or 0.0)


def _index(one: Injection) -> tuple[int, ...]:
    return tuple(one.element or ())


# What an injection may be


def resolved(config: Config) -> Config:
    """The configuration with every parameter of its injections spelt out.

    Raises ConfigError with a line for every mistake: an unknown name, a step outside the run, a parameter that the
    fault does not take, a target or an element that is not there, or that nothing reads afterwards.
    """
    if not config.injections:
        return config
    told, mistakes = [], []
    for number, one in enumerate(config.injections):
        try:
            told.append(_resolve(one, config))
        except _Mistake as mistake:
            mistakes.append(f"injections[{number}].{mistake}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return config.model_copy(update={"injections": told})


class _Mistake(Exception):
    """One line, from the key on."""


def _resolve(one: Injection, config: Config) -> Injection:
    fault = FAULTS.get(one.name)
    if fault is None:
        known = f"; known are {', '.join(FAULTS)}"
        raise _Mistake(
            f"name: expected the name of an injection, got {one.name!r}{did_you_mean(one.name, FAULTS) or known}"
        )
    total, first = config.scheduler.total_steps, int(one.name == "duplicate_batch")
    if not first <= one.step < total:
        raise _Mistake(
            f"step: expected {first} to {total - 1} for {one.name} in a run of {total} steps, got {one.step}"
        )
    for key, taken in ("target", fault.among), ("element", fault.element), ("factor", fault.factor), ("bit", fault.bit):
        value = getattr(one, key)
        if value is not None and (taken is None or taken is False):
            raise _Mistake(f"{key}: expected none, since {one.name} takes none, got {value!r}")
    factor = fault.factor if one.factor is None else one.factor
    if factor is not None:
        low, high = (0.0, np.inf) if fault.point in ("lr", "optimizer") else (-_LARGEST, _LARGEST)
        if not low <= factor <= high:
            expected = "a number of at least 0" if low == 0 else "a number that float32 holds"
            raise _Mistake(f"factor: expected {expected}, got {factor!r}")
    target, element = _place(one, fault, config) if fault.among else (None, None)
    bit = fault.bit if one.bit is None else one.bit
    return Injection(name=one.name, step=one.step, target=target, element=element, factor=factor, bit=bit)


_LARGEST = float(np.finfo(np.float32).max)


def _place(one: Injection, fault: Fault, config: Config) -> tuple[str, list[int] | None]:
    """Target and element, which may stand behind the target in brackets."""
    target, element = one.target or fault.target or "", one.element
    if found := re.fullmatch(r"(.*)\[\s*(\d+(?:\s*,\s*\d+)*)\s*\]", target):
        if element is not None:
            raise _Mistake(f"element: expected it once, got {element} and {target}")
        target, element = found[1], [int(i) for i in found[2].split(",")]
    shapes = targets(config, fault)
    if target not in shapes:
        if fault.among == "sites" and (why := unread(config).get(target)):
            raise _Mistake(f"target: expected a site that something reads afterwards, got {target!r}: {why}")
        kind = {"parameters": "a parameter", "state": "param.X, m.X or v.X of a parameter X", "sites": "a site"}
        near = did_you_mean(target, shapes) or f"; such as {fault.target}"
        raise _Mistake(f"target: expected {kind[fault.among or 'sites']}, got {target!r}{near}")
    shape = shapes[target]
    if not fault.element:
        if element is not None:
            raise _Mistake(f"element: expected none, since {one.name} is about whole tensors, got {element}")
        return target, None
    element = [0] * len(shape) if element is None else element
    if len(element) != len(shape) or any(not 0 <= i < n for i, n in zip(element, shape, strict=True)):
        expected = f"{len(shape)} indices inside the shape {list(shape)} of {target}"
        raise _Mistake(f"element: expected {expected}, got {element}")
    if target.endswith("attn.probs") and element[3] > element[2]:
        raise _Mistake(
            f"element: expected a key up to its query in {target} (nothing reads a later one), got {element}"
        )
    return target, element


def targets(config: Config, fault: Fault) -> dict[str, tuple[int, ...]]:
    """What this fault may be aimed at, with the shapes."""
    parameters = {p.name: p.shape for p in parameter_table(config.model)}
    if fault.among == "parameters":
        return parameters
    if fault.among == "state":
        return {f"{kind}.{name}": shape for kind in KINDS for name, shape in parameters.items()}
    B, T, dead = config.training.batch_size, config.model.max_seq_len, unread(config)
    shapes = {a.name: a.shape for a in activation_table(config.model, B, T) + gradient_table(config.model, B, T)}
    named = [site for site in sites(config.model) if site.removeprefix("grad:") in shapes and site not in dead]
    return {site: shapes[site.removeprefix("grad:")] for site in named}


def unread(config: Config) -> dict[str, str]:
    """Sites whose change would change nothing, or no element: and why."""
    blocks = range(config.model.n_layer)
    return {
        "log_softmax": "the losses have been taken from it before; logits or softmax are read",
        "loss": "it is one number, of which the backward pass reads nothing; logits are read",
        **{
            f"grad:block.{i}.attn.probs": "the same kernel has used it before; grad:block.{i}.v is read".replace(
                "{i}", str(i)
            )
            for i in blocks
        },
    }
