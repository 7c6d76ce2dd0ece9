"""A tiny run is killed again and again, and ends each time with the bits of the run that nobody killed.

    python tests/faults/kill.py                 (make faults; 50 random moments and all named places, 15 to 40 minutes)
    python tests/faults/kill.py --kills 10 --seed 1 --json kills.json

Every loss is on, with accumulation, evaluation of both models, best/, sample grids, tensorboard and a checkpoint every
other step. A life is one run folder: the command is given again after each kill until it ends; then weights, average,
both optimizers, counters, metrics.jsonl (times aside), best/, final/ and all pictures are compared with those of the
uninterrupted run of as many processes. Random lives have five kills at moments spread over the run, start-up included,
by SIGKILL to all its processes (launcher, ranks, data loading processes) or to the main process alone. In the named
lives the main process dies at each place of PLACES in turn, see trigger.py. Exit code 1 when a life ends otherwise.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from harness import DEADLINE, Training, differences  # noqa: E402

STEPS = 18
SETTINGS = {"train.max_steps": STEPS}
KILLS_A_LIFE = 5
STREAM = {"data.streaming": "true", "data.shuffle_buffer": 5, "data.stream_lanes": 4, "eval.num_samples": 8}
# what a life runs as: processes, settings, whether accelerate launch starts it
SCENARIOS = {
    "1 process": (1, {}, False),
    "1 process, 2 workers": (1, {"data.num_workers": 2}, False),
    "2 processes": (2, {}, False),
    "2 processes, 2 workers": (2, {"data.num_workers": 2}, False),
    "accelerate launch, 2 processes": (2, {}, True),
    "1 process, streaming, 2 workers": (1, {**STREAM, "data.num_workers": 2}, False),
    "2 processes, streaming": (2, STREAM, False),
}
PARTIAL = r"/checkpoints/\.step-\d+\.partial"
PLACES = {
    "config.yaml half-written, first start": {"place": r"open w .*/\.config\.partial\.yaml", "action": "half"},
    "first line of metrics.jsonl": {"place": r"open a .*/metrics\.jsonl", "action": "half"},
    "metrics.jsonl, half a line": {"place": r"open a .*/metrics\.jsonl", "count": 6, "action": "half"},
    "metrics.jsonl cut back on resume": {"place": r"open w .*/\.metrics\.partial\.jsonl", "action": "half"},
    "sample picture half-written": {"place": r"open w\+ .*/samples/step-", "action": "half"},
    "curves half-written": {"place": r"open w\+ .*/curves\.png", "action": "half"},
    "checkpoint: first file": {"place": rf"open w .*{PARTIAL}/state\.json", "action": "half"},
    "checkpoint: last of the networks' files": {"place": rf"open w .*{PARTIAL}/optimizer\.pt", "action": "half"},
    "checkpoint: a file cut in half": {"place": rf"open r .*{PARTIAL}/ema", "action": "half"},
    "checkpoint: before its manifest": {"place": rf"open w .*{PARTIAL}/manifest\.json", "action": "kill"},
    "checkpoint: before its rename": {"place": rf"os\.rename .*{PARTIAL}", "action": "kill"},
    "checkpoint: before old ones are dropped": {"place": r"shutil\.rmtree .*/checkpoints/step-", "action": "kill"},
    "checkpoint: old one half dropped": {"place": r"os\.remove .*/checkpoints/step-", "count": 3, "action": "kill"},
    "best/: half-written": {"place": r"open w .*/\.best\.partial/preprocessor_config", "action": "half"},
    "best/: between its two renames": {"place": r"os\.rename .*/\.best\.partial", "action": "kill"},
    "best/: before the old one is dropped": {"place": r"shutil\.rmtree .*/\.best\.old", "count": 2, "action": "kill"},
    "between the evaluations of two models": {"place": r"call measure", "count": 2, "action": "kill"},
    "final/: half-written": {"place": r"open w .*/\.final\.partial/preprocessor_config", "action": "half"},
    "final/: before its rename": {"place": r"os\.rename .*/\.final\.partial", "action": "kill"},
    "between final/ and last checkpoint": {"place": rf"open w .*/\.step-0*{STEPS}\.partial/state", "action": "kill"},
}


def tree(process: Any) -> list:
    """A process and all that it started."""
    try:
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def is_at_work(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ranks_of(processes: list) -> list:
    """Those of a launcher's tree that train, the main process first; data loading processes have a rank as parent."""
    found = [p for p in processes[1:] if "train_rae.py" in " ".join(p.cmdline()) and p.ppid() == processes[0].pid]
    return sorted(found, key=lambda process: process.environ().get("RANK", "0"))


def kill_at(training: Training, started: list, launched: bool, moment: float, pace: dict, alone: bool) -> bool:
    """Kill the run at a moment: steps since its begin, or below 0 a share of the start-up. Returns whether it was still
    at work. `alone`: the main process only; the others must end by themselves."""
    main = psutil.Process(started[0].pid)
    if moment < 0:
        time.sleep(-moment * pace["start"])
    else:
        while training.step() < moment // 1 and is_at_work(main):
            time.sleep(0.005)
        time.sleep(moment % 1 * pace["step"])
    hit = is_at_work(main)
    everyone = [p for process in started for p in tree(process)]
    victims = everyone
    if alone:
        victims = ranks_of(everyone)[:1] if launched else everyone[:1]
    for process in victims:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for process in started:
        process.wait(DEADLINE) if launched else process.join(DEADLINE)
    _, left = psutil.wait_procs(everyone, DEADLINE)
    assert not left, f"{left} live on after the main process was killed"
    return hit


