"""Writes docs/models.md, the support of every family, with the function that the tests run.

Run `python -m tests.families.page`.
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

Support for each family of mixture-of-experts models in transformers {version} with offloaded experts. Written by
`python -m tests.families.page`; the tests check that it still holds.

Each row is one model type, tested on a tiny model with random weights (8 experts, 3 active per token if the family
allows it), in float32 and in bfloat16, with the smallest pool that loads, and pools of half of the experts and of all.
**Exact** means that the logits of a left-padded batch, of cached decode steps after it and of `generate()` are equal to
those of transformers' own eager path, bit for bit. **Refused** means that `finemoe.load()` raises
`UnsupportedModelError` before it reads any weight, for the reason given. The tests use the layout that
`save_pretrained()` writes, unquantized, and text only: images and sound were not tested.

On AMD CPUs, a float32 answer of transformers itself depends, in its last bits, on the alignment of weights: MKL sums a
matrix in another order if it does not start at a multiple of 16 bytes, and `from_pretrained()` uses weights at their
offsets in the mapped files. There the answers are equal to those of a model whose weights are aligned to 64 bytes, as
torch allocates them.

Checkpoints whose experts are stored quantized as FP8 in blocks (`weight` and `weight_scale_inv`) or as MXFP4
(`_blocks` and `_scales`) load too, with the extra `quantized`. Experts stay quantized on disk and in memory and are
dequantized on use by transformers' own operations, so that the output equals, bit for bit, that of the model that
transformers loads with `dequantize=True`; dense layers are dequantized at load, as there. The tests cover
`deepseek_v3`, `mixtral`, `qwen3_moe` and `gpt_oss`. Refused with a one-line error: GPTQ, AWQ and all other methods,
which transformers does not dequantize expert by expert, and an FP8 checkpoint in another `--dtype` than its own, in
which transformers can't run it.

{exact} families are exact, {refused} are refused, {untried} could not be tested.

| model type | class | status | why |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Documented:
    """Content of the page: the version of transformers that it was written with, and the status of each family."""

    version: str
    status: dict[str, str]


def documented(page: Path = PAGE) -> Documented:
    """Reads the page."""
    text = page.read_text(encoding="utf-8")
    version = re.search(r"models in transformers (\S+) with", text)
    rows = re.findall(r"^\| `(\S+)` \| `\w+` \| (\w+) \|", text, flags=re.MULTILINE)
    return Documented(version[1] if version else "", dict(rows))


def render(verdicts: dict[str, Verdict | None]) -> str:
    """The page as Markdown; `None` is for a family that could not be tested."""
    statuses = [verdict.status if verdict else "untried" for verdict in verdicts.values()]
    counts = {status: statuses.count(status) for status in ("exact", "refused", "untried")}
    lines = [HEAD.format(version=transformers.__version__, **counts)]
    for family, verdict in verdicts.items():
        status, why = (verdict.status, verdict.why) if verdict else ("untried", why_not(family) or "")
        lines.append(f"| `{family}` | `{catalogue()[family].class_name}` | {status} | {why.replace('|', '/')} |\n")
    return "".join(lines)


def examine_all() -> dict[str, Verdict | None]:
    """Tests every family in every dtype; the verdict is the first that is not exact."""
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
    verdicts = examine_all()
    wrong = {family: verdict.why for family, verdict in verdicts.items() if verdict and verdict.status == "different"}
    for family, why in wrong.items():
        sys.stderr.write(f"{family} is neither exact nor refused: {why}\n")
    if not wrong:
        PAGE.write_text(render(verdicts), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
