"""How models are spoken to: ours in the template of their training, others in their own."""

import re
from dataclasses import dataclass

from conversations import TEMPLATES, Conversation, Message, encode


@dataclass(frozen=True)
class Baseline:
    """How another model of the paper's comparisons is spoken to. `<s>` and `</s>` are those tokens, {text} and {system} slots.

    first: the first user turn where there is a system text; user: any other, up to where the assistant speaks; answer: one of its.
    """

    user: str
    answer: str
    first: str | None = None
    system: str | None = None  # what the model was trained with
    stop: str | None = None  # text, not a token, that ends an answer
    strip: bool = False  # spaces around a text


_ASSISTANT = "The assistant gives helpful, detailed, and polite answers to the user's questions."
BASELINES = {
    # v1.1, v1.5; wizardlm v1.2 too
    "vicuna": Baseline(
        "USER: {text} ASSISTANT:",
        " {text}</s>",
        "{system} USER: {text} ASSISTANT:",
        f"A chat between a curious user and an artificial intelligence assistant. {_ASSISTANT}",
    ),
    "llama-2-chat": Baseline(
        "[INST] {text} [/INST]",
        " {text} </s><s>",
        "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{text} [/INST]",
        strip=True,
    ),
    "guanaco": Baseline(
        "### Human: {text}\n### Assistant:",
        " {text}\n",
        "{system}\n### Human: {text}\n### Assistant:",
        f"A chat between a curious human and an artificial intelligence assistant. {_ASSISTANT}",
        stop="### Human:",
    ),
    "ultralm": Baseline("User: {text}</s>\nAssistant:", " {text}</s>\n"),
}
# openchat: v3.2, the GPT4 prompt; base: the raw text
PROMPTS = (*TEMPLATES, *BASELINES, "openchat", "base")


def tokenize_baseline(messages, tokenizer, template, system=None):
    """Ids of a conversation in another model's template. ValueError: a system text where the template has no place for one."""
    style = BASELINES[template]
    system = style.system if system is None else system
    if system is not None and style.first is None:
        raise ValueError(
            f"template {template} has no place for a system text; put it into the first message"
        )
    # ids, and texts that are tokenized each by itself; only our templates' `<s>` and `</s>` become
    # ids
    parts = [tokenizer.bos, ""]
    for i, message in enumerate(messages):
        text = message.text.strip() if style.strip else message.text
        turn = (
            style.answer
            if message.role == "assistant"
            else style.first
            if i == 0 and system is not None
            else style.user
        )
        for piece in re.split(r"(<s>|</s>|\{system\}|\{text\})", turn):
            if piece in ("<s>", "</s>"):
                parts += [tokenizer.bos if piece == "<s>" else tokenizer.eos, ""]
            else:
                parts[-1] += {"{text}": text, "{system}": system}.get(piece, piece)
    return [
        i
        for part in parts
        for i in ([part] if isinstance(part, int) else tokenizer.encode(part) if part else [])
    ]


def tokenize_prompt(messages, tokenizer, template, condition, system=None):
    """Ids up to the point where the assistant speaks. The same `encode` as in training: a prompt can't drift from it."""
    if template in BASELINES:
        return tokenize_baseline(messages, tokenizer, template, system)
    if template == "openchat":
        template, condition = "before_speaker", "GPT4"
    if template == "base":  # a model that has not been fine-tuned: the text itself
        return [tokenizer.bos, *tokenizer.encode("\n".join(m.text for m in messages))]
    conversation = Conversation(
        (*messages, Message("assistant", "")), system=system, condition=condition
    )
    head, turns = encode(conversation, tokenizer, template)
    return [*head, *(i for prefix, text in turns[:-1] for i in prefix + text), *turns[-1][0]]
