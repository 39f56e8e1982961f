"""One process of the benchmark: times training steps of the PyTorch twin. Run by run.py, in the peers' environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter


def main(folder: Path, steps: int, threads: int) -> None:
    import numpy as np
    import torch
    from torch_model import NOT_COUNTED, adamw, load_model, train_step

    torch.set_num_threads(threads)
    about = json.loads((folder / "about.json").read_text())
    arrays = np.load(folder / "batches.npz")
    inputs = torch.from_numpy(arrays["inputs"]).long()
    targets = torch.from_numpy(np.where(arrays["loss_mask"], arrays["targets"], NOT_COUNTED)).long()
    batches = list(zip(inputs, targets, strict=True))
    model = load_model(folder / about["model"])
    optimizer = adamw(model, about["config"]["optimizer"])
    clip = about["config"]["optimizer"]["clip"]
    loss, times = 0.0, []
    for step in range(steps):
        tokens, goal = batches[step % len(batches)]
        start = perf_counter()
        loss, _ = train_step(model, optimizer, about["lr"][step], clip, tokens, goal)
        times.append(perf_counter() - start)
    result = {"seconds": times, "loss": loss, "version": torch.__version__}
    if steps > 1:
        result["product_gflops"] = product_gflops()
    print(json.dumps(result))


def product_gflops() -> float:
    """How fast PyTorch multiplies matrices here, of a size that suits it."""
    import torch

    M, N, K = 2048, 1024, 256
    x, weight = torch.rand(M, K), torch.rand(N, K)
    times = []
    for _ in range(50):
        start = perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(perf_counter() - start)
    return 2 * M * N * K / min(times) / 1e9


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
