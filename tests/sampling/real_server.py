"""`transformers serve` in a process of its own, for tests that ask a real server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving(model: str, folder: Path) -> Iterator[str]:
    """Serves the model in a folder on a free port of 127.0.0.1 and yields the base URL. `folder` takes its log."""
    config = Path(model) / "generation_config.json"
    # Without it the server takes the most likely token whatever the temperature
    config.write_text(json.dumps(json.loads(config.read_text()) | {"do_sample": True}))
    (folder / "home" / "hub").mkdir(parents=True)
    port = _free_port()
    command = ["serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", *command],
            env=os.environ | {"HF_HOME": str(folder / "home")},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(url: str, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    for _ in range(int(seconds * 5)):
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"transformers serve did not start:\n{log.read_text()[-3000:]}")
