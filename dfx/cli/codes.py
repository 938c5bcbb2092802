"""Exit codes of the commands."""

DONE, FAILURES, BAD_CALL, INTERRUPTED = 0, 1, 2, 130
