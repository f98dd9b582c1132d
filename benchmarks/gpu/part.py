"""One call of a suite's command: as many recipes as its minutes allow, a process for each.

A record that is there is kept, so a command is given again until nothing is left. A recipe whose
process fails is recorded so, with the end of what it said; one whose process is killed is tried
once more before that.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch

from benchmarks.gpu import summary, tiny
from benchmarks.gpu.jobs import POSTPONED, SKIPPED, Job, Suite, write
from benchmarks.gpu.recipes import Case
from lowres.core import paths
from lowres.core.record import RunRecord
from lowres.run import environment

ROOT = Path(__file__).resolve().parent.parent.parent
TRIES = 2
USUAL_SECONDS = {True: 10.0, False: 45.0}
"""Of a recipe, tiny or not, before the first has ended."""
LONGEST_SECONDS = 300
LOG_CHARACTERS = 4000
"""Of the log of a failed recipe, from its end."""
SHOWN = 12


@dataclasses.dataclass
class Process:
    """A recipe under way."""

    case: Case
    process: subprocess.Popen[bytes]
    log: TextIO
    started: float


class Part:
    """One call of the command: as many recipes as its minutes allow.

    Args:
        configs: Holds a folder of each model.
        scratch: For weights, saved models and logs.
        workers: Recipes that are prepared side by side; one at a time uses the device.
    """

    def __init__(
        self, *, tiny: bool, records: Path, configs: Path, scratch: Path, minutes: float,
        workers: int, commit: str | None = None, suite: Suite = "planner",
    ) -> None:  # fmt: skip
        self.suite: Suite = suite
        self.tiny, self.records, self.configs, self.scratch = tiny, records, configs, scratch
        self.workers, self.commit = workers, commit
        self.deadline = time.time() + 60 * minutes
        self.walls: list[float] = []
        self.left: list[str] = []
        self.skipped: dict[str, str] = {}
        self.done = 0
        records.mkdir(parents=True, exist_ok=True)

    def run(self, wanted: Sequence[Case]) -> None:
        """Start recipes while there is time, and see each to its end."""
        waiting = deque(case for case in wanted if not self._settled(case))
        running: list[Process] = []
        try:
            while waiting or running:
                while waiting and len(running) < self.workers and self._has_time():
                    running.append(self._start(waiting.popleft()))
                if not running:
                    break
                time.sleep(0.05)
                for one in list(running):
                    if self._ended(one):
                        running.remove(one)
                        if self._finish(one):
                            waiting.append(one.case)
        finally:
            for one in running:
                self._stop(one)
        self.left += [case.name for case in waiting]

    def say(self) -> int:
        """What was done and what is left, in a line; returns 1 where nothing can be run, else 0."""
        names = ", ".join(self.left[:SHOWN]) + (" ..." if len(self.left) > SHOWN else "")
        print(f"{self.done} run, {len(self.skipped)} skipped, {len(self.left)} left", end="")
        print(f": {names}; give the command again" if self.left else "")
        if self.done or self.left or not self.skipped:
            return 0
        print(f"nothing was run: {next(iter(self.skipped.values()))}", file=sys.stderr)
        return 1

    def _settled(self, case: Case) -> bool:
        """Whether nothing is to be done: it has a record, or lacks a configuration."""
        if (self.records / f"{case.name}.json").exists():
            return True
        if not (self.configs / case.model / "config.json").is_file():
            self.skipped[case.name] = f"there is no {self.configs / case.model}/config.json"
            return True
        if self._tries(case) >= TRIES:
            self._record_failure(case, "its process was killed from outside, again and again", "")
            return True
        return False

    def _has_time(self) -> bool:
        usual = sum(self.walls) / len(self.walls) if self.walls else USUAL_SECONDS[self.tiny]
        return time.time() + usual < self.deadline

    def _start(self, case: Case) -> Process:
        job = Job(case.name, self.tiny, str(self.configs), str(self.scratch), str(self.records),
                  None if self.tiny else self.deadline, self.commit, self.suite)  # fmt: skip
        order = self.scratch / f"{case.name}.job"
        order.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
        self._marker(case).write_text(str(self._tries(case) + 1), encoding="utf-8")
        threads = max(1, (os.cpu_count() or 1) // self.workers - 1)
        surroundings = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
                        "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        if self.tiny:
            surroundings["CUDA_VISIBLE_DEVICES"] = ""
            # Told to stay on the CPU, accelerate would leave DeepSpeed out without a word.
            if not any(lever.whole_process for lever in case.recipe().levers):
                surroundings["ACCELERATE_USE_CPU"] = "true"
        log = (self.scratch / f"{case.name}.log").open("w+", encoding="utf-8", errors="replace")
        command = [sys.executable, "-m", "benchmarks.gpu.measure", str(order)]
        process = subprocess.Popen(command, cwd=ROOT, env=surroundings, stdout=log, stderr=log)
        return Process(case, process, log, time.time())

    def _ended(self, one: Process) -> bool:
        if one.process.poll() is not None:
            return True
        if time.time() - one.started > LONGEST_SECONDS or time.time() > self.deadline:
            one.process.kill()
            one.process.wait()
            return True
        return False

    def _finish(self, one: Process) -> bool:
        """Say how it ended; True when it is to be tried again."""
        name, code = one.case.name, one.process.returncode
        wall = time.time() - one.started
        one.log.seek(0)
        log = one.log.read().strip()
        last = (log.splitlines() or [""])[-1]
        one.log.close()
        place = self.records / f"{name}.json"
        if place.exists():
            self._marker(one.case).unlink(missing_ok=True)
            self.walls.append(wall)
            self.done += 1
            print(f"{name}: {told(place)} ({wall:.0f} s)", flush=True)
            return False
        if code == POSTPONED or time.time() > self.deadline:
            self._marker(one.case).unlink(missing_ok=True)
            self.left.append(name)
            return False
        if code == SKIPPED:
            self._marker(one.case).unlink(missing_ok=True)
            self.skipped[name] = last
            print(f"{name}: skipped: {last}", flush=True)
            return False
        why = f"its process ended with {code} after {wall:.0f} s: {last}"
        print(f"{name}: died: {why}", flush=True)
        if code < 0 and self._tries(one.case) < TRIES:
            return True
        self._record_failure(one.case, why, log[-LOG_CHARACTERS:])
        return False

    def _stop(self, one: Process) -> None:
        one.process.kill()
        one.process.wait()
        one.log.close()
        self._marker(one.case).unlink(missing_ok=True)

    def _marker(self, case: Case) -> Path:
        """Counts starts that came to no end, those of a call that was itself killed included."""
        return self.records / f"{case.name}.tried"

    def _tries(self, case: Case) -> int:
        marker = self._marker(case)
        return int(marker.read_text(encoding="utf-8") or 1) if marker.exists() else 0

    def _record_failure(self, case: Case, why: str, log: str) -> None:
        recipe = case.recipe()
        for place, name in ((self.scratch, "scratch"), (self.configs, "configs"), (ROOT, ".")):
            why, log = why.replace(str(place), name), log.replace(str(place), name)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = RunRecord(
            id=case.name, outcome="failed", started=now, seconds=0.0, recipe=recipe.resolved(),
            digest=recipe.digest, overrides=[], task_version=recipe.task.version,
            environment={"versions": environment.versions(), **environment.commit()}
            | ({"commit_given": self.commit} if self.commit else {}),
            error=why,
        )  # fmt: skip
        suite = {"model": case.model, "side": case.side, "log": log.splitlines()}
        write(self.records, case.name, record, suite)
        self._marker(case).unlink(missing_ok=True)
        self.done += 1


def told(place: Path) -> str:
    """A record in one line."""
    record = json.loads(place.read_text(encoding="utf-8"))
    error, ratio = summary.peak_error(record), summary.step_ratio(record)
    fits = (record["plan"] or {}).get("fits")
    words = [record["outcome"], "" if fits is None else f"planned {'' if fits else 'not '}to fit",
             "" if error is None else f"peak {error:+.2%}",
             "" if ratio is None else f"step x{ratio:.2f}"]  # fmt: skip
    return ", ".join(word for word in words if word)


def parser(about: str) -> argparse.ArgumentParser:
    """The options that every suite has."""
    made = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--minutes", type=float, default=9.0, help="no recipe ends later")
    made.add_argument("--records", type=Path, default=None)
    made.add_argument("--configs", type=Path, default=None, help="a folder of each model")
    made.add_argument("--only", default="", help="recipes whose name holds this")
    made.add_argument("--tiny", action="store_true")
    made.add_argument("--summary", action="store_true")
    made.add_argument("--workers", type=int, default=None, help="recipes prepared side by side")
    made.add_argument("--scratch", type=Path, default=None, help="20 GB for weights; kept")
    made.add_argument("--commit", default=None, help="where the checkout has no history")
    return made


def lacks_device(asked: argparse.Namespace) -> bool:
    """Whether there is nothing to run on, which is said."""
    if asked.tiny or torch.cuda.is_available():
        return False
    print("there is no CUDA device here; --tiny tries the suite on a CPU", file=sys.stderr)
    return True


@contextlib.contextmanager
def prepared(
    asked: argparse.Namespace, usual: Path, suite: Suite = "planner", most: int = 4
) -> Iterator[Part]:
    """A part with its folders.

    Args:
        usual: Where records lie unless told otherwise; those of a try on a CPU are not kept.
        most: Recipes prepared side by side, unless told otherwise.
    """
    cores = os.cpu_count() or 1
    workers = min(2, cores) if asked.tiny else max(1, min(most, cores // 4))
    with contextlib.ExitStack() as stack:
        scratch = asked.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scratch = scratch.resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        configs = asked.configs or paths.data_folder() / "configs"
        if asked.tiny:
            configs = scratch / "configs"
            tiny.write_configs(configs)
        records = asked.records or (scratch / "records" if asked.tiny else usual)
        yield Part(
            tiny=asked.tiny, records=records.resolve(), configs=configs.resolve(), scratch=scratch,
            minutes=asked.minutes, commit=asked.commit, suite=suite,
            workers=asked.workers or workers,
        )  # fmt: skip
