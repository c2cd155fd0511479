"""On a real GPU, output equals the full model's, whatever is resident and however late copies are.

Run with `FINEMOE_TEST_GPU=1 pytest -m gpu tests/gpu`; skipped without a CUDA device.
"""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import finemoe
from finemoe.errors import BudgetError
from finemoe.gpu.device import CudaDevice
from tests.tiny import Make, eager, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and FINEMOE_TEST_GPU=1"),
]
CASES = [("mixtral", "float32"), ("mixtral", "bfloat16"), ("gpt_oss", "bfloat16"), ("nemotron_h", "bfloat16")]


def logits(model: Any, batch: int) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(**{name: each.cuda() for name, each in prompt(batch).items()}).logits
    return output


def answer(model: Any, new_tokens: int = 12) -> torch.Tensor:
    given = {name: each.cuda() for name, each in prompt().items()}
    output: torch.Tensor = model.generate(
        **given, do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=new_tokens
    )
    return output


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("memory", ["50%", "all"])
def test_eager_output_equals_the_full_models(tiny: Make, case: tuple[str, str], memory: str) -> None:
    folder = tiny(*case)
    full = eager(folder).cuda()
    with finemoe.load(folder, device="cuda", expert_memory=memory, expert_kernel="eager", verify=True) as model:
        for batch in (1, 2, 3):
            assert torch.equal(logits(model, batch), logits(full, batch))
        assert torch.equal(answer(model), answer(full))
        model.finemoe.check_integrity()


def test_grouped_output_equals_the_full_models(tiny: Make) -> None:
    folder = tiny("mixtral", "bfloat16")
    full = eager(folder).cuda()
    full.set_experts_implementation("grouped_mm")
    with finemoe.load(folder, device="cuda", expert_memory="60%", expert_kernel="grouped_mm") as model:
        for batch in (1, 2, 3):
            assert torch.equal(logits(model, batch), logits(full, batch))


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
@pytest.mark.parametrize("policy", ["lru", "finemoe", "mixtral-offloading"])
def test_output_does_not_depend_on_residency(tiny: Make, kernel: str, policy: str) -> None:
    folder = tiny("mixtral", "bfloat16")
    options: Any = {"device": "cuda", "expert_kernel": kernel, "policy": policy}
    with finemoe.load(folder, expert_memory="all", **options) as model:
        expected = [logits(model, batch) for batch in (1, 2, 3)]
    with finemoe.load(folder, expert_memory="45%", host_memory="60%", **options) as model:
        generator = random.Random(0)
        for _ in range(30):
            batch = generator.randrange(3)
            if generator.random() < 0.2:
                model.finemoe.evict_all()
            assert torch.equal(logits(model, batch + 1), expected[batch])
        model.finemoe.check_integrity()
        assert model.finemoe.stats().stall_s >= 0


def test_events_order_copies_and_kernels() -> None:
    device = CudaDevice(0)
    size = 1 << 24
    host = torch.zeros(8 * size, dtype=torch.uint8)
    device.pin(host)
    try:
        parts = host.view(8, size)
        for value, part in enumerate(parts):
            part.fill_(value)
        slot = device.allocate(size)
        busy = torch.randn(4096, 4096, device="cuda")
        sums = []
        used = device.record_compute()
        for step in range(40):
            device.copies_wait(used)
            device.copy(slot, parts[step % 8])
            device.compute_wait(device.record_copies())
            if step % 3 == 0:
                busy = (busy @ busy).clamp_(-1, 1)  # the compute stream falls behind
            sums.append(slot.to(torch.int64).sum())
            used = device.record_compute()
        read = device.read_back([torch.stack(sums)])[0]
        assert read.tolist() == [step % 8 * size for step in range(40)]
        later, earlier = device.record_copies(), used
        later.wait()
        earlier.wait()
        assert later.done()
        assert earlier.since_s(earlier) == 0
    finally:
        torch.cuda.synchronize()
        device.unpin(host)


def test_a_budget_beyond_the_memory_is_refused_in_one_line(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaDevice, "available_bytes", lambda _: 1 << 10)
    with pytest.raises(BudgetError, match=r"--expert-memory: .* do not fit on cuda:0"):
        finemoe.load(tiny("mixtral"), device="cuda", expert_memory="50%")


def test_close_frees_the_memory(tiny: Make) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = finemoe.load(tiny("mixtral"), device="cuda", expert_memory="50%")
    answer(model)
    assert torch.cuda.memory_allocated() > before
    model.close()
    del model
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_missing_devices_are_refused(tiny: Make) -> None:
    with pytest.raises(finemoe.FinemoeError, match="there is no cuda:63"):
        finemoe.load(tiny("mixtral"), device="cuda:63")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_output_of_one(tiny: Make) -> None:
    folder: Path = tiny("mixtral", "bfloat16")
    full = eager(folder).cuda()
    with finemoe.load(folder, device="cuda:0,cuda:1", expert_memory="60%", expert_kernel="eager") as model:
        assert torch.equal(logits(model, 2), logits(full, 2))
        assert torch.equal(answer(model), answer(full))
