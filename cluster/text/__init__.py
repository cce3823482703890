"""Between text and token ids: the tokenizer, text as it grows, stop strings.

Everything here runs at the edge; the driver and the ranks know token ids only.
"""

from cluster.text.codec import TextCodec
from cluster.text.detokenizer import Detokenizer
from cluster.text.stops import StopMatcher
from cluster.text.stream import TextDelta, TextStream

__all__ = ["Detokenizer", "StopMatcher", "TextCodec", "TextDelta", "TextStream"]
