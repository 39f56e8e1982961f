"""The model file: what is written comes back to the bit, and a file that is not whole is refused in words."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from minitrain.checkpoint import (
    FORMAT,
    METADATA_KEY,
    MODEL_FORMAT,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_model,
)
from minitrain.data.tokenizer import Tokenizer
from minitrain.errors import RunError
from minitrain.model import MiniGPT
from minitrain.sections import ModelConfig
from minitrain.state import State
from minitrain.tensors import parameter_table

SIZES = ModelConfig(n_layer=2, n_head=2, d_model=12, d_ff=20, vocab_size=37, max_seq_len=13, tie_weights=False)
TOKENIZER = Tokenizer("abc ", [(4, 5)]).to_json()


def written(folder: Path) -> Path:
    """A model file with awkward numbers in it."""
    model = MiniGPT(SIZES, seed=1)
    model.params.flat[:5] = [-0.0, np.nan, np.inf, -np.inf, 1e-45]
    return save_model(folder, model.params, SIZES, TOKENIZER, "minigpt-phase18")


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes behind it."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def rewritten(path: Path, about: dict[str, Any]) -> None:
    """The same tensors with other metadata; a key that becomes None is left out."""
    header, data = parts(path)
    changed = json.loads(header["__metadata__"][METADATA_KEY]) | about
    header["__metadata__"][METADATA_KEY] = json.dumps({k: v for k, v in changed.items() if v is not None})
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_model_comes_back_to_the_bit(tmp_path: Path):
    """Names, bits, sizes and tokenizer; the same model gives the same bytes under the same name."""
    path = written(tmp_path)
    stored = load_model(path)
    assert stored.config == SIZES
    assert Tokenizer.from_json(stored.tokenizer or b"").to_json() == TOKENIZER
    again = save_model(tmp_path / "b", stored.params, stored.config, stored.tokenizer, "minigpt-phase18")
    assert (again.name, again.read_bytes()) == (path.name, path.read_bytes())
    assert path.name.startswith("minigpt-phase18-")
    header, _ = parts(path)
    about = json.loads(header["__metadata__"][METADATA_KEY])
    assert about["digest"].startswith(path.stem.removeprefix("minigpt-phase18-"))
    assert load_model(save_model(tmp_path, stored.params, SIZES)).tokenizer is None


def test_a_flipped_bit_is_found(tmp_path: Path):
    """safetensors has no checksum; the digest in the metadata has."""
    path = written(tmp_path)
    content = bytearray(path.read_bytes())
    for place in (-1, -1000):
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(RunError, match="the file has been changed or damaged"):
            load_model(path)
        content[place] ^= 1


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"format": "minigpt-9"}, "expected a model of format minigpt-1, got format 'minigpt-9'"),
        ({"digest": None}, r"expected the digest of its tensors in the metadata, got none \(written by an older"),
        ({"model": None}, "expected a readable model, got KeyError: 'model'"),
        ({"model": {"n_head": 5}}, "expected the sizes of a model, got .*n_head 5 does not divide"),
        (
            {"model": SIZES.model_dump() | {"n_layer": 2**31 - 1}},
            "expected tensors of 2147483647 blocks, got 29 tensors",
        ),
        ({"model": SIZES.model_dump() | {"n_layer": 1}}, "expected 17 tensors of this model, got 29 with other names"),
        (
            {"model": SIZES.model_dump() | {"d_model": 2**30}},
            r"expected embed.weight as F32 \(37, 1073741824\), got F32 \(37, 12\)",
        ),
    ],
)
def test_metadata_that_do_not_fit(tmp_path: Path, about: dict[str, Any], message: str):
    """Another format, impossible sizes, sizes of another model: refused before any memory is taken for them."""
    path = written(tmp_path)
    rewritten(path, about)
    with pytest.raises(RunError, match=message):
        load_model(path)


def test_files_of_another_kind(tmp_path: Path):
    """Nothing, a torn file, a text, tensors without our metadata, a checkpoint in place of a model and the reverse."""
    model = MiniGPT(SIZES, seed=1)
    m, v = model.params.like(), model.params.like()
    checkpoint, path = tmp_path / "checkpoint.safetensors", written(tmp_path)
    save_checkpoint(checkpoint, State(3, model.params, m, v), config_hash="", streams={})
    with pytest.raises(RunError, match="got format 'minitrain-checkpoint-1'; name another file"):
        load_model(checkpoint)
    with pytest.raises(RunError, match="got format 'minigpt-1'; delete the file to start again"):
        load_checkpoint(path, model.params, m, v)
    torn = path.read_bytes()[:-7]
    foreign = save({"a": np.zeros(3, np.float32)})
    half = save({"a": np.zeros(3, np.float32)}, {METADATA_KEY: '["a list"]'})
    for content, message in (
        (torn, "expected a readable model, got SafetensorError"),
        (b"", "expected a readable model"),
        (b"once upon a time" * 9, "expected a readable model"),
        (foreign, "got format None"),
        (half, r"got format \['a list'\]"),
    ):
        path.write_bytes(content)
        with pytest.raises(RunError, match=message):
            load_model(path)
    with pytest.raises(RunError, match="FileNotFoundError"):
        load_model(tmp_path / "nowhere.safetensors")


def test_the_documented_names_and_shapes():
    """docs/checkpoint.md lists every tensor of a model with its shape, in order, and every key of both metadata."""
    document = Path(__file__).parent.parent / "docs" / "checkpoint.md"
    if not document.exists():
        pytest.skip("docs/ is not beside the tests")
    text = document.read_text()
    letters = {"V": SIZES.vocab_size, "C": SIZES.d_model, "F": SIZES.d_ff}
    rows = re.findall(r"(?m)^\| `([\w.{}]+)` \| ([VCF, ]+) \|", text)
    shapes = [(name, tuple(letters[d] for d in dims.split(", "))) for name, dims in rows]
    blocks = [row for row in shapes if "{i}" in row[0]]
    at = shapes.index(blocks[0])
    written = [(name.format(i=i), shape) for i in range(SIZES.n_layer) for name, shape in blocks]
    expected = [(p.name, p.shape) for p in parameter_table(SIZES)]
    assert [*shapes[:at], *written, *shapes[at + len(blocks) :]] == expected
    for key in (
        "format",
        "model",
        "tokenizer",
        "digest",
        "step",
        "streams.training_control",
        "streams.data",
        "config_hash",
    ):
        assert re.search(rf"(?m)^\| `{re.escape(key)}` \|", text), key
    assert f"`{FORMAT}`" in text
    assert f"`{MODEL_FORMAT}`" in text
