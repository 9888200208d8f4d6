"""How a long command is watched: bars in a terminal, dated lines in a log file."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from elastic_sparsity.terminal import plain

LINE_SECONDS = 60.0  # between two lines of a stage in a log file

Report = Callable[[str, int, int], None]


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """Every stage with the time left, and the package's log, on stderr; neither if quiet, but for warnings."""
    import transformers  # slow import, only for commands that work

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logger = logging.getLogger("elastic_sparsity")
    logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    console = Console(emoji=False, stderr=True)
    if console.is_terminal:
        logger.handlers = [RichHandler(console=console, show_path=False, markup=False)]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with RichProgress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, disable=quiet) as bars:
            yield _bars(bars)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(_PlainFormatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.handlers = [handler]
        yield ProgressLines(logging.getLogger(__name__).info)


def _bars(bars: RichProgress) -> Report:
    tasks = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done)

    return report


class _PlainFormatter(logging.Formatter):
    """Names of files and of models can hold what acts in the terminal that shows the log later."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


class ProgressLines:
    """A line when a stage begins, once a minute, and when it ends; a stage that begins anew is timed anew.

    Args:
        write: takes a line.
        clock: seconds.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._stages: dict[str, _Stage] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now, known = self._clock(), self._stages.get(stage)
        if known is None or done < known.done:
            known = self._stages[stage] = _Stage(begun=now, begun_done=done, shown=now, done=done)
        elif done == known.done:
            return
        else:
            known.done = done
            if done < total and now - known.shown < LINE_SECONDS:
                return
            known.shown = now
        line = f"{stage} {done:,}/{total:,}"
        if done > known.begun_done:
            left = (now - known.begun) / (done - known.begun_done) * (total - done)
            line += f"  {_hours(now - known.begun)} left {_hours(left)}"
        self._write(line)


@dataclass(slots=True)
class _Stage:
    begun: float  # when
    begun_done: int  # how much was done then
    shown: float  # when its last line was written
    done: int


def _hours(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
