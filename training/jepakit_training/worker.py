"""One training process of several, started by `launch`: `python -m jepakit_training.worker RUN`, job on standard input.

Standard input stays open for as long as its parent lives.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading

from jepakit._machine import in_command
from jepakit.errors import JepakitError
from jepakit_training import ranks
from jepakit_training.endings import reporting_ending
from jepakit_training.launch import run_rank


def main() -> int:
    """Train as the environment's RANK; returns the exit code, and leaves the reason where `launch` looks for it."""
    in_command.set(True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # outside the training loop there is nothing to save
    config, images, out, folder = pickle.load(sys.stdin.buffer)  # from our own parent
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with reporting_ending(folder, ranks.rank()):
            run_rank(config, images, out)
            _leave_group()
    except JepakitError as error:
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        return 1
    return 0


def _end_with_parent() -> None:
    """Send SIGTERM, on which the training loop saves a checkpoint, as soon as the other end of the pipe is closed."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _leave_group() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
