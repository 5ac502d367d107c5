"""Leases: one holder at a time, and the dead and the silent are replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ldm_sg.store import Leases

HOLD = """
import sys, time
from ldm_sg.store import Leases
with Leases(sys.argv[1]).take("work") as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def write(folder: Path, age_s: float, **changes: object) -> Path:
    """A lease of a process on another machine, silent for `age_s`."""
    owner = {"host": "elsewhere", "pid": 1, "machine": "another", "began": "1", "seconds": 30}
    path = folder / "work.3.lease"
    path.write_text(json.dumps(owner | changes))
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    first, second = Leases(tmp_path), Leases(tmp_path)
    with first.take("work") as a, second.take("work") as b, second.take("other") as c:
        assert (a, b, c) == (True, False, True)
    with second.take("work") as again:
        assert again
    assert not list(tmp_path.iterdir())


def test_released_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Leases(tmp_path).take("work"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_of_many_who_try_one_succeeds(tmp_path: Path) -> None:
    write(tmp_path, age_s=31)
    start, holding, taken = threading.Barrier(16), threading.Event(), []

    def contend() -> None:
        start.wait()
        with Leases(tmp_path).take("work") as mine:
            taken.append(mine)
            if mine:
                holding.wait(10)

    threads = [threading.Thread(target=contend) for _ in range(16)]
    for thread in threads:
        thread.start()
    while len(taken) < 16:
        time.sleep(0.01)
    holding.set()
    for thread in threads:
        thread.join()
    assert taken.count(True) == 1


def test_silent_holder_is_replaced_after_its_own_time(tmp_path: Path) -> None:
    path = write(tmp_path, age_s=20)
    with Leases(tmp_path, seconds=1).take("work") as mine:
        assert not mine and path.exists()
    path = write(tmp_path, age_s=40)
    with Leases(tmp_path, seconds=1000).take("work") as mine:
        assert mine and not path.exists()


def test_heartbeat_keeps_a_lease(tmp_path: Path) -> None:
    with Leases(tmp_path, seconds=0.4).take("work"):
        time.sleep(1.2)
        with Leases(tmp_path).take("work") as mine:
            assert not mine


def test_killed_holder_is_replaced_at_once(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        with Leases(tmp_path).take("work") as mine:
            assert not mine
        holder.send_signal(signal.SIGKILL)
    with Leases(tmp_path).take("work") as mine:
        assert mine


def test_number_of_a_dead_process_given_to_another(tmp_path: Path) -> None:
    with Leases(tmp_path).take("work"):
        text = next(tmp_path.iterdir()).read_text()
    (tmp_path / "work.1.lease").write_text(json.dumps(json.loads(text) | {"began": "0"}))
    with Leases(tmp_path).take("work") as mine:
        assert mine


def test_half_written_lease_counts_until_it_is_old(tmp_path: Path) -> None:
    path = tmp_path / "work.1.lease"
    path.write_text('{"host"')
    with Leases(tmp_path, seconds=30).take("work") as mine:
        assert not mine
    os.utime(path, (time.time() - 31,) * 2)
    with Leases(tmp_path, seconds=30).take("work") as mine:
        assert mine


def test_replaced_holder_leaves_the_new_lease_alone(tmp_path: Path) -> None:
    with Leases(tmp_path).take("work"):
        own = next(tmp_path.iterdir())
        own.unlink()
        own.write_text("another's, of the same name")
    assert own.exists()


def test_sweep_deletes_what_the_dead_left(tmp_path: Path) -> None:
    write(tmp_path, age_s=31)
    with Leases(tmp_path).take("mine"):
        Leases(tmp_path).sweep()
        assert [path.name for path in tmp_path.iterdir()] == ["mine.1.lease"]


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_impossible_time(seconds: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected more than 0: --lease"):
        Leases(tmp_path, seconds)
