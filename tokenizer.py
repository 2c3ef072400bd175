"""Ids of a text in which nothing is special, from either kind of tokenizer.

LLaMA-2 and Mistral come with a sentencepiece `tokenizer.model`, Llama-3 and SmolLM2 with a
byte-level `tokenizer.json`. `Tokenizer` is the door to both:

    Tokenizer("llama-2-7b-hf/tokenizer.model").encode("Hi")    -> [6324]
    Tokenizer("SmolLM2-135M/tokenizer.json").encode("Hi")      -> [21041]

What ends a turn, and whether a text begins with a space, is not the tokenizer's own: the template
says it (conversations.py).
"""

import json
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import sentencepiece
import tokenizers

from support.fields import Fields, read_fields

# ends every utterance, unless the template names another token
EOT = "<|end_of_turn|>"

# What a Hugging Face directory calls the file, in the order in which to look for it. The first
# stands in an export (support/export_tokenizer.py): the base's own, where tokenizer.json has one
# token more.
TOKENIZER_FILES = ("tokenizer.base.json", "tokenizer.model", "tokenizer.json")


class Tokenizer:
    """A tokenizer file and the token that ends a turn.

    Text never becomes a special token: `</s>` typed by a user is encoded as the four characters
    that it is. Special tokens are only ever put in by their ids.

        bos, eos     begin and end a text, as the base was pre-trained
        pad          fills up a batch in other engines; nothing here is padded
        eot          ends a turn: an id of the file's, or the first that it does not have
        file_size    ids of the file: 32000 for Llama-2
        vocab_size   ids in all: one more where the end of turn is added
        bytes        the file; a prepared file and an export hold it as it is
    """

    def __init__(
        self,
        file: str | Path | bytes,
        end_of_turn: str = EOT,
        space: bool = True,
        ids: dict[str, int] | None = None,
    ):
        """file: the path of a tokenizer.model or tokenizer.json, or its bytes.

        space: whether every text begins with one. (To sentencepiece's kind, all do.)
        ids: {"bos", "eos", "pad"}, where the file is bytes; else the files beside it say them.
        ValueError: a tokenizer of another kind, or without one of the tokens.
        """
        names = {}
        if not isinstance(file, bytes):
            file, ids, names = read_with_neighbours(Path(file))
        known = ids or {}

        # kept, for the prepared file and the export hold them
        self.bytes = file
        is_json = file.lstrip()[:1] == b"{"
        self.library = ByteLevel(file) if is_json else SentencePiece(file)
        self.space = space
        # the ids of templates' texts, which are the same in every conversation (conversations.py)
        self.of_templates = {}

        self.end_of_turn = end_of_turn
        self.file_size = self.library.size
        self.eot = self.find_eot()
        self.vocab_size = max(self.file_size, self.eot + 1)
        self.check_known(known)
        self.bos = known["bos"] if "bos" in known else self.find("bos", names)
        self.eos = known["eos"] if "eos" in known else self.find("eos", names)
        self.pad = known["pad"] if "pad" in known else self.find_pad(names)
        self.check_text_stays_text()

    @property
    def ids(self) -> dict[str, int]:
        """The ids that a file's metadata keep, since the file's bytes alone do not say them."""
        return {"bos": self.bos, "eos": self.eos, "pad": self.pad}

    @property
    def first_special(self) -> int:
        """How many ids come before the file's special tokens; all, where these come first."""
        return min(self.library.specials.values()) or self.file_size

    def find_eot(self) -> int:
        """The id of the end of turn. A base may have it already: then it is left alone."""
        found = self.library.id_of(self.end_of_turn)
        if found is not None:
            return found
        if self.end_of_turn != EOT:
            raise ValueError(
                f"the tokenizer has no {self.end_of_turn}, which ends a turn in this template; "
                "take another template, or the tokenizer of a base that has it"
            )
        return self.file_size

    def check_known(self, known: dict[str, int]) -> None:
        """ValueError: an id that a file beside the tokenizer names is none of its tokens."""
        for kind, id_ in known.items():
            if not 0 <= id_ < self.vocab_size:
                raise ValueError(
                    f"the id of {kind} is {id_}, and the tokenizer has {self.vocab_size} tokens; "
                    "the two are not of one model, so export or fetch them again"
                )

    def check_text_stays_text(self) -> None:
        """ValueError: the tokenizer makes a special token of a text that spells its name."""
        special = self.library.specials
        if self.eot < self.file_size:
            special = special | {self.end_of_turn: self.eot}
        for name, id_ in special.items():
            if id_ in self.library.encode(name, space=False):
                raise ValueError(
                    f"the tokenizer makes the special token of the text {name!r}; "
                    "use the base model's own file"
                )

    def find(self, kind: str, names: dict[str, str]) -> int:
        """The id of the token that begins (bos) or ends (eos) a text."""
        candidates = [names[kind]] if kind in names else KNOWN_NAMES[kind]
        for name in candidates:
            id_ = self.library.id_of(name)
            if id_ is not None:
                return id_
        raise ValueError(
            f"the tokenizer has no {kind}_token ({', '.join(candidates)}), and C-RLFT needs one; "
            "put the base's tokenizer_config.json beside it"
        )

    def find_pad(self, names: dict[str, str]) -> int:
        """`<unk>`, else the base's own pad, else its eos, else any special token.

        Trainers take all pad tokens out of the loss. So it can be neither what begins a text nor
        the end of turn, which is learned.
        """
        candidates = [self.library.unk, self.library.id_of(names.get("pad", "")), self.eos]
        candidates += sorted(self.library.specials.values(), reverse=True)
        for id_ in candidates:
            if id_ not in (None, self.bos, self.eot):
                return id_
        raise ValueError("the tokenizer has no special token beside bos and the end of turn")

    def __reduce__(self):
        # to another process only the bytes are sent, not the library's object
        return Tokenizer, (self.bytes, self.end_of_turn, self.space, self.ids)

    def encode(self, text: str, space: bool | None = None) -> list[int]:
        """Ids of a text, without a special token. space: another than the tokenizer's own."""
        return self.library.encode(text, self.space if space is None else space)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without the space that it begins with. Special tokens say nothing."""
        return self.library.decode([i for i in ids if i < self.file_size], self.space)

    def piece(self, i: int) -> str:
        """The token as text for a reader."""
        if i == self.eot:
            return self.end_of_turn
        # a model's vocabulary may be padded beyond its tokenizer
        return self.library.piece(i) if i < self.file_size else f"<{i}>"

    def id_of(self, name: str) -> int:
        """The id of a special token. ValueError: there is none of this name."""
        id_ = self.eot if name == self.end_of_turn else self.library.id_of(name)
        if id_ is None:
            raise ValueError(
                f"the tokenizer has no {name}, which this template needs; take another template, "
                "or the tokenizer of a base that has it"
            )
        return id_


# the tokens that files beside a tokenizer name
KINDS = "bos", "eos", "pad"
MOST_ID = 2**24

# What bases call the tokens, where no file beside the tokenizer says it.
KNOWN_NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>"),
}


def read_with_neighbours(path: Path) -> tuple[bytes, dict[str, int], dict[str, str]]:
    """(the file's bytes, ids, names): what `ids_beside` and `special_names_beside` find."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no such tokenizer; give the path of a sentencepiece tokenizer.model "
            "or a byte-level tokenizer.json"
        )
    return path.read_bytes(), ids_beside(path), special_names_beside(path)


