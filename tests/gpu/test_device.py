"""Values of `--device`, and settings that need or exclude a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finemoe.bench.config import BenchConfig
from finemoe.config import LoadConfig
from finemoe.errors import ConfigError
from finemoe.gpu.device import cuda_indices, open_devices


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("device", "indices"),
    [("cpu", ()), ("auto", (0,)), ("cuda", (0,)), ("cuda:1", (1,)), ("cuda:1,cuda:0", (1, 0))],
)
def test_devices_are_found_by_name(device: str, indices: tuple[int, ...]) -> None:
    assert cuda_indices(device) == indices


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert open_devices("auto") == open_devices("cpu") == ()
    with pytest.raises(ConfigError, match="--device: cuda, but torch finds no CUDA device here; give cpu or auto"):
        open_devices("cuda")


@pytest.mark.usefixtures("two_gpus")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="--device: there is no cuda:2; this machine has 2, from cuda:0 on"):
        cuda_indices("cuda:0,cuda:2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "gpu"}, "--device: can't read 'gpu'; give cpu, cuda, different devices"),
        ({"device": "cuda,cuda"}, "--device: can't read 'cuda,cuda'"),
        ({"device": "cuda:0,cuda:0"}, "--device: can't read 'cuda:0,cuda:0'"),
        ({"device": "cpu", "host_memory": "all"}, "--host-memory: has no effect on the CPU; give --device cuda too"),
        ({"device": "cpu", "expert_kernel": "eager"}, "--expert-kernel: has no effect on the CPU"),
        ({"device": "cuda", "link_bandwidth": "1GB"}, "--link-bandwidth: is for experiments on the CPU"),
        ({"host_memory": "much"}, "--host-memory: can't read 'much'"),
        ({"expert_kernel": "fast"}, "--expert-kernel: 'fast' is not one of auto, eager, grouped_mm"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoadConfig(**settings)


def test_bench_measures_on_the_cpu() -> None:
    assert BenchConfig().load_config("25%", "lru").device == "cpu"
    with pytest.raises(
        ConfigError, match=r"--device: bench measures on the CPU, not on cuda; see scripts/gpu_bench\.py"
    ):
        BenchConfig(device="cuda")
