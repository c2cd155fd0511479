"""Benchmarks expert offloading to a GPU: link bandwidth, hit path, and policies under forced routing.

    python scripts/gpu_bench.py OUT.json [--shapes mixtral-8x7b,qwen1.5-moe,gpt-oss-20b] [--memory 25%,50%,75%]
        [--policies lru,finemoe] [--trace gpt-oss-20b=FILE] [--folder /dev/shm/finemoe] [--minutes 9]

Weights are generated in `--folder`, which is the disk tier (put it in memory: the disk is not measured), and removed
afterwards. For each shape, rows are: the model resident on the GPU, by transformers (`grouped_mm` and `eager`) and by
finemoe (`all`: the cost of its hit path); finemoe at each budget under each policy; and transformers' CPU offload
(accelerate) with the memory of the first budget. All rows take the same routing: a recorded trace where `--trace` gives
one, else a synthetic one, from which nothing about policies follows. Rows beyond `--minutes` are left out and listed.

`--dry-run` runs the same code at tiny sizes on the CPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["FINEMOE_MAPS"] = "none"  # before finemoe is imported: maps of forced routing are not kept

import torch
import transformers
from gpu_subject import KINDS, make_config, write_checkpoint, write_routing

import finemoe
from finemoe.gpu.cpu_device import CpuDevice
from finemoe.gpu.device import Device, open_devices
from finemoe.model import model_class
from finemoe.trace.forced_routing import replay_routing

Row = dict[str, Any]


def link_rates(device: Device, size_bytes: int, chunks: tuple[int, ...]) -> dict[str, float]:
    """Bandwidth of copies from pinned memory, bytes/s by chunk size: the best of three."""
    source = torch.zeros(size_bytes, dtype=torch.uint8)
    device.pin(source)
    into = device.allocate(size_bytes)
    rates = {}
    for chunk in chunks:
        best_s = float("inf")
        for _ in range(3):
            start = device.record_copies()
            for begin in range(0, size_bytes, chunk):
                device.copy(into[begin : begin + chunk], source[begin : begin + chunk])
            end = device.record_copies()
            end.wait()
            best_s = min(best_s, end.since_s(start))
        rates[str(chunk)] = size_bytes / max(best_s, 1e-9)
    device.unpin(source)
    return rates


def timed(model: Any, ids: torch.Tensor, new_tokens: int, wait: Callable[[], object]) -> tuple[float, list[float], str]:
    """TTFT and the time of each later token, in seconds, and the first tokens as text."""
    cache, tokens, seconds = None, [], []
    for step in range(new_tokens):
        wait()
        start_s = time.perf_counter()
        with torch.no_grad():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(ids))  # waits for the device
        seconds.append(time.perf_counter() - start_s)
        del output, step
    return seconds[0], seconds[1:], " ".join(map(str, tokens[:8]))


def measure(model: Any, arguments: argparse.Namespace, trace: Path, wait: Callable[[], object]) -> Row:
    """One row: a request to warm up, then `--requests` measured ones, under the same forced routing."""
    replay = replay_routing(model, trace)
    device = next(p.device for p in model.parameters() if p.device.type != "meta")
    draw = torch.Generator().manual_seed(0)
    shape = arguments.requests + 1, 1, arguments.prompt_tokens
    prompts = torch.randint(3, model.config.vocab_size, shape, generator=draw).to(device)
    if hasattr(model, "finemoe") and (stats := model.finemoe.stats()).slots == stats.experts:
        for prompt in prompts:  # makes all needed experts resident, so that only the hit path is measured
            timed(model, prompt, arguments.new_tokens, wait)
        replay.restart()
    ttfts, tpots, digests = [], [], []
    for request, prompt in enumerate(prompts):
        if request == 1 and hasattr(model, "finemoe"):
            model.finemoe.reset_stats()
        ttft_s, steps_s, digest = timed(model, prompt, arguments.new_tokens, wait)
        if request:
            ttfts.append(ttft_s)
            tpots += steps_s
            digests.append(digest)
    row = {
        "ttft_ms": 1000 * statistics.mean(ttfts),
        "tpot_ms": 1000 * statistics.mean(tpots),
        "tpot_p50_ms": 1000 * statistics.median(tpots),
        "tokens": digests,
    }
    if hasattr(model, "finemoe"):
        stats = model.finemoe.stats()
        row |= {name: getattr(stats, name) for name in (
            "slots", "experts", "hit_rate", "late_rate", "miss_rate", "host_computed", "precision", "wasted",
            "bytes_read", "stall_s", "stalled_bytes", "disk_bytes", "expert_kernel", "expert_memory_bytes",
            "host_memory_bytes",
        )}  # fmt: skip
    return row


class Bench:
    """All rows of one run, written out after each."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.cuda = not arguments.dry_run
        self.device = open_devices("cuda")[0] if self.cuda else CpuDevice()
        self.end_s = time.monotonic() + 60 * arguments.minutes
        size_bytes, chunks = (1 << 30, (4 << 20, 32 << 20, 1 << 30)) if self.cuda else (1 << 16, (1 << 12, 1 << 16))
        self.result: dict[str, Any] = {
            "device": torch.cuda.get_device_name(0) if self.cuda else "dry run on the CPU: times mean nothing",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "link_bytes_s": link_rates(self.device, size_bytes, chunks),
            "shapes": {},
            "rows": [],
            "left_out": [],
        }

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def row(self, shape: str, name: str, make: Callable[[], Any], trace: Path, tokens: int | None = None) -> None:
        """Measures one row, unless time is up.

        Args:
            shape: of the model.
            name: of the row.
            make: loads the model.
            trace: routing to force.
            tokens: measure one request of at most this many tokens; `None`: as the flags say.
        """
        arguments = argparse.Namespace(**vars(self.arguments))
        if tokens is not None:
            arguments.requests, arguments.new_tokens = 1, min(tokens, arguments.new_tokens)
        if time.monotonic() > self.end_s:
            self.result["left_out"].append(f"{shape}: {name} (no time left)")
            return
        start_s = time.monotonic()
        try:
            model = make()
            load_s = time.monotonic() - start_s
            row = measure(model, arguments, trace, self.wait)
        except (finemoe.FinemoeError, ImportError, MemoryError, RuntimeError, ValueError) as error:
            self.result["left_out"].append(f"{shape}: {name} ({type(error).__name__}: {str(error).splitlines()[0]})")
            return
        finally:
            if "model" in locals() and hasattr(model, "finemoe"):
                model.close()
            model = None
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()
        if row.get("stall_s"):
            best = max(self.result["link_bytes_s"].values())
            row["link_utilisation"] = row["stalled_bytes"] / (row["stall_s"] * best)
        self.result["rows"].append({"shape": shape, "name": name, "load_s": load_s} | row)
        self.save()

    def save(self) -> None:
        text = json.dumps(self.result, indent=1)
        partial = self.arguments.out.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.replace(self.arguments.out)
        last = self.result["rows"][-1] if self.result["rows"] else {}
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in last.items()), flush=True)

    def shape(self, shape: str) -> None:
        """All rows of one shape."""
        arguments = self.arguments
        folder = arguments.folder / shape
        config = make_config(shape, arguments.experts_gib)
        try:
            expert_bytes = write_checkpoint(folder, config, self.device.torch_device)
            trace = arguments.traces.get(shape)
            if trace is None:
                rows = arguments.requests + 1, arguments.prompt_tokens, arguments.new_tokens
                trace = write_routing(folder / "routing.trace", config, *rows)
            self.result["shapes"][shape] = {
                "layers": config.num_hidden_layers,
                "expert_bytes": expert_bytes,
                "routing": "recorded" if shape in arguments.traces else "synthetic",
            }
            for kernel in ("grouped_mm", "eager"):
                self.row(shape, f"transformers {kernel}", lambda k=kernel: self.resident(folder, k), trace)
                self.row(
                    shape, f"finemoe all {kernel}",
                    lambda k=kernel: self.offloaded(folder, "all", "lru", expert_kernel=k), trace,
                )  # fmt: skip
            for memory in arguments.memory.split(","):
                for policy in arguments.policies.split(","):
                    self.row(
                        shape, f"finemoe {memory} {policy}",
                        lambda m=memory, p=policy: self.offloaded(folder, m, p), trace,
                    )  # fmt: skip
            first = arguments.memory.split(",")[0]
            self.row(
                shape, f"finemoe {first} lru host-compute",
                lambda: self.offloaded(folder, first, "lru", host_compute="auto"), trace,
            )  # fmt: skip
            share = float(first.rstrip("%")) / 100
            self.row(
                shape, "transformers CPU offload", lambda: self.accelerate(folder, share * expert_bytes), trace,
                tokens=8,
            )  # fmt: skip
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def offloaded(self, folder: Path, memory: str, policy: str, **options: Any) -> Any:
        model = finemoe.load(
            folder, device="cuda", expert_memory=memory, policy=policy, reader_threads=8, **options
        )  # fmt: skip
        end_s = time.monotonic() + 60
        while model.finemoe.host_resident < model.finemoe.host_slots and time.monotonic() < end_s:
            time.sleep(0.05)  # until the host tier is filled from the disk
        return model

    def resident(self, folder: Path, kernel: str, **options: Any) -> Any:
        config = transformers.AutoConfig.from_pretrained(folder)
        model = model_class(config).from_pretrained(
            folder, dtype="auto", experts_implementation=kernel, use_safetensors=True, **options
        )
        return model if options else model.to(self.device.torch_device)

    def accelerate(self, folder: Path, room_bytes: float) -> Any:
        importlib.import_module("accelerate")
        if not self.cuda:
            return self.resident(folder, "eager", device_map={"": "cpu"})
        dense_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        dense_bytes -= self.result["shapes"][folder.name]["expert_bytes"]
        return self.resident(
            folder, "eager", device_map="auto", max_memory={0: int(dense_bytes + room_bytes), "cpu": "100GiB"}
        )


