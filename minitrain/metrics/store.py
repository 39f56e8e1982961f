"""``metrics.zarr``: written in blocks at each checkpoint, read back as series by name.

Plain Zarr v3 like the record, and by the same hands. It is no evidence: after a crash it ends at the last checkpoint,
and resuming measures the steps behind it again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain.errors import RunError
from minitrain.metrics.table import CADENCES, FORMAT, FORMAT_VERSION, METRICS, MetricsLayout
from minitrain.record.arrays import BlockWriter, read_chunk, shards, write_chunk, write_metadata
from minitrain.record.layout import ArraySpec, metadata
from minitrain.run_folder import RunFolder, start_of


@dataclass(frozen=True, eq=False)
class Series:
    """One metric over the steps at which it was measured."""

    name: str
    unit: str
    steps: NDArray[np.int64]
    """(S,)"""
    values: NDArray[np.float32]
    """(S, ...), NaN where there was nothing to measure or the number is not finite."""
    labels: tuple[tuple[str, ...], ...]
    """What the places of each further axis stand for."""
    formula: str


class MetricsWriter:
    """Begins the metrics of a run, or goes on with those that are there up to ``step``."""

    def __init__(self, folder: RunFolder, layout: MetricsLayout, step: int) -> None:
        """Raises RunError where those that stand there cannot be read, and OSError."""
        self._layout = layout
        if step == layout.start:
            shutil.rmtree(folder.metrics, ignore_errors=True)
        attributes, arrays = layout.attributes, layout.arrays
        lengths = {cadence: len(steps) for cadence, steps in layout.steps.items()}
        try:
            known = {} if step == layout.start else _rows_before(folder, layout, step)
        except RunError as error:
            raise RunError(f"{error}\nor delete {folder.metrics}: the run goes on without what was measured") from error
        write_metadata(folder.metrics, metadata(attributes, arrays.values(), lengths))
        for cadence in CADENCES:
            if cadence in arrays:
                write_chunk(folder.metrics, arrays[cadence], 0, np.array(layout.steps[cadence]))
        self._writers = {}
        self.last: dict[str, Any] = {}
        """The newest row of each array, of those that are there already."""
        for cadence in CADENCES:
            rows = known.get(cadence, [])
            self.last |= rows[-1] if rows else {}
            specs = layout.of(cadence)
            full = len(rows) // specs[0].block if specs else 0
            self._writers[cadence] = BlockWriter(folder.metrics, specs, full)
            for row in rows[full * specs[0].block :] if specs else ():
                self._writers[cadence].append(row)

    def append(self, cadence: str, row: Mapping[str, Any]) -> None:
        """The next row of this cadence, with a value for each of its arrays. Raises OSError."""
        row = {name: np.asarray(value, self._layout.arrays[name].dtype) for name, value in row.items()}
        self._writers[cadence].append(row)
        self.last |= row  # as it will be read back: a resumed run is to say the same of it

    def flush(self) -> None:
        """Write what there is. Raises OSError."""
        for writer in self._writers.values():
            writer.flush()


def _rows_before(folder: RunFolder, layout: MetricsLayout, step: int) -> dict[str, list[dict[str, Any]]]:
    """By cadence, what was measured at the steps before ``step``."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cadence, steps in layout.steps.items():
        count = sum(1 for s in steps if s < step)
        arrays = {spec.name: _values(folder, spec, count) for spec in layout.of(cadence)}
        found[cadence] = [{name: values[i] for name, values in arrays.items()} for i in range(count)]
    return found


def _values(folder: RunFolder, spec: ArraySpec, rows: int) -> NDArray[Any]:
    """(rows, ...) of an array in blocks, NaN where no block stands."""
    values = np.full((rows, *spec.shape), np.nan, spec.dtype)
    if not (folder.metrics / spec.name).is_dir():
        return values
    for block, _ in shards(folder.metrics, spec):
        first = block * spec.block
        if first < rows:
            values[first : first + spec.block] = read_chunk(folder.metrics, spec, block, spec.block)[: rows - first]
    return values


def read_metrics(folder: RunFolder) -> dict[str, Series]:
    """The metrics of this run by name, up to the last step that has any; none where it was not measured.

    Raises RunError where the files are damaged or of another version.
    """
    about = folder.metrics / "zarr.json"
    if not about.exists():
        return {}
    try:
        attributes = json.loads(about.read_text(encoding="utf-8"))["attributes"]
        found = attributes["format"], attributes["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{about}: expected a Zarr group of metrics, got {type(error).__name__}: {error}") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise RunError(
            f"{about}: expected {FORMAT} version {FORMAT_VERSION}, got {found[0]!r} version {found[1]!r}; "
            "use the minitrain version that the manifest names"
        )
    config = folder.stored_config()
    layout = MetricsLayout(config, start_of(folder.read_manifest()), config.scheduler.total_steps)
    series = {}
    for m in METRICS:
        if m.name not in layout.arrays:
            continue
        steps = np.array(layout.steps[m.cadence], np.int64)
        values = _values(folder, layout.arrays[m.name], len(steps))
        written = np.flatnonzero(np.isfinite(values.reshape(len(steps), -1)).any(axis=1))
        end = int(written[-1]) + 1 if len(written) else 0
        series[m.name] = Series(
            m.name, m.unit, steps[:end], values[:end], tuple(layout.labels[axis] for axis in m.axes), m.formula
        )
    return series
