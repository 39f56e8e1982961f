"""``minitrain train`` as a script: ``scripts/train_mini.py --config FILE --out-dir FOLDER --seed N``."""

import sys

from minitrain.cli import main

main(["train", *sys.argv[1:]])
