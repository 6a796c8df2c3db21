"""python -m sdlearn is the command sdlearn."""

import sys


def run() -> int:
    """The command, whose first seconds go into imports: Ctrl-C ends these, too."""
    try:
        from sdlearn.cli import main

        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run())
