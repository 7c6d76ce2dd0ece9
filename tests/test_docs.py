"""README.md and docs/: translations have the same commands, links lead somewhere, the settings that are named exist.

What the commands do is `make docs-check`, which takes minutes.
"""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import docs_check
import pytest
from conftest import ROOT

from eval_fid import EvalFIDConfig
from eval_rfid import EvalRFIDConfig
from linear_probe import LinearProbeConfig
from rae_suite.settings_dit import Config as DiTConfig
from rae_suite.settings_rae import Config as RAEConfig
from sample_dit import SampleDiTConfig

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRANSLATED = [ROOT / "README.zh.md", ROOT / "docs/training.zh.md", ROOT / "docs/linear_probing.zh.md"]
SCHEMAS = {
    "train_rae.py": RAEConfig,
    "train_dit.py": DiTConfig,
    "eval_rfid.py": EvalRFIDConfig,
    "eval_fid.py": EvalFIDConfig,
    "linear_probe.py": LinearProbeConfig,
    "sample_dit.py": SampleDiTConfig,
}


def blocks(path: Path) -> list:
    return docs_check.read_page(path)[0]


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda path: path.name)
def test_a_translation_has_the_same_blocks(page):
    """Commands and code to the letter, and pictures: a change in the original is a change in both. Only blocks of text,
    the file tree among them, may be left to the original."""
    original = page.with_name(page.name.replace(".zh.md", ".md"))
    theirs, ours = (
        [(block.language, block.text) for block in blocks(path) if block.language != "text"]
        for path in (original, page)
    )
    assert len(theirs) == len(ours) > 3
    for a, b in zip(theirs, ours, strict=True):
        assert a == b
    pictures = [re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text()) for path in (original, page)]
    assert pictures[0] == pictures[1]
    headings = [len(re.findall(r"^#+ ", path.read_text(), re.M)) for path in (original, page)]
    assert headings[0] == headings[1]


def anchors(path: Path) -> set:
    """Places within a page that links can name, as GitHub makes them of headings."""
    found = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+://", target):
            continue
        file, _, anchor = target.partition("#")
        place = page if not file else (page.parent / file)
        assert place.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(place), f"{page.name} links to {target}"


def setting_names(schema: type, prefix: str = "") -> set:
    names = set()
    for field in fields(schema):
        names.add(prefix + field.name)
        if is_dataclass(field.type):
            names |= setting_names(field.type, f"{prefix}{field.name}.")
    return names


def test_every_flag_of_a_command_exists():
    """What --help of a command lists; flags of launchers stand before the script's name."""
    checked = 0
    for page in PAGES:
        for block in blocks(page):
            for line in docs_check.commands(block.text) if block.language in docs_check.SHELL else ():
                words = line.split()
                program = next((word for word in words if word in SCHEMAS), None)
                if program is None:
                    continue
                known = setting_names(SCHEMAS[program])
                if program == "sample_dit.py":  # its sampling settings are given without that word
                    known |= {name.removeprefix("sampling.") for name in known}
                for word in words[words.index(program) + 1 :]:
                    name = word.removeprefix("--").partition("=")[0]
                    if word.startswith("--") and name not in ("config", "help"):
                        assert name in known, f"{page.name}:{block.line}: {program} has no --{name}"
                        checked += 1
    assert checked > 50


def prose(page: Path) -> str:
    """The text of a page without its blocks, and without the table of names in other code."""
    text = re.sub(r"^```.*?^```|^[^\n]*there is no such setting[^\n]*$", "", page.read_text(), flags=re.M | re.S)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    for table in tables:
        if "Hydra" in table.splitlines()[0]:
            text = text.replace(table, "")
    return text


def test_settings_that_the_text_names_exist():
    """`group.name` in the text, where a training or measuring script has that group. Names of files are none, nor are
    those of messages about settings that there are not."""
    known = set().union(*map(setting_names, SCHEMAS.values()))
    groups = {name.partition(".")[0] for name in known if "." in name}
    endings = ("py", "yaml", "md", "json", "jsonl", "npz", "png", "txt", "pth", "pt", "log", "safetensors")
    missing, found = [], 0
    for page in PAGES:
        for name in re.findall(r"`(?:--)?([a-z_]+\.[a-z_.]*[a-z_])(?:[: ][^`]*)?`", prose(page)):
            if name.partition(".")[0] in groups and name.rsplit(".", 1)[-1] not in endings:
                found += 1
                if name not in known:
                    missing.append(f"{page.name}: {name}")
    assert not missing and found > 100, missing


def test_docs_check_reads_its_comments(tmp_path, monkeypatch):
    """Replacements, added flags, commands before a block, blocks that are not run; anything else is an error."""
    monkeypatch.setattr(docs_check, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- docs-check: replace\n/data/ => data/\n-->\n<!-- docs-check: first touch a -->\n"
        "<!-- docs-check: add --b 1 -->\n```bash\n# comment\npython x.py \\\n    --path /data/y\n```\n"
        "<!-- docs-check: not run: no GPU -->\n```\npython z.py\n```\n```yaml\na: 1\n```\n"
    )
    (first, second, third), replacements = docs_check.read_page(page)
    assert docs_check.script(first, replacements) == "touch a\npython x.py --path data/y --b 1"
    assert (first.runs, second.runs, third.runs) == (True, False, False) and second.not_run == "no GPU"
    page.write_text("<!-- docs-check: sometimes -->\n```\nls\n```\n")
    with pytest.raises(ValueError, match="page.md:1: docs-check knows no 'sometimes'"):
        docs_check.read_page(page)


def test_docs_check_tells_what_fails(tmp_path, monkeypatch, capsys):
    """A failing block fails the check, and a block that runs does not."""
    page = tmp_path / "page.md"
    page.write_text("```bash\ntrue\n```\n```bash\nfalse\n```\n")
    monkeypatch.setattr(docs_check, "ROOT", tmp_path)
    monkeypatch.setattr(docs_check, "PREPARE", "true")
    monkeypatch.setattr(docs_check, "copy_repository", lambda folder: None)
    assert docs_check.main(["page.md"]) == 1
    assert docs_check.main(["page.md:1"]) == 0
    out = capsys.readouterr().out
    assert "| page.md:4 | `false` | FAILS (1)," in out and "1 blocks run, 0 fail, 0 are not run." in out
