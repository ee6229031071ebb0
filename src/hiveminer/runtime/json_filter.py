"""Makes every line of a program's output a JSON object, whoever wrote it (a C library, a child
process, a traceback).

Runs as a script of its own, so that it outlives a crash; its argument is the neuron's name.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import time


def main(neuron: str) -> None:
    """Filter stdin to stdout until all who write there have ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while raw := sys.stdin.buffer.readline(64 * 1024):
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
