"""docs/load_in_pytorch.py: our model file in plain PyTorch gives our logits and our greedy text."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from minitrain import trainer
from minitrain.config import load_config
from minitrain.data.tokenizer import BOS
from minitrain.run_folder import RunFolder
from minitrain.sampling import Sampling, generate, open_model

torch = pytest.importorskip("torch", reason="PyTorch is not installed (benchmarks/requirements.txt names the version)")

EXAMPLE = Path(__file__).parent.parent / "docs" / "load_in_pytorch.py"
SHORT = ["scheduler.total_steps=150", "scheduler.warmup_steps=20", "training.val_every=150"]
UNEVEN = ["model.n_layer=3", "model.n_head=3", "model.d_model=42", "model.d_ff=75", "model.tie_weights=false"]
MODELS = {"default": [], "uneven and untied": [*UNEVEN, "model.max_seq_len=37", "model.vocab_size=53"]}


def greedy(model: torch.nn.Module, ids: list[int], size: int, limit: int) -> list[int]:
    """Until <eos> = 2; neither <pad> = 0 nor <bos> = 1 may come."""
    while ids[-1] != 2 and len(ids) < limit:
        ids = [*ids, 2 + int(model(torch.tensor([ids]))[0, -1, 2:size].argmax())]
    return ids


PROMPTS = ("", "She has", "They will go", "Zoë")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    if not EXAMPLE.exists():
        pytest.skip("docs/ is not beside the tests")
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=MODELS)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a short run, so that its text is no noise."""
    place = tmp_path_factory.mktemp("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for picture in ("write_curve", "write_page"):
            patch.setattr(trainer.report, picture, lambda *_: None)
        trainer.run(load_config(None, [*SHORT, *MODELS[request.param]]), place / "run")
    return RunFolder(place / "run").require_model()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_same_logits_and_the_same_greedy_text(example: ModuleType, file: Path, prompt: str):
    """Logits within 1e-4 at every position of the prompt; greedy continuations token for token."""
    model, tokenizer, _ = open_model(file)
    theirs = example.load(file)
    ids = [BOS, *tokenizer.encode(prompt)]
    tokens = np.array([ids], np.int32)
    ours, _ = model.forward(tokens, tokens, tokens >= 0, tokens >= 0, training=False)
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.from_numpy(tokens).long()).numpy(), ours, rtol=0, atol=1e-4)
    limit = model.config.max_seq_len
    with torch.no_grad():
        found = greedy(theirs, ids, tokenizer.size, limit)
    mine = generate(model, tokenizer, ids, Sampling(max_tokens=limit - len(ids)))
    assert found == [*ids, *mine.tokens, *([2] if mine.finished else [])]


def test_the_script(example: ModuleType, file: Path):
    """Typed as documented: the logits of what comes first."""
    done = subprocess.run([sys.executable, EXAMPLE, file], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tensor([")
    model, _, _ = open_model(file)
    tokens = np.array([[BOS]], np.int32)
    ours, _ = model.forward(tokens, tokens, tokens >= 0, tokens >= 0, training=False)
    numbers = done.stdout[done.stdout.index("[") + 1 : done.stdout.index("]")].split(",")
    np.testing.assert_allclose([float(x) for x in numbers], ours[0, 0], atol=1e-3)
