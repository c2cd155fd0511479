"""What goes wrong in mid-generation is said in one line, and the next request works."""

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
from finemoe.store.reader import ReaderThreads
from finemoe.types import ByteRange
from tests.tiny import WEIGHTS, answer


def broken_after(reads: int) -> Callable[[DiskStore, ByteRange, int, memoryview], None]:
    whole = DiskStore.read
    left = [reads]

    def read(store: DiskStore, run: ByteRange, start_bytes: int, into: memoryview) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO), store.name(run.file))
        whole(store, run, start_bytes, into)

    return read


@pytest.mark.parametrize("reads", [0, 1, 50, 200])
def test_a_read_error_in_mid_generation_names_the_file_and_the_next_request_works(
    offloaded: Any, whole: Any, chat_folder: Path, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(DiskStore, "read", broken_after(reads))
        with pytest.raises(ExpertReadError) as caught:
            answer(offloaded, batch=2, new_tokens=30)
    message = str(caught.value)
    assert message.startswith(f"{chat_folder / WEIGHTS}: can't read expert ")
    assert message.endswith("Input/output error")
    assert "\n" not in message
    offloaded.finemoe.check_integrity()
    assert torch.equal(answer(offloaded, batch=2), answer(whole, batch=2))


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_a_file_cut_off_while_it_is_used_is_a_read_error_until_it_is_whole_again(
    chat_folder: Path, whole: Any, tmp_path: Path, io: Any
) -> None:
    folder = Path(shutil.copytree(chat_folder, tmp_path / "model"))
    data = (folder / WEIGHTS).read_bytes()
    with finemoe.load(folder, expert_memory="20%", io=io) as model:
        os.truncate(folder / WEIGHTS, 10_000)
        with pytest.raises(ExpertReadError, match=r"model\.safetensors: can't read expert .*file ends before byte"):
            answer(model)
        with (folder / WEIGHTS).open("r+b") as file:
            file.write(data)
        assert torch.equal(answer(model), answer(whole))
        model.finemoe.check_integrity()


def open_files() -> int:
    """0 where they can't be counted."""
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
def test_ctrl_c_in_mid_generation_leaves_nothing_wedged(
    offloaded: Any, whole: Any, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, calls: int
) -> None:
    original, left = getattr(owner, name), [calls]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(offloaded, new_tokens=20)
    offloaded.finemoe.check_integrity()
    assert torch.equal(answer(offloaded), answer(whole))


@pytest.mark.parametrize(
    "name", ["find_experts", "DiskStore", "RamSlotPool", "ReaderThreads", "choose_accumulator", "Engine", "ModelHandle"]
)
def test_ctrl_c_while_loading_gives_everything_back(
    chat_folder: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    original = modeling_utils.convert_and_load_state_dict_in_model
    threads, files = threading.active_count(), open_files()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["finemoe.model.loader"], name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            finemoe.load(chat_folder, policy="deepspeed")  # one that runs on a thread of its own
    give_up_s = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < give_up_s:
        time.sleep(0.01)  # transformers' own loader threads end when they get to it
    assert threading.active_count() == threads
    assert open_files() == files
    assert modeling_utils.convert_and_load_state_dict_in_model is original
    with finemoe.load(chat_folder) as model:
        assert torch.equal(answer(model), answer(whole))


INTERRUPTED = """
    import signal, sys, torch, finemoe
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell inherit that it is ignored
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
    """Sends Ctrl-C, and again if nothing comes of it: Python drops one that meets a destructor."""
    for _ in range(10):
        process.send_signal(signal.SIGINT)
        with suppress(queue.Empty):
            assert lines.get(timeout=5) == expected
            return
    raise AssertionError(f"never {expected}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_a_real_ctrl_c_ends_a_generation_and_the_next_one_works(chat_folder: Path) -> None:
    program = [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(chat_folder)]
    lines: queue.Queue[str] = queue.Queue()
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        output = process.stdout
        assert output is not None

        def listen() -> None:
            for line in output:
                lines.put(line.strip())

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            for delay_s in (0.5, 0.31, 0.17):
                assert lines.get(timeout=120) == "running"
                time.sleep(delay_s)
                interrupt_until(lines, process, "stopped")
            assert lines.get(timeout=60) == "fine"
        finally:
            process.kill()
            listener.join(10)


def test_verify_catches_a_slot_that_holds_the_wrong_bytes(
    chat_folder: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_read, left = DiskStore.read, [20]

    def damaged(store: DiskStore, run: ByteRange, start_bytes: int, into: memoryview) -> None:
        whole_read(store, run, start_bytes, into)
        left[0] -= 1
        if left[0] < 0:
            into[-1] ^= 1

    with finemoe.load(chat_folder, expert_memory="20%", verify=True) as model:
        with monkeypatch.context() as patch:
            patch.setattr(DiskStore, "read", damaged)
            with pytest.raises(InvariantError, match=r"slot \d+ does not hold .*model\.safetensors"):
                answer(model)
        model.finemoe.evict_all()  # with what prefetches have brought in since, no less damaged, and found out too
        assert torch.equal(answer(model), answer(whole))


def test_out_of_memory_in_a_reader_fails_the_request_and_not_the_process(
    offloaded: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError("no buffer")

    with monkeypatch.context() as patch:
        patch.setattr(DiskStore, "read", exhausted)
        with pytest.raises(MemoryError):
            answer(offloaded)
    assert torch.equal(answer(offloaded), answer(whole))
