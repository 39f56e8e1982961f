"""The configuration: what is valid is read exactly, what is not is told in words, all of it at once."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from minitrain.config import (
    NOT_HASHED,
    Config,
    DataConfig,
    config_from,
    config_hash,
    differing_keys,
    load_config,
    to_yaml,
)
from minitrain.errors import ConfigError

DOMAIN_EXAMPLE = """
model:      {n_layer: 2, n_head: 4, d_model: 64, d_ff: 256, vocab_size: 64, max_seq_len: 32}
optimizer:  {type: adamw, lr_max: 3e-4, lr_min: 3e-5, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: 1.0}
scheduler:  {warmup_steps: 100, total_steps: 2000}
training:   {batch_size: 8, val_every: 50, log_every: 10, loss_reduction: token_mean, rng_seed: 42, data_seed: 7}
data:       {train_path: data/processed/train.jsonl, val_path: data/processed/val.jsonl, heldout_policy: verbs_4}
"""  # noqa: E501

counts = st.integers(1, 2**31 - 1)
below_one = st.floats(0, 1, exclude_max=True)
not_negative = st.floats(0, allow_infinity=False)
positive_or_null = st.none() | st.floats(0, exclude_min=True, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.isprintable)
heads = st.tuples(st.integers(1, 64), st.integers(1, 64))


@st.composite
def configs(draw):
    """Any valid config, in the keys whose values are written in ways of their own."""
    n_head, pairs = draw(heads)
    lr_min, lr_max = sorted(draw(st.tuples(not_negative, not_negative)))
    warmup_steps, total_steps = sorted(draw(st.tuples(counts, counts)))
    tree = {
        "model": {"n_head": n_head, "d_model": 2 * n_head * pairs, "dropout": draw(below_one)},
        "optimizer": {"lr_min": lr_min, "lr_max": lr_max, "clip": draw(positive_or_null)},
        "scheduler": {"warmup_steps": warmup_steps, "total_steps": total_steps},
        "training": {"rng_seed": draw(st.integers(0, 2**32 - 1))},
        "data": {"train_path": draw(texts)},
    }
    return config_from(tree, "a test")


@pytest.fixture
def write(tmp_path):
    """A function that writes a config file and returns its path."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """One file for all the examples of a property."""
    return tmp_path_factory.mktemp("config") / "run.yaml"


def mistakes(path: Path | None, *overrides: str) -> list[str]:
    """The lines of the error that this config must raise."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


# What is valid


@pytest.mark.parametrize("text", ["", "# nothing\n", "model:\n", "\ufeffmodel: {}\n", DOMAIN_EXAMPLE])
def test_what_is_not_said_is_the_default(write, text):
    """An empty file, an empty section, a byte order mark and the documented example all give Config()."""
    assert load_config(write(text)) == Config() == load_config(None)


@pytest.mark.parametrize("spelling", ["3e-4", "3.0e-4", "0.0003", "3E-4", ".3e-3", "3e-04"])
def test_floats_in_every_spelling(write, spelling):
    """A number with an exponent and no dot is a number, in the file and on the command line."""
    assert load_config(write(f"optimizer: {{lr_max: {spelling}}}")).optimizer.lr_max == 3e-4
    assert load_config(None, [f"optimizer.lr_max={spelling}"]).optimizer.lr_max == 3e-4


def test_an_integer_is_a_float():
    """``clip: 1`` is 1.0, and hashes as 1.0."""
    config = load_config(None, ["optimizer.clip=1"])
    assert isinstance(config.optimizer.clip, float)
    assert config_hash(config) == config_hash(Config())


def test_overrides_lie_over_the_file_and_the_last_wins(write):
    """File under overrides, in their order; null, text and other values are YAML."""
    path = write("model: {n_layer: 3, d_ff: 128}\nscheduler: {type: linear}\n")
    overrides = ["model.n_layer=4", "model.n_layer=5", "optimizer.clip=null", "data.train_path= a b.txt"]
    config = load_config(path, [*overrides, "model.tie_weights=false"])
    assert (config.model.n_layer, config.model.d_ff, config.model.tie_weights) == (5, 128, False)
    assert (config.scheduler.type, config.optimizer.clip, config.data.train_path) == (
        "linear",
        None,
        "a b.txt",
    )


def test_an_override_leaves_an_aliased_section_alone(write):
    """Two sections that are one YAML node do not change together."""
    path = write("optimizer: &shared {type: adamw}\nscheduler: *shared\n")
    assert load_config(path, ["scheduler.type=step"]).optimizer.type == "adamw"


