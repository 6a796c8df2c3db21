"""`python -m sdlearn` is the command `sdlearn`."""

import sys

from sdlearn.cli import main

if __name__ == "__main__":
    sys.exit(main())
