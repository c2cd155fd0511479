"""Compares finemoe with other engines: same weights, same prompts, same memory, one process after another.

    python benchmarks/peers/run.py --model FOLDER --envs ENVS --work WORK --memory 2GiB --install

Each engine runs in its own process under a memory cgroup, the checkpoint evicted from the page cache; see README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from cap import Cap, CapError
from peer import Order, Result, python_of
from table import Row, render

from finemoe.bench.disk_probe import cached_share, evict
from finemoe.bench.run import describe_host
from finemoe.budget import format_bytes, parse_budget
from finemoe.checkpoint import locate, read_headers
from finemoe.checkpoint.headers import fingerprint
from finemoe.errors import ConfigError, FinemoeError
from finemoe.model import read_config, reference_model
from finemoe.model.generation import encode, load_tokenizer
from finemoe.system import available_cores

HERE = Path(__file__).parent
PEERS = {  # name -> script; in the order of the table
    "finemoe": "finemoe_peer.py",
    "transformers-disk-offload": "transformers_peer.py",
    "airllm": "airllm_peer.py",
    "llama.cpp": "llama_cpp_peer.py",
    "neurostream": "neurostream_peer.py",
}
OWN = {"finemoe", "transformers-disk-offload"}  # run in this program's environment
GGUF, READ_GGUF = "model.gguf", {"llama.cpp", "neurostream"}
REFERENCE = "transformers, no cap"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line.

    Raises:
        ConfigError: an invalid value; the message names its flag.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0], allow_abbrev=False)
    parser.add_argument("--model", help="folder of the checkpoint; by default the reference model")
    parser.add_argument("--envs", type=Path, required=True, help="where the engines' virtual environments are")
    parser.add_argument(
        "--work", type=Path, required=True, help="for converted models, which are kept, and scratch files"
    )
    parser.add_argument("--memory", default="2GiB", help="cap of every engine, or none (default: %(default)s)")
    parser.add_argument("--peers", default=",".join(PEERS), help="engines, separated by commas (default: %(default)s)")
    parser.add_argument("--prompts", type=Path, help="text, a prompt a line; by default FOLDER/prompts.txt")
    parser.add_argument("--prompts-limit", type=int, default=4, help="prompts to answer (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of each answer (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="of each engine (default: %(default)s)")
    parser.add_argument("--policy", default="finemoe", help="finemoe's (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=3600, help="give up on an engine (default: %(default)s)")
    parser.add_argument("--install", action="store_true", help="install missing engines")
    parser.add_argument("--no-reference", action="store_true", help="leave out the reference row, which has no cap")
    parser.add_argument("--json", type=Path, help="also write everything as JSON")
    arguments = parser.parse_args(argv)
    arguments.peers = tuple(dict.fromkeys(name.strip() for name in arguments.peers.split(",") if name.strip()))
    if unknown := [name for name in arguments.peers if name not in PEERS]:
        raise ConfigError(f"--peers: {unknown[0]!r} is not one of {', '.join(PEERS)}")
    for name, least in (("prompts_limit", 1), ("new_tokens", 2), ("threads", 1)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')}: {getattr(arguments, name)} is not at least {least}")
    arguments.memory_bytes = parse_memory(arguments.memory)
    return arguments


def parse_memory(text: str) -> int | None:
    """The cap in bytes; `None` for no cap.

    Raises:
        ConfigError: not a size.
    """
    if text.strip() == "none":
        return None
    try:
        size_bytes = parse_budget(text).size_bytes
    except FinemoeError:
        size_bytes = None
    if size_bytes is None:
        raise ConfigError(f"--memory: can't read {text!r}; give bytes (2GiB, 800MB) or none")
    return size_bytes


def read_prompts(folder: Path, file: Path | None, limit: int) -> list[list[int]]:
    """Token ids of the first `limit` prompts, with the chat template where the model has one.

    Raises:
        ConfigError: the file is missing or has no prompt.
    """
    chosen = file or folder / "prompts.txt"
    try:
        lines = [line for line in chosen.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"--prompts: {chosen}: can't be read ({error.strerror})") from error
    if not lines:
        raise ConfigError(f"--prompts: {chosen} has no prompt; give a file with a prompt on each line")
    tokenizer = load_tokenizer(folder)
    return [encode(tokenizer, line)[0].tolist() for line in lines[:limit]]


class Comparison:
    """One run of the comparison."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, order: Order) -> None:
        self._arguments = arguments
        self._folder = folder
        self._order = order
        self._work = Path(order.work)

    def reference(self) -> Row:
        """The reference: transformers with the model in memory and no cap."""
        log(f"{REFERENCE} ...")
        self._empty_cache()
        return self._run(REFERENCE, "transformers-disk-offload", replace(self._order, memory_bytes=None))

    def row(self, name: str) -> Row:
        """One engine under the cap."""
        log(f"{name} ...")
        if (reason := self._unavailable(name) or self._prepare(name)) is not None:
            return Row(name, error=reason)
        row = self._capped(name, at_once=True)
        if row.error is not None and "killed" in row.error:
            log("  killed; once more, with the cap in force only after loading")
            again = self._capped(name, at_once=False)
            return (
                again
                if again.error is None
                else replace(row, error=f"{row.error}; capped after loading: {again.error}")
            )
        return row

    def _capped(self, name: str, *, at_once: bool) -> Row:
        self._empty_cache()
        if self._order.memory_bytes is None:
            return self._run(name, name, self._order)
        with Cap(self._order.memory_bytes, "finemoe-peers", at_once=at_once) as cap:
            order = self._order if at_once else replace(self._order, limit_file=str(cap.limit_file))
            row = self._run(name, name, order, cap)
            return replace(row, usage=cap.usage(), at_once=at_once)

    def _unavailable(self, name: str) -> str | None:
        """Why an engine can't run; `None` if it can."""
        envs = self._arguments.envs
        if name in OWN or (envs / name / "installed").exists():
            return None
        install = ["python", f"benchmarks/peers/{PEERS[name]}", "install", str(envs)]
        if not self._arguments.install:
            return f"not installed; --install, or {' '.join(install)}"
        command = [sys.executable, str(HERE / PEERS[name]), *install[2:]]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        return None if done.returncode == 0 else last_line(done.stderr, done.returncode)

    def _prepare(self, name: str) -> str | None:
        if name in READ_GGUF and not (self._work / GGUF).exists():
            from gguf_file import write_gguf

            log("  converting to GGUF ...")
            try:
                write_gguf(self._folder, self._work / GGUF)
            except (KeyError, OSError, StopIteration, ValueError) as error:
                return f"can't be converted to GGUF: {error}"
        outcome = self._process(name, self._order, "prepare")
        return outcome if isinstance(outcome, str) else None

    def _run(self, title: str, name: str, order: Order, cap: Cap | None = None) -> Row:
        outcome = self._process(name, order, "run", cap)
        if isinstance(outcome, str):
            log(f"  failed: {outcome}")
            return Row(title, error=outcome)
        row = Row(title, outcome)
        log(f"  TTFT {row.ttft_s:.2f} s, {row.tok_s or 0:.2f} tokens/s")
        return row

    def _process(self, name: str, order: Order, command: str, cap: Cap | None = None) -> Result | str | None:
        """Runs a peer's script. Returns one line if it fails, and the result of `run`."""
        python = sys.executable if name in OWN else str(python_of(self._arguments.envs, name))
        with tempfile.TemporaryDirectory(prefix="finemoe-peers-") as scratch:
            order_file, result_file = Path(scratch) / "order.json", Path(scratch) / "result.json"
            order_file.write_text(json.dumps(asdict(order)))
            line = [python, str(HERE / PEERS[name]), command, str(order_file)]
            line += [str(result_file)] if command == "run" else []
            with (Path(scratch) / "output.txt").open("w+") as output:
                try:
                    done = subprocess.run(
                        line if cap is None else cap.command(line),
                        check=False,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        timeout=self._arguments.timeout_s,
                    )
                except subprocess.TimeoutExpired:
                    return f"took longer than {self._arguments.timeout_s:.0f} s"
                output.seek(0)
                text = output.read()
            if done.returncode:
                return last_line(text, done.returncode)
            return Result.from_dict(json.loads(result_file.read_text())) if command == "run" else None

    def _empty_cache(self) -> None:
        """Evicts all files: the cgroup does not count pages that are cached already."""
        shutil.rmtree(self._work / "offload", ignore_errors=True)
        files = [*locate(str(self._folder)).files, *(p for p in self._work.rglob("*") if p.is_file())]
        evict(files)
        share = cached_share([file for file in files if file.stat().st_size])
        if share is not None and share > 0.05:
            log(f"  {share:.0%} of the files stay in the page cache; another process may have mapped them")