@contextmanager
def on_the_cpu(*, pretend: bool) -> Iterator[None]:
    """With `pretend`, the device `cuda` is the CPU."""
    if not pretend:
        yield
        return
    module = importlib.import_module("finemoe.model.load")
    original = module.open_devices
    module.open_devices = lambda device: [CpuDevice()] if device == "cuda" else original(device)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.open_devices = original  # type: ignore[attr-defined]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0], allow_abbrev=False)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--shapes", default="mixtral-8x7b,qwen1.5-moe,gpt-oss-20b", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--memory", default="25%,50%,75%", help="shares of the routed experts on the GPU")
    parser.add_argument("--policies", default="lru,finemoe")
    parser.add_argument(
        "--trace", action="append", default=[], metavar="SHAPE=FILE", help="recorded routing of a shape"
    )
    parser.add_argument("--folder", type=Path, default=Path("gpu-bench-models"), help="where weights are generated")
    parser.add_argument("--experts-gib", type=float, default=8.0, help="largest size of each model's routed experts")
    parser.add_argument("--requests", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--minutes", type=float, default=9.0, help="start no row after this")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    arguments = parser.parse_args()
    arguments.traces = dict(pair.split("=", 1) for pair in arguments.trace)
    arguments.traces = {shape: Path(path) for shape, path in arguments.traces.items()}
    if arguments.dry_run:
        arguments.shapes, arguments.prompt_tokens, arguments.new_tokens, arguments.requests = "tiny", 6, 4, 1
    if unknown := sorted({*arguments.shapes.split(","), *arguments.traces} - set(KINDS)):
        parser.error(f"--shapes: {unknown[0]} is not one of {', '.join(KINDS)}")
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --dry-run tries the script without one")
    return arguments


def main() -> int:
    arguments = parse()
    with on_the_cpu(pretend=arguments.dry_run):
        bench = Bench(arguments)
        for shape in arguments.shapes.split(","):
            bench.shape(shape)
        bench.save()
    for line in bench.result["left_out"]:
        print(f"left out: {line}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
