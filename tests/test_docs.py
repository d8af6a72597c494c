"""Documentation that can be wrong: the command reference, every relative link, and the commands of the README."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import text_pipelines
import tiny_pipeline
from click.testing import CliRunner

import hqc
from hqc.cli import main
from hqc.errors import PlanError
from hqc.evaluation.comparison.table import markdown
from hqc.recipes import RECIPES
from hqc.sampling import Work
from hqc.steps import step_name

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


def test_the_tables_of_the_field_are_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python scripts/field_table.py` writes them from the figures of every cell."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    field = importlib.import_module("field_table")
    found = field.read(ROOT / "docs" / "measurements" / "digits-field.json")
    wanted = (ROOT / "docs" / "measurements" / "digits-field.md").read_text(encoding="utf-8")
    assert markdown(found) == wanted
    assert field.short(found) in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    cells = [figures for row in found.rows for figures in row.figures.values()]
    assert all((cell["file_bytes"] is None) == bool(cell["export_refused"]) for cell in cells)
    assert all(cell["file_bytes"] > cell["size_bytes"] for cell in cells if cell["file_bytes"]), (
        "the graph comes besides"
    )


def test_sizes_of_the_field_are_of_untrained_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python scripts/field_sizes.py` exports what it makes of these."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    sizes = importlib.import_module("field_sizes")
    entry = sizes.entry_of("hq-dm@qr-adaptor", "w4a4")
    assert entry.plan.bits in ("", "w4a4")
    quick = sizes.quick(entry.recipe)
    assert quick.kind == "ptq"
    assert quick.step("calibrate_activations").samples == 1
    with pytest.raises(PlanError, match="attaches no LoRA"):
        quick.following(entry.plan.rules)
    assert quick.following(sizes.unranked(entry.plan).rules)
    assert sizes.quick(RECIPES["q-diffusion"]).step("reconstruct").iterations == 1


# ---- links ---------------------------------------------------------------------------------------------------------


def _without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def _links(text: str) -> list[str]:
    """Targets of Markdown links and images, and of HTML's href and src, that are not on the web."""
    bare = re.sub(r"`[^`\n]*`", "", _without_blocks(text))
    found = re.findall(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)", bare) + re.findall(r"(?:href|src)=\"([^\"]+)\"", bare)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def _anchors(page: Path) -> set[str]:
    """Headings as GitHub names them: lower case, punctuation dropped, spaces as hyphens."""
    headings = re.findall(r"^#+\s+(.*?)\s*#*$", _without_blocks(page.read_text(encoding="utf-8")), re.MULTILINE)
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


# ---- commands and Python of the pages ------------------------------------------------------------------------------


