"""Generate the dense model's own answers to chat prompts: distillation data besides plain text."""

import json
from pathlib import Path
from typing import Any

import torch

from finemoe.model.reference.dense import DenseSource, layer_tensors


def dense_transformers(source: DenseSource) -> Any:
    """The dense model as a transformers `LlamaForCausalLM`, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    s = source.shape
    config = LlamaConfig(
        vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.neurons, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim, rms_norm_eps=s.rms_eps,
        max_position_embeddings=s.max_positions, tie_word_embeddings=True, bos_token_id=s.bos, eos_token_id=s.eos,
        pad_token_id=s.pad, rope_parameters={"rope_type": "default", "rope_theta": s.rope_theta},
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += [name for layer in range(s.layers) for name in layer_tensors(s, layer)]
    state = {name: torch.from_numpy(source.tensor(name).copy()) for name in names}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, prompts: list[str], *, new_tokens: int, batch: int, sample_share: float, seed: int
) -> list[dict[str, str]]:
    """Prompt, chat-formatted text and answer for each prompt; the first `sample_share` is sampled, the rest greedy."""
    tokenizer.padding_side = "left"
    torch.manual_seed(seed)
    rows: list[dict[str, str]] = []
    sampled = int(len(prompts) * sample_share)
    for sampling, part in ((True, prompts[:sampled]), (False, prompts[sampled:])):
        for first in range(0, len(part), batch):
            group = part[first : first + batch]
            chats = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                )
                for prompt in group
            ]
            given = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
            how: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 0} if sampling else {}
            out = model.generate(**given, max_new_tokens=new_tokens, **(how or {"do_sample": False}))
            for prompt, chat, ids in zip(group, chats, out, strict=True):
                text = tokenizer.decode(ids[given["input_ids"].shape[1] :], skip_special_tokens=False)
                text = text.split("<|im_end|>")[0]
                rows.append({"prompt": prompt, "chat": f"{chat}{text}<|im_end|>\n", "answer": text.strip()})
            print(f"answers: {len(rows)}/{len(prompts)}", flush=True)
    return rows


def load_or_make(
    path: Path, source: DenseSource, tokenizer: Any, prompts: list[str], **how: Any
) -> list[dict[str, str]]:
    """The answers kept at `path`; they are generated and written there when it does not exist."""
    if path.exists():
        rows: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
        return rows
    rows = answer(dense_transformers(source), tokenizer, prompts, **how)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    part.replace(path)
    return rows
