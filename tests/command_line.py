"""What the command line says, taken apart."""

from __future__ import annotations


def one_line(err):
    """Return the one line on stderr that is no note."""
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1, err
    assert lines[0].startswith("lcc: ")
    return lines[0]
