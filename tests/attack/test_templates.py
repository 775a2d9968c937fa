"""Chat templates that never end or fill memory: refused in a bounded time, and their process is gone."""

from __future__ import annotations

import os
from typing import cast

import pytest
from transformers import PreTrainedTokenizerBase

from converters.errors import UsageError
from mbx.train.data import template_process
from mbx.train.data.template_process import Template

TURNS = [{"role": "user", "content": "hi"}]


class Tokenizer:
    """As much of a tokenizer as a template needs."""

    special_tokens_map = {"eos_token": "</s>"}

    def __init__(self, template: str) -> None:
        self.get_chat_template = lambda: template


def render(template: str) -> str:
    process = Template(cast("PreTrainedTokenizerBase", Tokenizer(template)))
    try:
        return process.turns(TURNS, {}, ()).text
    finally:
        started = process._process
        process.close()
        if started is not None:
            with pytest.raises(ProcessLookupError):
                os.kill(started.pid, 0)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "took more than 0.5 s"),
        ("{{ 'x' | center(10000000000) }}", "more than 256 MiB"),
        ("{{ 'x' * 20000000 }}", "20000000 characters"),
        ("{{ raise_exception('no system turn') }}", "refuses this conversation: no system turn"),
    ],
)
def test_a_template_is_refused(monkeypatch: pytest.MonkeyPatch, template: str, words: str) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 0.5 if "0.5 s" in words else 30.0)
    with pytest.raises(UsageError, match=words):
        render(template)


def test_a_template_renders() -> None:
    assert render("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}") == "user: hi</s>"