def last_line(output: str, status: int) -> str:
    """Why a process failed, in one line."""
    if status in {-9, 137}:
        return "killed: it needs more memory than it was given"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else f"ended with exit status {status}"


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = parse(argv)
        checkpoint = locate(arguments.model or reference_model())
        folder = checkpoint.folder.resolve()
        read_config(folder)
        prompts = read_prompts(folder, arguments.prompts, arguments.prompts_limit)
        if arguments.memory_bytes is not None:
            with Cap(arguments.memory_bytes, "finemoe-peers-trial"):
                pass
        work = arguments.work.resolve() / fingerprint(folder, read_headers(checkpoint.files))
        work.mkdir(parents=True, exist_ok=True)
    except (CapError, FinemoeError, OSError) as error:
        way_out = "; --memory none runs without a cap" if isinstance(error, CapError) else ""
        print(f"run.py: error: {error}{way_out}", file=sys.stderr)
        return 2
    order = Order(
        str(folder), str(work), prompts, arguments.new_tokens, arguments.threads, arguments.memory_bytes,
        policy=arguments.policy,
    )  # fmt: skip
    comparison = Comparison(arguments, folder, order)
    rows = [] if arguments.no_reference else [comparison.reference()]
    rows += [comparison.row(name) for name in arguments.peers]
    reference = next((row for row in rows if row.result is not None), None)
    cap = "no cap" if arguments.memory_bytes is None else f"cap {format_bytes(arguments.memory_bytes)}"
    host = describe_host()
    print(f"model {checkpoint.name}, {cap}, {len(prompts)} prompts of {sum(map(len, prompts))} tokens, ", end="")
    print(f"{arguments.new_tokens} new tokens each, {arguments.threads} threads of {host['cpu']}\n")
    print(render(rows, reference))
    if arguments.json is not None:
        document = {
            "model": checkpoint.name, "host": host, "memory_bytes": arguments.memory_bytes, "order": asdict(order),
            "torch": torch.__version__, "rows": [row.as_dict(reference) for row in rows],
        }  # fmt: skip
        partial = arguments.json.with_name(f".{arguments.json.name}.partial")
        partial.write_text(json.dumps(document))
        partial.replace(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
