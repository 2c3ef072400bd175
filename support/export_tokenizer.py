"""The tokenizer of an export, with the chat templates: what other engines take the prompts from."""

import json
from pathlib import Path
from string import Template

from conversations import role_texts, template_named, template_of
from support.files import write_bytes, write_json
from tokenizer import ByteLevel, Tokenizer

# How sentencepiece writes a space in its pieces.
SPACE = "\u2581"
# Beside the chat template that engines take, one for trainers, which says what is trained on.
TRAINING_TEMPLATE = "chat_template_training.jinja"


def write_tokenizer(folder: str | Path, tokenizer: Tokenizer, meta: dict) -> None:
    """The base's tokenizer file, tokenizer.json, tokenizer_config.json, both chat templates and
    crlft.json.

    meta: what a prepared file says of itself. The chat templates are the expert's, so whoever
    chats without a wish of their own talks to the expert.
    """
    folder = Path(folder)
    is_bytes = isinstance(tokenizer.library, ByteLevel)
    if is_bytes:
        of_library = byte_level_json(tokenizer)
    else:
        of_library = sentencepiece_json(tokenizer)
        write_bytes(folder / "tokenizer.model", tokenizer.bytes)

    if is_bytes and tokenizer.eot < tokenizer.file_size:
        # no token more: the base's file is the export's
        write_bytes(folder / "tokenizer.json", tokenizer.bytes)
    else:
        write_json(folder / "tokenizer.json", of_library)
        if is_bytes:
            write_bytes(folder / "tokenizer.base.json", tokenizer.bytes)

    (expert,) = [c for c in meta["classes"] if c["name"] == meta["expert"]]
    prompts = template_of(meta), expert["condition"], is_bytes
    config = tokenizer_config(tokenizer, of_library, meta["max_len"])
    config["chat_template"] = chat_template(*prompts)
    write_json(folder / "tokenizer_config.json", config)
    marked = chat_template(*prompts, training=True)
    write_bytes(folder / TRAINING_TEMPLATE, marked.encode())
    write_json(folder / "crlft.json", meta)


def tokenizer_config(tokenizer: Tokenizer, of_library: dict, max_len: int) -> dict:
    """tokenizer_config.json but for the chat template. of_library: tokenizer.json's content."""
    added = {}
    for token in of_library["added_tokens"]:
        token = dict(token)
        added[str(token.pop("id"))] = token

    # The general class takes tokenizer.json as it stands. LlamaTokenizer of transformers 5 puts a
    # rule of its own in place of ours (a text that starts with a space loses one); legacy says to
    # older readers that a space follows a special token. An answer ends in the end of turn, so that
    # is the eos here; the base's </s> is one of the special tokens still.
    config = {
        "bos_token": tokenizer.piece(tokenizer.bos),
        "eos_token": tokenizer.end_of_turn,
        "pad_token": tokenizer.piece(tokenizer.pad),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        # or transformers 4 adds token_type_ids, which its generate refuses
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_len,
        "added_tokens_decoder": added,
        "additional_special_tokens": [tokenizer.piece(tokenizer.eos)],
    }
    if not isinstance(tokenizer.library, ByteLevel):
        config["unk_token"] = tokenizer.piece(tokenizer.library.unk)
    return config


# ---- chat templates

# What `encode` of conversations.py does, in Jinja. Each $name is a string literal; $text is what a
# message says; each $opening.. and $learned.. a statement, or nothing. An answer's first token
# holds the space before its text, so what is learned begins with that space.
JINJA = Template(
    "{{ bos_token }}"
    "$opening"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set m = messages[0] %}{{ $system + $text + $eot }}{% endif %}"
    "$opening_after_system"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ $user + $text + $eot }}"
    "{% elif m['role'] == 'assistant' %}{{ $assistant }}"
    "$learned{{ $space + $text + $eot }}$learned_end"
    "{% elif not loop.first %}{{ raise_exception('a system message stands first') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ $assistant }}{% endif %}"
)