@given(configs())
@settings(max_examples=50, deadline=None)
def test_yaml_round_trip(scratch, config):
    """to_yaml is deterministic and loads back to an equal config with the same hash."""
    text = to_yaml(config)
    scratch.write_text(text, encoding="utf-8", newline="")
    back = load_config(scratch)
    assert back == config
    assert to_yaml(back) == text
    assert config_hash(back) == config_hash(config)
    assert differing_keys(config, back) == []


@given(st.text(st.characters(codec="utf-8"), max_size=40) | st.text("{}[]:,-?&*!|>'\"%@#\n az1.", max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_is_a_config_or_a_config_error(scratch, text):
    """No text, as a file or as an override, raises anything but ConfigError."""
    scratch.write_text(text, encoding="utf-8", newline="")
    for arguments in ((scratch, []), (None, [text]), (None, [f"data.train_path={text}"])):
        with contextlib.suppress(ConfigError):
            load_config(*arguments)


# What is not valid

OUT_OF_RANGE = [
    ("model.n_layer=0", "an integer from 1 to 2147483647, got 0"),
    ("model.n_layer=2147483648", "an integer from 1 to 2147483647, got 2147483648"),
    ("model.n_layer='7'", "an integer from 1 to 2147483647, got '7'"),
    ("model.n_layer=2.0", "an integer from 1 to 2147483647, got 2.0"),
    ("model.n_layer=true", "an integer from 1 to 2147483647, got true"),
    ("model.n_layer=null", "an integer from 1 to 2147483647, got null"),
    ("model.n_layer=[1, 2]", "an integer from 1 to 2147483647, got [1, 2]"),
    ("model.vocab_size=4", "an integer from 5 to 2147483647, got 4"),
    ("model.dropout=1", "a number from 0 to below 1, got 1"),
    ("model.dropout=-0.1", "a number from 0 to below 1, got -0.1"),
    ("model.tie_weights=1", "true or false, got 1"),
    ("model.tie_weights=yes", "true or false, got 'yes'"),
    ("optimizer.type=adam", "adamw, got 'adam'; did you mean 'adamw'?"),
    ("optimizer.lr_max=-1", "a finite number, 0 or more, got -1"),
    ("optimizer.lr_max=true", "a finite number, 0 or more, got true"),
    ("optimizer.lr_max=.inf", "a finite number, 0 or more, got inf"),
    ("optimizer.weight_decay=.nan", "a finite number, 0 or more, got nan"),
    ("optimizer.beta1=1.0", "a number from 0 to below 1, got 1.0"),
    ("optimizer.beta2=.nan", "a number from 0 to below 1, got nan"),
    ("optimizer.eps=0", "a finite number above 0, got 0"),
    ("optimizer.clip=0", "a finite number above 0, or null for none, got 0"),
    ("optimizer.clip_value=none", "a finite number above 0, or null for none, got 'none'"),
    ("scheduler.warmup_steps=-1", "an integer from 0 to 2147483647, got -1"),
    ("scheduler.gamma=1.5", "a number above 0, up to 1, got 1.5"),
    ("scheduler.type=linaer", "cosine or linear or step or constant, got 'linaer'; did you mean 'linear'?"),
    ("training.rng_seed=4294967296", "an integer from 0 to 4294967295, got 4294967296"),
    ("training.data_seed=-1", "an integer from 0 to 4294967295, got -1"),
    ("training.val_every=0", "an integer from 1 to 2147483647, got 0"),
    ("training.log_every=0", "an integer from 1 to 2147483647, got 0"),
    ("training.checkpoint_every=0", "an integer from 1 to 2147483647, got 0"),
    ("training.threads=65", "an integer from 1 to 64, got 65"),
    ("training.dtype=float16", "float32, got 'float16'"),
    ("training.backend=3", "compiled or reference, got 3"),
    ("data.train_path=3", "the path of a file, without control characters, got 3"),
    ("data.train_path=''", "the path of a file, without control characters, got ''"),
]


@pytest.mark.parametrize(("override", "expected"), OUT_OF_RANGE)
def test_an_impossible_value_is_told_with_its_range(override, expected):
    """Key, what was expected, what came, where, in one line."""
    lines = mistakes(None, override)
    assert lines[0].startswith(f"{override.partition('=')[0]}: expected {expected}")
    assert lines[0].endswith("(--set)")
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["model.n_head=5"],
            "model.n_head 5 does not divide model.d_model 64 into heads of even width (the rotary embedding "
            "turns pairs of columns); d_model 70 would fit (n_head: --set, d_model: default)",
        ),
        (
            ["model.d_model=12"],
            "model.n_head 4 does not divide model.d_model 12 into heads of even width (the rotary embedding "
            "turns pairs of columns); d_model 16 would fit (n_head: default, d_model: --set)",
        ),
        (
            ["optimizer.lr_max=1e-5"],
            "optimizer.lr_min 3e-05 is above optimizer.lr_max 1e-05; lower lr_min or raise lr_max "
            "(lr_min: default, lr_max: --set)",
        ),
        (
            ["scheduler.total_steps=50"],
            "scheduler.warmup_steps 100 is more than scheduler.total_steps 50; lower warmup_steps (0 is "
            "none) or raise total_steps (warmup_steps: default, total_steps: --set)",
        ),
    ],
)
def test_keys_that_contradict_each_other(overrides, line):
    """Both keys, both values, where both stand, and a remedy."""
    assert mistakes(None, *overrides) == [line]


