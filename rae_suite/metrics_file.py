"""metrics.jsonl: what a run measured, one JSON object a line."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from rae_suite.errors import ConfigError
from rae_suite.files import write_text, writing


def is_metrics_line(line: Any) -> bool:
    """Whether a JSON value has what those who read metrics.jsonl rely on: texts, numbers, and in the right places."""
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str) or not isinstance(line.get("step"), int):
        return False
    if line["kind"] == "eval" and not (isinstance(line.get("model"), str) and isinstance(line.get("num_samples"), int)):
        return False
    return all(
        isinstance(value, (int, float, type(None))) for key, value in line.items() if key not in ("kind", "model")
    )


class MetricsFile:
    """`metrics.jsonl`, written by the main process only; `as_table`: the same as metrics.csv beside it, too."""

    def __init__(self, path: Path, enabled: bool, as_table: bool = False):
        self.path, self.enabled, self.as_table = path, enabled, as_table
        self.columns = []  # of the table, in the order in which they first occur

    def forget_after(self, step: int) -> None:
        """Drop lines of steps after `step`: the run goes on from there and writes them again."""
        if self.enabled and self.path.exists():
            kept = [line for line in self.read() if line["step"] <= step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            if self.as_table:
                self._write_table(kept)

    def read(self) -> list:
        """All whole lines; a last line cut off by a crash is left out. Raises ConfigError, which says where, for a line
        that `append` has not written."""
        lines = []
        for number, text in enumerate(self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else [], 1):
            try:
                line = json.loads(text)
                known = is_metrics_line(line)
            except (ValueError, RecursionError):
                known = False
            if not known:
                raise ConfigError(
                    f"{self.path} is damaged: line {number} is no JSON object with `kind`, `step` and numbers, and "
                    "of an evaluation `model` and `num_samples`; without that line the run goes on"
                )
            lines.append(line)
        return lines

    def append(self, line: dict) -> None:
        """Write one line; numbers that JSON does not know (inf, nan) become null."""
        if self.enabled:
            clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps(clean) + "\n")
            if self.as_table:
                self._add_to_table(clean)

    def _add_to_table(self, line: dict) -> None:
        """Append a row; the table is written again where the line has something that it has no column for."""
        table = self.path.with_suffix(".csv")
        if not line.keys() <= set(self.columns) or not table.exists():
            self._write_table(self.read())
            return
        with writing(table), table.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(line)

    def _write_table(self, lines: list) -> None:
        self.columns, text = list(dict.fromkeys(name for line in lines for name in line)), io.StringIO()
        table = csv.DictWriter(text, self.columns)
        table.writeheader()
        table.writerows(lines)
        write_text(self.path.with_suffix(".csv"), text.getvalue())
