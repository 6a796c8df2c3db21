"""python -m sdlearn is the command sdlearn."""

import os
import sys


def run() -> int:
    """The command, whose first seconds go into imports: Ctrl-C ends these, too."""
    try:
        for stream in (0, 1, 2):  # one that is closed would lend its number to a file
            try:
                os.fstat(stream)
            except OSError:
                os.open(os.devnull, os.O_RDWR)
        from sdlearn.cli import main

        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run())
