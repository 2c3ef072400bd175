"""Ids of a text in which nothing is special."""

from collections.abc import Iterable
from pathlib import Path

import sentencepiece

# ends every utterance; its id is the size of the sentencepiece model (32000 for Llama-2)
EOT = "<|end_of_turn|>"


class Tokenizer:
    """A sentencepiece model and the one token that C-RLFT adds.

    Text never becomes a special token: `</s>` typed by a user is encoded as the four characters
    that it is. Special tokens are only ever put in by their ids, `bos`, `eos` and `eot`.
    """

    def __init__(self, model: str | Path | bytes):
        """model: the path of a tokenizer.model, or its bytes. ValueError: it is of another kind."""
        if not isinstance(model, bytes):
            if not Path(model).is_file():
                raise ValueError(
                    f"{model}: no such tokenizer; give the path of a sentencepiece tokenizer.model"
                )
            model = Path(model).read_bytes()
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError(
                "tokenizer.model is not a sentencepiece model; fetch the file again"
            ) from None

        # kept, for the prepared file and the export hold them
        self.bytes = model
        self.bos = self.sp.bos_id()
        self.eos = self.sp.eos_id()
        self.eot = self.sp.get_piece_size()
        if self.bos < 0 or self.eos < 0:
            raise ValueError(
                "tokenizer.model has no <s> or </s>; C-RLFT starts every conversation with <s>"
            )
        if not (self.is_bpe() and self.keeps_spaces()):
            raise ValueError(
                "tokenizer.model is no BPE model that keeps spaces, Llama-2's kind; "
                "use the base model's own"
            )

    def is_bpe(self) -> bool:
        # The score of a BPE piece is its rank among the merges, a whole number. The other kind,
        # unigram, has logarithms of probabilities.
        return all(self.sp.get_score(i).is_integer() for i in range(self.eot))

    def keeps_spaces(self) -> bool:
        text = "  a  b "
        return self.decode(self.encode(text)) == text

    def __reduce__(self):
        # to another process only the bytes are sent, not the C++ object
        return Tokenizer, (self.bytes,)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without <s> and without a special token."""
        return self.sp.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; those that the sentencepiece model does not know say nothing."""
        return self.sp.decode([i for i in ids if i < self.eot])

    def piece(self, i: int) -> str:
        """The token as text for a reader, with the space that a word carries as U+2581."""
        if i < self.eot:
            return self.sp.id_to_piece(i)
        if i == self.eot:
            return EOT
        # a model's vocabulary may be padded beyond its tokenizer
        return f"<{i}>"
