"""Run the commands of README.md and docs/*.md on tiny data, and say of each what came of it.

    make docs-check                                    all pages
    python tests/docs_check.py docs/training.md        some pages
    python tests/docs_check.py docs/training.md:41     one block, by the line of its fence

Blocks of bash, sh and python are run, and blocks without a language that begin with a program of PROGRAMS, each page in
a copy of the repository of its own, in the order of the page and offline. Other blocks are read, not run. The copy has
what the pages speak of, tiny: data/imagenet and data/my_images, a stage-1 run, a stage-2 run, and stand-ins for the
files of Inception and VGG16. HTML comments in a page, which readers of the page do not see, say what is changed:

    <!-- docs-check: replace                      in every block of the page
    /data/imagenet => data/imagenet
    -->
    <!-- docs-check: add --train.max_steps 2 -->   to each command of the next block
    <!-- docs-check: first CODE -->                shell code that runs before the next block
    <!-- docs-check: not run: REASON -->           the next block is not run

Exit code 1 when a block fails. The table on stdout is Markdown.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHELL = ("", "bash", "sh")
PROGRAMS = ("python", "accelerate", "torchrun", "make", "hf")
LIMIT = 900  # seconds for a block
PREPARE = """
python scripts/prepare_data.py dummy --output data/imagenet --num_images 40 --num_classes 5 --size 40 \\
    --splits train:0.6,val:0.4
cp -r data/imagenet data/my_images
python - <<'PY'
import sys
from pathlib import Path
sys.path.insert(0, "tests")
import torch
from inception_standin import save_standin
from rae_suite.lpips_vgg16 import random_vgg16_state
folder = Path(torch.hub.get_dir()) / "checkpoints"
folder.mkdir(parents=True)
save_standin(folder / "inception-2015-12-05.pt")
torch.save(random_vgg16_state(), folder / "vgg16-397923af.pth")
PY
python train_rae.py --config configs/dinov2_b.yaml --config tests/docs/tiny.yaml --data.path data/imagenet \\
    --train.output_dir runs/dinov2_b --data.eval_split val
python train_dit.py --config configs/ditdh_digits.yaml --config tests/docs/tiny_dit.yaml --data.path data/imagenet \\
    --model.rae runs/dinov2_b/final --train.output_dir runs/ditdh_xl --data.eval_split val
