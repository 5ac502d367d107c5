"""What every tool does alike: an example in --help, one line for a user's error, --debug for the traceback."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """Make a tool's parser.

    Args:
        description: what the tool does, one sentence.
        example: a command that works, shown below the options.
    Returns:
        A parser that has --debug.
    """
    made = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def run(main: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    """Call a tool's main function; exit with 2 and one line on what a user can mend, 130 on Ctrl-C.

    Where the reader of the output stops reading (`| head -1`), exit with 141 and without words, as Unix tools do.
    Of processes that torchrun started, the first one prints; torchrun's own report ends with the line of the one that
    failed first.

    Args:
        main: does the work.
        arguments: parsed.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        main(arguments)
        return sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its exit
        sys.exit(141)
    except (ValueError, OSError) as error:
        if arguments.debug:
            raise
        line, status = f"error: {' '.join(str(error).split())}", 2
    except KeyboardInterrupt:
        line, status = "stopped; the same command goes on from here", 130
    _tell(line)  # out here the progress bars of what failed are closed
    sys.exit(status)


def _tell(line: str) -> None:
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")  # torchrun reads it
    if not report or os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
    if report:
        about = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):  # a full disk may be what `line` tells
            Path(report).write_text(json.dumps({"message": about}))


def bars(stage: str, total: int) -> Callable[[int], None]:
    """Show a progress bar.

    Args:
        stage: its name.
        total: images to come.
    Returns:
        A function to call with the number of images just done; the bar closes itself at the end.
    """
    bar = tqdm(total=total, desc=stage, unit=" images")

    def update(n: int) -> None:
        bar.update(n)
        if bar.n >= total:
            bar.close()

    return update
