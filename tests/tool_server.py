"""A warm process that runs tools: it imports once and forks for every command, so that each is a process of its own.

Reads one JSON request per line (`Request`) and answers with the exit status.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import ldm_sg.config
import ldm_sg.evaluate  # joins all the rest

with contextlib.suppress(ImportError):
    import torch._dynamo  # what the first optimizer loads
    import torch.utils.tensorboard  # noqa: F401

TIMEOUT_S = 120
ROOM_BYTES = 4096  # what a file may still hold on the full disk


class Request(TypedDict):
    """One command."""

    argv: list[str]
    cwd: str
    out: str  # file for the standard output
    err: str
    configs: str | None  # folder to take the place of configs/
    die_at: tuple[str, int] | None  # ("module:function", n): SIGKILL at its n-th call
    full_at: tuple[str, int] | None  # from its n-th call on, no file can grow


def at_call(name: str, n: int, act: Callable[[], None]) -> None:
    """Replace the function `module:attribute.path`, so that its n-th call begins with `act`."""
    module, path = name.split(":")
    *parents, last = path.split(".")
    owner = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    function, calls = getattr(owner, last), iter(range(1, 1_000_000))

    def wrapped(*args: object, **kwargs: object) -> object:
        if next(calls) == n:
            act()
        return function(*args, **kwargs)

    setattr(owner, last, wrapped)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM_BYTES, resource.RLIM_INFINITY))


def run(request: Request) -> int:
    """Run one tool in this (forked) process; returns its exit status."""
    signal.alarm(TIMEOUT_S)
    os.chdir(request["cwd"])
    for number, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for place, act in ((request["die_at"], die), (request["full_at"], fill_disk)):
        if place:
            at_call(*place, act)
    if request["configs"]:
        ldm_sg.config.CONFIG_ROOT = Path(request["configs"])
    sys.argv = request["argv"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = run(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
