"""docs/models.md: every family and how it fares, written by the very function that the tests run.

`python -m tests.families.page` writes it anew.
"""

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from tests.families.catalogue import catalogue
from tests.families.examine import Verdict, examine
from tests.families.factory import FAMILIES, why_not

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
DTYPES = (torch.float32, torch.bfloat16)

HEAD = """# Models

How each family of mixture-of-experts models in transformers {version} fares with its experts offloaded. Written by
`python -m tests.families.page`; the tests check that it still holds.

Each row is one model type, tried on a tiny model with random weights (8 experts, 3 active per token where the family
allows it), in float32 and in bfloat16, with a pool of the smallest size that loads, of half of the experts and of all.
**Exact** means that the logits of a left-padded batch, of cached decode steps after it and of `generate()` are equal to
those of transformers' own eager path, bit for bit. **Refused** means that `finemoe.load()` raises
`UnsupportedModelError` before it reads any weight, for the reason given. What was tried is the layout that
`save_pretrained()` writes, unquantized; images and sound were not.

On AMD's CPUs a float32 answer of transformers itself depends, in its last bits, on where weights happen to lie: MKL
adds a matrix up in another order if it does not start at a multiple of 16 bytes, and `from_pretrained()` leaves weights
where the files have them that it maps into memory. There the answers are equal to those of a model whose weights lie
where torch puts tensors, at multiples of 64 bytes.

Checkpoints whose experts are stored quantized as FP8 in blocks (`weight` and `weight_scale_inv`) or as MXFP4
(`_blocks` and `_scales`) load too, with the extra `quantized`. Experts stay quantized on disk and in memory and are
restored on use by transformers' own operations, so that the output is, bit for bit, that of the model that transformers
loads with `dequantize=True`; dense layers are restored while loading, as there. The tests try this on `deepseek_v3`,
`mixtral`, `qwen3_moe` and `gpt_oss`. Refused in one line: GPTQ, AWQ and all other methods, which transformers does not
restore expert by expert, and an FP8 checkpoint in another `--dtype` than its own, in which transformers can't run it.

{exact} families are exact, {refused} are refused, {untried} could not be tried.

| model type | class | status | why |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Documented:
    """What the page says: the transformers it was written with, and the status of each family."""

    version: str
    status: dict[str, str]


def documented(page: Path = PAGE) -> Documented:
    """Read the page."""
    text = page.read_text(encoding="utf-8")
    version = re.search(r"transformers (\S+) fares", text)
    rows = re.findall(r"^\| `(\S+)` \| `\w+` \| (\w+) \|", text, flags=re.MULTILINE)
    return Documented(version[1] if version else "", dict(rows))


def render(verdicts: dict[str, Verdict | None]) -> str:
    """The page; None stands for a family that could not be tried."""
    statuses = [verdict.status if verdict else "untried" for verdict in verdicts.values()]
    counts = {status: statuses.count(status) for status in ("exact", "refused", "untried")}
    lines = [HEAD.format(version=transformers.__version__, **counts)]
    for family, verdict in verdicts.items():
        status, why = (verdict.status, verdict.why) if verdict else ("untried", why_not(family) or "")
        lines.append(f"| `{family}` | `{catalogue()[family].class_name}` | {status} | {why.replace('|', '/')} |\n")
    return "".join(lines)


def try_all() -> dict[str, Verdict | None]:
    """Every family in every dtype: the first verdict that is not exact, or exact."""
    verdicts: dict[str, Verdict | None] = {}
    for family in FAMILIES:
        verdicts[family] = None
        if why_not(family):
            continue
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                verdict = examine(family, dtype, Path(folder))
            verdicts[family] = verdict
            if verdict.status != "exact":
                break
        sys.stderr.write(f"{family} {verdicts[family]}\n")
    return verdicts


def main() -> int:
    torch.set_num_threads(1)
    verdicts = try_all()
    wrong = {family: verdict.why for family, verdict in verdicts.items() if verdict and verdict.status == "different"}
    for family, why in wrong.items():
        sys.stderr.write(f"{family} is neither exact nor refused: {why}\n")
    if not wrong:
        PAGE.write_text(render(verdicts), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
