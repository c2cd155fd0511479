"""Failures while a model loads or runs: a one-line error, and everything stays usable or is closed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finemoe.errors import BudgetError, CheckpointError, ConfigError, ExpertReadError, FinemoeError
from finemoe.gguf import address_space, binding, relocation
from tests.gguf.conftest import MakeFile

Load = Callable[..., Any]


def copy(path: Path, folder: Path) -> Path:
    copied = folder / "model.gguf"
    copied.write_bytes(path.read_bytes())
    return copied


def maps_of(path: Path) -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if str(path) in line or "finemoe-" in line]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_read_error_ends_the_request_and_not_the_process(random_gguf: MakeFile, loaded: Load, tmp_path: Path) -> None:
    from tests.gguf.run import LONG, answer

    path = copy(random_gguf(), tmp_path)
    model = loaded(path, "25%")
    expected, _ = answer(model, LONG, 8)
    model.parts.runner.forget()
    size = path.stat().st_size
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(size // 2)
    with pytest.raises(ExpertReadError, match=r"model\.gguf: can't read expert \d+ of MoE layer \d+"):
        answer(model, LONG[::-1], 8)
    assert model.parts.engine.pool.resident == 0
    model.parts.engine.check_integrity()
    path.write_bytes(content)  # restore the file: the model works again
    assert answer(model, LONG, 8)[0] == expected


def test_an_error_within_the_callback_ends_the_pass(random_gguf: MakeFile, loaded: Load) -> None:
    from tests.gguf.run import LONG, answer

    model = loaded(random_gguf(), "25%")
    expected = answer(model, LONG, 4)[0]
    hold, calls = model.parts.engine.hold, []

    def fail(event: Any) -> None:
        calls.append(event.layer)
        if len(calls) == 3:
            raise MemoryError("no more")
        hold(event)

    model.parts.engine.hold = fail
    model.parts.runner.forget()
    with pytest.raises(MemoryError, match="no more"):
        answer(model, LONG, 4)
    assert len(calls) == 3  # the library reached no further layer
    assert not model.parts.runner.tokens
    model.parts.engine.hold = hold
    assert answer(model, LONG, 4)[0] == expected


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_ends_an_answer_and_the_next_one_is_right(random_gguf: MakeFile, loaded: Load, signals: int) -> None:
    from tests.gguf.run import LONG, answer

    model = loaded(random_gguf(), "25%")
    expected = answer(model, LONG, 6)[0]
    hold, seen = model.parts.engine.hold, []

    def interrupt(event: Any) -> None:
        seen.append(event.layer)
        if len(seen) in {5, 6} and len(seen) < 5 + signals:
            os.kill(os.getpid(), signal.SIGINT)
        hold(event)

    model.parts.engine.hold = interrupt
    model.parts.runner.forget()
    with pytest.raises(KeyboardInterrupt):
        answer(model, LONG * 4, 60)  # long: the main thread may be scheduled late
    model.parts.engine.hold = hold
    model.parts.engine.check_integrity()
    model.parts.runner.forget()
    assert answer(model, LONG, 6)[0] == expected


def test_closing_gives_everything_back(random_gguf: MakeFile, loaded: Load, tmp_path: Path) -> None:
    from tests.gguf.run import SHORT, answer

    path = copy(random_gguf(), tmp_path)
    before = open_files(), threading.active_count()
    model = loaded(path, "50%")
    answer(model, SHORT, 4)
    assert maps_of(path)
    model.close()
    model.close()
    del model
    assert not maps_of(path)
    assert open_files() <= before[0]
    assert threading.active_count() <= before[1]


def test_a_closed_model_says_so(random_gguf: MakeFile, loaded: Load) -> None:
    model = loaded(random_gguf(), "50%")
    model.close()
    with pytest.raises(FinemoeError, match="was closed"):
        list(model.generate([1, 2], 3))


def test_a_failed_load_gives_everything_back(
    random_gguf: MakeFile, loaded: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy(random_gguf(), tmp_path)
    before = open_files()
    monkeypatch.setattr("finemoe.gguf.expert_memory._MAX_MAP_COUNT", tmp_path / "limit")
    (tmp_path / "limit").write_text("100\n")
    with pytest.raises(ConfigError, match=r"vm\.max_map_count is 100; run: sysctl -w"):
        loaded(path, "50%")
    assert not maps_of(path)
    assert open_files() <= before


def test_ctrl_c_within_a_load_ends_it(
    random_gguf: MakeFile, loaded: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finemoe.gguf import load

    path = copy(random_gguf(), tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(load._DensePart, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        loaded(path, "50%")
    assert not maps_of(path)
    monkeypatch.undo()
    loaded(path, "50%")


def test_a_file_that_is_replaced_while_it_is_loaded_is_refused(
    random_gguf: MakeFile, loaded: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy(random_gguf(), tmp_path)
    library = binding.load_library

    def replace() -> Any:
        (tmp_path / "other").write_bytes(path.read_bytes())
        (tmp_path / "other").rename(path)
        return library()

    monkeypatch.setattr("finemoe.gguf.load.load_library", replace)
    with pytest.raises(CheckpointError, match="has changed while it was loaded"):
        loaded(path, "50%")


def test_an_unknown_architecture_is_named(random_gguf: MakeFile, loaded: Load, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(random_gguf().read_bytes().replace(b"qwen3moe", b"nosuchmo"))
    with pytest.raises(CheckpointError, match=r"can't load it: .*unknown model architecture: 'nosuchmo'"):
        loaded(path, "50%")


def test_a_refused_memory_file_is_said(random_gguf: MakeFile, loaded: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(ConfigError, match="need memfd_create, which this system refuses"):
        loaded(random_gguf(), "50%")


def test_a_budget_below_the_minimum_names_it(random_gguf: MakeFile, loaded: Load) -> None:
    with pytest.raises(BudgetError, match=r"holds 1 of 32 experts; at least 2 are needed for one token: \d+ bytes"):
        loaded(random_gguf(), "5%")


@pytest.mark.parametrize(
    ("tokens", "reason"), [([], "is empty"), ([-1], "outside"), ([300], "outside"), ([1] * 512, "context holds 512")]
)
def test_a_prompt_that_can_not_run_is_refused(
    random_gguf: MakeFile, loaded: Load, tokens: list[int], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        list(loaded(random_gguf(), "50%").generate(tokens, 3))


def test_logits_that_are_no_numbers_end_the_answer(random_gguf: MakeFile, loaded: Load, tmp_path: Path) -> None:
    from finemoe.gguf.file import open_gguf

    path = copy(random_gguf(), tmp_path)
    info = open_gguf(path).tensors["output_norm.weight"]
    with path.open("r+b") as file:
        file.seek(info.offset_bytes)
        file.write(np.full(info.size_bytes // 4, np.nan, np.float32).tobytes())
    with pytest.raises(CheckpointError, match="logits are not finite"):
        list(loaded(path, "50%").generate([1, 2, 3], 3))


def test_an_unbound_expert_can_not_be_read(random_gguf: MakeFile) -> None:
    """Runs in a separate process, which must crash."""
    import subprocess
    import sys

    program = """
