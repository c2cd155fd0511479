"""Writes a Mixture-of-Experts checkpoint of a published shape with random weights, to measure the data path.

    python scripts/make_checkpoint.py OUT [--shape olmoe-1b-7b] [--layers N] [--routing uniform] [--seed 0] [--check]

With `--routing uniform`, all experts are equally likely for every token; plain random weights route with extreme skew.
Token embeddings are random vectors of RMS 1, attention and experts add little to them (`BRANCH_RMS`), and routers are
random: each layer routes a token by its own random projection of the embedding. The head is random and not tied, so
greedy decoding visits the whole vocabulary; every few tokens the experts' output decides between the first two
candidates, so a wrong expert changes the text. Use it for throughput only: nothing about caching policies follows.

With `--routing local`, embeddings and head are made so that routing is balanced in the long run and local from token to
token (`topics.py`), for engines that can't replay recorded routing. A tokenizer (`t17` is token 17) and `prompts.txt`,
one prompt a line, are written too.

Peak memory is one block of `BLOCK_ITEMS` weights, and with local routing three times the embeddings in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from topics import Topics, make_topics
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

BLOCK_ITEMS = 1 << 24  # weights drawn at a time: 64 MiB in float32
SHARD_BYTES = 1 << 30
BRANCH_RMS = 0.1  # of one attention or experts block's output; the residual stream's is 1
BRANCH_LAYERS = 6  # in models of more layers each block's output is smaller, so that their sum is not larger
PROMPTS, PROMPT_TOKENS = 32, 64
ROUTER_STD = 1.5  # of router logits

# the published shapes; only the number of layers is cut, to at least 4 GiB of experts
SHAPES: dict[str, tuple[str, int, dict[str, Any]]] = {  # name -> (model type, layers, config)
    "olmoe-1b-7b": (
        "olmoe",
        6,  # of 16
        {
            "hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8,
            "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304,
        },
    ),
    "qwen1.5-moe": (
        "qwen2_moe",
        5,  # of 24
        {
            "hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4,
            "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936,
        },
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        4,  # of 48
        {
            "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
            "num_experts_per_tok": 8, "norm_topk_prob": True, "num_attention_heads": 32, "num_key_value_heads": 4,
            "head_dim": 128, "vocab_size": 151936,
        },
    ),
    "mixtral-8x7b": (
        "mixtral",
        2,  # of 32
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        },
    ),
    # gpt-oss-20b's layers, experts and top-k, so that its recorded routing can be replayed; a third of its width, and
    # Qwen3's modules, which other engines know
    "gpt-oss-20b-narrow": (
        "qwen3_moe",
        24,
        {
            "hidden_size": 1024, "intermediate_size": 4096, "moe_intermediate_size": 1024, "num_experts": 32,
            "num_experts_per_tok": 4, "norm_topk_prob": True, "num_attention_heads": 16, "num_key_value_heads": 4,
            "head_dim": 64, "vocab_size": 32768, "max_position_embeddings": 4096,
        },
    ),
}  # fmt: skip


def make_config(shape: str, layers: int | None) -> PreTrainedConfig:
    """The config of a published shape with `layers` layers."""
    model_type, default_layers, values = SHAPES[shape]
    config = AutoConfig.for_model(
        model_type, num_hidden_layers=layers or default_layers, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None, pad_token_id=None, dtype="bfloat16", **values,
    )  # fmt: skip
    config.architectures = [type(meta_model(config)).__name__]
    return config


def meta_model(config: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def tensor_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes as published: transformers' conversion to fused experts, reverted."""
    model: Any = meta_model(config)
    stored = revert_weight_conversion(model, model.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in sorted(stored.items())}