def ids_beside(path: Path) -> dict[str, int]:
    """{"bos", "eos", "pad": id} of an export, whose tokenizer_config.json names the end of turn as
    its eos; {} beside any other file."""
    crlft = path.with_name("crlft.json")
    if not crlft.is_file():
        return {}
    fields = read_fields(crlft, "export the directory again")
    return {kind: fields.whole(kind, 0, MOST_ID) for kind in KINDS if fields.has(kind)}


def special_names_beside(path: Path) -> dict[str, str]:
    """{"bos", "eos", "pad": name}, as far as a tokenizer_config.json beside the file says them."""
    config = path.with_name("tokenizer_config.json")
    if path.suffix != ".json" or not config.is_file():
        return {}
    fields = read_fields(config)
    names = {}
    for kind in KINDS:
        if fields.has(f"{kind}_token"):
            names[kind] = token_name(fields, f"{kind}_token")
    return names


def token_name(fields: Fields, field: str) -> str:
    """The name of a token: the field is the name, or an object that has it."""
    if isinstance(fields.content[field], dict):
        return fields.object(field).text("content")
    return fields.text(field)


# ---- the two kinds, with the same names for the same things


class SentencePiece:
    """Llama-2's kind: BPE over characters, in which a space is a character of its own."""

    def __init__(self, file: bytes):
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=file)
        except RuntimeError:
            raise ValueError(
                "tokenizer.model is not a sentencepiece model; fetch the file again"
            ) from None
        self.size = self.sp.get_piece_size()
        ids = range(self.size)
        is_special = [i for i in ids if self.sp.is_control(i)]
        self.unk = self.sp.unk_id()
        # {name: id} of all that stand for no text
        self.specials = {self.sp.id_to_piece(i): i for i in is_special}
        if self.sp.bos_id() < 0 or self.sp.eos_id() < 0:
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
        return all(self.sp.get_score(i).is_integer() for i in range(self.size))

    def keeps_spaces(self) -> bool:
        text = "  a  b "
        return self.sp.decode(self.sp.encode(text)) == text

    def encode(self, text: str, space: bool) -> list[int]:
        """Ids of a text. Sentencepiece puts a space before it in any case."""
        return self.sp.encode(text)

    def decode(self, ids: list[int], space: bool) -> str:
        """The text of ids. Sentencepiece takes the first space away in any case."""
        return self.sp.decode(ids)

    def piece(self, i: int) -> str:
        """The token as text, with the space that a word carries as U+2581."""
        return self.sp.id_to_piece(i)

    def id_of(self, name: str) -> int | None:
        """The id of a special token, or None."""
        return self.specials.get(name)


