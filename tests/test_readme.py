"""The README's commands and code do what the README says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from finemoe.cli import main
from tests.bench.rows import run_rows_here
from tests.chat_model import make_chat_model
from tests.hub import QWEN3_30B_A3B, publish

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    return [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]


USAGE = [command for command in commands() if command.startswith("finemoe ")]
SERVE = [command for command in commands() if command.startswith("finemoe serve ")]
(RECORD,) = [command for command in USAGE if command.startswith("finemoe record ")]
(PLAN,) = [command for command in USAGE if command.startswith("finemoe plan ")]
FIRST, LAST = [command for command in commands() if command.startswith("python3 -m venv ")]
NUMBERS = re.compile(r"[\d.,]+")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    make_chat_model(folder / "my-model")
    (folder / "questions.txt").write_text("Hello\n/stats\n")
    (folder / "prompts.jsonl").write_text('{"question": "Why?"}\n{"question": "Who?"}\n')
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=540, check=False
    )


@pytest.mark.parametrize("command", sorted({*USAGE} - {*SERVE, PLAN}))
@pytest.mark.usefixtures("own_process")
def test_command_runs(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "<" in command:  # what a shell has to do with
        done = run(command, folder)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        return
    monkeypatch.chdir(folder)
    run_rows_here(monkeypatch)
    if "my.trace" in command and command != RECORD and not Path("my.trace").exists():
        assert main(shlex.split(RECORD)[1:]) == 0  # another process of the tests has run that line
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out.strip()


def test_the_server_is_started_as_in_its_own_document_whose_commands_are_run() -> None:
    assert SERVE
    assert all(command in (ROOT / "docs" / "serving.md").read_text() for command in SERVE)


@pytest.mark.parametrize("code", blocks("python"))
def test_code_runs(code: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 0 <= float(done.stdout.splitlines()[-1]) <= 1


def test_first_command_prints_what_is_shown(reference_model: Path, folder: Path) -> None:
    assert reference_model.is_dir()
    *install, generate = FIRST.split(" && ")
    assert install == ["python3 -m venv .venv", ".venv/bin/pip install -q -c constraints.txt ."]
    done = run(shlex.join(shlex.split(generate.removeprefix(".venv/bin/"))), folder)
    assert done.returncode == 0, done.stderr
    shown = blocks("text")[1]
    assert done.stdout.strip()[:40] == shown.strip()[:40]  # later words may differ in rounding between processors
    summary = done.stderr.strip().splitlines()[-3:]
    assert [NUMBERS.sub("#", line) for line in summary] == [
        NUMBERS.sub("#", s) for s in shown.strip().splitlines()[-3:]
    ]


def test_plan_of_a_big_model_prints_what_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(PLAN.split()[-1], QWEN3_30B_A3B, tmp_path, monkeypatch)
    assert main(shlex.split(PLAN)[1:]) == 0
    printed, shown = capsys.readouterr().out.splitlines(), blocks("text")[0].splitlines()
    assert printed[0] == shown[0]  # the model's sizes; the rest is measured on this machine
    machine = re.compile(r"[\d.,]+|[KMG]iB|yes|no| +")
    assert [machine.sub("#", line) for line in printed] == [machine.sub("#", line) for line in shown]
    budgets = re.compile(r"\d+ \(\d+%\), [\d.]+ GiB")
    assert budgets.findall("\n".join(printed)) == budgets.findall("\n".join(shown))


def test_ci_runs_the_test_command_of_the_readme() -> None:
    install, test = LAST.split(" && ")[1:]
    script = (ROOT / ".ci" / "run").read_text()
    assert install.removeprefix(".venv/bin/") in script
    assert test.removeprefix(".venv/bin/") in script
