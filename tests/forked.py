"""Processes that have the libraries, and more (preloaded.py), before they begin: most of a tiny command's time."""

import atexit
import ctypes
import functools
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Optional
from unittest import mock

TESTS = Path(__file__).resolve().parent


@functools.cache
def forks() -> Any:
    """Starts processes as forks of one that has imported the libraries."""
    multiprocessing.set_forkserver_preload(["preloaded"])
    path = os.pathsep.join(map(str, (TESTS / "faults", TESTS, TESTS.parent)))
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def become_command(argv: list, output: Path, errors: Optional[Path] = None) -> None:
    """In a forked process: what it prints goes to files, Ctrl-C interrupts it, SIGHUP ends it (also where the tests run
    under nohup), and its workers start as usual."""
    multiprocessing.set_start_method("fork", force=True)
    for stream, file in ((1, output), (2, errors or output)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.argv = argv


def free_port() -> int:
    """One below those that the system gives to outgoing connections: a rank that waits for it could be given it."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def rank_environments(processes: int) -> list:
    """What a launcher tells each of its processes; nothing to a single one."""
    if processes == 1:
        return [{}]
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port())}  # fmt: skip
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def shrink_shared_memory(size: str) -> None:
    """Give this process, and those that it starts, a /dev/shm of that size, as containers have it; see mount(8). Exits
    with code 99 where that is not permitted."""
    new_mounts = 0x00020000  # CLONE_NEWNS
    allowed = ctypes.CDLL(None, use_errno=True).unshare(new_mounts) == 0
    for arguments in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"]):
        if not allowed or subprocess.run(["mount", *arguments], stderr=subprocess.DEVNULL).returncode:
            sys.exit(99)


def close_readers() -> None:
    """Let stdout and stderr be pipes that nobody reads."""
    for stream in (sys.stdout, sys.stderr):
        reader, writer = os.pipe()
        os.dup2(writer, stream.fileno())
        os.close(reader)
        stream.reconfigure(line_buffering=True)


def run_script(argv: list, folder: Path, variables: dict, surroundings: tuple = ()) -> None:
    """In a forked process: the script argv[0], as `python argv...` in the repository runs it. `surroundings`: function
    that makes them and its arguments."""
    become_command(argv, folder / "out", folder / "err")
    if surroundings:
        surroundings[0](*surroundings[1:])
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(TESTS.parent)
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends a process without
