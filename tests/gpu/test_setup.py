"""Models on devices, end to end, with `CpuDevice`s: the same code as on GPUs, and the same bits as the full model."""

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
    """`finemoe.load` with `CpuDevice`s in place of `cuda` ones."""

    def opened(device: str) -> list[CpuDevice]:
        return [CpuDevice() for _ in device.split(",")] if device.startswith("cuda") else []

    monkeypatch.setattr(importlib.import_module("finemoe.model.load"), "open_devices", opened)

    def on_devices(folder: Path, device: str = "cuda", **options: Any) -> Any:
        return finemoe.load(folder, device=device, verify=True, **options)

    return on_devices


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("device", ["cuda", "cuda:0,cuda:1,cuda:2"])
def test_output_equals_the_full_models(load: Load, tiny: Make, case: tuple[str, str], device: str) -> None:
    folder = tiny(*case)
    full = eager(folder)
    with load(folder, device, expert_memory="60%", expert_kernel="eager") as model:
        for _ in range(2):
            assert torch.equal(logits(model, batch=2), logits(full, batch=2))
            assert torch.equal(answer(model), answer(full))
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
def test_grouped_output_equals_the_full_models(load: Load, tiny: Make, case: tuple[str, str]) -> None:
    folder = tiny(*case)
    full = eager(folder)
    full.set_experts_implementation("grouped_mm")
    with load(folder, expert_memory="60%", expert_kernel="grouped_mm") as model:
        assert model.finemoe.stats().expert_kernel == "grouped_mm"
        for _ in range(2):
            assert torch.equal(logits(model, batch=2), logits(full, batch=2))


def test_the_host_tier_may_be_smaller_than_the_model(load: Load, tiny: Make) -> None:
    folder = tiny("gpt_oss", "bfloat16")
    with load(folder, expert_memory="60%", host_memory="40%", expert_kernel="eager") as model:
        for _ in range(2):
            assert torch.equal(logits(model, batch=2), logits(eager(folder), batch=2))
        stats = model.finemoe.stats()
    assert stats.host_memory_bytes < stats.expert_memory_bytes
    assert stats.disk_bytes > stats.expert_bytes  # what was dropped was read again


def test_another_dtype_is_converted_in_the_host_tier(load: Load, tiny: Make) -> None:
    folder = tiny("mixtral", "float32")
    with load(folder, expert_memory="60%", dtype="bfloat16", expert_kernel="eager") as model:
        assert torch.equal(logits(model, batch=2), logits(eager(folder, "bfloat16"), batch=2))
        stats = model.finemoe.stats()
    assert 2 * stats.expert_memory_bytes / stats.slots == pytest.approx(stats.expert_bytes / stats.experts, rel=0.1)


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
def test_output_does_not_depend_on_the_budget(load: Load, tiny: Make, kernel: str) -> None:
    folder = tiny("mixtral", "bfloat16")
    with load(folder, expert_memory="all", expert_kernel=kernel) as model:
        expected = logits(model, batch=3)
        assert torch.equal(logits(model, batch=3), expected)
    for memory, device in (("30%", "cuda"), ("70%", "cuda:0,cuda:1")):
        with load(folder, device, expert_memory=memory, expert_kernel=kernel) as model:
            assert torch.equal(logits(model, batch=3), expected)


def test_close_ends_all_threads(load: Load, tiny: Make) -> None:
    before = {thread.name for thread in threading.enumerate()}
    model = load(tiny("mixtral"), expert_memory="60%")
    assert {"finemoe-copy-0", "finemoe-host-tier"} <= {thread.name for thread in threading.enumerate()}
    model.close()
    model.close()
    left = {thread.name for thread in threading.enumerate()} - before
    assert not any(name.startswith(("finemoe-copy-0", "finemoe-host-tier", "finemoe-reader")) for name in left)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_memory": "1KiB"}, "--host-memory: 1KiB holds 0 of 32 experts; at least 4 are needed"),
        ({"expert_memory": "2KiB"}, "--expert-memory: 2KiB holds 0 of"),
        ({"link_bandwidth": "1GB"}, "--link-bandwidth: is for experiments on the CPU; give --device cpu too"),
    ],
)
def test_impossible_settings_are_refused(load: Load, tiny: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tiny("mixtral"), **options)


def test_a_device_without_enough_memory_is_refused(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_output_of_every_layout_equals_the_full_models(load: Load, tiny: Make, family: str) -> None:
    folder = tiny(family)
    with load(folder, expert_memory="60%", expert_kernel="eager") as model:
        assert torch.equal(logits(model, batch=2), logits(eager(folder), batch=2))


def never_route_to_the_first_expert(tensors: dict[str, torch.Tensor]) -> None:
    """Sets expert 0's gate weights so that no token is routed to it."""
    for name, tensor in tensors.items():
        if name.endswith("gate.weight"):
            tensor[0] = -tensor[1:].sum(0)


@pytest.mark.parametrize("policy", ["lru", "finemoe"])
def test_nothing_is_read_back_once_all_experts_are_resident(
    load: Load, tiny: Make, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = edited(tiny("mixtral", "bfloat16"), tmp_path, never_route_to_the_first_expert)
    full = eager(folder)
    full.set_experts_implementation("grouped_mm")
    expected = [logits(full, batch=batch) for batch in (1, 2, 3)]
    with load(folder, expert_memory="all", policy=policy) as model:
        for _ in range(2):  # with an empty pool each
            for _ in range(1000):
                for batch, expected_logits in zip((1, 2, 3), expected, strict=True):
                    assert torch.equal(logits(model, batch=batch), expected_logits)
                if model.finemoe.stats().resident == model.finemoe.stats().experts:
                    break  # the idle link has loaded what no token needed
            model.finemoe.reset_stats()
            with monkeypatch.context() as patched:
                patched.setattr(CpuDevice, "read_back", None)
                for batch, expected_logits in zip((1, 2, 3), expected, strict=True):
                    assert torch.equal(logits(model, batch=batch), expected_logits)
            stats = model.finemoe.stats()
            assert (stats.hit_rate, stats.misses) == (1, 0)
            assert stats.hits > stats.layers
            model.finemoe.evict_all()


@pytest.mark.parametrize("device", ["cuda", "cuda:0,cuda:1"])
def test_a_module_without_an_accumulator_runs_by_its_own_forward(
    load: Load, tiny: Make, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("finemoe.model.loader"), "choose_accumulator", lambda *_: None)
    folder = tiny("mixtral", "bfloat16")
    if "," in device:  # a module's own forward needs all experts on one device
        with pytest.raises(ConfigError, match="--device: this model's experts run by their own code, on one device"):
            load(folder, device)
        return
    with load(folder, device, expert_memory="60%") as model:
        assert model.finemoe.stats().expert_kernel == "forward"
        assert torch.equal(answer(model), answer(eager(folder)))


def test_counting_every_expert_needs_the_routing(load: Load, tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(tiny("mixtral", "bfloat16"), expert_memory="all") as model:
        for _ in range(1000):
            logits(model)
            if model.finemoe.stats().resident == model.finemoe.stats().experts:
                break
        model.finemoe._engine.cache_manager.enable_expert_counts()
        monkeypatch.setattr(CpuDevice, "read_back", None)
        with pytest.raises(TypeError):
            logits(model)
