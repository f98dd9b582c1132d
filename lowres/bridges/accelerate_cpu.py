"""Several CPU processes under `accelerate launch --cpu --num_processes N`.

accelerate's launcher (1.15) starts N processes on CPUs only through MPI; without it, it sets the
address of a process group, starts one process and says nothing. Here the N that were asked for are
started by torch's own launcher.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def start_missing_processes(arguments: Sequence[str]) -> None:
    """Replace this process by N that run `lowres` with the same arguments, where N were asked for.

    Returns when there is nothing to mend: not under accelerate's CPU launcher, one process, or the
    processes exist already.
    """
    if not _lonely(os.environ):
        return
    count = _asked_for(_launcher_arguments())
    if count < 2:
        return
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count),
        "--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"],
        "-m", "lowres", *arguments,
    ]  # fmt: skip
    os.execv(sys.executable, command)


def _lonely(environment: os._Environ[str] | dict[str, str]) -> bool:
    """Whether a CPU launcher named a process group but started no ranks in it."""
    return (
        environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
        and "MASTER_ADDR" in environment
        and "WORLD_SIZE" not in environment
        and "PMI_SIZE" not in environment
        and "OMPI_COMM_WORLD_SIZE" not in environment
    )


def _launcher_arguments() -> list[str]:
    """What stands behind `launch` in the command line of the launcher, the parent process."""
    import psutil

    parent = psutil.Process().parent()
    words = parent.cmdline() if parent is not None else []
    for place, word in enumerate(words):
        if word == "launch" or word.endswith(("accelerate-launch", "commands.launch", "launch.py")):
            return words[place + 1 :]
    return []


def _asked_for(arguments: list[str]) -> int:
    """`--num_processes` of the command line or of its config file; 1 when neither says."""
    if not arguments:
        return 1
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    asked = launch_command_parser().parse_args(arguments)
    if asked.num_processes is None and asked.config_file is not None:
        return int(load_config_from_file(asked.config_file).num_processes)
    return int(asked.num_processes or 1)
