"""The `Auto...` classes: `from_pretrained` that picks what a folder or Hub id holds."""

from __future__ import annotations

from taut.modeling import CausalLM


class AutoModelForCausalLM:
    """Loads a `CausalLM` of whatever family the folder, file or Hub id is. Not instantiated itself."""

    from_pretrained = CausalLM.from_pretrained
    from_config = CausalLM.from_config

    def __init__(self) -> None:
        raise TypeError(
            "AutoModelForCausalLM is not a model; call AutoModelForCausalLM.from_pretrained(name)"
        )
