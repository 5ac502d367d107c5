"""Store -> run: the training loop and the run folder."""

from ldm_sg.train.distributed import Processes, start_processes
from ldm_sg.train.loop import Trainer, train
from ldm_sg.train.run import Run, newest_run, open_run, resume_or_create

__all__ = [
    "Processes",
    "Run",
    "Trainer",
    "newest_run",
    "open_run",
    "resume_or_create",
    "start_processes",
    "train",
]
