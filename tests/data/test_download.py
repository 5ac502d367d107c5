"""Downloads against a server on the loopback: broken off, resumed, changed meanwhile, refused."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import socket
from pathlib import Path
from typing import Any

import pytest

from ldm_sg.data import download as module
from ldm_sg.data.download import ATTEMPTS, check_file, download, free_bytes, remote_size

DATA = os.urandom(300_000)
SHA256 = f"sha256:{hashlib.sha256(DATA).hexdigest()}"


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.0)


@pytest.fixture
def url(server: Any) -> str:
    server.files["/set.zip"] = DATA
    return f"{server.url}/set.zip"


def left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_size_is_known_before(url, tmp_path):
    assert remote_size(url, tmp_path / "x") == len(DATA)


def test_whole_file(url, server, tmp_path):
    counts: list[int] = []
    download(url, tmp_path / "deep" / "set.zip", SHA256, counts.append)
    assert (tmp_path / "deep" / "set.zip").read_bytes() == DATA and sum(counts) == len(DATA)
    assert left(tmp_path / "deep") == ["set.zip"] and server.asked == [None]


def test_a_broken_connection_is_taken_up_where_it_broke(url, server, tmp_path):
    server.cuts = [100_000, 0, 50_000]
    counts: list[int] = []
    download(url, tmp_path / "set.zip", SHA256, counts.append)
    assert (tmp_path / "set.zip").read_bytes() == DATA and sum(counts) == len(DATA)
    assert server.asked == [None, "bytes=100000-", "bytes=100000-", "bytes=150000-"]


def test_a_killed_download_goes_on(url, server, tmp_path):
    class Killed(BaseException):
        pass

    def stop(count: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        download(url, tmp_path / "set.zip", SHA256, stop)
    (tmp_path / "set.zip.part").write_bytes(DATA[:12_345])
    assert left(tmp_path) == ["set.zip.part", "set.zip.part.etag"]
    download(url, tmp_path / "set.zip", SHA256)
    assert server.asked == [None, "bytes=12345-"] and left(tmp_path) == ["set.zip"]
    assert (tmp_path / "set.zip").read_bytes() == DATA


def test_a_file_that_changed_meanwhile_is_fetched_anew(url, server, tmp_path):
    (tmp_path / "set.zip.part").write_bytes(b"old" * 1000)
    (tmp_path / "set.zip.part.etag").write_text('"0"')
    counts: list[int] = []
    download(url, tmp_path / "set.zip", SHA256, counts.append)
    assert (tmp_path / "set.zip").read_bytes() == DATA and sum(counts) == len(DATA) - 3000


def test_a_server_without_ranges_sends_all_again(url, server, tmp_path):
    server.ranges, server.cuts = False, [100_000]
    download(url, tmp_path / "set.zip", SHA256)
    assert (tmp_path / "set.zip").read_bytes() == DATA


def test_all_bytes_were_there_but_the_name(url, server, tmp_path):
    (tmp_path / "set.zip.part").write_bytes(DATA)
    download(url, tmp_path / "set.zip", SHA256)
    assert left(tmp_path) == ["set.zip"] and server.asked == [f"bytes={len(DATA)}-"]


def test_more_bytes_than_the_file_has(url, tmp_path):
    (tmp_path / "set.zip.part").write_bytes(DATA + b"more")
    download(url, tmp_path / "set.zip", SHA256)
    assert (tmp_path / "set.zip").read_bytes() == DATA


def test_a_busy_server_is_asked_again(url, server, tmp_path):
    server.failures = [503, 500]
    download(url, tmp_path / "set.zip", SHA256)
    assert (tmp_path / "set.zip").read_bytes() == DATA


def test_gives_up_after_attempts_without_a_byte_and_keeps_what_is_there(url, server, tmp_path):
    server.cuts = [1000] + [0] * 2 + [1000] + [0] * ATTEMPTS
    with pytest.raises(OSError, match=r"set.zip: the connection closed early; 2000 bytes are kept") as caught:
        download(url, tmp_path / "set.zip", SHA256)
    assert str(tmp_path / "set.zip") in str(caught.value) and "another machine" in str(caught.value)
    assert (tmp_path / "set.zip.part").read_bytes() == DATA[:2000]


def test_a_wrong_checksum_removes_the_file(url, server, tmp_path):
    server.files["/set.zip"] = DATA[::-1]
    with pytest.raises(ValueError, match=r"set.zip.* has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}; removed"):
        download(url, tmp_path / "set.zip", SHA256)
    assert left(tmp_path) == []


def test_no_such_file_and_no_network(server, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused at once
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}/set.zip"
        for url, words in [(f"{server.url}/none.zip", "Not Found"), (closed, "refused")]:
            for attempt in (lambda u: remote_size(u, tmp_path / "x"), lambda u: download(u, tmp_path / "x")):
                with pytest.raises(OSError, match=words) as caught:
                    attempt(url)
                assert "\n" not in str(caught.value) and f"put the file from another machine at {tmp_path}" in str(
                    caught.value
                )
    assert server.asked == [None]


def test_a_full_disk_is_not_the_networks_fault(url, server, tmp_path):
    child = os.fork()
    if not child:  # the limit holds for every file of a process
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            download(url, tmp_path / "set.zip")
        except OSError as error:
            os._exit(error.errno or 0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EFBIG
    assert len(server.asked) == 1


def test_checks_of_both_kinds(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    check_file(tmp_path / "x", None)
    check_file(tmp_path / "x", "md5:900150983cd24fb0d6963f7d28e17f72")
    with pytest.raises(ValueError, match="x has md5 900150983cd24fb0d6963f7d28e17f72, expected 0"):
        check_file(tmp_path / "x", "md5:0")


def test_free_space_of_a_folder_to_come(tmp_path):
    assert free_bytes(tmp_path / "a" / "b") > 0 and free_bytes(Path("nowhere/yet")) > 0
