"""What every tool does alike."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm_sg import cli

ROOT = Path(__file__).resolve().parents[1]
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))


def run(error: BaseException | None, debug: bool = False) -> None:
    def main(_: argparse.Namespace) -> None:
        if error is not None:
            raise error

    cli.run(main, argparse.Namespace(debug=debug))


def test_success_returns() -> None:
    run(None)


@pytest.mark.parametrize("error", [ValueError("got 3,\n  expected 4"), FileNotFoundError("got 3, expected 4")])
def test_user_error_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(error)
    assert capsys.readouterr() == ("", "error: got 3, expected 4\n")


def test_debug_and_our_own_errors_keep_the_traceback() -> None:
    with pytest.raises(ValueError, match="bad"):
        run(ValueError("bad"), debug=True)
    with pytest.raises(AssertionError, match="ours"):
        run(AssertionError("ours"))


def test_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="130"):
        run(KeyboardInterrupt())
    assert "the same command goes on" in capsys.readouterr().err


def test_torchrun_ends_with_the_one_line(tmp_path: Path) -> None:
    code = "import argparse, os\nfrom ldm_sg import cli\ndef main(_):\n    raise ValueError('got 3, expected 4')\n"
    (tmp_path / "tool.py").write_text(code + "cli.run(main, argparse.Namespace(debug=False))\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, str(tmp_path / "tool.py")], env=environment, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and lines.count("error: got 3, expected 4") == 1, "one process speaks"
    assert lines[-2] == "  traceback : error: got 3, expected 4", done.stderr


@pytest.mark.parametrize("lines", [1, 100_000])
def test_reader_that_stops_early(lines: int) -> None:
    code = "from ldm_sg import cli; import argparse\n"
    code += f"cli.run(lambda _: print('x\\n' * {lines}), argparse.Namespace(debug=False))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


def test_bar_of_what_failed_ends_before_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: argparse.Namespace) -> None:
        bar = cli.bars("stage", 5)
        bar(2)
        raise ValueError("bad")

    with pytest.raises(SystemExit, match="2"):
        cli.run(main, argparse.Namespace(debug=False))
    err = capsys.readouterr().err
    assert err.endswith("\nerror: bad\n") and "2/5" in err


def test_bar_closes_itself(capsys: pytest.CaptureFixture[str]) -> None:
    bar = cli.bars("stage", 5)
    bar(2)
    bar(3)
    assert capsys.readouterr().err.endswith("\n")


@pytest.mark.parametrize("name", TOOLS)
def test_help_has_an_example_that_parses(name: str, tool: Any) -> None:
    done = tool(name, "--help")
    assert done.returncode == 0 and done.stderr == ""
    example = done.stdout.split("example:\n  ")[1].splitlines()[0]
    assert re.match(rf"(python|torchrun)( --)? tools/{name}( |$)", example), example
    assert "--debug" in done.stdout
    flags = [word for word in example.split() if word.startswith("--") and len(word) > 2]
    assert all(flag in done.stdout.split("example:")[0] for flag in flags)


@pytest.mark.parametrize("name", TOOLS)
def test_unknown_and_shortened_flags_are_refused(name: str, tool: Any) -> None:
    for flag in ("--no-such-flag", "--debu"):
        done = tool(name, flag)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("usage: ") and "Traceback" not in done.stderr
