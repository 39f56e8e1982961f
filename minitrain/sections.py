"""The sections of a configuration: every key with its type, its bounds and its default.

Checked by pydantic; in messages a key is told by its ``description``. Reading, messages and hashes stand in config.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from minitrain.rng import SEED_LIMIT
from minitrain.shorthand import INJECTION_NAME


def _integer(low: int, high: int) -> Any:
    return Field(ge=low, le=high, description=f"an integer from {low} to {high}")


_INT32_MAX = 2**31 - 1  # the engine counts in 32 bits, and a step is one word of the random counter
Count = Annotated[int, _integer(1, _INT32_MAX)]
CountOrZero = Annotated[int, _integer(0, _INT32_MAX)]
Seed = Annotated[int, _integer(0, SEED_LIMIT - 1)]
Flag = Annotated[bool, Field(description="true or false")]


def _printable(path: str) -> str:
    if not path.isprintable():
        raise PydanticCustomError("path", "not printable")
    return path


FilePath = Annotated[
    str, Field(min_length=1, description="the path of a file, without control characters"), AfterValidator(_printable)
]
NotNegative = Annotated[float, Field(ge=0, description="a finite number, 0 or more")]
Positive = Annotated[float, Field(gt=0, description="a finite number above 0")]
PositiveOrNull = Annotated[float | None, Field(gt=0, description="a finite number above 0, or null for none")]
BelowOne = Annotated[float, Field(ge=0, lt=1, description="a number from 0 to below 1")]
UpToOne = Annotated[float, Field(gt=0, le=1, description="a number above 0, up to 1")]


class Section(BaseModel):
    """Frozen; "7" is not 7 and true is not 1, but 1 is 1.0. The schema is built at first use, not at import.

    Raises pydantic's ValidationError, which `load_config` and `config_from` turn into a ConfigError.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class ModelConfig(Section):
    """Sizes of the MiniGPT; lengths in tokens."""

    n_layer: Count = 2
    n_head: Count = 4
    d_model: Count = 64
    d_ff: Count = 256
    vocab_size: Annotated[int, _integer(5, _INT32_MAX)] = 64  # four special tokens and something to say
    max_seq_len: Count = 32
    dropout: BelowOne = 0.0
    tie_weights: Flag = True

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        pairs = 2 * self.n_head
        if self.d_model % pairs:
            raise PydanticCustomError(
                "conflict",
                "model.n_head {n_head} does not divide model.d_model {d_model} into heads of even width (the "
                "rotary embedding turns pairs of columns); d_model {fits} would fit",
                {"n_head": self.n_head, "d_model": self.d_model, "fits": -(-self.d_model // pairs) * pairs},
            )
        return self


class OptimizerConfig(Section):
    """AdamW and its clips: `clip` bounds the global L2 norm, `clip_value` each element, before the norm."""

    type: Literal["adamw"] = "adamw"
    lr_max: NotNegative = 3e-4
    lr_min: NotNegative = 3e-5
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.95
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1
    clip: PositiveOrNull = 1.0
    clip_value: PositiveOrNull = None

    @model_validator(mode="after")
    def _rates_in_order(self) -> Self:
        if self.lr_min > self.lr_max:
            raise PydanticCustomError(
                "conflict",
                "optimizer.lr_min {lr_min} is above optimizer.lr_max {lr_max}; lower lr_min or raise lr_max",
                {"lr_min": self.lr_min, "lr_max": self.lr_max},
            )
        return self


class SchedulerConfig(Section):
    """The learning rate over the steps; `step_size` and `gamma` are read by type ``step`` only."""

    type: Literal["cosine", "linear", "step", "constant"] = "cosine"
    warmup_steps: CountOrZero = 100
    total_steps: Count = 2000
    step_size: Count = 500
    gamma: UpToOne = 0.5

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps > self.total_steps:
            raise PydanticCustomError(
                "conflict",
                "scheduler.warmup_steps {warmup_steps} is more than scheduler.total_steps {total_steps}; "
                "lower warmup_steps (0 is none) or raise total_steps",
                {"warmup_steps": self.warmup_steps, "total_steps": self.total_steps},
            )
        return self


class TrainingConfig(Section):
    """The loop: sentences in a step (`batch_size`), steps between looks (`*_every`), seeds and engine."""

    batch_size: Count = 8
    val_every: Count = 50
    log_every: Count = 10
    loss_reduction: Literal["token_mean"] = "token_mean"
    rng_seed: Seed = 42
    data_seed: Seed = 7
    checkpoint_every: Count = 200
    on_nonfinite: Literal["stop", "continue"] = "stop"
    threads: Annotated[int, _integer(1, 64)] = 1
    dtype: Literal["float32"] = "float32"
    backend: Literal["compiled", "reference"] = "compiled"


class DataConfig(Section):
    """Where the sentences are and how they are drawn."""

    train_path: FilePath = "data/processed/train.jsonl"
    val_path: FilePath = "data/processed/val.jsonl"
    heldout_policy: Literal["verbs_4", "stratified"] = "verbs_4"
    batching: Literal["shuffle", "stratified"] = "shuffle"

    def named_paths(self) -> tuple[str, ...]:
        """The paths that are the user's own: when missing they are an error, a default one is generated.

        Judged by value, because a resolved config spells every default out and names nothing by that.
        """
        fields = type(self).model_fields
        named = (key for key in ("train_path", "val_path") if getattr(self, key) != fields[key].default)
        return tuple(getattr(self, key) for key in named)


class RecordConfig(Section):
    """What of each step is kept (FORMAT.md): its `moments`, a whole state every `keyframe_every` steps, `sites`.

    `on_error`: whether training stops when the record cannot be written, or goes on without.
    """

    enabled: Flag = True
    moments: Literal["every_step", "keyframes"] = "every_step"
    keyframe_every: Count = 128
    sites: Literal["none", "digest"] = "none"
    on_error: Literal["stop", "continue"] = "stop"


class MetricsConfig(Section):
    """How often the run is looked into (docs/metrics.md): sites and tensors `every` so many steps, heads and matrices
    `slow_every`; `probe` is how many training sentences are held against the validation text.
    """

    enabled: Flag = True
    every: Count = 10
    slow_every: Count = 50
    probe: CountOrZero = 32


class Injection(Section):
    """A fault that is caused on purpose at ``step`` (a setting: from there on); inject.py has the table of names.

    None where nothing was said: `inject.resolved` puts the fault's own value there, if it takes one.
    """

    name: Annotated[str, Field(description=INJECTION_NAME)]
    step: Annotated[int, _integer(0, _INT32_MAX)]
    target: Annotated[str | None, Field(description="the name of a tensor or site")] = None
    element: Annotated[
        list[CountOrZero] | None, Field(min_length=1, description="a list of indices, as in [3, 7], each 0 or more")
    ] = None
    factor: Annotated[float | None, Field(description="a finite number")] = None
    bit: Annotated[int | None, _integer(0, 31)] = None


class Config(Section):
    """A checked configuration: ``Config()`` is the default run, `load_config` reads one from a file."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    record: RecordConfig = Field(default_factory=RecordConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    injections: list[Injection] = Field(default_factory=list)