@given(heads)
def test_the_proposed_width_fits(head):
    """The d_model that the message proposes is accepted, and only unfit ones are refused."""
    n_head, d_model = head
    overrides = [f"model.n_head={n_head}", f"model.d_model={d_model}"]
    if d_model % n_head == 0 and d_model // n_head % 2 == 0:
        assert load_config(None, overrides).model.d_model == d_model
    else:
        proposed = mistakes(None, *overrides)[0].partition("; d_model ")[2].split()[0]
        assert load_config(None, [overrides[0], f"model.d_model={proposed}"]).model.n_head == n_head


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.n_hed=3", "model.n_hed: unknown key; did you mean 'n_head'? (--set)"),
        ("model.clip=3", "model.clip: unknown key; 'clip' belongs to optimizer (--set)"),
        ("model.type=3", "model.type: unknown key; 'type' belongs to optimizer and scheduler (--set)"),
        (
            "data.xyz=3",
            "data.xyz: unknown key; known are train_path, val_path, heldout_policy, batching (--set)",
        ),
        ("modle.n_head=3", "modle: unknown section; did you mean 'model'? (--set)"),
        ("clip.x=3", "clip: unknown section; 'clip' belongs to optimizer (--set)"),
        (
            "xyz.x=3",
            "xyz: unknown section; known are model, optimizer, scheduler, training, data, record, metrics (--set)",
        ),
        (
            "n_layer=3",
            "--set n_layer=3: expected section.key=value, as in model.n_layer=4; 'n_layer' belongs to model",
        ),
        ("model.n_layer", "--set model.n_layer: expected section.key=value, as in model.n_layer=4"),
        ("model.=3", "--set model.=3: expected section.key=value, as in model.n_layer=4"),
        ("optimizer.clip=", "--set optimizer.clip=: expected a value after '=' (null for none)"),
        (
            "model.n_layer=[",
            "--set model.n_layer:1:2: expected YAML, got a syntax error: "
            "expected the node content, but found '<stream end>'",
        ),
    ],
)
def test_names_that_are_not_there_and_overrides_of_another_form(override, line):
    """A wrong name gets the nearest right one, or the section that it belongs to."""
    assert mistakes(None, override) == [line]


def test_every_mistake_is_told_at_once_with_its_line(write):
    """Types, ranges, names and contradictions of file and overrides, together."""
    path = write(
        "model:\n  n_head: 5\n  n_layer: '7'\noptimizer: {lr_max: 1e-5,\n  clop: 1}\n"
        "scheduler: {total_steps: 9}\ntrainning: {}\ndata: 3\n1: 2\ntraining: {2: 3}\n"
    )
    assert mistakes(path, "oops", "model.d_ff=0", "data.val_path=x") == [
        "--set oops: expected section.key=value, as in model.n_layer=4",
        f"model.n_layer: expected an integer from 1 to 2147483647, got '7' ({path}:3)",
        "model.d_ff: expected an integer from 1 to 2147483647, got 0 (--set)",
        f"optimizer.clop: unknown key; did you mean 'clip'? ({path}:5)",
        "scheduler.warmup_steps 100 is more than scheduler.total_steps 9; lower warmup_steps (0 is none) or "
        f"raise total_steps (warmup_steps: default, total_steps: {path}:6)",
        "training.2: unknown key; known are batch_size, val_every, log_every, loss_reduction, rng_seed, "
        f"data_seed, checkpoint_every, on_nonfinite, threads, dtype, backend ({path}:10)",
        f"data: expected a mapping of keys to values, got 3 ({path}:8)",
        f"trainning: unknown section; did you mean 'training'? ({path}:7)",
        f"1: unknown section; known are model, optimizer, scheduler, training, data, record, metrics ({path}:9)",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model: {n_layer: 1, n_layer: 2}", ":1:21: expected YAML, got a syntax error: found duplicate key"),
        ("a: 1\nb: [", ":2:5: expected YAML, got a syntax error: expected the node content"),
        ("a: \0", ": expected YAML, got a syntax error: unacceptable character"),
        ("a: 2001-99-99", ": expected YAML, got a syntax error: month must be in 1..12"),
        ("a: !!bool x", ": expected YAML, got a syntax error: 'x'"),
        ("[" * 3000, ": expected YAML, got a syntax error: maximum recursion depth exceeded"),
        (
            "!!python/name:os.system x",
            ":1:1: expected YAML, got a syntax error: could not determine a constructor",
        ),
        ("- a", ": expected sections such as 'model:' at the top level, got ['a']"),
        ("!!omap [a: 1]", ": expected sections such as 'model:' at the top level, got"),
        (b"a: \xff", ": expected UTF-8 text, got the byte 0xff at offset 3"),
    ],
)
def test_a_file_that_is_not_a_mapping_of_sections(write, text, problem):
    """The file, the place where there is one, and what is wrong there."""
    path = write(text)
    assert mistakes(path)[0].startswith(f"{path}{problem}")


