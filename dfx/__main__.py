"""`python -m dfx` is `dfx`."""

from dfx.cli import entry

entry()
