"""The command line that all peers share: install the engine, prepare a model, or answer prompts and time them.

    python X_peer.py install ENVS        creates the virtual environment ENVS/X
    python X_peer.py prepare ORDER.json  makes files that the engine needs besides the checkpoint; without a cap
    python X_peer.py run ORDER.json RESULT.json

`run.py` runs the last two. Imports the standard library only, because it runs in every peer's environment.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Tokens = Callable[[list[int]], Iterator[int]]  # a prompt's token ids -> greedy tokens, without end
INSTALL_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Order:
    """What a peer runs."""

    model: str  # folder of the checkpoint
    work: str  # folder for files of `prepare` and scratch files
    prompts: list[list[int]]
    new_tokens: int
    threads: int
    memory_bytes: int | None = None  # the cap; None for none
    limit_file: str | None = None  # to write the cap to once the model is loaded; None: it is in force already
    policy: str = "lfru"  # finemoe's


@dataclass(frozen=True)
class Answer:
    """One prompt's continuation. Bytes are what the process read from storage."""

    tokens: list[int]
    seconds: list[float]  # of each token; the first includes the prompt
    prompt_bytes: int
    decode_bytes: int


@dataclass(frozen=True)
class Result:
    """The measurements of a peer."""

    version: str
    load_s: float
    answers: list[Answer] = field(default_factory=list)
    peak_rss_bytes: int = 0

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Result:
        """From JSON."""
        return cls(**raw | {"answers": [Answer(**answer) for answer in raw["answers"]]})


@dataclass(frozen=True)
class Peer:
    """An engine.

    Args:
        name: of the row, and of its environment's folder.
        packages: arguments of `pip install`; empty: it runs in the environment of `run.py`.
        package: the one whose version is shown.
        load: loads the model.
        prepare: makes files that `load` needs besides the checkpoint.
        build: environment variables for the installation.
    """

    name: str
    packages: tuple[str, ...]
    package: str
    load: Callable[[Order], Tokens]
    prepare: Callable[[Order], None] = lambda _: None
    build: tuple[tuple[str, str], ...] = ()


def main(peer: Peer, argv: Sequence[str] | None = None) -> int:
    """A peer's command line. A failure is one line on standard error and exit status 2."""
    parser = argparse.ArgumentParser(description=f"{peer.name}, for run.py")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install").add_argument("envs", type=Path)
    commands.add_parser("prepare").add_argument("order", type=Path)
    run = commands.add_parser("run")
    run.add_argument("order", type=Path)
    run.add_argument("result", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.command == "install":
        return install(peer, arguments.envs)
    order = Order(**json.loads(arguments.order.read_text()))
    try:
        if arguments.command == "prepare":
            peer.prepare(order)
        else:
            arguments.result.write_text(json.dumps(asdict(measure(peer, order))))
    except Exception as error:  # engines raise anything
        lines = str(error).strip().splitlines() or [""]
        sys.stderr.write(f"\n{type(error).__name__}: {lines[0]}\n")
        return 2
    return 0


def install(peer: Peer, envs: Path) -> int:
    """Creates the peer's environment, unless it exists."""
    folder = envs / peer.name
    done = folder / "installed"
    if not peer.packages:
        print(f"{peer.name}: runs in the environment of finemoe, with its extra `bench`")
        return 0
    if done.exists() and done.read_text() == " ".join(peer.packages):
        print(f"{peer.name}: installed in {folder}")
        return 0
    log = envs / f"{peer.name}.log"
    envs.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python_of(envs, peer.name)), "-m", "pip", "install", *peer.packages],
        ):
            try:
                subprocess.run(
                    command,
                    check=True,
                    stdout=output,
                    stderr=output,
                    env=os.environ | dict(peer.build),
                    timeout=INSTALL_TIMEOUT_S,
                )
            except (OSError, subprocess.SubprocessError) as error:
                reason = log.read_text().strip().splitlines()[-1:] or [str(error)]
                sys.stderr.write(f"{peer.name}: can't be installed: {reason[0]} (see {log})\n")
                return 2
    done.write_text(" ".join(peer.packages))
    print(f"{peer.name}: installed in {folder}")
    return 0


def python_of(envs: Path, name: str) -> Path:
    """The interpreter of a peer's environment."""
    return envs / name / "bin" / "python"


def measure(peer: Peer, order: Order) -> Result:
    """Loads the model and answers the prompts, one after another."""
    start_s = time.perf_counter()
    tokens = peer.load(order)
    load_s = time.perf_counter() - start_s
    if order.limit_file is not None:
        hold(order)
    answers = [timed(tokens, prompt, order.new_tokens) for prompt in order.prompts]
    with suppress(PackageNotFoundError):
        return Result(version(peer.package), load_s, answers, peak_rss_bytes())
    return Result("unknown", load_s, answers, peak_rss_bytes())


def hold(order: Order) -> None:
    """Puts the cap in force after loading.

    Raises:
        MemoryError: the process uses more memory than the cap.
    """
    assert order.limit_file is not None and order.memory_bytes is not None
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    group = Path(order.limit_file).parent
    try:
        Path(order.limit_file).write_text(str(order.memory_bytes))
        with suppress(OSError):  # kernels without swap accounting
            (group / "memory.memsw.limit_in_bytes").write_text(str(order.memory_bytes))
        (group / "memory.max_usage_in_bytes").write_text("0")  # resets the peak
    except OSError as error:
        raise MemoryError(f"holds more than {order.memory_bytes} bytes after loading ({error.strerror})") from error


def timed(tokens: Tokens, prompt: list[int], new_tokens: int) -> Answer:
    """Times a prompt's first `new_tokens` tokens."""
    before, produced = read_bytes(), tokens(prompt)
    found, seconds, after_prompt = [], [], 0
    for _ in range(new_tokens):
        start_s = time.perf_counter()
        found.append(int(next(produced)))
        seconds.append(time.perf_counter() - start_s)
        after_prompt = after_prompt or read_bytes()
    return Answer(found, seconds, after_prompt - before, read_bytes() - after_prompt)


def read_bytes() -> int:
    """Bytes that this process has read from storage, by reads and page faults."""
    return _number("/proc/self/io", "read_bytes:")


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, including mapped files."""
    return _number("/proc/self/status", "VmHWM:") * 1024


def _number(file: str, name: str) -> int:
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])
