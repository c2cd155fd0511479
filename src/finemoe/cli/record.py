"""`finemoe record`: runs prompts and writes the routing to a trace."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finemoe.budget import format_bytes
from finemoe.cli.flags import add_flags, read_flags
from finemoe.cli.generate import warn_if_lossy
from finemoe.config import GenerateConfig, LoadConfig, RecordConfig
from finemoe.errors import ConfigError
from finemoe.metrics import explain_table
from finemoe.trace import TraceWriter, refuse_existing
from finemoe.trace.prompts import read_prompts
from finemoe.trace.spool import pending_requests

if TYPE_CHECKING:
    from torch import Tensor

    from finemoe.model.generation import Session


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="JSON lines, a JSON list or text with one prompt per line; of conversations, the first user turn",
    )
    parser.add_argument("--out", required=True, metavar="TRACE", help="the trace to write")
    parser.add_argument("--json", action="store_true", help="print one JSON document, and nothing else")
    add_flags(parser, RecordConfig)
    add_flags(parser, LoadConfig)
    add_flags(parser, GenerateConfig)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    config, load_config = read_flags(arguments, RecordConfig), read_flags(arguments, LoadConfig)
    generate_config = read_flags(arguments, GenerateConfig)
    out = Path(arguments.out)
    refuse_existing(out, append=config.append, overwrite=config.force)
    prompts = read_prompts(Path(arguments.prompts), config.field, config.limit, config.skip)
    if prompts.skipped:
        print(f"skipped entries without a prompt: {prompts.skipped}", file=sys.stderr)
    if config.append and (waiting := pending_requests(out)):
        print(f"resuming an interrupted recording with {waiting} finished requests", file=sys.stderr)
    from tqdm import tqdm

    from finemoe.gguf.locate import refuse_gguf
    from finemoe.model import load_config as load
    from finemoe.model.generation import Session
    from finemoe.trace.recorder import Recorder

    refuse_gguf(load_config.model, "record")
    settings = {
        "prompts": Path(arguments.prompts).name,
        "batch_size": config.batch_size,
        "max_new_tokens": generate_config.max_new_tokens,
        "temperature": generate_config.temperature,
        "raw": generate_config.raw,
        "expert_memory": load_config.expert_memory,
        "expert_dtype": load_config.expert_dtype,
    }
    warn_if_lossy(load_config)
    with load(load_config) as model:
        session = Session(model)
        encoded = _encoded(session, prompts.texts, generate_config, config.max_prompt_tokens)
        recorder = Recorder(session, generate_config, config.lookahead, settings)
        for notice in recorder.notices:
            print(notice, file=sys.stderr)
        start_s, tokens, recorded = time.perf_counter(), 0, 0
        writer = TraceWriter(out, recorder.header, append=config.append, overwrite=config.force)
        bar = tqdm(total=len(encoded), desc="Recording", unit=" requests", leave=False, delay=1, disable=None)

        def step() -> None:
            arguments.interrupts.check()
            bar.update(0)  # refreshes the elapsed time during a long batch

        try:
            with writer, bar:
                for first in range(0, len(encoded), config.batch_size):
                    batch = encoded[first : first + config.batch_size]
                    for request in recorder.record(batch, batch=len(writer), on_token=step):
                        writer.add(request)
                        tokens += len(request.token_ids)
                        recorded += 1
                        bar.update()
        except BaseException:
            if recorded and not pending_requests(out):  # otherwise the error names the spool
                print(f"\n{out} holds the {recorded} finished requests; --append adds to it", file=sys.stderr)
            raise
        if load_config.explain:
            print(explain_table(model.finemoe.explain()), file=sys.stderr)
        summary = {
            "trace": str(out),
            "recorded": recorded,
            "requests": len(writer),
            "tokens": tokens,
            "bytes": out.stat().st_size,
            "fields": list(recorder.header.fields),
            "lossy": load_config.lossy,
            "seconds": time.perf_counter() - start_s,
        }
    print(json.dumps(summary) if arguments.json else _text(summary))
    return 0


def _encoded(session: Session, texts: tuple[str, ...], config: GenerateConfig, longest: int | None) -> list[Tensor]:
    """The prompts' token ids, each `[1, T]`, without those that are empty or too long (reported on standard error)."""
    limit = session.context_tokens
    most = min(
        (most for most in (longest, limit and limit - config.max_new_tokens) if most is not None), default=sys.maxsize
    )
    encoded = [session.prompt_ids(text, raw=config.raw) for text in texts]
    fitting = [ids for ids in encoded if 0 < ids.shape[1] <= most]
    if len(fitting) < len(encoded):
        left_out = len(encoded) - len(fitting)
        print(f"skipped prompts that are empty or longer than {most} tokens: {left_out}", file=sys.stderr)
    if not fitting:
        raise ConfigError(f"--prompts: none of the {len(encoded)} prompts has at most {most} tokens")
    return fitting


def _text(summary: dict[str, Any]) -> str:
    return (
        f"recorded {summary['recorded']} requests, {summary['tokens']} tokens in {summary['seconds']:.1f} s; "
        f"{summary['trace']} has {summary['requests']} ({format_bytes(summary['bytes'])})"
    )
