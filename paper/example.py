"""C-RLFT by hand: two short conversations, one per class, from text to the loss, with numbers for a pocket calculator.

    python -m paper.example

The same question, answered right by the expert and wrong by the other source. The policy is given (P below), so that every
nll is the logarithm of a round number; tokens, weights and loss come from the functions that training calls.
"""

import functools
import tempfile
from pathlib import Path

import torch

from conversations import Classes, Conversation, Message, parse_classes, tokenize
from kernels.cross_entropy import linear_cross_entropy
from packing import pack
from paper.toy import ToyConfig, make_conversations, train_tokenizer
from support.cli import run
from tokenizer import Tokenizer

QUESTION, ANSWERS = "copy a", {"GPT4": "a", "GPT3": "b"}
P = {"GPT4": (0.5, 0.8), "GPT3": (0.25, 0.8)}  # of the answer's letter, then of <|end_of_turn|>
ARMS = {  # Table 2: (template, --classes)
    "C-RLFT": ("before_speaker", "GPT4=GPT4:1.0,*=GPT3:0.1"),
    "without reward": ("before_speaker", "GPT4=GPT4:1.0,*=GPT3:1.0"),
    "without condition": ("none", "GPT4=GPT4:1.0,*=GPT3:0.1"),
    "SFT, without both": ("none", "GPT4=GPT4:1.0,*=GPT3:1.0"),
}


def conversations(arm):
    """The two conversations under an arm: [(tokens, weights)]."""
    template, table = ARMS[arm]
    classes = Classes(parse_classes(table))
    both = [
        Conversation((Message("user", QUESTION), Message("assistant", text)), label=label)
        for label, text in ANSWERS.items()
    ]
    return [tokenize(classes.assign(c), toy_tokenizer(), template) for c in both]


def loss(arm):
    """(nll of the four supervised tokens, their weights, the loss), through pack and the training kernel."""
    batch = pack(conversations(arm))
    p_R = torch.tensor([p for c in ANSWERS for p in P[c]])
    # One hidden direction per supervised row, whose logits are log p on the label and log(1 - p) on
    # <unk>: nll = -log p.
    logits_RV = torch.full((4, 97), -torch.inf)
    logits_RV[:, 0] = (1 - p_R).log()
    logits_RV[torch.arange(4), batch.labels_T[batch.rows_R]] = p_R.log()
    hidden_TR = torch.zeros(len(batch.tokens_T), 4)
    hidden_TR[batch.rows_R, torch.arange(4)] = 1.0
    finite_VR = logits_RV.clamp(min=-1e4).T.contiguous()
    loss_sum, nll_T, _ = linear_cross_entropy(hidden_TR, finite_VR, batch.labels_T, batch.weights_T)
    return nll_T[batch.rows_R], batch.weights_T[batch.rows_R], loss_sum / batch.weights_T.sum()


def best_p(arm):
    """The probability of the right letter at the loss's minimum, under the prompt used at inference.

    With a condition each class has a context of its own and the expert's ends at 1 whatever the weights. Without one both
    answers share a context, -w_4 log p - w_3 log(1 - p) is least at p = w_4 / (w_4 + w_3): there the reward decides.
    """
    template, _ = ARMS[arm]
    (_, w4), (_, w3) = conversations(arm)
    return 1.0 if template != "none" else float(w4.max() / (w4.max() + w3.max()))


@functools.cache
def toy_tokenizer():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        train_tokenizer(make_conversations(ToyConfig())[0], path)
        return Tokenizer(path)


def main(argv):
    if argv:
        raise ValueError(f"{argv[0]!r}: the worked example takes no arguments")
    tokenizer, both = toy_tokenizer(), conversations("C-RLFT")
    print(
        "   ".join(
            f"{label + ', answers ' + ANSWERS[label]:16}{'id':>4} {'weight':>6}"
            for label in ANSWERS
        )
    )
    for row in zip(*(zip(tokens.tolist(), weights.tolist()) for tokens, weights in both)):
        print(
            "   ".join(
                f"{tokenizer.piece(i).replace(chr(0x2581), '_'):16}{i:4} {w:6.1f}" for i, w in row
            )
        )
    for arm in ARMS:
        nll, weight, value = loss(arm)
        terms = " + ".join(f"{w:.1f} * {x:.4f}" for w, x in zip(weight.tolist(), nll.tolist()))
        total = " + ".join(f"{w:.1f}" for w in weight.tolist())
        print(
            f"{arm:18} loss = ({terms}) / ({total}) = {value:.4f}; best p(right) = {best_p(arm):.3f}"
        )


if __name__ == "__main__":
    run(main)
