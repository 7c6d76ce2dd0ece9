"""Records of steps that are read one step later, as on a GPU: real runs on the CPU, of one and two processes."""

import re

import pytest
from conftest import PLAIN, checkpoint_state, error_line, read_metrics, run_ranks, same
from test_failures import fault, is_finite

from rae_suite.checkpoints import checkpoints, read_checkpoint

# step 1 and the last one are logged, steps 4 and 8 are saved: at others, nothing waits for the record
LATE = {**PLAIN, "train.max_steps": "8", "logging.every_steps": "100", "eval.every_steps": "100",
        "train.save_every_steps": "4"}  # fmt: skip


def struck(what, step, rank=0) -> dict:
    return {"what": what, "rank": rank, "place": "step", "step": step}


@pytest.fixture(scope="module")
def late(images, tmp_path_factory):
    """{name: (run folder, result)} of runs that read records one step later, as on a GPU, except for "at once"."""
    root = tmp_path_factory.mktemp("late")
    skipping = {"train.max_nonfinite_steps": "2"}
    some = [fault("pixels", 2, rank=1), fault("gradient", 3), fault("disc_gradient", 6)]
    plan = [
        ("skipped", "skipped", 2, 1, skipping, some),
        ("skipped at once", "skipped at once", 2, 0, skipping, some),
        ("untouched", "untouched", 2, 1, {}, []),
        ("stopped", "stopped", 2, 1, {}, [struck("stop", 5, rank=1)]),
        ("continued", "stopped", 2, 1, {}, []),
        ("too many", "too many", 1, 1, skipping, [fault("pixels", step) for step in (5, 6, 7)]),
        ("in time", "in time", 2, 1, {}, [fault("gradient", 6, rank=1), struck("kill", 8)]),
        ("not at once", "not at once", 1, 1, {}, [fault("gradient", 6), struck("kill", 7)]),
    ]
    scenarios = []
    for name, run, processes, behind, settings, faults in plan:
        settings = {**LATE, **settings, "data.path": images, "train.output_dir": root / run / "run"}
        scenarios.append({"folder": root / name / "said", "processes": processes, "faults": faults,
                          "argv": ["train_rae.py", settings], "steps_behind": behind})  # fmt: skip
    results = run_ranks(*scenarios)
    return {name: (root / run / "run", result) for (name, run, *_), result in zip(plan, results, strict=True)}


def test_late_records_change_nothing(late):
    """Skipped steps, of decoder and discriminator and because of either process: every checkpoint, counters included,
    metrics and what is printed are those of the run that reads each record at once."""
    (run_dir, result), (expected, at_once) = late["skipped"], late["skipped at once"]
    assert [end["code"] for end in (*result["ends"], *at_once["ends"])] == [0, 0, 0, 0], result["err"]
    saved = checkpoints(run_dir)
    states = [read_checkpoint(path) for path in saved]
    assert same(states, [read_checkpoint(path) for path in checkpoints(expected)])
    counts = [(s["state"]["step"], s["state"]["skipped_steps"], s["state"]["nonfinite_in_a_row"]) for s in states]
    assert counts == [(4, 2, 0), (8, 3, 0)]
    assert read_metrics(run_dir) == read_metrics(expected)
    printed = [re.findall("^.*skipped[:,] .*$", r["out"][0], re.M) for r in (result, at_once)]
    assert printed[0] == printed[1] == [
        "skipped: recon is nan at step 2 (1 in a row of at most 2)",
        "skipped: grad_norm is nan at step 3 (2 in a row of at most 2)",
        "skipped: disc_grad_norm is nan at step 6 (1 in a row of at most 2)",
        "steps skipped, not finite: 3 of 8",
    ]  # fmt: skip


def test_late_failures(late):
    """A step that is not finite is noticed when the next one has been taken and before the one after it, on all
    processes, with its own number and term; nothing that came of it is saved."""
    run_dir, result = late["in time"]
    assert [end["code"] for end in result["ends"]] == [1, 1]
    line = f"error: grad_norm is nan at step 6; the last good checkpoint is {run_dir / 'checkpoints/step-00000004'}"
    assert [error_line(stderr) for stderr in result["err"]] == [line, line]
    assert [end["code"] for end in late["not at once"][1]["ends"]] == [-9]
    run_dir, result = late["too many"]
    assert [end["code"] for end in result["ends"]] == [1] and result["out"][0].count("skipped: ") == 2
    assert error_line(result["err"][0]).startswith("error: recon is nan at step 7; the last good checkpoint is")
    for name in ("in time", "too many"):
        assert [path.name for path in checkpoints(late[name][0])] == ["step-00000004"]
        assert is_finite(checkpoint_state(late[name][0]))


def test_late_stop(late):
    """Asked at step 5, agreed on in step 6, known after step 7, which is saved; continued, it ends as if it had not
    been stopped."""
    _, result = late["stopped"]
    assert [end["code"] for end in result["ends"]] == [0, 0], result["err"]
    assert "stopped by another process after step 7, saved" in result["out"][0]
    run_dir, result = late["continued"]
    assert "continuing from" in result["out"][0] and "step-00000007" in result["out"][0]
    assert same(checkpoint_state(run_dir), checkpoint_state(late["untouched"][0]))
    assert read_metrics(run_dir) == read_metrics(late["untouched"][0])
