"""``python -m densitykit``: the command line, see :mod:`densitykit.cli`."""

import sys

from densitykit.cli import main

if __name__ == "__main__":
    sys.exit(main())
