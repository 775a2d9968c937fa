"""`python -m mbx`."""

import sys

from mbx.cli import main

if __name__ == "__main__":
    sys.exit(main())
