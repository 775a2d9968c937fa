"""What a table puts for an absent config key is what Transformers' class of that model puts."""

from __future__ import annotations

import pytest

from converters.rows.config_spelling import canonical
from converters.rows.isos import VALUE
from mappings import table_names
from mbx.tables import shipped

MODELS = [(name, model_type) for name in table_names() for model_type in shipped(name).model_types]
#: Model types that Transformers has no class for.
FOREIGN = {"kimi_k2", "nemotron-nas", "mimo", "sarvam_moe", "bailing_moe_v2", "deepseek", "NemotronH_Nano_VL_V2"}
FOREIGN |= {"kimi_k3"}
FOREIGN |= {"NemotronH_Nano_Omni_Reasoning_V3", "NemotronH_Super_Omni_Reasoning_V3"}  # by that name


@pytest.mark.parametrize(("name", "model_type"), [model for model in MODELS if model[1] not in FOREIGN])
def test_absent_keys_mean_what_the_class_says(name: str, model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    whole = CONFIG_MAPPING[model_type]()
    config = whole.get_text_config()
    defaults = canonical({**config.to_dict(), "architectures": None})
    if config is not whole:  # the model around the text decides whether its head is the embedding
        defaults.pop("tie_word_embeddings", None)
    wrong, compared = [], 0
    for row in shipped(name).config.rows:
        value = defaults.get(row.hf)
        if value is None or row.otherwise is None or isinstance(row.otherwise, str):
            continue
        meant = VALUE[row.via].to_mcore(value, defaults) if row.via else value
        otherwise = row.otherwise
        if isinstance(meant, list) and isinstance(otherwise, int):  # every how many layers, written out
            otherwise = [int((layer + 1) % otherwise != 0) for layer in range(len(meant))]
        compared += 1
        if meant != otherwise:
            wrong.append(f"{row.hf}: {row.otherwise!r} for {meant!r}")
    assert not wrong and compared


def test_classes_that_are_not_compared_are_not_there() -> None:
    from transformers import CONFIG_MAPPING

    assert not FOREIGN & set(CONFIG_MAPPING.keys()) and {kind for _, kind in MODELS} >= FOREIGN
