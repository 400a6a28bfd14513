"""An lcc directory is replaced whole or not at all, and nothing of the user's is ever removed."""

import errno
import os
import sys
from pathlib import Path

import pytest
from torch import nn

import lcc
from lcc import artifact
from lcc.directory import FILES
from lcc.errors import ArtifactError
from lcc.models import Loaded, Preprocessing, Source

STEPS = ("mkdir", "rename", "unlink", "rmdir", "fsync")  # of the operating system, in the course of a save
TINY = Source(id="py:tiny:net", weights="none")


def tiny(value):
    """A network of one number."""
    net = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(net.weight, value)
    preprocessing = Preprocessing(mean=(0.0,), std=(1.0,), image_size=(2, 2))
    return Loaded(model=net.eval(), source=TINY, preprocessing=preprocessing)


def value_in(directory):
    """The number that a directory holds, after all its checks."""
    return float(artifact.load(directory, model=tiny(0).model).loaded.model.weight.detach())


def listing(root):
    """Every path below with its content."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))}


def refusal(directory, **options):
    """The one line with which a directory can't be written, said by the check and by save alike."""
    root = Path(directory).parent
    before = listing(root) if root.is_dir() and root != Path("/proc") else None
    lines = []
    for refuse in (
        lambda: artifact.check_target(directory, **options),
        lambda: artifact.save(tiny(9), directory, **options),
    ):
        with pytest.raises(ArtifactError) as caught:
            refuse()
        lines.append(str(caught.value))
    assert lines[0] == lines[1]
    assert len(lines[0].splitlines()) == 1
    if before is not None:
        assert listing(root) == before
    return lines[0]


@pytest.fixture
def net(tmp_path):
    """A directory that holds 1."""
    artifact.save(tiny(1), tmp_path / "net", recipe="lcc = 1")
    return tmp_path / "net"


# Where a directory can go


def test_checking_a_target_leaves_no_trace(tmp_path):
    artifact.check_target(tmp_path / "net")
    assert listing(tmp_path) == {}


def test_saving_leaves_the_directory_and_nothing_beside_it(net):
    assert sorted(path.name for path in net.iterdir()) == sorted(FILES)
    assert [path.name for path in net.parent.iterdir()] == ["net"]


def test_missing_parents_are_made(tmp_path):
    artifact.save(tiny(1), tmp_path / "runs" / "today" / "net")
    assert value_in(tmp_path / "runs" / "today" / "net") == 1


def test_an_empty_directory_can_be_filled(tmp_path):
    (tmp_path / "net").mkdir()
    artifact.save(tiny(1), tmp_path / "net")
    assert value_in(tmp_path / "net") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_an_existing_directory_needs_force(net):
    assert "net exists; choose another path, or replace it with --force" in refusal(net)


def test_force_replaces_a_directory_of_ours(net):
    artifact.save(tiny(2), net, force=True)
    assert value_in(net) == 2
    assert [path.name for path in net.parent.iterdir()] == ["net"]


def test_a_directory_of_an_unknown_format_is_still_ours(net):
    (net / "manifest.json").write_text('{"format": "lcc/7"}')
    artifact.save(tiny(2), net, force=True)
    assert value_in(net) == 2


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["photo.jpg", "manifest.json"])
def test_what_is_not_ours_is_never_overwritten(tmp_path, name, force):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"manifest_version": 3, "format": "crx"}')
    assert "out exists and is not an lcc directory" in refusal(tmp_path / "out", force=force)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_overwritten(tmp_path, force):
    (tmp_path / "out").write_text("thesis")
    assert "out exists and is not an lcc directory" in refusal(tmp_path / "out", force=force)


def test_force_does_not_remove_what_the_user_put_there(net):
    (net / "notes.txt").write_text("mine")
    assert "net holds notes.txt, which lcc didn't write and would be lost" in refusal(net, force=True)


def test_a_directory_inside_a_file_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "file/net can't be written: Not a directory" in refusal(tmp_path / "file" / "net")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that nobody can write to")
def test_a_read_only_place_can_not_be_written():
    assert "can't be written" in refusal(Path("/proc/lcc-net"))


def test_a_name_that_is_too_long_can_not_be_written(tmp_path):
    assert "can't be written: File name too long" in refusal(tmp_path / ("n" * 300))


