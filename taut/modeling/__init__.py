"""The Hugging Face-shaped models: packed modules behind padded doors, one file for each kind of head."""

from taut.modeling.base import PreTrainedModel as PreTrainedModel
from taut.modeling.causal import CausalLM as CausalLM
from taut.modeling.headless import HeadlessModel as HeadlessModel
from taut.modeling.output import ModelOutput as ModelOutput