def left_behind(training: Training) -> str:
    """What a kill caught half-done."""
    names = [path.name for path in training.run_dir.rglob(".*") if path.name != ".lock"]
    metrics = training.run_dir / "metrics.jsonl"
    if metrics.exists() and not metrics.read_bytes().endswith(b"\n"):
        names.append("half a line")
    return ", ".join(sorted(names)) or "-"


def random_life(training: Training, scenario: str, kills: int, chance: random.Random, pace: dict) -> list:
    """One run folder killed up to `kills` times, then finished. Returns a row for each kill that hit."""
    processes, settings, launched = SCENARIOS[scenario]
    rows = []
    moments = sorted(-chance.random() if chance.random() < 0.1 else chance.uniform(0, STEPS) for _ in range(kills))
    for moment in moments:
        # in start-up one that has not met the others yet leaves them waiting: that is the launcher's business
        alone = chance.random() < 0.25 and (launched or processes == 1 or moment >= 0)
        started = [training.launch(processes, **settings)] if launched else training.start(processes, **settings)
        if kill_at(training, started, launched, moment, pace, alone):
            who = "main process" if alone else "all processes"
            when = f"start-up {-moment:.0%}" if moment < 0 else f"step {moment:.2f}"
            rows.append({"scenario": scenario, "when": when, "killed": who, "caught": left_behind(training)})
    return rows


def named_life(training: Training, scenario: str, places: dict) -> list:
    """One run folder whose main process dies at each of the places in turn."""
    processes, settings, _ = SCENARIOS[scenario]
    rows = []
    for name, fault in places.items():
        codes = training.go(processes, ({"count": 1, **fault},), **settings)
        assert codes[0] == -9, f"{name}: ended with {codes} instead of being killed: {training.output()}"
        rows.append({"scenario": scenario, "when": name, "killed": "main process", "caught": left_behind(training)})
    return rows


def finish(training: Training, scenario: str, reference: Path, rows: list) -> None:
    """Give the command until it ends, and note in the rows what differs from the uninterrupted run."""
    processes, settings, _ = SCENARIOS[scenario]
    codes = training.go(processes, **settings)
    assert codes == [0] * processes, training.output()
    found = ", ".join(differences(training.run_dir, reference)) or "nothing"
    for row in rows:
        row.update(differs=found)
        print(f"{row['scenario']:<32}{row['when']:<42}{row['killed']:<15}{row['caught']:<32}{found}", flush=True)


def main() -> None:
    from conftest import make_images
    from test_streams import write_parquet

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="file for all rows")
    arguments = parser.parse_args()
    chance, begin = random.Random(arguments.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        images, shards = make_images(folder / "images"), folder / "shards"
        for i in range(3):
            write_parquet(shards / f"train-{i:05}-of-00003.parquet", range(8 * i, 8 * i + 8), side=40)
        write_parquet(shards / "validation-00000-of-00001.parquet", range(24, 32), side=40)

        def training(name: str, scenario: str) -> Training:
            streams = "data.streaming" in SCENARIOS[scenario][1]
            return Training(folder / name, shards if streams else images, **SETTINGS)

        references, pace = {}, {}
        for scenario, (processes, settings, _) in SCENARIOS.items():
            kind = (processes, "data.streaming" in settings)  # workers and launcher change nothing
            if kind not in pace:
                whole = training(f"whole-{len(pace)}", scenario)
                started = time.time()
                assert whole.go(processes, **settings) == [0] * processes, whole.output()
                lines = [json.loads(line) for line in (whole.run_dir / "metrics.jsonl").read_text().splitlines()]
                seconds = lines[-1]["time"] - lines[0]["time"]
                pace[kind] = {"start": lines[0]["time"] - started, "step": seconds / STEPS}
                references[kind] = whole.run_dir
            references[scenario], pace[scenario] = references[kind], pace[kind]
        print(f"{'run':<32}{'killed at':<42}{'what':<15}{'caught':<32}differs from the uninterrupted run")
        rows, number = [], 0
        for scenario in cycle(SCENARIOS):
            if len(rows) >= arguments.kills:
                break
            life = training(f"life-{number}", scenario)
            number += 1
            kills = min(KILLS_A_LIFE, arguments.kills - len(rows))
            killed = random_life(life, scenario, kills, chance, pace[scenario])
            finish(life, scenario, references[scenario], killed)
            rows += killed
        for scenario in ("1 process, 2 workers", "2 processes"):
            life = training(f"named-{scenario.replace(' ', '-')}", scenario)
            killed = named_life(life, scenario, PLACES)
            finish(life, scenario, references[scenario], killed)
            rows += killed
    bad = sum(row["differs"] != "nothing" for row in rows)
    minutes = (time.monotonic() - begin) / 60
    print(f"{len(rows)} kills in {minutes:.0f} minutes, {bad} of them in lives that ended otherwise")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
