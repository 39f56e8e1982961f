"""The same model in PyTorch (benchmarks/torch_model.py) computes the same: logits, gradients, ten training steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from minitrain.checkpoint import save_model
from minitrain.config import Config, config_from
from minitrain.data.batches import Batch, TrainBatches
from minitrain.data.prepare import prepare
from minitrain.loop import train_step
from minitrain.model import MiniGPT
from minitrain.optim import AdamW
from minitrain.schedule import Scheduler

torch = pytest.importorskip("torch", reason="PyTorch is not installed (benchmarks/requirements.txt names the version)")

STEPS = 10
SIZES = {"n_layer": 3, "n_head": 3, "d_model": 42, "d_ff": 75, "vocab_size": 53, "max_seq_len": 37}
MODELS = {"default": {}, "uneven and untied": SIZES | {"tie_weights": False}}


@pytest.fixture(scope="module")
def peer(repository: Path) -> ModuleType:
    """benchmarks/torch_model.py, which is in no package."""
    path = repository / "benchmarks" / "torch_model.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


@pytest.fixture(scope="module", params=MODELS)
def config(request: pytest.FixtureRequest) -> Config:
    return config_from({"model": MODELS[request.param]}, "test")


@pytest.fixture(scope="module")
def batches(config: Config, tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    """The first batches of the built-in corpus."""
    folder = tmp_path_factory.mktemp("data")
    data = prepare(
        folder / "train.jsonl",
        folder / "val.jsonl",
        heldout_policy=config.data.heldout_policy,
        vocab_size=config.model.vocab_size,
        max_seq_len=config.model.max_seq_len,
        generate_missing=True,
    )
    source = TrainBatches(data.train, config.training.batch_size, config.training.data_seed)
    return [source.batch_at(step) for step in range(STEPS)]


@pytest.fixture
def model(config: Config) -> MiniGPT:
    return MiniGPT(config.model, seed=config.training.rng_seed)


@pytest.fixture
def twin(peer: ModuleType, model: MiniGPT, tmp_path: Path) -> Any:
    """The twin with the same weights, through the model file."""
    return peer.load_model(save_model(tmp_path, model.params, model.config))


def tokens(array: np.ndarray[Any, Any]) -> Any:
    return torch.from_numpy(array).long()


def targets(peer: ModuleType, batch: Batch) -> Any:
    return tokens(np.where(batch.loss_mask, batch.targets, np.int32(peer.NOT_COUNTED)))


def forward(model: MiniGPT, batch: Batch) -> tuple[np.ndarray[Any, Any], float]:
    return model.forward(batch.inputs, batch.targets, batch.attn_pad_mask, batch.loss_mask)


def test_the_untrained_logits_agree(model: MiniGPT, twin: Any, batches: list[Batch]) -> None:
    batch = batches[0]
    logits, _ = forward(model, batch)
    with torch.no_grad():
        masked = twin(tokens(batch.inputs), torch.from_numpy(batch.attn_pad_mask)).numpy()
        causal = twin(tokens(batch.inputs)).numpy()
    np.testing.assert_allclose(logits, masked, rtol=0, atol=1e-5)
    # Padding stands at the end of the rows, where nothing that is real can see it.
    np.testing.assert_allclose(logits[batch.attn_pad_mask], causal[batch.attn_pad_mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_the_first_gradients_agree(
    peer: ModuleType, model: MiniGPT, twin: Any, batches: list[Batch], masked: bool
) -> None:
    batch = batches[0]
    _, loss = forward(model, batch)
    mask = torch.from_numpy(batch.attn_pad_mask) if masked else None
    expected = twin.loss(tokens(batch.inputs), targets(peer, batch), mask)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    theirs = twin.named_gradients()
    assert sorted(theirs) == sorted(model.params)
    for name, gradient in model.backward().items():
        scale = abs(gradient).max()
        np.testing.assert_allclose(gradient, theirs[name].numpy(), rtol=0, atol=1e-5 * scale, err_msg=name)


def oracle_step(peer: ModuleType, twin: Any, oracle: Any, lr: float, clip: float, batch: Batch) -> tuple[float, float]:
    """As the twin's train_step, with minitrain's rule of clipping: PyTorch's own adds 1e-6 to the norm, not 1e-12."""
    for group in oracle.param_groups:
        group["lr"] = lr
    loss = twin.loss(tokens(batch.inputs), targets(peer, batch))
    oracle.zero_grad()
    loss.backward()
    gradients = [p.grad for p in twin.parameters()]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    for gradient in gradients:
        gradient *= min(1.0, clip / (norm + 1e-12))
    oracle.step()
    return loss.item(), norm


@pytest.mark.parametrize("warmup", [100, 0])
def test_ten_training_steps_agree(
    peer: ModuleType, config: Config, model: MiniGPT, twin: Any, batches: list[Batch], warmup: int
) -> None:
    optimizer = AdamW(config.optimizer)
    rates = {"lr_max": config.optimizer.lr_max, "lr_min": config.optimizer.lr_min}
    scheduler = Scheduler(**rates, warmup_steps=warmup, total_steps=config.scheduler.total_steps)
    oracle = peer.adamw(twin, config.optimizer.model_dump())
    clip = config.optimizer.clip
    assert clip is not None
    moved = 0.0
    for batch in batches:
        moved += scheduler.lr
        loss, norm = oracle_step(peer, twin, oracle, scheduler.lr, clip, batch)
        stats = train_step(model, optimizer, scheduler, batch)
        assert stats.loss == pytest.approx(loss, abs=1e-5)
        assert stats.grad_norm == pytest.approx(norm, rel=1e-5)
        assert stats.grad_norm > clip  # so that all of this was clipped
    theirs = twin.named()
    errors = np.concatenate([abs(model.params[name] - theirs[name].numpy()).ravel() for name in theirs])
    # Adam divides a gradient by its own size, so the few that are next to nothing pass their rounding error on
    # undiminished: up to a few parts in a thousand of the way that Adam can go (sum of the rates; 8e-4 of it seen).
    # All others agree to the rounding of a float32 near 0.1 to 1.
    assert errors.max() <= 5e-3 * moved
    assert np.quantile(errors, 0.999) <= 1e-7
