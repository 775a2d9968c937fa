"""What a table puts for an absent config key is what Transformers' or diffusers' class of that model puts."""

from __future__ import annotations

import inspect

import pytest

from converters.rows.config_spelling import canonical
from converters.rows.expr import Value
from converters.rows.isos import VALUE
from mappings import table_names
from mbx.tables import shipped

MODELS = [(name, model_type) for name in table_names() for model_type in shipped(name).model_types]
#: Model types that Transformers has no class for.
FOREIGN = {"kimi_k2", "nemotron-nas", "mimo", "sarvam_moe", "bailing_moe_v2", "deepseek", "NemotronH_Nano_VL_V2"}
FOREIGN |= {"kimi_k3"}
FOREIGN |= {"NemotronH_Nano_Omni_Reasoning_V3", "NemotronH_Super_Omni_Reasoning_V3"}  # by that name


def of_transformers(model_type: str) -> dict[str, Value]:
    """A config whose maker says nothing, in the v4 spelling; of a model around a text model, the latter's."""
    from transformers import CONFIG_MAPPING

    whole = CONFIG_MAPPING[model_type]()
    config = whole.get_text_config()
    defaults = canonical({**config.to_dict(), "architectures": None})
    if config is not whole:  # the model around the text decides whether its head is the embedding
        defaults.pop("tie_word_embeddings", None)
    return defaults


def of_diffusers(name: str) -> dict[str, Value]:
    """The same of a class of diffusers, whose constructor's arguments are the keys."""
    import diffusers

    arguments = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    held = {one.name: one.default for one in arguments if one.default is not inspect.Parameter.empty}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in held.items()}


@pytest.mark.parametrize(("name", "model_type"), [model for model in MODELS if model[1] not in FOREIGN])
def test_absent_keys_mean_what_the_class_says(name: str, model_type: str) -> None:
    defaults = of_diffusers(model_type) if shipped(name).family == "dit" else of_transformers(model_type)
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
