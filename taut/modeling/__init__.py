"""The Hugging Face-shaped models: packed modules behind padded doors, one file for each kind of head."""

from taut.modeling.base import PreTrainedModel as PreTrainedModel
from taut.modeling.causal import CausalLM as CausalLM
from taut.modeling.contrast import ContrastiveModel as ContrastiveModel
from taut.modeling.contrast import TextTower as TextTower
from taut.modeling.headless import HeadlessModel as HeadlessModel
from taut.modeling.heads import MaskedLM as MaskedLM
from taut.modeling.heads import QuestionAnswerer as QuestionAnswerer
from taut.modeling.heads import SequenceClassifier as SequenceClassifier
from taut.modeling.heads import TokenClassifier as TokenClassifier
from taut.modeling.image import ImageClassifier as ImageClassifier
from taut.modeling.image import ImageModel as ImageModel
from taut.modeling.output import ModelOutput as ModelOutput
from taut.modeling.seq2seq import EncoderModel as EncoderModel
from taut.modeling.seq2seq import Seq2SeqLM as Seq2SeqLM
from taut.modeling.seq2seq import Seq2SeqModel as Seq2SeqModel
from taut.modeling.speech_seq2seq import SpeechSeq2SeqLM as SpeechSeq2SeqLM
from taut.modeling.speech_seq2seq import SpeechSeq2SeqModel as SpeechSeq2SeqModel
