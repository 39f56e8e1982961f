"""What is measured of a run while it trains: written beside the record, read back by name.

`Meter` is the listener that measures, `read_metrics` gives what a run has, `formulas` are the numbers themselves.
"""

from minitrain.metrics.store import Series, read_metrics

__all__ = ["Series", "read_metrics"]
