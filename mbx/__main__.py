"""`python -m mbx`."""

import os
import sys

# `-m` puts the current folder before everything else, and with it whatever a stranger's checkpoint has there by the
# name of a library. It stays where mbx itself lies in it.
if sys.path and sys.path[0] in ("", os.getcwd()) and not __file__.startswith(os.path.join(os.getcwd(), "mbx", "")):
    del sys.path[0]

from mbx.cli import main

if __name__ == "__main__":
    sys.exit(main())
