"""A warm process that runs tools: it imports once and forks for every command, so that each is a process of its own.

Reads one JSON list of requests per line, runs them side by side, and answers with the list of their exit statuses.
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
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import ldm_sg.config
import ldm_sg.evaluate  # joins all the rest
from ldm_sg.annotate import features

with contextlib.suppress(ImportError):
    import torch._dynamo  # what the first optimizer loads
    import torch.utils.tensorboard  # noqa: F401
    from diffusers import AutoencoderKL  # noqa: F401

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
    stop_at: tuple[str, int] | None  # SIGSTOP there; the next command starts then, and SIGCONT follows its end
    few_filters: bool | None  # features whose fit costs next to nothing
    environment: dict[str, str] | None  # variables beside those there are
    kill_after_s: float | None  # SIGKILL so long after the last command has started


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


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fill_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM_BYTES, resource.RLIM_INFINITY))


def run(request: Request) -> int:
    """Run one tool in this (forked) process; returns its exit status."""
    signal.alarm(TIMEOUT_S)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"] or {})
    for number, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for place, act in (("die_at", die), ("full_at", fill_disk), ("stop_at", freeze)):
        if request[place]:
            at_call(*request[place], act)
    if request["configs"]:
        ldm_sg.config.CONFIG_ROOT = Path(request["configs"])
    if request["few_filters"]:
        features.SCALES = (features.Scale(0, 8, 4),)
    sys.argv = request["argv"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def start(request: Request) -> int:
    """Fork a process that runs a tool; returns its number, once it has stopped if it is to stop."""
    child = os.fork()
    if child == 0:
        status = run(request)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if request["stop_at"]:
        status = os.waitpid(child, os.WUNTRACED)[1]
        assert os.WIFSTOPPED(status), f"ended with {status} before {request['stop_at']}"
    return child


def run_together(requests: list[Request]) -> list[int]:
    """Run tools side by side; returns their exit statuses."""
    children = [start(request) for request in requests]
    running = {c for c, request in zip(children, requests) if not request["stop_at"]}
    stopped = set(children) - running
    killings = [
        threading.Timer(request["kill_after_s"], os.kill, (child, signal.SIGKILL))
        for child, request in zip(children, requests)
        if request["kill_after_s"] is not None
    ]
    for killing in killings:
        killing.start()
    statuses = {}
    while running or stopped:
        if not running:
            for child in stopped:
                os.kill(child, signal.SIGCONT)
            running, stopped = stopped, set()
        child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
        running.discard(child)
        stopped.discard(child)
    for killing in killings:
        killing.cancel()
        killing.join()
    return [statuses[child] for child in children]


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(run_together(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
