"""Preparation of chats for training: time and memory of the first start and of the second, and the cost of long chats.

    python -m benchmarks.data_preparation --chats 200000 --turns 10
    python -m benchmarks.data_preparation --long

Memory is the largest sum of the anonymous memory of this process and of those it started, less what this process had
when all modules were imported.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from pathlib import Path

import psutil

WORDS = "the quick brown fox jumps over a lazy dog while nobody in this town looks out of any window at all".split()
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE that was trained on the words, with ChatML's tokens and template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([" ".join(WORDS)] * 9, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    made.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


class Peak:
    """The largest anonymous memory of this process and its children, in MiB, while the context is open."""

    def __enter__(self) -> Peak:
        self.mib, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            self.mib = max(self.mib, anonymous())


def anonymous() -> float:
    """Anonymous memory of this process and its children, in MiB."""
    own = psutil.Process()
    total = 0
    for one in (own, *own.children(recursive=True)):
        try:
            status = Path(f"/proc/{one.pid}/status").read_text()
        except OSError:  # it ended
            continue
        total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    return total / 1024


def measure_many(work: Path, chats: int, turns: int) -> None:
    """Prepare many chats twice."""
    from mbx.models.tokenizer import read_tokenizer
    from mbx.train.data.corpora import prepare_corpus
    from mbx.train.recipe.sections import Data

    draw = random.Random(0)
    with (work / "chat.jsonl").open("w") as file:
        for _ in range(chats):
            talk = [
                {"role": "user" if n % 2 == 0 else "assistant", "content": " ".join(draw.choices(WORDS, k=20))}
                for n in range(turns)
            ]
            file.write(json.dumps({"messages": talk}) + "\n")
    tokenizer = read_tokenizer(work / "model")
    tokenizer("warm")
    before = anonymous()
    for start in ("first", "second"):
        began = time.perf_counter()
        with Peak() as peak:
            found = prepare_corpus(Data(kind="chat"), [str(work / "chat.jsonl")], tokenizer, 1 << 20)
        took = time.perf_counter() - began
        size = (work / "chat.jsonl").stat().st_size / 1e6
        facts = found.corpus.facts
        print(
            f"{start} start: {took:.1f} s, {peak.mib - before:.0f} MiB beside the interpreter's {before:.0f}; "
            f"{facts.examples} chats of {turns} messages, {size:.0f} MB, {facts.tokens} tokens, kept={found.kept}"
        )


def measure_long(work: Path) -> None:
    """A long chat's preparation beside rendering and tokenising it once, in CPU time of this process and its child."""
    from mbx.models.tokenizer import read_tokenizer
    from mbx.train.data.examples import Reading, _examples
    from mbx.train.data.sources import File
    from mbx.train.data.template_process import Template
    from mbx.train.data.tokens import Encoder, marks_of

    tokenizer = read_tokenizer(work / "model")
    encoder = Encoder(tokenizer)
    template = Template(tokenizer, CHATML, marks_of(tokenizer))
    reading, sources = Reading("chat", "assistant", CHATML, tokenizer), [File(Path("chat.jsonl"))]

    def used() -> float:
        own = psutil.Process()
        return sum(sum(one.cpu_times()[:2]) for one in (own, *own.children()))

    for turns in (1, 10, 40):
        talk = [
            {"role": r, "content": "the quick brown fox " * 40} for _ in range(turns) for r in ("user", "assistant")
        ]
        part, times = [(0, ":1", {"messages": talk})], 4000 // turns // 2
        _examples(part, sources, reading, encoder, template)
        began = used()
        for _ in range(times):
            _examples(part, sources, reading, encoder, template)
        took, began = (used() - began) / times, used()
        for _ in range(times):
            tokenizer.apply_chat_template(talk, tokenize=True)
        once = (used() - began) / times
        ratio = f"rendering and tokenising once {once * 1e3:.2f} ms: {took / once:.2f} x"
        print(f"{turns} turns: {took * 1e3:.2f} ms, {ratio}")
    template.close()


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=200_000)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--long", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MBX_CACHE_DIR"] = f"{folder}/cache"
        make_tokenizer(Path(folder) / "model")
        if asked.long:
            measure_long(Path(folder))
        else:
            measure_many(Path(folder), asked.chats, asked.turns)


if __name__ == "__main__":
    main()
