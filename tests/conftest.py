"""What tests of several modules ask for; and for every test, a place of its own for what is measured."""

from __future__ import annotations

import os
import socket
import sys

import pytest
import torch
from small_data import idx_data

from lcc.cli import main

# Processes that test beside each other, and those that they start, share the cores.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


@pytest.fixture(autouse=True)
def measurements_are_kept_nowhere_else(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("LCC_CACHE", str(tmp_path_factory.mktemp("measurements")))


@pytest.fixture
def one_thread():
    """Compute with one thread: sums in another order differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def same_threads():
    """Set back the number of threads that what is tested sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path):
    """A data set of 48 images to train on and 12 to test on."""
    return idx_data(tmp_path / "data")


@pytest.fixture
def no_network(monkeypatch):
    """Fail where the network is touched."""

    def refuse(*args, **kwargs):
        raise AssertionError("touched the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def lcc_run(monkeypatch, capsys):
    """Run `lcc` in this process; give its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lcc", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run
