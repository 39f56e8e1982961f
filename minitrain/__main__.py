"""``python -m minitrain`` is the command line."""

from minitrain.cli import main

if __name__ == "__main__":
    main()
