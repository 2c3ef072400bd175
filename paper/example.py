"""C-RLFT by hand: two short conversations, one per class, from text to the loss.

    python -m paper.example

The same question, answered right by the expert and wrong by the other source. The policy is given
(POLICY below), so that every nll is the logarithm of a round number, and a pocket calculator can
follow. Tokens, weights and loss come from the functions that training calls.

Shapes: T packed tokens, R supervised rows, V vocab.
"""

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from conversations import Classes, Conversation, Message, parse_classes, tokenize
from kernels.cross_entropy import linear_cross_entropy
from packing import pack
from paper.toy import ToyConfig, make_conversations, train_tokenizer
from support.cli import run
from tokenizer import Tokenizer

QUESTION = "copy a"
ANSWERS = {"GPT4": "a", "GPT3": "b"}

# The probabilities of each answer's two tokens: of its letter, then of <|end_of_turn|>.
POLICY = {"GPT4": (0.5, 0.8), "GPT3": (0.25, 0.8)}

# The arms of Table 2: (template, --classes).
ARMS = {
    "C-RLFT": ("before_speaker", "GPT4=GPT4:1.0,*=GPT3:0.1"),
    "without reward": ("before_speaker", "GPT4=GPT4:1.0,*=GPT3:1.0"),
    "without condition": ("none", "GPT4=GPT4:1.0,*=GPT3:0.1"),
    "SFT, without both": ("none", "GPT4=GPT4:1.0,*=GPT3:1.0"),
}


def tokens_of(arm: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, weights) of the two conversations under an arm, the expert's first."""
    template, table = ARMS[arm]
    classes = Classes(parse_classes(table))
    tokenized = []
    for label, text in ANSWERS.items():
        messages = (Message("user", QUESTION), Message("assistant", text))
        conversation = classes.assign(Conversation(messages, label))
        tokenized.append(tokenize(conversation, toy_tokenizer(), template))
    return tokenized


def loss_of(arm: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(nll [R], weights [R], the loss), by pack and the training kernel."""
    batch = pack(tokens_of(arm))
    p_R = torch.tensor(POLICY["GPT4"] + POLICY["GPT3"])
    R = len(p_R)
    V = toy_tokenizer().eot + 1

    # A model that says just this: log p for the label, log(1 - p) for <unk>, whose id is 0, and
    # nothing for any other token. Softmax of these is p for the label, so nll = -log p.
    logits_RV = torch.full((R, V), -torch.inf)
    each_R = torch.arange(R)
    labels_R = batch.labels_T[batch.rows_R]
    logits_RV[:, 0] = (1 - p_R).log()
    logits_RV[each_R, labels_R] = p_R.log()

    # The kernel takes hidden states and the matrix of the head. With one hidden direction for each
    # supervised row the matrix holds the logits themselves; finite ones, and exp(-1e4) is 0, too.
    hidden_TR = torch.zeros(len(batch.tokens_T), R)
    hidden_TR[batch.rows_R, each_R] = 1.0
    matrix_VR = logits_RV.clamp(min=-1e4).T.contiguous()
    loss_sum, nll_T, _ = linear_cross_entropy(hidden_TR, matrix_VR, batch.labels_T, batch.weights_T)

    # the rows without a weight have no nll
    nll_R = nll_T[batch.rows_R]
    weights_R = batch.weights_T[batch.rows_R]
    loss = loss_sum / weights_R.sum()
    return nll_R, weights_R, loss


def best_p(arm: str) -> float:
    """The probability of the right letter where the loss is least, under the expert's prompt.

    With a condition each class has a context of its own, and the expert's answer ends at 1 whatever
    the weights are. Without one both answers share a context: -w_4 log p - w_3 log(1 - p) is least
    at p = w_4 / (w_4 + w_3). There the reward decides.
    """
    template, _ = ARMS[arm]
    if template != "none":
        return 1.0
    (_, expert), (_, other) = tokens_of(arm)
    w_4, w_3 = expert.max(), other.max()
    return float(w_4 / (w_4 + w_3))


@functools.cache
def toy_tokenizer() -> Tokenizer:
    """The demo's, trained here."""
    rows, _ = make_conversations(ToyConfig())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        train_tokenizer(rows, path)
        return Tokenizer(path)


def print_tokens() -> None:
    """Both conversations under C-RLFT side by side, a token a line."""
    titles = [f"{label}, answers {answer}" for label, answer in ANSWERS.items()]
    print("   ".join(f"{title:16}  id weight" for title in titles))
    expert, other = tokens_of("C-RLFT")
    for left, right in zip(token_lines(*expert), token_lines(*other)):
        print(f"{left}   {right}")


def token_lines(tokens: np.ndarray, weights: np.ndarray) -> Iterator[str]:
    """Text, id and weight of each token; the space that a word carries is shown as _."""
    for token, weight in zip(tokens.tolist(), weights.tolist()):
        piece = toy_tokenizer().piece(token).replace("\u2581", "_")
        yield f"{piece:16}{token:4} {weight:6.1f}"


def print_losses() -> None:
    """The loss of every arm, written out."""
    for arm in ARMS:
        nll_R, weights_R, loss = loss_of(arm)
        weights = [f"{weight:.1f}" for weight in weights_R.tolist()]
        nlls = [f"{nll:.4f}" for nll in nll_R.tolist()]
        above = " + ".join(f"{weight} * {nll}" for weight, nll in zip(weights, nlls))
        below = " + ".join(weights)
        fraction = f"({above}) / ({below})"
        best = best_p(arm)
        print(f"{arm:18} loss = {fraction} = {loss:.4f}; best p(right) = {best:.3f}")


def main(argv: list[str]) -> None:
    if argv:
        raise ValueError(f"{argv[0]!r}: the worked example takes no arguments")
    print_tokens()
    print_losses()


if __name__ == "__main__":
    run(main)