"""


@dataclass
class Block:
    """A fenced block of a page: the line of its fence, its language and text, and what comments before it say."""

    page: str
    line: int
    language: str
    text: str
    add: str = ""
    first: list = field(default_factory=list)
    not_run: str = ""

    @property
    def runs(self) -> bool:
        return self.language in (*SHELL, "python") and not self.not_run

    def title(self) -> str:
        """The first command, without paths and settings that make it long."""
        lines = [line for line in self.text.splitlines() if line.strip() and not line.startswith("#")]
        return f"{lines[0].strip().rstrip(chr(92)).strip()[:80]}{' ...' if len(lines) > 1 else ''}" if lines else ""


def pages() -> list:
    """README.md and docs/*.md; translations have the same blocks, which tests/test_docs.py compares."""
    return [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if ".zh." not in path.name]


def read_page(path: Path) -> tuple:
    """(blocks, replacements as pairs) of a page. Raises ValueError for a comment of this script that means nothing."""
    blocks, replacements, waiting = [], [], {}
    lines = path.read_text().splitlines()
    i = 0
    while i < len(lines):
        line = lines[i]
        if line.startswith("<!-- docs-check:"):
            start = i
            while "-->" not in lines[i]:
                i += 1
            words = "\n".join(lines[start : i + 1]).split("docs-check:", 1)[1].rsplit("-->", 1)[0].strip()
            kind, _, rest = words.partition("\n" if words.startswith("replace") else " ")
            if kind == "replace":
                replacements += [tuple(pair.split(" => ", 1)) for pair in rest.splitlines() if pair.strip()]
            elif kind == "first":
                waiting.setdefault("first", []).append(rest)
            elif kind == "add":
                waiting["add"] = " ".join(rest.split())
            elif words.startswith("not run:"):
                waiting["not_run"] = " ".join(words.removeprefix("not run:").split())
            else:
                raise ValueError(f"{path.name}:{start + 1}: docs-check knows no {kind!r}")
        elif line.startswith("```"):
            start, language = i, line[3:].strip()
            i += 1
            while not lines[i].startswith("```"):
                i += 1
            text = "\n".join(lines[start + 1 : i])
            if language == "" and not text.startswith(PROGRAMS):
                language = "text"
            if text.startswith("hf "):
                waiting.setdefault("not_run", "it talks to the Hub")
            blocks.append(Block(str(path.relative_to(ROOT)), start + 1, language, text, **waiting))
            waiting = {}
        i += 1
    if waiting:
        raise ValueError(f"{path.name}: a docs-check comment at the end has no block")
    return blocks, replacements


def commands(text: str) -> list:
    """The lines of a shell block, continued ones joined, without comments and empty ones."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    return [line for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


def script(block: Block, replacements: list) -> str:
    """What is run for a block."""
    if block.language in SHELL:
        text = "\n".join(f"{line} {block.add}".rstrip() for line in commands(block.text))
    else:
        text = f"python - <<'PYTHON'\n{block.text}\nPYTHON"
    for old, new in replacements:
        text = text.replace(old, new)
    return "\n".join([*block.first, text])


def run(text: str, folder: Path, variables: dict) -> tuple:
    """(exit code, seconds, end of the output) of shell code in a folder."""
    began = time.monotonic()
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=folder, env={**os.environ, **variables},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, timeout=LIMIT,
        )  # fmt: skip
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output = -1, f"{(error.stdout or b'').decode(errors='replace')}\nlonger than {LIMIT} seconds"
    return code, time.monotonic() - began, output


def copy_repository(folder: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def check_page(path: Path, only: set, base: Path, variables: dict, rows: list) -> None:
    """Run the blocks of a page, or those whose lines are in `only`, and add a row of the table for each."""
    blocks, replacements = read_page(path)
    folder = base.with_name(path.stem)
    shutil.copytree(base, folder)
    for block in blocks:
        if block.language not in (*SHELL, "python") or only and block.line not in only:
            continue
        if not block.runs:
            rows.append((block, "not run", block.not_run, 0.0))
            continue
        code, seconds, output = run(script(block, replacements), folder, variables)
        rows.append((block, "runs" if code == 0 else f"FAILS ({code})", "", seconds))
        print(f"{block.page}:{block.line} {rows[-1][1]} {seconds:.0f} s  {block.title()}", file=sys.stderr, flush=True)
        if code:
            print(script(block, replacements), output[-3000:], sep="\n", file=sys.stderr, flush=True)
    shutil.rmtree(folder)


def table(rows: list) -> str:
    lines = ["| block | begins with | result |", "|---|---|---|"]
    for block, result, reason, seconds in rows:
        said = f"{result}: {reason}" if reason else f"{result}, {seconds:.0f} s"
        title = block.title().replace("|", "\\|")
        lines.append(f"| {block.page}:{block.line} | `{title}` | {said} |")
    return "\n".join(lines)


def main(names: list) -> int:
    wanted = {}
    for name in names:
        page, _, line = name.partition(":")
        wanted.setdefault((ROOT / page).resolve(), set()).update({int(line)} if line else ())
    chosen = wanted or dict.fromkeys(pages(), ())
    rows = []
    with tempfile.TemporaryDirectory(prefix="docs-check-") as temporary:
        base = Path(temporary) / "repository"
        base.mkdir()
        copy_repository(base)
        variables = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HF_HOME": f"{temporary}/hf",
            "TORCH_HOME": f"{temporary}/torch",
            "HF_HUB_OFFLINE": "1",
            "ACCELERATE_USE_CPU": "true",
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",  # networks are tiny, and other work may share the cores
        }
        code, seconds, output = run(PREPARE, base, variables)
        print(f"data and models: {seconds:.0f} s", file=sys.stderr, flush=True)
        if code:
            print(output, file=sys.stderr)
            return 1
        for path, only in chosen.items():
            check_page(path, set(only), base, variables, rows)
    print(table(rows))
    failed = [row for row in rows if row[1].startswith("FAILS")]
    ran = sum(row[1] == "runs" for row in rows)
    print(f"\n{ran} blocks run, {len(failed)} fail, {len(rows) - ran - len(failed)} are not run.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
