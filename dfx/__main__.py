"""`python -m dfx` is `dfx`."""

import sys

from dfx.cli import main

sys.exit(main())
