"""Files that appear whole or not at all, and the lock between processes that make them."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openclip_otco.files import locked, remove_partial, write_text, written_whole

PROCESSES, ROUNDS = 3, 40


def count_up(path: Path) -> None:
    for _ in range(ROUNDS):
        with locked(path):
            write_text(path, str(int(path.read_text()) + 1))


def write_and_die(path: Path) -> None:
    with written_whole(path) as partial:
        partial.write_text("half of the new")
        os.kill(os.getpid(), signal.SIGKILL)


def test_no_process_enters_what_another_one_holds(tmp_path):
    """Reading and adding one are two steps: without the lock, numbers would be lost."""
    path = tmp_path / "number"
    path.write_text("0")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=count_up, args=(path,)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    assert int(path.read_text()) == PROCESSES * ROUNDS


def test_the_folder_of_a_lock_is_made(tmp_path):
    with locked(tmp_path / "not" / "there" / "yet"):
        assert (tmp_path / "not" / "there").is_dir()


@given(
    before=st.none() | st.binary(),
    parts=st.lists(st.binary(), min_size=1),
    fails=st.booleans(),
    synced=st.booleans(),
)
def test_a_file_is_the_old_one_or_the_new_one(tmp_path_factory, before, parts, fails, synced):
    path = tmp_path_factory.mktemp("whole") / "folder" / "file"
    if before is not None:
        path.parent.mkdir()
        path.write_bytes(before)

    def write() -> None:
        with written_whole(path, synced) as partial, partial.open("wb") as file:
            for part in parts:
                file.write(part)
                assert (path.read_bytes() if path.exists() else None) == before
            if fails:
                raise RuntimeError("in the middle")

    if fails:
        with pytest.raises(RuntimeError):
            write()
        assert (path.read_bytes() if path.exists() else None) == before
    else:
        write()
        assert path.read_bytes() == b"".join(parts)
    assert [entry.name for entry in path.parent.iterdir()] == ([] if fails and before is None else ["file"])


def test_what_a_kill_leaves_is_taken_away(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    process = multiprocessing.get_context("spawn").Process(target=write_and_die, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_text_does_not_follow_a_link_that_lay_there(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("untouched")
    (tmp_path / "page.part").symlink_to(elsewhere)
    write_text(tmp_path / "page", "new")
    assert elsewhere.read_text() == "untouched"
    assert (tmp_path / "page").read_text() == "new"
