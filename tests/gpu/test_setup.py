"""The way to a GPU, from the files to the answer, with devices that are the CPU: the same code, the same bits."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import finemoe
from finemoe.errors import BudgetError, ConfigError
from finemoe.gpu.cpu_device import CpuDevice
from tests.tiny import Make, answer, eager, edited, logits

CASES = [("mixtral", "float32"), ("mixtral", "bfloat16"), ("gpt_oss", "bfloat16"), ("nemotron_h", "bfloat16")]
Load = Callable[..., Any]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """`finemoe.load` on `cuda` devices that are the CPU."""

    def opened(device: str) -> list[CpuDevice]:
        return [CpuDevice() for _ in device.split(",")] if device.startswith("cuda") else []

    monkeypatch.setattr(importlib.import_module("finemoe.model.load"), "open_devices", opened)

    def on_devices(folder: Path, device: str = "cuda", **options: Any) -> Any:
        return finemoe.load(folder, device=device, verify=True, **options)

    return on_devices


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("device", ["cuda", "cuda:0,cuda:1,cuda:2"])
def test_answers_are_those_of_the_whole_model(load: Load, tiny: Make, case: tuple[str, str], device: str) -> None:
    folder = tiny(*case)
    whole = eager(folder)
    with load(folder, device, expert_memory="60%", expert_kernel="eager") as model:
        for _ in range(2):
            assert torch.equal(logits(model, batch=2), logits(whole, batch=2))
            assert torch.equal(answer(model), answer(whole))
        model.finemoe.check_integrity()
        stats = model.finemoe.stats()
    assert stats.expert_kernel == "eager"
    assert stats.misses
    assert stats.device == ",".join(["cpu"] * len(device.split(",")))


@pytest.mark.parametrize("policy", ["lru", "finemoe", "mixtral-offloading"])
def test_policies_prefetch_over_the_link(load: Load, tiny: Make, policy: str) -> None:
    folder = tiny("mixtral", "bfloat16")
    with load(folder, expert_memory="50%", host_memory="70%", policy=policy, expert_kernel="eager") as model:
        expected = answer(eager(folder), new_tokens=12)
        assert torch.equal(answer(model, new_tokens=12), expected)
        assert torch.equal(answer(model, new_tokens=12), expected)
        model.finemoe.check_integrity()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_grouped_matmuls_are_those_of_the_whole_model(load: Load, tiny: Make, case: tuple[str, str]) -> None:
    folder = tiny(*case)
    whole = eager(folder)
    whole.set_experts_implementation("grouped_mm")
    with load(folder, expert_memory="60%", expert_kernel="grouped_mm") as model:
        assert model.finemoe.stats().expert_kernel == "grouped_mm"
        for _ in range(2):
            assert torch.equal(logits(model, batch=2), logits(whole, batch=2))


def test_the_host_tier_may_be_smaller_than_the_model(load: Load, tiny: Make) -> None:
    folder = tiny("gpt_oss", "bfloat16")
    with load(folder, expert_memory="60%", host_memory="40%", expert_kernel="eager") as model:
        for _ in range(2):
            assert torch.equal(logits(model, batch=2), logits(eager(folder), batch=2))
        stats = model.finemoe.stats()
    assert stats.host_memory_bytes < stats.expert_memory_bytes
    assert stats.disk_bytes > stats.expert_bytes  # what was dropped was read again


def test_another_dtype_is_converted_on_the_way(load: Load, tiny: Make) -> None:
    folder = tiny("mixtral", "float32")
    with load(folder, expert_memory="60%", dtype="bfloat16", expert_kernel="eager") as model:
        assert torch.equal(logits(model, batch=2), logits(eager(folder, "bfloat16"), batch=2))
        stats = model.finemoe.stats()
    assert 2 * stats.expert_memory_bytes / stats.slots == pytest.approx(stats.expert_bytes / stats.experts, rel=0.1)


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
def test_answers_do_not_depend_on_the_budget(load: Load, tiny: Make, kernel: str) -> None:
    folder = tiny("mixtral", "bfloat16")
    with load(folder, expert_memory="all", expert_kernel=kernel) as model:
        expected = logits(model, batch=3)
        assert torch.equal(logits(model, batch=3), expected)
    for memory, device in (("30%", "cuda"), ("70%", "cuda:0,cuda:1")):
        with load(folder, device, expert_memory=memory, expert_kernel=kernel) as model:
            assert torch.equal(logits(model, batch=3), expected)


def test_a_model_that_is_closed_frees_its_threads(load: Load, tiny: Make) -> None:
    before = {thread.name for thread in threading.enumerate()}
    model = load(tiny("mixtral"), expert_memory="60%")
    assert {"finemoe-link-0", "finemoe-stage"} <= {thread.name for thread in threading.enumerate()}
    model.close()
    model.close()
    left = {thread.name for thread in threading.enumerate()} - before
    assert not any(name.startswith(("finemoe-link", "finemoe-stage", "finemoe-reader")) for name in left)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_memory": "1KiB"}, "--host-memory: 1KiB holds 0 of 32 experts; at least 4 are needed"),
        ({"expert_memory": "2KiB"}, "--expert-memory: 2KiB holds 0 of"),
        ({"link_bandwidth": "1GB"}, "--link-bandwidth: is for experiments on the CPU; give --device cpu too"),
    ],
)
def test_what_can_not_be_is_refused(load: Load, tiny: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tiny("mixtral"), **options)


def test_a_device_without_room_is_refused(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("finemoe.model.load")
    monkeypatch.setattr(module, "open_devices", lambda _: [CpuDevice(memory_bytes=1 << 10)])
    with pytest.raises(BudgetError, match=r"--expert-memory: .* do not fit on cpu, where 1.0 KiB are available"):
        finemoe.load(tiny("mixtral"), device="cuda")


def test_memory_that_can_not_be_pinned_is_refused(load: Load, tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError("cudaHostRegister: 2")

    monkeypatch.setattr(CpuDevice, "pin", refuse)
    with pytest.raises(BudgetError, match=r"--host-memory: \d+ bytes can't be pinned \(cudaHostRegister: 2\)"):
        load(tiny("mixtral"))


@pytest.mark.parametrize("family", ["deepseek_v3", "jamba", "phimoe", "qwen3_next"])
def test_families_of_every_layout_answer_as_on_the_cpu(load: Load, tiny: Make, family: str) -> None:
    folder = tiny(family)
    with load(folder, expert_memory="60%", expert_kernel="eager") as model:
        assert torch.equal(logits(model, batch=2), logits(eager(folder), batch=2))


def never_the_first_expert(tensors: dict[str, torch.Tensor]) -> None:
    """No token is routed to expert 0: its gate says what the least likely ones say, whatever the hidden state."""
    for name, tensor in tensors.items():
        if name.endswith("gate.weight"):
            tensor[0] = -tensor[1:].sum(0)


@pytest.mark.parametrize("policy", ["lru", "finemoe"])
def test_once_all_experts_are_there_nothing_is_read_back(
    load: Load, tiny: Make, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = edited(tiny("mixtral", "bfloat16"), tmp_path, never_the_first_expert)
    whole = eager(folder)
    whole.set_experts_implementation("grouped_mm")
    expected = [logits(whole, batch=batch) for batch in (1, 2, 3)]
    with load(folder, expert_memory="all", policy=policy) as model:
        for _ in range(2):  # emptied in between
            for _ in range(1000):
                for batch, right in zip((1, 2, 3), expected, strict=True):
                    assert torch.equal(logits(model, batch=batch), right)
                if model.finemoe.stats().resident == model.finemoe.stats().experts:
                    break  # the idle link has brought in what no token needed
            model.finemoe.reset_stats()
            with monkeypatch.context() as patched:
                patched.setattr(CpuDevice, "read_back", None)
                for batch, right in zip((1, 2, 3), expected, strict=True):
                    assert torch.equal(logits(model, batch=batch), right)
            stats = model.finemoe.stats()
            assert (stats.hit_rate, stats.misses) == (1, 0)
            assert stats.hits > stats.layers
            model.finemoe.evict_all()


@pytest.mark.parametrize("device", ["cuda", "cuda:0,cuda:1"])
def test_modules_that_only_run_by_their_own_forward_do(
    load: Load, tiny: Make, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("finemoe.model.loader"), "choose_path", lambda *_: None)
    folder = tiny("mixtral", "bfloat16")
    if "," in device:  # a module's own forward has all of its experts on one device
        with pytest.raises(ConfigError, match="--device: this model's experts run by their own code, on one device"):
            load(folder, device)
        return
    with load(folder, device, expert_memory="60%") as model:
        assert model.finemoe.stats().expert_kernel == "forward"
        assert torch.equal(answer(model), answer(eager(folder)))


def test_experts_that_are_counted_one_by_one_are_read_back(
    load: Load, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(tiny("mixtral", "bfloat16"), expert_memory="all") as model:
        for _ in range(1000):
            logits(model)
            if model.finemoe.stats().resident == model.finemoe.stats().experts:
                break
        model.finemoe._engine.cache_manager.watch()
        monkeypatch.setattr(CpuDevice, "read_back", None)
        with pytest.raises(TypeError):
            logits(model)
