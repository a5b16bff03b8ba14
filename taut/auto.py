"""The `Auto...` classes and the families' own class names, which load what a folder or Hub id holds."""

from __future__ import annotations

from functools import partial

from taut.errors import nearest
from taut.modeling import CausalLM
from taut.models import architectures


class AutoModelForCausalLM:
    """Loads a `CausalLM` of whatever family the folder, file or Hub id is. Not instantiated itself."""

    from_pretrained = CausalLM.from_pretrained
    from_config = CausalLM.from_config

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} is not a model; call {name}.from_pretrained(name)")


def family_class(name: str) -> type[AutoModelForCausalLM]:
    """The loader that programs call by a family's own class name, such as `LlamaForCausalLM`: it refuses
    checkpoints of other families. `AttributeError` for a name that no family has."""
    known = architectures()
    if name not in known:
        raise AttributeError(f"Taut has no {name}{nearest(name, known)}; it has: {', '.join(sorted(known))}")
    load = partial(CausalLM.from_pretrained, model_type=known[name])
    return type(name, (AutoModelForCausalLM,), {"from_pretrained": staticmethod(load)})
