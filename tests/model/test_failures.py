"""Errors and interrupts during loading and generation: a one-line message, and the next request works."""

from __future__ import annotations

import errno
import os
import queue
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import modeling_utils

import finemoe
from finemoe.engine.expert_layer import ExpertLayer
from finemoe.errors import ExpertReadError, InvariantError
from finemoe.store import DiskStore
from finemoe.store.reader_threads import ReaderThreads
from finemoe.types import ByteRange
from tests.tiny import WEIGHTS, answer


def failing_after(reads: int) -> Callable[[DiskStore, ByteRange, int, memoryview], None]:
    original = DiskStore.read
    remaining = [reads]

    def read(store: DiskStore, run: ByteRange, start_bytes: int, into: memoryview) -> None:
        remaining[0] -= 1
        if remaining[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO), store.name(run.file))
        original(store, run, start_bytes, into)

    return read


@pytest.mark.parametrize("reads", [0, 1, 50, 200])
def test_a_read_error_during_generation_names_the_file_and_the_next_request_works(
    offloaded: Any, eager_model: Any, chat_folder: Path, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(DiskStore, "read", failing_after(reads))
        with pytest.raises(ExpertReadError) as caught:
            answer(offloaded, batch=2, new_tokens=30)
    message = str(caught.value)
    assert message.startswith(f"{chat_folder / WEIGHTS}: can't read expert ")
    assert message.endswith("Input/output error")
    assert "\n" not in message
    offloaded.finemoe.check_integrity()
    assert torch.equal(answer(offloaded, batch=2), answer(eager_model, batch=2))


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_a_file_truncated_while_in_use_is_a_read_error_until_it_is_complete_again(
    chat_folder: Path, eager_model: Any, tmp_path: Path, io: Any
) -> None:
    folder = Path(shutil.copytree(chat_folder, tmp_path / "model"))
    data = (folder / WEIGHTS).read_bytes()
    with finemoe.load(folder, expert_memory="20%", io=io) as model:
        os.truncate(folder / WEIGHTS, 10_000)
        with pytest.raises(ExpertReadError, match=r"model\.safetensors: can't read expert .*file ends before byte"):
            answer(model)
        with (folder / WEIGHTS).open("r+b") as file:
            file.write(data)
        assert torch.equal(answer(model), answer(eager_model))
        model.finemoe.check_integrity()


def open_files() -> int:
    """Number of open descriptors; 0 if the system can't count them."""
    descriptors = Path("/proc/self/fd")
    return len(list(descriptors.iterdir())) if descriptors.is_dir() else 0


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("owner", "name"),
    [(ReaderThreads, "wait"), (ReaderThreads, "submit"), (ReaderThreads, "poll"), (ExpertLayer, "parameters")],
    ids=["waiting", "submitting", "polling", "computing"],
)
@pytest.mark.parametrize("calls", [0, 7])
def test_ctrl_c_during_generation_leaves_the_model_usable(
    offloaded: Any, eager_model: Any, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, calls: int
) -> None:
    original, remaining = getattr(owner, name), [calls]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        remaining[0] -= 1
        if remaining[0] < 0:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(offloaded, new_tokens=20)
    offloaded.finemoe.check_integrity()
    assert torch.equal(answer(offloaded), answer(eager_model))


@pytest.mark.parametrize(
    "name", ["find_experts", "DiskStore", "RamSlotPool", "ReaderThreads", "choose_accumulator", "Engine", "ModelHandle"]
)
def test_ctrl_c_while_loading_frees_everything(
    chat_folder: Path, eager_model: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    original = modeling_utils.convert_and_load_state_dict_in_model
    threads, files = threading.active_count(), open_files()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["finemoe.model.loader"], name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            finemoe.load(chat_folder, policy="deepspeed")  # an asynchronous policy, with its thread
    deadline_s = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline_s:
        time.sleep(0.01)  # transformers' own loader threads take a while to end
    assert threading.active_count() == threads
    assert open_files() == files
    assert modeling_utils.convert_and_load_state_dict_in_model is original
    with finemoe.load(chat_folder) as model:
        assert torch.equal(answer(model), answer(eager_model))


INTERRUPTED = """
    import signal, sys, torch, finemoe
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    torch.set_num_threads(1)
    model = finemoe.load(sys.argv[1], expert_memory="20%")
    ids = torch.ones(1, 4, dtype=torch.long)
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    first = model.generate(ids, max_new_tokens=4, **options)
    for _ in range(3):
        print("running", flush=True)
        try:
            model.generate(ids, max_new_tokens=100_000, **options)
        except KeyboardInterrupt:
            model.finemoe.check_integrity()
        print("stopped", flush=True)
    assert torch.equal(model.generate(ids, max_new_tokens=4, **options), first)
    model.close()
    print("fine", flush=True)
"""


def interrupt_until(lines: queue.Queue[str], process: subprocess.Popen[str], expected: str) -> None:
    """Sends Ctrl-C, repeatedly if it has no effect: Python drops one that arrives in a destructor."""
    for _ in range(10):
        process.send_signal(signal.SIGINT)
        with suppress(queue.Empty):
            assert lines.get(timeout=5) == expected
            return
    raise AssertionError(f"no line {expected!r}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_a_real_ctrl_c_ends_a_generation_and_the_next_one_works(chat_folder: Path) -> None:
    program = [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(chat_folder)]
    lines: queue.Queue[str] = queue.Queue()
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        output = process.stdout
        assert output is not None

        def read_lines() -> None:
            for line in output:
                lines.put(line.strip())

        reader = threading.Thread(target=read_lines, daemon=True)
        reader.start()
        try:
            for delay_s in (0.5, 0.31, 0.17):
                assert lines.get(timeout=120) == "running"
                time.sleep(delay_s)
                interrupt_until(lines, process, "stopped")
            assert lines.get(timeout=60) == "fine"
        finally:
            process.kill()
            reader.join(10)


def test_verify_catches_a_slot_that_holds_the_wrong_bytes(
    chat_folder: Path, eager_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, remaining = DiskStore.read, [20]

    def damaged(store: DiskStore, run: ByteRange, start_bytes: int, into: memoryview) -> None:
        original(store, run, start_bytes, into)
        remaining[0] -= 1
        if remaining[0] < 0:
            into[-1] ^= 1

    with finemoe.load(chat_folder, expert_memory="20%", verify=True) as model:
        with monkeypatch.context() as patch:
            patch.setattr(DiskStore, "read", damaged)
            with pytest.raises(InvariantError, match=r"slot \d+ does not hold .*model\.safetensors"):
                answer(model)
        model.finemoe.evict_all()  # prefetches may have loaded more damaged experts since
        assert torch.equal(answer(model), answer(eager_model))


def test_out_of_memory_in_a_reader_fails_the_request_and_not_the_process(
    offloaded: Any, eager_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError("no buffer")

    with monkeypatch.context() as patch:
        patch.setattr(DiskStore, "read", exhausted)
        with pytest.raises(MemoryError):
            answer(offloaded)
    assert torch.equal(answer(offloaded), answer(eager_model))
