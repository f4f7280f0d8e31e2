"""Commands that are killed at a chosen write, and go on. `TRL_KD_FAULTS=long` (`make faults`) tries many more of them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compat.cases import serving
from tests.faults.fork_server import ForkServer
from tests.faults.killing import Killing
from tests.faults.table import ROOT, Kept


IS_LONG = os.environ.get("TRL_KD_FAULTS") == "long"


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    """`kill_at_write.c`, compiled."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if sys.platform != "linux" or compiler is None:
        if os.environ.get("TRL_KD_REQUIRE_COMPILER") == "1":
            pytest.fail("TRL_KD_REQUIRE_COMPILER=1, but this is not Linux or there is no C compiler (`cc`)")
        pytest.skip("commands are killed at a chosen write on Linux alone, with a C compiler (`cc`)")
    path = tmp_path_factory.mktemp("library") / "kill_at_write.so"
    source = Path(__file__).with_name("kill_at_write.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", str(path), str(source), "-ldl"], check=True)
    return path


@pytest.fixture(scope="session")
def killing(library, tmp_path_factory) -> Iterator[Killing]:
    pytest.importorskip("openai", reason="needs the extra `api`")
    with serving() as server, ForkServer(library) as forks:
        yield Killing(forks, server, tmp_path_factory.mktemp("faults").resolve())


@pytest.fixture(scope="session")
def kept() -> Kept:
    return Kept(ROOT / "build/faults/kills.jsonl" if IS_LONG else None)
