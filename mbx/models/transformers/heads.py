"""An output layer behind text models that Transformers has as a part of larger models alone.

This file defines models, so unlike its neighbours it imports torch and Transformers' class when imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7PreTrainedModel, Step3p7TextModel


class Step3p5ForCausalLM(Step3p7PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """Transformers' text model of Step-3.7, which is Step-3.5, and its output layer."""

    config_class = Step3p7TextConfig

    def __init__(self, config: Step3p7TextConfig) -> None:
        super().__init__(config)
        self.model = Step3p7TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: torch.Tensor | None = None, **keywords: Any) -> CausalLMOutput:
        """input_ids: [b, s] → logits [b, s, vocab]"""
        hidden = self.model(input_ids, **keywords).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden))


AutoModelForCausalLM.register(Step3p7TextConfig, Step3p5ForCausalLM, exist_ok=True)