def _blocks(text: str, language: str, mark: str = MARK) -> list[str]:
    """The fenced blocks of a language under a mark; under an empty one, all of them."""
    above = rf"{re.escape(mark)}\n+" if mark else ""
    return re.findall(rf"^{above}```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def _commands(block: str) -> list[list[str]]:
    """The block's `hqc` lines, continued lines joined, comments and prompts dropped."""
    lines = block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [line for line in words if line and line[0] == "hqc"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first line of several pages makes, made once."""
    folder = tmp_path_factory.mktemp("docs") / "digits.hqc"
    _run_commands(f"hqc trace digits -o {folder}")
    return folder


def _run_commands(block: str, digits: Path | None = None) -> None:
    """As a user would type them, in the current folder; what is there of `hqc trace digits` is copied."""
    commands = _commands(block)
    assert commands
    for command in commands:
        if digits is not None and command[:-1] == ["hqc", "trace", "digits", "-o"]:
            shutil.copytree(digits, command[-1])
            continue
        done = CliRunner(catch_exceptions=False).invoke(main, command[1:])
        assert done.exit_code == 0, f"{shlex.join(command)}\n{done.stderr}"


def _run_python(block: str) -> dict[str, Any]:
    """As a file of its own; the names that it leaves."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block, "block", "exec"), names)
    return names


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to be in, which is not on Python's path, as for the `hqc` command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    sys.modules.pop("mymodel", None)


def test_blocks_are_found() -> None:
    text = f"{MARK}\n```bash\n$ hqc trace digits \\\n  -o a.hqc  # x\nls\n```\n\n```bash\nhqc no\n```\n"
    assert [_commands(block) for block in _blocks(text, "bash")] == [[["hqc", "trace", "digits", "-o", "a.hqc"]]]
    assert len(_blocks(text, "bash", "")) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_are_shown_are_ones_that_there_are(page: Path) -> None:
    """Every `hqc` line of a page is understood; the marked ones are run besides."""
    lines = [line for block in _blocks(page.read_text(encoding="utf-8"), "bash", "") for line in _commands(block)]
    for _, name, *arguments in lines:
        main.commands[name].make_context(name, arguments)


@pytest.mark.slow
def test_the_commands_of_the_readme_run(inside: Path, digits: Path) -> None:
    """Marked blocks, in their order, in one folder."""
    blocks = _blocks((ROOT / "README.md").read_text(encoding="utf-8"), "bash")
    assert blocks, f"README.md has no ```bash block under {MARK}"
    for block in blocks:
        _run_commands(block, digits)


@pytest.mark.slow
def test_the_python_of_the_readme_runs(inside: Path) -> None:
    """Every Python block, as it is; what `import hqc` shows is the same."""
    (block,) = _blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python", "")
    assert len(_run_python(block)["images"]) == 2
    shown = [line[4:] for line in (hqc.__doc__ or "").splitlines() if line.startswith("    ")]
    shown.remove('pipe = hqc.load("digits-onnx").pipeline()')
    assert len(shown) == 4
    assert set(shown) <= {line.partition("  #")[0] for line in block.splitlines()}


@pytest.mark.slow
def test_the_page_about_recipes(inside: Path, digits: Path) -> None:
    """Its file through the command line, and its method as a recipe of the package: trained and exported."""
    page = (ROOT / "docs" / "add-a-recipe.md").read_text(encoding="utf-8")
    (recipe,) = _blocks(page, "yaml", "<!-- file: mine.yaml -->")
    (inside / "mine.yaml").write_text(recipe, encoding="utf-8")
    (commands,) = _blocks(page, "bash")
    _run_commands(commands, digits)
    assert {plan.block for plan in hqc.load_program(inside / "mine.hqc").plan.sites} >= {64}
    (method,) = _blocks(page, "python")
    short = {"distil.updates": 2, "distil.batch_size": 1, "calibrate_activations.samples": 1}
    settings = {**short, "sampler.num_inference_steps": 2}
    trained = hqc.qat(
        tiny_pipeline.traced_pipeline("classes"), _run_python(method)["SCALES_ONLY"], "w4a4", settings=settings
    )
    assert trained.plan.recipe == "scales-only"
    hqc.export_program(trained, "onnxruntime", inside / "exported")


def test_the_page_of_the_recipes_has_a_row_for_each() -> None:
    rows = re.findall(
        r"^\| `([a-z0-9-]+)` \| (\w+) \| ([^|]+) \|", (ROOT / "docs" / "recipes.md").read_text("utf-8"), re.M
    )
    assert sorted(rows) == sorted((name, recipe.kind, recipe.source) for name, recipe in RECIPES.items())


def test_the_page_of_the_recipes_counts_their_iterations() -> None:
    """Of 20 steps of the sampler; what is published is not the code's to know."""
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    rows = {
        name: row for row in page.split("## Iterations")[1].split("## Figures")[0].splitlines() for name in _named(row)
    }

    def updates(name: str, step: str = "distil") -> list[str]:
        found = [one for one in RECIPES[name].steps if step_name(type(one)) == step]
        return [f"{one.total(Work(None, None, RECIPES[name].sampler)):,}".replace(",", " ") for one in found]  # type: ignore[arg-type]

    trained = ("hq-dm", "hq-dm-reference", "efficientdm", "hqc", "mpq-dm", "mpq-dmv2")
    assert all(f"| {updates(name)[0]} updates" in rows[name] for name in trained)
    assert f"then {' and '.join(updates('quest'))} updates" in rows["quest"]
    assert f"{updates('passionsr', 'learn_bounds')[0]} updates a stage" in rows["passionsr"]
    for name in ("q-diffusion", "tcaq-dm", "quest"):
        each = [str(one.iterations) for one in RECIPES[name].steps if step_name(type(one)) == "reconstruct"]
        assert all(re.search(rf"\b{number}\b", rows[name]) for number in each)
    assert all(str(RECIPES[name].step("fit_lookup").rounds) in rows[name] for name in ("ganq", "ganq-int8"))
    assert {name for name, recipe in RECIPES.items() if recipe.kind == "qat"} <= rows.keys()


def _named(row: str) -> list[str]:
    """The recipes of a row, in its first cell."""
    return re.findall(r"`([a-z0-9-]+)`", row.split("|")[1]) if row.startswith("|") else []


@pytest.mark.slow
def test_the_page_about_your_own_model(inside: Path) -> None:
    """Its file, then every marked block, commands and Python, from top to bottom in one folder."""
    page = (ROOT / "docs" / "your-own-model.md").read_text(encoding="utf-8")
    (module,) = _blocks(page, "python", "<!-- file: mymodel.py -->")
    (inside / "mymodel.py").write_text(module, encoding="utf-8")
    of_the_module, of_a_part = _blocks(page, "bash")
    _run_commands(of_the_module)
    blocks = _blocks(page, "python")
    assert len(blocks) == 2
    for block in blocks:
        _run_python(block)
    _run_commands(of_a_part)


@pytest.mark.slow
def test_the_page_about_your_own_model_with_a_text_pipeline(inside: Path) -> None:
    page = (ROOT / "docs" / "your-own-model.md").read_text(encoding="utf-8")
    text_pipelines.save_text_pipeline("sd15", inside / "made").rename(inside / "pipe")
    (inside / "prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    (commands,) = _blocks(page, "bash", "<!-- test: text -->")
    _run_commands(commands)
    (block,) = _blocks(page, "python", "<!-- test: text -->")
    assert _run_python(block)["image"].size == (16, 16)
