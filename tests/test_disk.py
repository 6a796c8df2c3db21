"""Files are plain when read, whole when written, and nobody's name is taken twice."""

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sdlearn.disk import check_plain, check_writable, locked, read_json, read_text, reserve, write_files


def test_an_interrupted_writer_leaves_the_old_files(tmp_path):
    old = [tmp_path / "a", tmp_path / "b"]
    for path in old:
        path.write_text("old")

    def interrupted(part):
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_files({old[0]: lambda part: part.write_text("new"), old[1]: interrupted})
    assert [path.read_text() for path in old] == ["old", "old"] and sorted(tmp_path.iterdir()) == old


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_full_disk_is_one_sentence(tmp_path, error):
    def full(part):
        raise error

    with pytest.raises(ValueError, match="No space left on device.*make room"):
        write_files({tmp_path / "x": full})
    assert not list(tmp_path.iterdir())


def test_a_planted_link_is_not_followed_and_leftovers_are_swept(tmp_path):
    victim, stale = tmp_path / "victim", tmp_path / ".x.0123456789ab.part"
    victim.write_text("precious")
    for name in (f".x.{os.getpid()}.part", "x.part"):
        (tmp_path / name).symlink_to(victim)
    stale.write_text("")
    os.utime(stale, (time.time() - 10**6,) * 2)
    write_files({tmp_path / "x": lambda part: part.write_text("new")})
    assert (tmp_path / "x").read_text() == "new" and victim.read_text() == "precious" and not stale.exists()


def test_writers_at_the_same_time_get_different_names(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        names = [p for paths in pool.map(lambda _: reserve(tmp_path, "x", ".png", 5), range(40)) for p in paths]
    assert len(set(names)) == 200 and len(list(tmp_path.iterdir())) == 200


@pytest.mark.posix
def test_only_plain_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "pipe or a device"), ("/dev/zero", "device"), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=words):
            check_plain(path)
    (tmp_path / "long").write_text("x" * 11)
    with pytest.raises(ValueError, match="11 bytes, but at most 10"):
        read_text(tmp_path / "long", 10)


def test_json_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
    for text, words in (("[1]", "holds a list"), ("{", "cannot be read as JSON"), ("[" * 10**5, "JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_json(path)


def test_one_works_and_the_other_is_told(tmp_path):
    path = tmp_path / "new" / "lock"
    with locked(path), pytest.raises(ValueError, match="another program is at work in .*new"), locked(path):
        pytest.fail("both have it")
    with locked(path):  # free again
        pass


def test_whether_a_file_can_be_written_is_known_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "figures.json")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "file" / "x", "cannot be written")):
        with pytest.raises(ValueError, match=words):
            check_writable(path)
