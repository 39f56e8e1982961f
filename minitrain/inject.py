"""Faults that are caused on purpose, at step K or (settings) from step K on; deterministic: they change the numbers.

`FAULTS` is the table of them. `maybe_inject` stands at each point of the step in `loop.py`, and an injection is part of
the step: what the recorder hears has it. At a point several act in the order of the list, and the points follow
the step: batch, site (forward and backward), gradients, optimizer, lr, state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from minitrain.config import Config, read_config
from minitrain.data.batches import FILL, Batch
from minitrain.data.tokenizer import PAD, Tokenizer
from minitrain.errors import ConfigError, did_you_mean
from minitrain.hooks import Hooks
from minitrain.sections import Injection, OptimizerConfig
from minitrain.state import State
from minitrain.tensors import KINDS, Tensors, activation_table, parameter_table, sites

Point = Literal["batch", "site", "gradients", "optimizer", "lr", "state"]
T = TypeVar("T")

SENTENCE = "She has written the letter."


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
                _multiply(groups[kind_of(one)][target], one)
            case "param_nan":
                state.params[target][_index(one)] = np.float32(np.nan)
            case "bit_flip":
                bits = groups[kind_of(one)][target.partition(".")[2]].view(np.uint32)
                bits[_index(one)] ^= np.uint32(1 << (one.bit or 0))
        return state


def acts(one: Injection, step: int) -> bool:
    """Whether it acts at this step."""
    return one.step == step or (FAULTS[one.name].lasts and one.step < step)


def acts_from(one: Injection, step: int) -> bool:
    """Whether it acts at this step or a later one."""
    return one.step >= step or FAULTS[one.name].lasts


def kind_of(one: Injection) -> str:
    """What of the state it changes: param, m or v."""
    if one.name == "bit_flip":
        return (one.target or "").partition(".")[0]
    return {"v_corrupt": "v", "m_corrupt": "m"}.get(one.name, "param")


def event(one: Injection) -> dict[str, Any]:
    """What the journal says of it."""
    return {"event": "injection", **one.model_dump(exclude_none=True)}


def spelt(one: Injection) -> str:
    """In a phrase, such as ``param_nan at step 7 (ln_f.bias[3])``."""
    place = (one.target or "") + (str(one.element) if one.element else "")
    more = [f"{key} {value:g}" for key in ("factor", "bit") if (value := getattr(one, key)) is not None]
    what = ", ".join(filter(None, [place, *more]))
    return f"{one.name} {'from' if FAULTS[one.name].lasts else 'at'} step {one.step}" + (f" ({what})" if what else "")


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


def load(path: Path | str | None, overrides: Sequence[str] = (), below: tuple[Config, str] | None = None) -> Config:
    """`load_config`, resolved. Raises ConfigError, which tells where each mistake stands."""
    return resolved(*read_config(path, overrides, below))


def resolved(config: Config, places: Mapping[str, str] = MappingProxyType({})) -> Config:
    """The configuration with every parameter of its injections spelt out.

    Raises ConfigError with a line for every mistake: an unknown name, a step outside the run, a parameter that the
    fault does not take, a target or an element that is not there, or that nothing reads afterwards. ``places`` are
    those of `read_config`.
    """
    if not config.injections:
        return config
    told, mistakes = [], []
    for number, one in enumerate(config.injections):
        try:
            told.append(_resolve(one, config))
        except _Mistake as mistake:
            name = "injection" if "injection" in places else f"injections[{number}]"
            where = places.get(f"injections.{number}.{mistake.key}") or places.get(f"injections.{number}")
            mistakes.append(f"{name}.{mistake.key}: {mistake}" + (f" ({where})" if where else ""))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return config.model_copy(update={"injections": told})


class _Mistake(Exception):
    """What was expected of a key, and what came."""

    def __init__(self, key: str, expected: str, got: object, hint: str = "") -> None:
        super().__init__(f"expected {expected}, got {got!r}{hint}")
        self.key = key


def _resolve(one: Injection, config: Config) -> Injection:
    fault = FAULTS.get(one.name)
    if fault is None:
        near = did_you_mean(one.name, FAULTS) or f"; known are {', '.join(FAULTS)}"
        raise _Mistake("name", "the name of an injection", one.name, near)
    total, first = config.scheduler.total_steps, int(one.name == "duplicate_batch")
    if not first <= one.step < total:
        raise _Mistake("step", f"{first} to {total - 1} for {one.name} in a run of {total} steps", one.step)
    for key, takes in (
        ("target", fault.among is not None),
        ("element", fault.element),
        ("factor", fault.factor is not None),
        ("bit", fault.bit is not None),
    ):
        value = getattr(one, key)
        if value is not None and not takes:
            raise _Mistake(key, f"none, since {one.name} takes none", value)
    factor = fault.factor if one.factor is None else one.factor
    if factor is not None:
        positive = fault.point in ("lr", "optimizer")
        if not (0 if positive else -LARGEST) <= factor <= LARGEST:
            raise _Mistake("factor", f"a number {'of at least 0 ' if positive else ''}that float32 holds", factor)
    target, element = _place(one, fault, config) if fault.among else (None, None)
    bit = fault.bit if one.bit is None else one.bit
    return Injection(name=one.name, step=one.step, target=target, element=element, factor=factor, bit=bit)


LARGEST = float(np.finfo(np.float32).max)


def _place(one: Injection, fault: Fault, config: Config) -> tuple[str, list[int] | None]:
    """Target and element, which may stand behind the target in brackets."""
    target, element = one.target or fault.target or "", one.element
    if found := re.fullmatch(r"(.*)\[\s*(\d+(?:\s*,\s*\d+)*)\s*\]", target):
        if element is not None:
            raise _Mistake("element", f"it once, since target is {target}", element)
        target, element = found[1], [int(i) for i in found[2].split(",")]
    shapes = targets(config, fault)
    if target not in shapes:
        if fault.among == "sites" and (why := unread(config).get(target)):
            raise _Mistake("target", "a site that something reads afterwards", target, f": {why}")
        kind = {"parameters": "a parameter", "state": "param.X, m.X or v.X of a parameter X", "sites": "a site"}
        near = did_you_mean(target, shapes) or f"; an example is {fault.target!r}"
        raise _Mistake("target", kind[fault.among or "sites"], target, near)
    shape = shapes[target]
    if not fault.element:
        if element is not None:
            raise _Mistake("element", f"none, since {one.name} takes whole tensors", element)
        return target, None
    element = [0] * len(shape) if element is None else element
    if len(element) != len(shape) or any(i >= n for i, n in zip(element, shape, strict=True)):
        indices = "1 index" if len(shape) == 1 else f"{len(shape)} indices"
        raise _Mistake("element", f"{indices} inside the shape {list(shape)} of {target}", element)
    if target.endswith("attn.probs") and element[3] > element[2]:
        raise _Mistake("element", f"a key up to its query in {target}, since nothing reads a later one", element)
    return target, element


def targets(config: Config, fault: Fault) -> dict[str, tuple[int, ...]]:
    """What this fault may be aimed at, with the shapes."""
    parameters = {p.name: p.shape for p in parameter_table(config.model)}
    if fault.among == "parameters":
        return parameters
    if fault.among == "state":
        return {f"{kind}.{name}": shape for kind in KINDS for name, shape in parameters.items()}
    B, T, dead = config.training.batch_size, config.model.max_seq_len, unread(config)
    shapes = {a.name: a.shape for a in activation_table(config.model, B, T)}
    here = [site for site in sites(config.model) if site.removeprefix("grad:") in shapes and site not in dead]
    return {site: shapes[site.removeprefix("grad:")] for site in here}


def unread(config: Config) -> dict[str, str]:
    """Sites whose change would change nothing, with the reason."""
    blocks = range(config.model.n_layer)
    return {
        "log_softmax": "the losses have been taken from it before; logits and softmax are read",
        "loss": "it is the outcome; logits are read",
        **{f"grad:block.{i}.attn.probs": f"its kernel has used it; grad:block.{i}.v is read" for i in blocks},
    }


def table() -> list[tuple[str, str, str, str]]:
    """Name, point, what it does and what it takes of every fault, for people to read."""
    rows: list[tuple[str, str, str, str]] = []
    for name, fault in FAULTS.items():
        takes = [] if fault.target is None else [f"target={fault.target}"]
        takes += ["element=[0, ...]"] if fault.element else []
        takes += [f"{key}={value:g}" for key in ("factor", "bit") if (value := getattr(fault, key)) is not None]
        rows.append((name, "setting" if fault.lasts else fault.point, fault.does, ", ".join(takes) or "-"))
    return rows