class ByteLevel:
    """GPT-2's kind, Llama-3's and SmolLM2's: BPE over bytes, by the `tokenizers` library."""

    def __init__(self, file: bytes):
        with whole():
            fields = json.loads(file)
            # {name: id} of the tokens beside the merges, and of those that stand for no text
            added = fields["added_tokens"]
            self.added = {token["content"]: token["id"] for token in added}
            self.specials = {token["content"]: token["id"] for token in added if token["special"]}
        check_byte_level(fields)
        with whole():
            self.library = library_of(file)
        # `<|eot_id|>` in a text is to be its characters
        self.library.encode_special_tokens = True
        self.library.no_truncation()
        self.library.no_padding()
        self.size = 1 + max(self.library.get_vocab().values())
        if self.size > MOST_ID:
            raise ValueError(
                f"tokenizer.json has the id {self.size - 1:,}, which no tokenizer has; "
                "fetch the file again"
            )
        for name, id_ in self.added.items():
            if id_ not in range(self.size):
                raise ValueError(
                    f"tokenizer.json gives {name!r:.80} the id {id_!r:.80}, which no token has; "
                    "fetch the file again"
                )
        # bytes spell every text, so none is unknown
        self.unk = None

    def encode(self, text: str, space: bool) -> list[int]:
        """Ids of a text, after a space or not. An empty text has none."""
        if text and space:
            text = " " + text
        return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], space: bool) -> str:
        """The text of ids, without the space that it begins with."""
        text = self.library.decode(ids, skip_special_tokens=True)
        return text.removeprefix(" ") if space else text

    def piece(self, i: int) -> str:
        """The token as text; bytes that are not a whole character look like U+FFFD."""
        text = self.library.decode([i], skip_special_tokens=False)
        return text or self.library.id_to_token(i) or f"<{i}>"

    def id_of(self, name: str) -> int | None:
        """The id of a token that stands beside the merges, or None."""
        return self.added.get(name)


@contextmanager
def whole():
    """For `with`: whatever fails is the fault of a tokenizer.json that is not whole."""
    # the library raises a bare Exception, and says what it misses
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"tokenizer.json is not a whole one ({error}); fetch the file again"
        ) from None


def library_of(file: bytes) -> tokenizers.Tokenizer:
    """What the library makes of a tokenizer.json. An Exception of any kind where it cannot."""
    try:
        return tokenizers.Tokenizer.from_buffer(file)
    except BaseException as error:
        # a panic of its Rust code, which is no Exception, and whose class cannot be imported
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from None


def check_byte_level(fields: dict) -> None:
    """ValueError: a tokenizer.json of another kind than GPT-2's, which would need more of us."""
    step = fields.get("pre_tokenizer")
    # one, or a sequence of them
    steps = step.get("pretokenizers", [step]) if isinstance(step, dict) else []
    byte_level = [step for step in steps if type_of(step) == "ByteLevel"]
    model = fields.get("model")
    # the library panics where a token of a merge is shorter than the prefix
    if type_of(model) != "BPE" or model.get("continuing_subword_prefix") or not byte_level:
        raise ValueError(
            "tokenizer.json is not a byte-level BPE, GPT-2's kind; where the base has a "
            "tokenizer.model too, take that"
        )
    if fields.get("normalizer") is not None:
        raise ValueError(
            f"tokenizer.json has a normalizer ({type_of(fields['normalizer'])}), which changes "
            "texts before they are encoded; only tokenizers without one are supported"
        )
    # it would put a space of its own before ours
    if byte_level[0].get("add_prefix_space"):
        raise ValueError(
            "tokenizer.json adds a space before texts (add_prefix_space); "
            "only tokenizers without it are supported"
        )


def type_of(part: object) -> str | None:
    """What a part of a tokenizer.json says that it is. The library also takes a list for a part,
    with the fields in their order; such a one says nothing."""
    return part.get("type") if isinstance(part, dict) else None
