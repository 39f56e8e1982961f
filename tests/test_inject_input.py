"""What a user may say of injections, and what is told where it is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from injecting import SENTENCES, TINY, baseline, tiny

import minitrain
from minitrain.cli import main
from minitrain.config import load_config, to_yaml
from minitrain.errors import ConfigError
from minitrain.inject import FAULTS, Injector, load, resolved, table


@pytest.fixture(scope="module", autouse=True)
def text(place: Path) -> None:
    """A text of few sentences, so that little is prepared and evaluated."""
    (place / "small.txt").write_text("\n\n".join(SENTENCES * 4) + "\n")


# What a user may say


def test_the_ways_to_say_it(tmp_path):
    """Options, short keys, a mapping and the list are one configuration, which its YAML gives back."""
    (tmp_path / "a.yaml").write_text("injection: param_nan\ninjection_step: 5\n")
    (tmp_path / "b.yaml").write_text("injection: {name: param_nan, step: 5, target: 'ln_f.bias[3]'}\n")
    (tmp_path / "c.yaml").write_text("injections:\n  - {name: param_nan, step: 5, target: ln_f.bias, element: [3]}\n")
    ways = [
        load(None, [*TINY, "injection.target=ln_f.bias[3]", "injection=param_nan", "injection_step=5"]),
        load(tmp_path / "a.yaml", [*TINY, "injection.target=ln_f.bias", "injection.element=[3]"]),
        load(tmp_path / "b.yaml", TINY),
        load(tmp_path / "c.yaml", TINY),
    ]
    assert all(way == ways[0] for way in ways)
    (tmp_path / "d.yaml").write_text(to_yaml(ways[0]))
    assert load_config(tmp_path / "d.yaml") == ways[0]
    assert resolved(ways[0]) == ways[0]


NAN, FLIP = ("injection=param_nan", "injection_step=5"), ("injection=bit_flip", "injection_step=5")
SITE = ("injection=nan_activation", "injection_step=5")
BAD: dict[tuple[str, ...], str] = {
    ("injection=v_corupt", "injection_step=5"): (
        "injection.name: expected the name of an injection, got 'v_corupt'; did you mean 'v_corrupt'? (--injection)"
    ),
    ("injection=zzz", "injection_step=5"): "got 'zzz'; known are bad_batch, duplicate_batch, nan_activation, scale",
    ("injection=v_corrupt",): "injection.step: expected an integer from 0 to 2147483647, got none (--injection)",
    ("injection_step=5",): "injection.name: expected the name of an injection (minitrain train --injection help",
    ("injection=scale", "injection_step=12"): (
        "injection.step: expected 0 to 11 for scale in a run of 12 steps, got 12 (--injection-step)"
    ),
    ("injection=scale", "injection_step=-1"): "injection.step: expected an integer from 0 to 2147483647, got -1",
    ("injection=duplicate_batch", "injection_step=0"): "injection.step: expected 1 to 11 for duplicate_batch",
    ("injection=scale", "injection_step=5", "injection.step=6"): "",
    ("injection=scale", "injection_step=5", "injection.fctor=6"): (
        "injection.fctor: unknown key; did you mean 'factor'? (--set)"
    ),
    (
        "injection=scale",
        "injection_step=5",
        "injection.bit=6",
    ): "injection.bit: expected none, since scale takes none, got 6",
    (
        "injection=scale",
        "injection_step=5",
        "injection.factor=1e39",
    ): "injection.factor: expected a number that float32",
    (
        "injection=scale",
        "injection_step=5",
        "injection.factor=x",
    ): "injection.factor: expected a finite number, got 'x'",
    (
        "injection=lr_jump",
        "injection_step=5",
        "injection.factor=-1",
    ): "injection.factor: expected a number of at least 0 ",
    (
        "injection=v_corrupt",
        "injection_step=5",
        "injection.element=[1]",
    ): "injection.element: expected none, since v_corrupt",
    (
        "injection=v_corrupt",
        "injection_step=5",
        "injection.target=lm_head.bias[1]",
    ): "since v_corrupt takes whole tensors",
    (*NAN, "injection.target=block.0.ffn.u.weight"): (
        "injection.target: expected a parameter, got 'block.0.ffn.u.weight'; did you mean 'block.0.ffn.up.weight'?"
    ),
    (*NAN, "injection.target=zzz"): "got 'zzz'; an example is 'lm_head.bias' (--set)",
    (*NAN, "injection.element=[64]"): "injection.element: expected 1 index inside the shape [",
    (*NAN, "injection.element=[3,7]"): "injection.element: expected 1 index inside the shape [",
    (*NAN, "injection.element=3"): "injection.element: expected a list of indices, as in [3, 7], each 0 or more, got 3",
    (
        *NAN,
        "injection.element=[-1]",
    ): "injection.element: expected a list of indices, as in [3, 7], each 0 or more, got -1",
    (
        *NAN,
        "injection.element=[1]",
        "injection.target=ln_f.bias[1]",
    ): "injection.element: expected it once, since target",
    (*FLIP, "injection.bit=32"): "injection.bit: expected an integer from 0 to 31, got 32 (--set)",
    (*FLIP, "injection.target=lm_head.bias"): "injection.target: expected param.X, m.X or v.X of a parameter X, got",
    (*SITE, "injection.target=log_softmax"): (
        "injection.target: expected a site that something reads afterwards, got 'log_softmax': the losses have"
    ),
    (*SITE, "injection.target=grad:block.0.attn.probs"): "its kernel has used it; grad:block.0.v is read",
    (*SITE, "injection.target=logit"): "injection.target: expected a site, got 'logit'; did you mean 'logits'?",
    (*SITE, "injection.target=block.0.attn.probs[0,0,3,4]"): "expected a key up to its query in block.0.attn.probs",
    ("injection.name=3", "injection_step=5"): "injection.name: expected the name of an injection (minitrain train",
}
del BAD["injection=scale", "injection_step=5", "injection.step=6"]  # one key: the last of two wins


@pytest.mark.parametrize("said", BAD, ids=" ".join)
def test_bad_input(said):
    """One line that tells the key, what was expected, what came and where."""
    with pytest.raises(ConfigError) as refused:
        load(None, [*TINY, *said])
    assert BAD[said] in str(refused.value)
    assert "\n" not in str(refused.value)


BAD_FILES = {
    "injection: [scale]\n": "injection: expected a name or a mapping such as {name: scale, step: 500}",
    "injection: scale\ninjections: [{name: scale, step: 3}]\n": "injection: expected either injection or injections",
    "injection: {name: scale, step: 3}\ninjection_step: 4\n": "injection_step: expected one step, got 4",
    "injections: 3\n": "injections: expected a list of injections, got 3 (FILE:1)",
    "injections: [3]\n": "injections[0]: expected a mapping such as {name: scale, step: 500}, got 3 (FILE:1)",
    "injections:\n- {name: scale}\n": "injections[0].step: expected an integer from 0 to 2147483647, got none (FILE:2)",
    "injections:\n- name: scale\n  step: 1\n- name: bit_flip\n  step: 99\n": "injections[1].step: expected 0 to 11 for",
    "injections:\n- name: scale\n  steps: 3\n  step: 1\n": "injections[0].steps: unknown key; did you mean 'step'?",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_files(tmp_path, text):
    """With the line of the file where the mistake stands."""
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        load(tmp_path / "a.yaml", TINY)
    assert BAD_FILES[text].replace("FILE", str(tmp_path / "a.yaml")) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_at_the_command_line(place):
    """Options train with the fault, help lists every name, a mistake ends with 2 and writes nothing."""

    def train(*words: str) -> Any:
        sets = [word for text in TINY for word in ("--set", text)]
        return CliRunner().invoke(main, ["train", *words, *sets])

    done = train("--injection", "v_corrupt", "--injection-step", "5", "--set", "injection.factor=7", "--out-dir", "cli")
    assert done.exit_code == 0, done.output
    assert minitrain.open_run("cli").events == [
        {"event": "injection", "name": "v_corrupt", "step": 5, "target": "lm_head.bias", "factor": 7.0}
    ]
    listed = CliRunner().invoke(main, ["train", "--injection", "help"]).output
    assert all(f"\n{name} " in listed for name in FAULTS)
    wrong = train("--injection", "v_corrupt", "--injection-step", "99", "--out-dir", "wrong")
    assert (wrong.exit_code, Path("wrong").exists()) == (2, False)
    assert train("--injection", "none", "--injection-step", "5", "--out-dir", "plain").exit_code == 0
    assert minitrain.open_run("plain").events == []


def test_without_data_the_injector_says_what_it_needs():
    """For loops of one's own: batches by step, and a tokenizer."""
    for name, needs in ("duplicate_batch", "batches that can be asked for by step"), ("bad_batch", "a tokenizer"):
        with pytest.raises(ConfigError, match=needs):
            Injector(tiny({"name": name, "step": 3})).inject("batch", 3, baseline().batches[3])


def test_the_readme_has_the_table(repository):
    """Every fault with what it does and takes, as the code has it."""
    text = (repository / "README.md").read_text()
    for row in table():
        name, point, does, takes = row
        assert f"| `{name}` | {point} | {does} | {takes} |" in text
