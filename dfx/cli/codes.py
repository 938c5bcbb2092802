"""Exit codes of the commands."""

DONE = 0
FAILURES = 1
"""Done, but for what failed: running again tries only that."""
BAD_CALL = 2
"""Can't be done as it was asked: running again does not help."""
TRY_AGAIN = 3
"""Cut off: the cluster is lost or has no workers, or SIGTERM came. Running again resumes."""
INTERRUPTED = 130
"""Ctrl-C."""
