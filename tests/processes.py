"""Two processes that work together, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_two(script: str, *arguments: object) -> list[list[str]]:
    """
    Runs a script twice, with the folder of the tests and the arguments in sys.argv.

    Returns the lines that each process has printed.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    started = []
    for rank in range(2):
        env = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        words = [str(Path(__file__).parent), *map(str, arguments)]
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", script, *words],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=250) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [lines.splitlines() for lines, _ in outputs]
