"""Text for calibration, distillation and evaluation, from folders given by the caller.

Domains are read from `text` (books, code, dialogue, math, factbook, speeches) and chat prompts from `prompts`
(OpenAssistant, self-instruct, GSM8K, MBPP). The last tenth of every domain is held out: training never sees it.
A file that is missing leaves its domain out.
"""

import json
import lzma
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HELD_OUT = 0.1
DOMAINS = {
    "books": "books_classic.txt.xz",
    "code": "code_python_stdlib.txt.xz",
    "dialogue": "dialogues_sgd.txt.xz",
    "math": "math_cot_flan.tsv.xz",
    "factbook": "factbook.txt.xz",
    "speeches": "nltk_state_union.txt",
}
# Shares of the training windows; the rest are chats.
TRAINING_MIX = {"books": 0.22, "code": 0.13, "dialogue": 0.08, "math": 0.1, "factbook": 0.07, "speeches": 0.05}

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Corpus:
    """Plain text by domain, split into a training part and a held-out part."""

    folder: Path
    encode: Encode

    @cache  # noqa: B019 (one corpus lives as long as the program)
    def part(self, domain: str, *, held_out: bool) -> str:
        """The training or held-out text of a domain."""
        path = self.folder / DOMAINS[domain]
        raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        text = raw.decode("utf-8", "replace").replace("\r\n", "\n")
        if domain == "math":
            text = text.replace("\t", "\n").replace("\\n", "\n")
        cut = int(len(text) * (1 - HELD_OUT))
        return text[cut:] if held_out else text[:cut]

    def window(self, domain: str, tokens: int, rng: random.Random, *, held_out: bool = False) -> list[int]:
        """`tokens` consecutive token ids from a random place of the domain, beginning at a line."""
        text = self.part(domain, held_out=held_out)
        while True:
            start = text.find("\n", rng.randrange(max(1, len(text) - 8 * tokens))) + 1
            ids = self.encode(text[start : start + 8 * tokens])
            if len(ids) >= tokens:
                return ids[:tokens]


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _assistant_tree(node: dict[str, object], found: list[str]) -> None:
    if node.get("role") == "prompter" and node.get("lang") == "en":
        found.append(str(node["text"]))
    for reply in node.get("replies") or []:  # type: ignore[attr-defined]
        _assistant_tree(reply, found)


TOPICS = (
    "photosynthesis", "the French Revolution", "black holes", "a healthy breakfast", "learning to swim", "jazz music",
    "the water cycle", "electric cars", "the Roman Empire", "growing tomatoes", "chess openings", "volcanoes",
    "the human heart", "saving money", "Shakespeare", "coral reefs", "time management", "the Moon", "bread baking",
    "public speaking", "penguins", "the internet", "yoga", "bicycles", "the Great Wall of China", "dreams", "bees",
    "solar panels", "coffee", "the Olympic Games", "dinosaurs", "learning Spanish", "a rainy day", "an old lighthouse",
    "friendship", "a lost dog", "gravity", "vaccines", "recycling", "the piano", "deserts", "whales", "rivers",
    "a job interview", "sleep", "kindness", "robots", "the stock market", "camping", "glaciers",
)  # fmt: skip
FORMS = (
    "Explain {} in simple terms.", "Write a short poem about {}.", "Give me three facts about {}.",
    "Write a short story about {}.", "What should I know about {}?", "Why is {} interesting?",
    "Write a friendly email to a colleague about {}.", "List five tips about {}.", "Summarize {} in two sentences.",
    "Write a thank-you note that mentions {}.", "Describe {} to a child.", "What are the pros and cons of {}?",
)  # fmt: skip
GREETINGS = (
    "Hi!", "Hello, who are you?", "How are you today?", "Tell me a joke.", "Good morning!", "What can you do?",
    "Thank you for your help.", "Can you help me with my homework?", "What is 12 + 30?", "Is 17 a prime number?",
    "What is the capital of Spain?", "Who wrote Hamlet?", "Translate 'good night' into French.",
    "What is the boiling point of water?", "Name a mammal that can fly.", "How do you spell 'necessary'?",
)  # fmt: skip


def chat_prompts(folder: Path, seed: int) -> tuple[list[str], list[str]]:
    """Training prompts and held-out prompts, shuffled by `seed`; none is in both."""
    pools: list[list[str]] = [[form.format(topic) for topic in TOPICS for form in FORMS]]
    if (path := folder / "oasst_messages.jsonl").exists():
        found: list[str] = []
        for tree in _lines(path):
            _assistant_tree(tree, found)
        pools.append(found)
    if (path := folder / "self_instruct_seed_tasks.jsonl").exists():
        tasks = [(str(task["instruction"]), str(task["instances"][0]["input"])) for task in _lines(path)]  # type: ignore[index]
        pools.append([f"{instruction}\n\n{given}".strip() for instruction, given in tasks])
    if (path := folder / "gsm8k_train.jsonl").exists():
        pools.append([str(row["question"]) for row in _lines(path)[:200]])
    if (path := folder / "mbpp.jsonl").exists():
        pools.append([str(row["text"]) for row in _lines(path)[:200]])
    rng = random.Random(seed)
    train, held_out = list(GREETINGS), []
    for pool in pools:
        short = sorted({prompt for prompt in pool if len(prompt) < 600})
        rng.shuffle(short)
        cut = max(1, int(len(short) * HELD_OUT))
        held_out += short[:cut][:16]
        train += short[cut:]
    rng.shuffle(train)
    return train, held_out