def test_a_file_that_cannot_be_read(tmp_path):
    """Missing file and folder are told in the words of the system."""
    missing = tmp_path / "no.yaml"
    assert mistakes(missing) == [f"{missing}: expected a readable YAML file, got: No such file or directory"]
    assert mistakes(tmp_path) == [f"{tmp_path}: expected a readable YAML file, got: Is a directory"]


def test_a_long_value_is_cut(write):
    """A message stays a line, whatever came."""
    (line,) = mistakes(write(f"model: {{n_layer: {'x' * 5000}}}"))
    assert len(line) < 300


def test_config_from_names_its_source():
    """A manifest's config comes back equal; what is wrong in it is told with the given name."""
    config = load_config(None, ["model.n_layer=3"])
    assert config_from(config.model_dump(), "a manifest") == config
    with pytest.raises(ConfigError) as caught:
        config_from({"model": {"n_layer": 0}, "data": 3, "x": {}}, "a manifest")
    assert [line[-12:] for line in str(caught.value).splitlines()] == ["(a manifest)"] * 3


# What others read from a config


def test_a_config_is_frozen():
    """Nothing moves under a run."""
    with pytest.raises(ValidationError):
        Config().model.n_layer = 3


def test_named_paths():
    """A path is the user's own by its value, and pydantic still knows whether it was written."""
    spelt = load_config(None, [f"data.train_path={DataConfig().train_path}"]).data
    assert spelt.named_paths() == Config().data.named_paths() == ()
    assert spelt.model_fields_set == {"train_path"}
    assert load_config(None, ["data.val_path=mine.txt"]).data.named_paths() == ("mine.txt",)


ANOTHER = {
    "model": "n_layer=3 n_head=2 d_model=128 d_ff=3 vocab_size=65 max_seq_len=33 dropout=0.5 tie_weights=false",
    "optimizer": "lr_max=1 lr_min=0 beta1=0 beta2=0 eps=1 weight_decay=0 clip=null clip_value=100",
    "scheduler": "type=step warmup_steps=0 total_steps=3000 step_size=9 gamma=1",
    "training": "batch_size=16 val_every=7 log_every=7 rng_seed=1 data_seed=1 checkpoint_every=7 "
    "on_nonfinite=continue threads=2 backend=reference",
    "data": "train_path=a val_path=b heldout_policy=stratified batching=stratified",
}


@pytest.mark.parametrize(
    "override", [f"{section}.{pair}" for section, pairs in ANOTHER.items() for pair in pairs.split()]
)
def test_the_hash_moves_with_every_key_that_can_move_a_bit(override):
    """All keys but the NOT_HASHED change the hash; differing_keys names each."""
    key, _, value = override.partition("=")
    changed = load_config(None, [override])
    assert (config_hash(changed) == config_hash(Config())) == (key in NOT_HASHED)
    (line,) = differing_keys(Config(), changed)
    assert line.startswith(f"{key}: ")


def test_the_hash_of_the_defaults_is_known():
    """A change of this number makes every recorded run incomparable: it belongs in the changelog."""
    assert config_hash(Config()) == "96ad68b3357ef891fe8667e5ce747815147099d53fe33404dcfe5a36e331037b"


def test_differing_keys():
    """One line for each key, old value to new, as YAML spells them; none for equal configs."""
    other = load_config(None, ["training.batch_size=16", "optimizer.clip=null", "scheduler.type=linear"])
    assert differing_keys(Config(), other) == [
        "optimizer.clip: 1.0 -> null",
        'scheduler.type: "cosine" -> "linear"',
        "training.batch_size: 8 -> 16",
    ]
    assert differing_keys(other, other) == []
