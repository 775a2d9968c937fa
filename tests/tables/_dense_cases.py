"""The families of `test_families_dense.py`."""

from __future__ import annotations

#: Families whose logits Transformers and Megatron Core both give on a CPU.
FORWARD = (
    *("mistral", "qwen2", "qwen3", "qwen3_tied", "nemotron", "gemma", "gemma3_text", "glm", "glm4", "phi3", "smollm3"),
    *("seed_oss", "mimo", "ernie4_5", "starcoder2", "gemma2", "olmo2", "ministral3", "olmo3"),
    *("internlm3", "gpt2", "pythia", "command_r7b"),
    *("exaone4_32b", "exaone4_1_2b"),
)
#: Families that Transformers has no class for, so without layout v5.
REMOTE_CODE = ("mimo", "llama_nemotron")
#: Granite divides its logits, by half in the test: flat ones compare nothing.
ALL = (*FORWARD, "granite", "llama_nemotron")
#: One family a table, whose rows are dropped and misspelt one by one.
MUTATED = ("llama2", *(name for name in ALL if name not in ("qwen3_tied", "exaone4_1_2b")))
