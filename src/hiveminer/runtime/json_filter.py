"""A filter between a program's output and its log: what is not JSON yet becomes JSON.

Run as a script of its own (it must outlive a crash of the program, and imports nothing of it),
with the neuron's name as its argument. A line that is a JSON object passes unchanged; any other,
whoever writes it (a C library, a child process, a traceback), becomes the message of one.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import time

MAX_LINE_BYTES = 64 * 1024


def main(neuron: str) -> None:
    """Filter stdin to stdout until all who write there have ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while raw := sys.stdin.buffer.readline(MAX_LINE_BYTES):
        for part in re.split(r"[\r\n]", raw.decode(errors="replace")):
            if part.strip():
                sys.stdout.write(as_json(part, neuron) + "\n")
        sys.stdout.flush()


def as_json(line: str, neuron: str) -> str:
    """The line itself if it is a JSON object, or one with the line as its message."""
    try:
        if isinstance(json.loads(line), dict):
            return line
    except (ValueError, RecursionError):
        pass
    fields = {"time": round(time.time(), 3), "level": "warning", "neuron": neuron}
    return json.dumps(fields | {"logger": "output", "message": line})


if __name__ == "__main__":
    main(sys.argv[1])
