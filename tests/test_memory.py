"""How much memory is judged to be left."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lcc import memory

CPU = torch.device("cpu")


@pytest.fixture
def container(tmp_path, monkeypatch):
    """A machine with 1000 bytes free, and where Linux states the limit of a container on it."""
    machine = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(memory, "psutil", machine)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    return tmp_path


def limited(folder, limit, *, used, cached):
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\nslab 2\n")


def test_without_a_container_all_that_is_available_counts(container):
    assert memory.free_memory(CPU) == 1000


@pytest.mark.parametrize(("limit", "left"), [(500, 250), (5000, 1000), (100, 0), ("max", 1000)])
def test_a_containers_limit_counts_where_it_leaves_less(container, limit, left):
    limited(container, limit, used=300, cached=50)
    assert memory.free_memory(CPU) == left


def test_torchs_ways_to_say_that_there_is_none_left_are_known():
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert memory.is_out_of_memory(error.value)
    assert not memory.is_out_of_memory(RuntimeError("sizes differ"))
