from numpy import float32, int32
from numpy.typing import NDArray

def instruction_sets() -> list[str]: ...

class Pool:
    threads: int
    def __init__(self, threads: int = 1) -> None: ...

class Program:
    length: int
    def __init__(self, pool: Pool) -> None: ...
    def append(
        self,
        kernel: int,
        arrays: list[int],
        sizes: list[int],
        numbers: list[float],
        units: int,
        split: int,
        scratch: int,
    ) -> None: ...
    def run(self, first: int, last: int) -> None: ...

class Environment:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...

def load_tokens(out: NDArray[int32], tokens: NDArray[int32], limit: int) -> int: ...
def normal(out: NDArray[float32], std: float, seed: int, purpose: int, step: int, site: int) -> None: ...
