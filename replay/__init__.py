"""The forensics room: take any recorded step back and run it again.

``Replay(run).at(500)`` is the live step 500 of a run or of a bundle; ``verify(run)`` holds every step against its
record, and ``nan_bisect(path)`` finds the first bad number.
"""

from minitrain.replay.bisect import nan_bisect as nan_bisect
from minitrain.replay.replayer import Replay as Replay
from minitrain.replay.segments import verify as verify

if __name__ != "minitrain.replay":
    raise ImportError("this folder is minitrain.replay; install the package (make) and import minitrain")
