"""Ids of a text in which nothing is special."""

from pathlib import Path

import sentencepiece

# ends every utterance; its id is the size of the sentencepiece model (32000 for Llama-2)
EOT = "<|end_of_turn|>"


class Tokenizer:
    """A sentencepiece model and the one token that C-RLFT adds. Text never becomes a special token: `</s>` typed by a user
    is encoded as the characters it is."""

    def __init__(self, model):
        """model: path of tokenizer.model, or its bytes."""
        if not isinstance(model, bytes):
            if not Path(model).is_file():
                raise ValueError(
                    f"{model}: no such tokenizer; give the path of a sentencepiece tokenizer.model"
                )
            model = Path(model).read_bytes()
        self.bytes = model
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError(
                "tokenizer.model is not a sentencepiece model; fetch the file again"
            ) from None
        self.bos, self.eos, self.eot = self.sp.bos_id(), self.sp.eos_id(), self.sp.get_piece_size()
        if self.bos < 0 or self.eos < 0:
            raise ValueError(
                "tokenizer.model has no <s> or </s>; C-RLFT starts every conversation with <s>"
            )
        # BPE's are ranks, unigram's log-probs
        whole_scores = all(self.sp.get_score(i).is_integer() for i in range(self.eot))
        if not whole_scores or self.sp.decode(self.sp.encode("  a  b ")) != "  a  b ":
            raise ValueError(
                "tokenizer.model is no BPE model that keeps spaces, Llama-2's kind; use the base model's own"
            )

    def __reduce__(self):
        return Tokenizer, (self.bytes,)

    def encode(self, text):
        return self.sp.encode(text)

    def decode(self, ids):
        return self.sp.decode([i for i in ids if i < self.eot])

    def piece(self, i):
        """The token as text for a reader: _ for the space that a word carries."""
        return EOT if i == self.eot else self.sp.id_to_piece(i) if i < self.eot else f"<{i}>"