def test_a_mount_point_can_not_be_replaced(net, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    assert "net is a mount point; choose a directory inside it" in refusal(net, force=True)


def test_the_current_directory_can_not_be_replaced(net, monkeypatch):
    monkeypatch.chdir(net)
    with pytest.raises(ArtifactError, match="can't be replaced from inside"):
        artifact.check_target(".", force=True)


def test_a_link_stays_a_link(net):
    link = net.parent / "current"
    link.symlink_to(net, target_is_directory=True)
    artifact.save(tiny(2), link, force=True)
    assert link.is_symlink()
    assert value_in(net) == value_in(link) == 2


# Neighbours


@pytest.mark.parametrize("neighbour", ["net.new", "net.old"])
def test_a_complete_neighbour_may_be_the_users_and_is_not_removed(net, neighbour):
    artifact.save(tiny(5), net.parent / neighbour)
    assert f"{neighbour} is in the way of saving" in refusal(net, force=True)


def test_a_neighbour_with_other_files_is_not_removed(tmp_path):
    (tmp_path / "net.new").mkdir()
    (tmp_path / "net.new" / "thesis.tex").write_text("mine")
    assert "net.new is in the way of saving" in refusal(tmp_path / "net")


def test_a_former_directory_kept_by_the_user_is_left_alone(tmp_path):
    artifact.save(tiny(5), tmp_path / "net.old")
    artifact.save(tiny(1), tmp_path / "net")
    assert (value_in(tmp_path / "net"), value_in(tmp_path / "net.old")) == (1, 5)


def test_an_unfinished_neighbour_is_written_anew(tmp_path):
    (tmp_path / "net.new").mkdir()
    (tmp_path / "net.new" / "model.safetensors").write_bytes(b"half")
    artifact.save(tiny(1), tmp_path / "net")
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


# What goes wrong on the way


class Killed(BaseException):
    """The process is gone: nothing runs after this."""


def interrupt(monkeypatch, at, error, *, for_good):
    """Make the system's step number `at` raise, `for_good` and every later one; return the running count."""
    count = [0]

    def wrap(step):
        real = getattr(os, step)

        def counted(*args, **kwargs):
            count[0] += 1
            if count[0] == at or (for_good and count[0] > at):
                raise error
            return real(*args, **kwargs)

        return counted

    for step in STEPS:
        monkeypatch.setattr(os, step, wrap(step))
    return count


def write_back(directory):
    network = artifact.load(directory, model=tiny(0).model).loaded.model
    nn.init.constant_(network.weight, 2)
    return lambda: lcc.save(network, directory)


WRITERS = {
    "first": lambda directory: lambda: artifact.save(tiny(2), directory),
    "force": lambda directory: lambda: artifact.save(tiny(2), directory, force=True),
    "back": write_back,
}


def interrupted_everywhere(monkeypatch, tmp_path, writer, error, *, for_good):
    """Yield (directory, what was there, what was raised) for a save stopped at step 1, 2, ... to the last."""
    for at in range(1, 1000):
        root = tmp_path / str(at)
        root.mkdir()
        if writer != "first":
            artifact.save(tiny(1), root / "net")
        before = listing(root)
        write = WRITERS[writer](root / "net")
        with monkeypatch.context() as patch:
            count = interrupt(patch, at, error, for_good=for_good)
            raised = outcome(write)
        if count[0] < at:
            return
        if raised is not None:  # making a parent that is there already may fail
            yield root / "net", before, raised


def outcome(write):
    """Return what a save raised; None if nothing."""
    try:
        write()
    except (ArtifactError, Killed) as raised:
        return raised
    return None


@pytest.mark.parametrize("writer", WRITERS)
def test_a_kill_at_any_step_leaves_the_old_or_the_new_one_whole(monkeypatch, tmp_path, writer):
    seen = set()
    for net, before, _ in interrupted_everywhere(monkeypatch, tmp_path, writer, Killed(), for_good=True):
        if net.exists():
            seen.add(value_in(net))
        elif before:
            with pytest.raises(ArtifactError, match=r"rename net.new or net.old \(the former one\) to net"):
                artifact.load(net)
            assert (value_in(net.with_name("net.new")), value_in(net.with_name("net.old"))) == (2, 1)
            seen.add("beside")
        else:
            seen.add("nothing")
    assert seen == ({"nothing", 2} if writer == "first" else {1, 2, "beside"})


@pytest.mark.parametrize("writer", WRITERS)
def test_after_a_kill_a_save_works_or_says_what_is_in_the_way(monkeypatch, tmp_path, writer):
    seen = set()
    for net, _, _ in interrupted_everywhere(monkeypatch, tmp_path, writer, Killed(), for_good=True):
        refused = outcome(lambda net=net: artifact.save(tiny(3), net, force=True))
        seen.add(refused is None)
        if refused is None:
            assert value_in(net) == 3
        else:
            assert "is in the way of saving" in str(refused) or "rename net.new or net.old" in str(refused)
    assert True in seen


@pytest.mark.parametrize("writer", WRITERS)
def test_an_error_at_any_step_leaves_everything_as_it_was(monkeypatch, tmp_path, writer):
    full = OSError(errno.ENOSPC, "No space left on device")
    stopped = 0
    for net, before, raised in interrupted_everywhere(monkeypatch, tmp_path, writer, full, for_good=False):
        assert len(str(raised).splitlines()) == 1
        if "net is saved, but not all is well" in str(raised):
            assert value_in(net) == 2
        else:
            assert "net can't be written: No space left on device" in str(raised)
            stopped += 1
            assert listing(net.parent) == before
    assert stopped > 5


def test_an_interrupted_save_removes_what_it_wrote(monkeypatch, tmp_path):
    for net, before, _ in interrupted_everywhere(monkeypatch, tmp_path, "force", Killed(), for_good=False):
        if value_in(net) == 1:
            assert listing(net.parent) == before


def test_parents_made_for_a_save_that_failed_are_removed(monkeypatch, tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact, "serialize", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        artifact.save(tiny(1), tmp_path / "runs" / "net")
    assert listing(tmp_path) == {}


def test_a_network_left_complete_beside_its_place_is_pointed_at(tmp_path):
    artifact.save(tiny(1), tmp_path / "net.new")
    with pytest.raises(
        ArtifactError, match=r"net is missing after an interrupted save; rename net.new to net"
    ):
        artifact.load(tmp_path / "net")


@pytest.mark.gpu
def test_a_model_on_another_device_stays_there(net):
    network = artifact.load(net, model=tiny(0).model).loaded.model.cuda()
    lcc.save(network, net)
    assert network.weight.is_cuda
    assert value_in(net) == 1