def chat_template(
    template: str, condition: str, is_bytes: bool = False, training: bool = False
) -> str:
    """The Jinja form of `encode`, from the same table, for transformers and vLLM.

    is_bytes: whether the tokenizer is a byte-level one. Sentencepiece's puts a space after every
    special token by itself.
    training: with tags around what has a weight in `tokenize`, an answer's text and its end of
    turn. They are transformers' own: Jinja alone, which other engines use, knows no such tags.
    """
    user, assistant, opening = role_texts(template, condition)
    chosen = template_named(template)
    space = " " if chosen.space else ""
    # before a text that follows a special token
    lead = space if is_bytes else ""
    said = {"opening": "", "opening_after_system": ""}
    if opening:
        place = "opening_after_system" if chosen.system_first else "opening"
        said[place] = "{{ " + quoted(lead + opening + chosen.end_of_turn) + " }}"
    return JINJA.substitute(
        eot=quoted(chosen.end_of_turn),
        text="m['content'] | trim" if chosen.chat_trims else "m['content']",
        system=quoted(lead + chosen.system),
        **said,
        user=quoted(lead + user + space),
        assistant=quoted(lead + assistant),
        space=quoted(space),
        learned="{% generation %}" if training else "",
        learned_end="{% endgeneration %}" if training else "",
    )


def quoted(text: str) -> str:
    """A JSON string is a Jinja string literal, whatever the condition holds."""
    return json.dumps(text, ensure_ascii=False)


# ---- tokenizer.json


def byte_level_json(tokenizer: Tokenizer) -> dict:
    """The base's tokenizer.json with the end of turn added, if the base has none; no other change.

    llama.cpp knows a byte-level tokenizer by the ids that it gives to a text: with a normalizer
    added it would not know it. So the space before a text stands in the chat template instead.
    """
    content = json.loads(tokenizer.bytes)
    if tokenizer.eot == tokenizer.file_size:
        added = added_token(tokenizer.eot, tokenizer.end_of_turn)
        content["added_tokens"] = [*content["added_tokens"], added]
    return content


def sentencepiece_json(tokenizer: Tokenizer) -> dict:
    """tokenizer.json for the `tokenizers` library, from a sentencepiece BPE vocabulary.

    It must give the same ids to every text: the vocabulary as it is, the merges that the scores
    imply, and around them what sentencepiece does to a text before and after.
    """
    sp, size = tokenizer.library.sp, tokenizer.eot
    pieces = [sp.id_to_piece(i) for i in range(size)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    bos = pieces[tokenizer.bos]
    bos_token = {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}

    # Tokens that are never found inside a text: control and unknown, and ours behind all others.
    special = [i for i in range(size) if sp.is_control(i) or sp.is_unknown(i)]
    added = [added_token(i, pieces[i]) for i in special]
    added.append(added_token(size, tokenizer.end_of_turn))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": NORMALIZER,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": begun_sequence(bos, "A", 0),
            "pair": begun_sequence(bos, "A", 0) + begun_sequence(bos, "B", 1),
            "special_tokens": {bos: bos_token},
        },
        "decoder": DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[sp.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(sp.is_byte(i) for i in range(size)),
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges(sp, pieces),
        },
    }


# A space in front of the text, and every space as sentencepiece writes it; back again in DECODER.
NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def added_token(id_: int, content: str) -> dict:
    return {
        "id": id_,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def begun_sequence(bos: str, name: str, type_id: int) -> list[dict]:
    """A text after the token that begins it."""
    return [
        {"SpecialToken": {"id": bos, "type_id": type_id}},
        {"Sequence": {"id": name, "type_id": type_id}},
    ]


def merges(sp, pieces: list[str]) -> list[str]:
    """["left right", ..] in the order in which BPE is to join neighbours.

    Sentencepiece joins the two neighbours whose union has the best score. A merge list says the
    same with pairs in the order of that score, where each way to cut a piece in two is a pair.
    """
    score_of = {}
    for i, piece in enumerate(pieces):
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i)):
            score_of[piece] = sp.get_score(i)
    found = []
    for piece, score in score_of.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in score_of and right in score_of:
                # Where scores are equal (Llama-2's runs of spaces) the longest left part goes
                # first: that is what joining from the left gives.
                found.append((-score, -len(left), -len(right), left, right))
    found.sort()
    return [f"{left} {right}" for *_, left, right in found]
