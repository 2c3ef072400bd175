"""How models are spoken to: ours in the template of their training, others in their own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conversations import (
    SPECIAL_TOKEN,
    TEMPLATES,
    Conversation,
    Message,
    encode,
    tokenizer_for,
)
from tokenizer import EOT, Tokenizer


@dataclass(frozen=True)
class Baseline:
    """How another model of the paper's comparisons is spoken to.

    `<s>`, `</s>` and `<|names|>` are those tokens, {text} and {system} are slots. A user's turn
    goes up to where the assistant speaks.
    """

    user: str
    answer: str
    # the first user turn where there is a system text
    first: str | None = None
    # the system text that the model was trained with
    system: str | None = None
    # text, not a token, that ends an answer
    stop: str | None = None
    # whether spaces around a message are removed
    strip: bool = False
    # whether the prompt begins with the token that begins a text
    bos: bool = True
    # whether a text after a token begins with a space (to sentencepiece, all do)
    space: bool = True
    # the token that ends an answer, beside the one that ends a text
    end_of_turn: str = EOT


_CHAT_BETWEEN = (
    "A chat between a curious {} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
BASELINES = {
    # v1.1, v1.5; wizardlm v1.2 too
    "vicuna": Baseline(
        user="USER: {text} ASSISTANT:",
        answer=" {text}</s>",
        first="{system} USER: {text} ASSISTANT:",
        system=_CHAT_BETWEEN.format("user"),
    ),
    "llama-2-chat": Baseline(
        user="[INST] {text} [/INST]",
        answer=" {text} </s><s>",
        first="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{text} [/INST]",
        strip=True,
    ),
    "guanaco": Baseline(
        user="### Human: {text}\n### Assistant:",
        answer=" {text}\n",
        first="{system}\n### Human: {text}\n### Assistant:",
        system=_CHAT_BETWEEN.format("human"),
        stop="### Human:",
    ),
    "ultralm": Baseline(user="User: {text}</s>\nAssistant:", answer=" {text}</s>\n"),
    # SmolLM2's and Qwen's
    "chatml": Baseline(
        user="<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        answer="{text}<|im_end|>\n",
        first="<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        bos=False,
        space=False,
        end_of_turn="<|im_end|>",
    ),
    # Llama-3-Instruct's own roles; `llama-3` of conversations.py has OpenChat's
    "llama-3-chat": Baseline(
        user=f"{_HEADER.format('user')}{{text}}<|eot_id|>{_HEADER.format('assistant')}",
        answer="{text}<|eot_id|>",
        first=f"{_HEADER.format('system')}{{system}}<|eot_id|>"
        f"{_HEADER.format('user')}{{text}}<|eot_id|>{_HEADER.format('assistant')}",
        strip=True,
        space=False,
        end_of_turn="<|eot_id|>",
    ),
}

# every name that --template takes; openchat: v3.2 with the expert's prompt; base: the text alone
PROMPTS = (*TEMPLATES, *BASELINES, "openchat", "base")
assert len(set(PROMPTS)) == len(PROMPTS), "a template of ours has the name of another model's"


def prompt_tokenizer(template: str, file: Path) -> Tokenizer:
    """The tokenizer, with the end of turn and the space that belong to one of PROMPTS."""
    if template in BASELINES:
        style = BASELINES[template]
        return Tokenizer(file, style.end_of_turn, style.space)
    if template in ("openchat", "base"):
        return Tokenizer(file)
    return tokenizer_for(template, file)


def tokenize_prompt(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: str,
    condition: str | None,
    system: str | None = None,
) -> list[int]:
    """Ids up to the point where the assistant speaks. template: one of PROMPTS.

    With a template of ours by the same `encode` as in training: the two cannot drift apart.
    """
    if template in BASELINES:
        return tokenize_baseline(messages, tokenizer, template, system)
    # a model that has not been fine-tuned goes on with a text
    if template == "base":
        text = "\n".join(message.text for message in messages)
        return [tokenizer.bos, *tokenizer.encode(text, space=False)]
    if template == "openchat":
        template = "before_speaker"
        condition = "GPT4"

    answer = Message("assistant", "")
    conversation = Conversation((*messages, answer), system=system, condition=condition)
    preamble, turns = encode(conversation, tokenizer, template)
    ids = list(preamble)
    for prefix, text in turns[:-1]:
        ids += prefix + text
    # the prompt ends where the text of the answer would begin
    prefix, _ = turns[-1]
    return ids + prefix


def tokenize_baseline(
    messages: Sequence[Message], tokenizer: Tokenizer, template: str, system: str | None = None
) -> list[int]:
    """Ids of a conversation in another model's template.

    ValueError: a system text where the template has no place for one.
    """
    style = BASELINES[template]
    if system is None:
        system = style.system
    if system is not None and style.first is None:
        raise ValueError(
            f"template {template} has no place for a system text; put it into the first message"
        )

    special = {"<s>": tokenizer.bos, "</s>": tokenizer.eos}
    ids = [tokenizer.bos] if style.bos else []
    # All text between two special tokens is tokenized at once, whichever turns it is from. The
    # template's own tokens become ids; in the text of a message they stay text.
    text = ""
    for i, message in enumerate(messages):
        turn = turn_of(style, message, with_system=i == 0 and system is not None)
        said = message.text.strip() if style.strip else message.text
        slots = {"{text}": said, "{system}": system}
        for piece in re.split(r"(</?s>|<\|\w+\|>|\{system\}|\{text\})", turn):
            if piece in special or SPECIAL_TOKEN.fullmatch(piece):
                ids += tokenizer.encode(text)
                ids.append(special[piece] if piece in special else tokenizer.id_of(piece))
                text = ""
            else:
                text += slots.get(piece, piece)
    return ids + tokenizer.encode(text)


def turn_of(style: Baseline, message: Message, with_system: bool) -> str:
    """The template of one turn."""
    if message.role == "assistant":
        return style.answer
    if with_system:
        return style.first
    return style.user
