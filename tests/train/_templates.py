"""Chat templates of the structure that real families' have, written small, with the marks of their tokenizers."""

from __future__ import annotations

from mbx.train.data.turns import Marks

_THINKING = """
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for t in tools or [] -%}{{ '<|im_start|>system\\n' + t.function.name + '<|im_end|>\\n' }}{%- endfor -%}
{%- for m in messages -%}
{%- set content = m.content or '' -%}
{%- if m.role == 'tool' -%}{{ '<|im_start|>user\\n<tool_response>' + content + '</tool_response><|im_end|>\\n' }}
{%- elif m.role == 'assistant' -%}
{%- set thought = m.reasoning_content or '' -%}
{%- if '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip() -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{ '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (ALWAYS or thought) -%}
{{ '<think>\\n' + thought.strip() + '\\n</think>\\n\\n' }}
{%- endif -%}
{{ content }}
{%- for call in m.tool_calls or [] -%}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- else -%}{{ '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' + PROMPT }}{%- endif -%}
"""

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama2": (
        "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set talk = messages[1:] %}{% else %}{% set sys = '' %}{% set talk = messages %}{% endif %}"
        "{% for m in talk %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must "
        "alternate') }}{% endif %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (sys if loop.first else '') + "
        "m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "llama3": (
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{% if m.tool_calls %}{{ '<|python_tag|>' + m.tool_calls[0].function.name + '()<|eom_id|>' }}"
        "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma3": (
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) "
        "+ '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "qwen3": _THINKING.replace("ALWAYS", "loop.last").replace("PROMPT", "''"),
    "qwen3_5": _THINKING.replace("ALWAYS", "true").replace("PROMPT", "'<think>\\n'"),
    "glm4_5": (
        "[gMASK]<sop>{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<|user|>\n' + m.content }}{% elif m.role == 'assistant' %}{{ '<|assistant|>' }}"
        "{% if loop.index0 > ns.last and m.reasoning_content %}{{ '\n<think>' + m.reasoning_content + '</think>' }}"
        "{% else %}{{ '\n<think></think>' }}{% endif %}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
        "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>' + c.function.name + '\n</tool_call>' }}{% endfor %}"
        "{% elif m.role == 'tool' %}{{ '<|observation|>\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
        "{% else %}{{ '<|system|>\n' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    "deepseek": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
        "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
        "{% elif m.tool_calls %}{{ '[TOOL_CALLS] ' + m.tool_calls[0].function | tojson + eos_token }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "harmony": (
        "{% if messages[0].role == 'developer' %}{{ raise_exception('none here') }}{% endif %}"
        "<|start|>system<|message|>You are.<|end|>{% set ns = namespace(final=false) %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{% set later = messages[loop.index:] | selectattr('role', 'equalto', "
        "'assistant') | rejectattr('tool_calls') | list %}{% if m.tool_calls %}{% if m.thinking and not later %}"
        "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
        "{{ '<|start|>assistant to=functions.' + m.tool_calls[0].function.name + "
        "'<|channel|>commentary json<|message|>' + m.tool_calls[0].function.arguments | tojson + '<|call|>' }}"
        "{% elif loop.last and not add_generation_prompt %}{% if m.thinking %}"
        "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}{% else %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}"
        "{% elif m.role == 'tool' %}{{ '<|start|>functions to=assistant<|message|>' + m.content + '<|end|>' }}"
        "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
    "no_prompt": (
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) "
        "+ '\n' + m.content + '<end_of_turn>\n' }}{% endfor %}"
    ),
    "generation": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    ),
    "endless": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
}
_CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
#: Family → special tokens, and those at which generation stops.
MARKS = {
    "llama2": Marks(("<s>", "</s>"), ("</s>",)),
    "llama3": Marks(
        tuple("<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>".split()),
        ("<|eot_id|>", "<|eom_id|>"),
    ),
    "gemma3": Marks(("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), ("<eos>",)),
    "no_prompt": Marks(("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), ("<eos>",)),
    "glm4_5": Marks(
        tuple("[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|endoftext|>".split()),
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    "deepseek": Marks(
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        ("<｜end▁of▁sentence｜>",),
    ),
    "mistral": Marks(
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), ("</s>",)
    ),
    "phi3": Marks(("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"), ("<|endoftext|>",)),
    "harmony": Marks(
        tuple("<|start|> <|end|> <|message|> <|channel|> <|call|> <|return|> <|endoftext|>".split()),
        ("<|return|>", "<|call|>", "<|endoftext|>"),
    ),
    **dict.fromkeys(("chatml", "qwen3", "qwen3_5", "generation", "endless"), Marks(_CHATML, ("<|im_end|>",))),
}
NAMED = {
    "llama2": ("<s>", "</s>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "gemma3": ("<bos>", "<eos>"),
    "no_prompt": ("<bos>", "<eos>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "mistral": ("<s>", "</s>"),
    "phi3": ("", "<|endoftext|>"),
}
