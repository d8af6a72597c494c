"""Documentation that can be wrong: the command reference, every relative link, and the commands of the README."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])
MARK = "<!-- test -->"


def test_the_command_reference_is_what_the_commands_say() -> None:
    """`make docs` writes it."""
    code = "import sys, cli_reference; sys.stdout.write(cli_reference.reference())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True, check=True)
    wanted = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert wanted == done.stdout, "docs/cli.md is out of date: run make docs"
    assert "## hqc serve" in wanted


def test_the_table_of_kernels_is_what_was_measured() -> None:
    """`python scripts/kernel_table.py` writes the data and prints the table."""
    from hqc.kernels.variants import VARIANTS, table

    found = json.loads((ROOT / "docs" / "measurements" / "kernels.json").read_text(encoding="utf-8"))["kernels"]
    assert {line["variant"] for line in found} == {variant.name for variant in VARIANTS}
    assert not any(line["spills"] for line in found)
    wanted = table(found)
    assert wanted in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [line for line in readme.splitlines() if re.match(r"\| (GEMM|conv|rotate|group norm)", line)]
    assert len(shown) >= 5
    assert set(shown) <= set(wanted.splitlines())


# ---- links ---------------------------------------------------------------------------------------------------------


def _without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def _links(text: str) -> list[str]:
    """Targets of Markdown links and images, and of HTML's href and src, that are not on the web."""
    bare = _without_code(text)
    found = re.findall(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)", bare) + re.findall(r"(?:href|src)=\"([^\"]+)\"", bare)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def _anchors(page: Path) -> set[str]:
    """Headings as GitHub names them: lower case, punctuation dropped, spaces as hyphens."""
    headings = re.findall(r"^#+\s+(.*?)\s*#*$", _without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_are_found_where_they_are() -> None:
    text = '[a](x.md#y) ![b](<p q.png>) `[c](code.md)` [d](https://e.f) <img src="g.png">\n```\n[h](i.md)\n```\n'
    assert _links(text.replace("p q", "pq")) == ["x.md#y", "pq.png", "g.png"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in _links(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        inside = target.exists() and target.is_relative_to(ROOT)
        if not inside or (anchor and target.suffix == ".md" and anchor not in _anchors(target)):
            broken.append(link)
    assert broken == []


# ---- the README's commands -----------------------------------------------------------------------------------------


def _tested_blocks(text: str) -> list[str]:
    return re.findall(rf"^{re.escape(MARK)}\n+```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def _commands(block: str) -> list[list[str]]:
    """The block's `hqc` lines, continued lines joined, comments and prompts dropped."""
    lines = block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [line for line in words if line and line[0] == "hqc"]


def test_blocks_are_found() -> None:
    text = f"{MARK}\n```bash\n$ hqc trace digits \\\n  -o a.hqc  # x\nls\n```\n\n```bash\nhqc no\n```\n"
    assert [_commands(block) for block in _tested_blocks(text)] == [[["hqc", "trace", "digits", "-o", "a.hqc"]]]


@pytest.mark.slow
def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    """Marked blocks, in their order, in one folder, as a user would type them."""
    blocks = _tested_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    commands = [command for block in blocks for command in _commands(block)]
    assert commands, f"README.md has no ```bash block under {MARK}"
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "hqc.cli", *command[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