import sys
from pathlib import Path
from tests.gguf.run import load
from finemoe.gguf.address_space import view
model = load(Path(sys.argv[1]), "25%")
first = model.parts.expert_index.byte_ranges((0, 0))[0]
print("here", flush=True)
view(model.parts.starts[first.file] + first.file_offset_bytes, 1)[0]
print("still here")
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(random_gguf())], capture_output=True, text=True, check=False
    )
    assert run.returncode == -signal.SIGSEGV
    assert run.stdout == "here\n"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": lambda _: "1.2.3"}, r"xllamacpp 1\.2\.3 is installed, 2026\.10\.11549 is needed"),
        ({"sys.platform": "win32"}, "run on Linux only, not on win32"),
    ],
)
def test_a_library_that_does_not_fit_is_refused_in_one_line(
    library: None, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reason: str
) -> None:
    for name, value in change.items():
        monkeypatch.setattr(f"finemoe.gguf.binding.{name}", value)
    with pytest.raises(ConfigError, match=reason) as error:
        binding.find_library()
    assert "\n" not in str(error.value)


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "PACKAGE", "no-such-package-anywhere")
    with pytest.raises(ConfigError, match=r'need no-such-package-anywhere .*; pip install "finemoe\[gguf\]"'):
        binding.find_library()


def test_a_cpu_without_the_instructions_is_told() -> None:
    assert binding.cpu_lacks("flags : fpu sse4_2 avx f16c") == ["AVX2", "FMA"]
    assert binding.cpu_lacks("flags : avx avx2 fma f16c") == []


def test_relocation_entries_are_restored(library: None) -> None:
    path = binding.find_library()
    binding.load_library()
    entries = relocation.find_entries(path, "mmap")
    assert entries
    base = next(each.start - each.file_offset_bytes for each in address_space.ranges() if each.path == str(path))

    def words() -> list[int]:
        return [relocation._word(base + entry).value for entry in entries]

    def allowed() -> list[int]:
        return [relocation._allowed(base + entry) for entry in entries]

    before = words(), allowed()
    with relocation.replaced(path, {"mmap": 4096}):
        assert set(words()) == {4096}
    assert (words(), allowed()) == before


def test_a_function_that_is_not_called_can_not_be_replaced(library: None) -> None:
    path = binding.find_library()
    with (
        pytest.raises(relocation.RelocationError, match="does not call no_such_function"),
        relocation.replaced(path, {"no_such_function": 1}),
    ):
        pass