def draw(name: str, shape: tuple[int, ...], seed: int, layers: int, topics: Topics | None) -> Iterator[torch.Tensor]:
    """A tensor's values in bfloat16, in blocks of rows. Deterministic in name and seed."""
    if topics is not None and name in {"model.embed_tokens.weight", "lm_head.weight"}:
        yield (topics.embedding() if "embed" in name else topics.head()).to(torch.bfloat16)
        return
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    if len(shape) == 1:
        yield torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
        return
    rows, columns = shape
    block = max(1, BLOCK_ITEMS // columns)
    for start in range(0, rows, block):
        values = torch.randn(min(block, rows - start), columns, generator=generator)
        yield values.mul_(spread(name, columns, layers)).to(torch.bfloat16)


def spread(name: str, columns: int, layers: int) -> float:
    """Standard deviation of a matrix: keeps the RMS of its input, except routers and the ends of blocks."""
    branch_rms = BRANCH_RMS * min(1.0, BRANCH_LAYERS / layers) ** 0.5
    if "embed_tokens" in name:
        return 1.0
    if name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight")):
        return ROUTER_STD / math.sqrt(columns)
    if name.endswith("o_proj.weight"):
        return branch_rms / math.sqrt(columns)
    if name.endswith(("down_proj.weight", ".w2.weight")):
        return 6 * branch_rms / math.sqrt(columns)  # gated activations have RMS 0.5, gate weights an RMS sum below 0.5
    return 1 / math.sqrt(columns)


def shards(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Tensor names of each file; files have about `SHARD_BYTES`."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size_bytes = 2 * math.prod(shape)
        if files[-1] and filled + size_bytes > SHARD_BYTES:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size_bytes
    return files


def write_shard(
    path: Path, names: Iterable[str], shapes: dict[str, tuple[int, ...]], seed: int, layers: int, topics: Topics | None
) -> None:
    """Writes one safetensors file, tensor by tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + 2 * math.prod(shapes[name])
        header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            for block in draw(name, shapes[name], seed, layers, topics):
                file.write(block.view(torch.uint8).numpy())
        finish(file)


def finish(file: BinaryIO) -> None:
    """Flushes a file to the disk and evicts it from the page cache."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_words(folder: Path, topics: Topics, seed: int) -> None:
    """Writes a tokenizer in which token 17 is `t17`, and prompts that follow the same walk as the model's answers."""
    words = {f"t{token}": token for token in range(len(topics.topic))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    generator = torch.Generator().manual_seed(seed + 1)
    walks = [topics.walk(PROMPT_TOKENS, generator) for _ in range(PROMPTS)]
    lines = [" ".join(f"t{token}" for token in walk) for walk in walks]
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n")


def write_config(folder: Path, config: PreTrainedConfig) -> None:
    """Writes config.json; some values also under the names that other engines and transformers 4 read."""
    config.save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    rope = values.get("rope_parameters") or {}
    older = {"torch_dtype": values["dtype"], "rope_theta": rope.get("rope_theta")}
    older |= {"num_experts": values.get("num_local_experts")} if hasattr(config, "num_experts") else {}
    path.write_text(json.dumps(values | {name: value for name, value in older.items() if value is not None}, indent=2))


def write(folder: Path, config: PreTrainedConfig, seed: int, *, local: bool) -> None:
    """Writes the checkpoint into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    topics = make_topics(config.vocab_size, config.hidden_size, seed) if local else None
    if topics is not None:
        write_words(folder, topics, seed)
    shapes = tensor_shapes(config)
    files = shards(shapes)
    where: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        write_shard(folder / file, names, shapes, seed, config.num_hidden_layers, topics)
        where |= dict.fromkeys(names, file)
        print(f"{file}: {len(names)} tensors", file=sys.stderr)
    write_config(folder, config)
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    print(
        f"{folder}: {config.num_hidden_layers} layers, {routed / 2**30:.2f} GiB of routed experts, "
        f"{(sum(sizes.values()) - routed) / 2**30:.2f} GiB of other weights"
    )


class RoutingLog:
    """Records which experts a model's layers run: `[T, K]` per layer and call."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[list[torch.Tensor]] = []  # per layer
        for name, module in model.named_modules():
            if name.endswith("experts") and hasattr(module, "num_experts"):
                self.calls.append([])
                module.register_forward_pre_hook(self._recording_hook(self.calls[-1]))

    def clear(self) -> None:
        for calls in self.calls:
            calls.clear()

    @staticmethod
    def _recording_hook(calls: list[torch.Tensor]) -> Any:
        def record(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            calls.append(args[1].clone())

        return record


def entropy_bits(uses: torch.Tensor, experts: int) -> float:
    """Entropy of the use of experts; log2(E) if uniform. A sample of N uses falls short by about E / (1.4 N) bits."""
    counts = torch.bincount(uses.reshape(-1), minlength=experts).double()
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log2()).sum())


def reuse(steps: torch.Tensor) -> float:
    """Mean share of a token's experts that the token before used too; K/E if independent. `steps` is `[T, K]`."""
    pairs = zip(steps[:-1].tolist(), steps[1:].tolist(), strict=True)
    shares = [len(set(before) & set(after)) / len(after) for before, after in pairs]
    return sum(shares) / len(shares)


def check(folder: Path, tokens: int, seed: int) -> None:
    """Runs the model with a quarter of its experts resident, and prints statistics of its routing."""
    import finemoe

    with finemoe.load(folder, expert_memory="25%") as model, torch.no_grad():
        config = model.config
        log = RoutingLog(model)
        experts = next(m.num_experts for n, m in model.named_modules() if n.endswith("experts"))
        active = config.num_experts_per_tok
        ids = torch.randint(config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(seed))
        model(ids)
        prefill = [entropy_bits(calls[0], experts) for calls in log.calls]
        alike = [reuse(calls[0]) for calls in log.calls]
        log.clear()
        out = model.generate(ids[:, :32], max_new_tokens=tokens, do_sample=False)
        decoded = [torch.cat(calls[1:]) for calls in log.calls]  # the first call is the prompt
        new = out[0, 32:].tolist()
        uniform = math.log2(experts)
        print(f"usage entropy by layer, prompt of 512 random tokens: {rounded(prefill)} bits (uniform: {uniform:.2f})")
        print(
            f"usage entropy by layer, {tokens} greedy tokens: {rounded(entropy_bits(d, experts) for d in decoded)} bits"
        )
        print(f"reuse from token to token by layer, prompt: {rounded(alike)} (independent: {active / experts:.3f})")
        print(f"reuse from token to token by layer, greedy: {rounded(reuse(d) for d in decoded)}")
        print(f"greedy tokens: {len(set(new))} distinct of {len(new)}; most frequent {Counter(new).most_common(1)}")


def rounded(values: Iterable[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="olmoe-1b-7b")
    parser.add_argument("--layers", type=int, help="by default as many as make 4 GiB of experts")
    parser.add_argument(
        "--routing", choices=("uniform", "local"), default="uniform", help="uniform, or balanced and local"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--check", action="store_true", help="run the model afterwards and print statistics of its routing"
    )
    parser.add_argument("--check-tokens", type=int, default=128, help="tokens that the check decodes")
    parser.add_argument("--check-only", action="store_true", help="check an existing checkpoint")
    args = parser.parse_args()
    if not args.check_only:
        write(args.out, make_config(args.shape, args.layers), args.seed, local=args.routing == "local")
    if args.check or args.check_only:
        check(args.out, args.check_tokens, args.seed)


if __name__ == "__main__":
    main()
