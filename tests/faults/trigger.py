"""A training with a fault at an exact place, for the tests: the process stops, kills or starves itself there.

    RAE_FAULT='{"place": "os.rename .*/checkpoints/", "count": 2, "action": "kill"}' \
        accelerate launch tests/faults/trigger.py --config ...

`place` is a regular expression for `call NAME`, a call of a function of the training, or `EVENT PATH`, an operation
that Python's audit hooks see: open (with its mode, `open w PATH`), os.mkdir, os.rename, os.remove, shutil.rmtree.
`count` says which of the matching ones (1 is the first), `rank` in which process (0). `action` is

    kill, term, usr1, hup, int  that signal to itself, just before the operation ("term term" sends it twice)
    pause                       longer than the moment in which Ctrl-C counts once
    halt                        stop its data loading processes, as a server that no longer answers does
    half                        kill, and leave the file half-written
    fill                        fill the file system `disk`, except for `leave` bytes
    remove, garbage             delete the file or folder `disk`; put something else in the file's place
    read-only                   let nobody, root included, make files in the folder `disk`
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Optional

import psutil

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import train_dit  # noqa: E402
import train_rae  # noqa: E402
from rae_suite.launch import run_main  # noqa: E402
from scripts import encode_latents  # noqa: E402

PROGRAMS = {"train_rae.py": train_rae, "train_dit.py": train_dit, "scripts/encode_latents.py": encode_latents}
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1, "int": signal.SIGINT}
SIGNALS["hup"] = signal.SIGHUP


def leave_half(path: Path, mode: Optional[str]) -> None:
    """What a process that dies while it writes a file leaves behind."""
    if mode == "a":
        with path.open("a") as file:
            file.write('{"kind": "tra')
    elif path.exists():
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_bytes(b"\x89PNG\r\n\x1a\n half")


def fill(disk: Path, leave: int) -> None:
    """Write a file that takes what is free on a disk, except for `leave` bytes."""
    free = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        file.write(bytes(max(0, free.f_bavail * free.f_frsize - leave)))


def strike(fault: dict, path: Optional[Path], mode: Optional[str]) -> None:
    action, disk = fault["action"], Path(fault.get("disk", "/"))
    if action == "half":
        leave_half(path, mode)
        action = "kill"
    if action == "fill":
        fill(disk, fault.get("leave", 0))
    elif action == "remove":
        shutil.rmtree(disk) if disk.is_dir() else disk.unlink()
    elif action == "garbage":
        disk.write_text("no image")
    elif action == "read-only":
        subprocess.run(["chattr", "+i", disk], check=True)
    elif action == "halt":
        for worker in psutil.Process().children():
            worker.suspend()
    else:
        for name in action.split():
            time.sleep(1.2) if name == "pause" else os.kill(os.getpid(), SIGNALS[name])


def arm(fault: dict) -> None:
    """Have the fault happen in this process, once."""
    if int(os.environ.get("RANK", 0)) != fault.get("rank", 0):
        return
    left, owner = fault["count"], os.getpid()

    def pass_by(label: str, path: Optional[Path] = None, mode: Optional[str] = None) -> None:
        nonlocal left
        if left > 0 and os.getpid() == owner and re.search(fault["place"], label):
            left -= 1
            if left == 0:
                strike(fault, path, mode)

    def hook(event: str, arguments: tuple) -> None:
        if event.split(".")[0] in ("open", "os", "shutil") and arguments and isinstance(arguments[0], (str, Path)):
            path = Path(arguments[0])
            if event == "os.remove" and arguments[1] >= 0:  # a name in a folder that is open
                path = Path(os.readlink(f"/proc/self/fd/{arguments[1]}")) / path
            mode = arguments[1] if event == "open" else None
            pass_by(f"{event} {mode} {path}" if event == "open" else f"{event} {path}", path, mode)

    def announced(name: str, function):
        def call(*arguments, **keywords):
            pass_by(f"call {name}")
            return function(*arguments, **keywords)

        return call

    sys.addaudithook(hook)
    modules = [module for name, module in sys.modules.items() if name.startswith(("train_", "rae_suite."))]
    for name in re.findall(r"^call (\w+)", fault["place"]):
        callers = [module for module in modules if hasattr(module, name)]
        for module in callers:
            setattr(module, name, announced(name, getattr(module, name)))


if __name__ == "__main__":
    arm(json.loads(os.environ["RAE_FAULT"]))
    run_main(train_rae.main)
