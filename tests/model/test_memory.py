"""Peak memory stays within the budget, while loading and while generating."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

MIB = 1 << 20
MEASURE = """
    import json, sys, torch, finemoe
    from finemoe.system import peak_rss_bytes
    import transformers.models.mixtral.modeling_mixtral
    torch.set_num_threads(1)
    before = peak_rss_bytes()
    model = finemoe.load(sys.argv[1], expert_memory=sys.argv[2], policy="lru")  # other policies import numba
    loaded = peak_rss_bytes()
    model.generate(torch.arange(3, 60)[None], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    stats = model.finemoe.stats()
    print(json.dumps(stats.as_dict() | {"loading": loaded - before, "running": peak_rss_bytes() - before}))
"""


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 288 MiB of experts and few other weights."""
    folder = tmp_path_factory.mktemp("heavy")
    config = MixtralConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=32, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        MixtralForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(previous)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak from /proc")
def test_neither_loading_nor_running_exceeds_the_budget(heavy: Path) -> None:
    program = [sys.executable, "-c", textwrap.dedent(MEASURE), str(heavy), "36MiB"]
    measured = json.loads(subprocess.run(program, check=True, capture_output=True, text=True).stdout)
    assert measured["expert_bytes"] == 288 * MIB
    assert measured["expert_memory_bytes"] <= 36 * MIB
    assert measured["bytes_read"] > 72 * MIB
    # besides the pool: dense weights, a read buffer per thread, and activations
    assert measured["loading"] < 36 * MIB + 60 * MIB
    assert measured["running"] < 36 * MIB + 100 * MIB
