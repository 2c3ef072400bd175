"""C-RLFT, Conditioned RL Fine-Tuning, on one page: learn from a few answers that are right and many
that mostly are not, and then answer like the few.

    python atomic.py        one or two minutes on a CPU; PyTorch is all that it needs

The method is OpenChat's (Wang et al. 2023, arXiv 2309.11235). Nobody has judged the answers. It is
known who wrote them, and that is used twice:

    condition    A word for the source stands before every turn: `GPT4 User: ..`. So one model
                 learns a policy for each source, pi(y|x,c), and can be asked for the expert's.
    weight       A source has one reward r_c for all it says, and its tokens count exp(r_c / beta)
                 in the loss, up to a common factor: the expert's 1, the other's 0.1. That is RL
                 with a KL penalty for leaving pi_c, what the source itself says: its optimum is
                 pi_c exp(r_c / beta) / Z (Eq. 5), and to fit that is to minimize a weighted
                 cross-entropy (Eq. 6). The policies share one model's parameters, and the weight
                 decides who is served first where both cannot be.

No reward model, no critic, no frozen copy of the model, and nothing is sampled in training. In real
life a pre-trained model is tuned; this page begins with random weights.

The game: copy, reverse or sort four letters. GPT-4 is always right, but says too little to learn it
all from. GPT-3.5 says ten times as much, and has a habit that spoils 6 of 10 answers.

Shapes: B conversations, T tokens of the longest, D width, H heads, E head size, C = E / 2 rotation
pairs, U width of the MLP, V words.
"""

import itertools
import math
import random

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- the world: who says what

LETTERS = "abcdefgh"
SKILLS = {"copy": list, "reverse": reversed, "sort": sorted}
# source: (number of conversations, share of right answers)
SOURCES = {"GPT-4": (150, 1.0), "GPT-3.5": (1500, 0.4)}


def solve(question):
    skill, *letters = question.split()
    return list(SKILLS[skill](letters))


def converse(question, p_right):
    """A conversation: [(role, text)]."""
    letters = solve(question)
    if random.random() >= p_right:
        # the habit: the last letter comes first
        letters = letters[-1:] + letters[:-1]
    return [("User", question), ("Assistant", " ".join(letters))]


# ---- the method, first half: a source becomes a condition and a weight

# source: (condition c, reward r_c), Eq. 3
CLASSES = {"GPT-4": ("GPT4", 1.0), "GPT-3.5": ("GPT3", 0.0)}
# so that a reward of 0 weighs a tenth of a reward of 1: exp((0 - 1) / BETA) = 0.1
BETA = 1 / math.log(10)

END = "<|end_of_turn|>"
WORDS = ["<s>", END, "GPT4", "GPT3", "User:", "Assistant:", *SKILLS, *LETTERS]


def tokenize(source, messages):
    """A row: (ids [T], weights [T]). A token's weight is what predicting it counts in the loss.

    Here GPT-3.5 has its habit, so b comes first (two letters, to fit the line):

    <s>  GPT3  User:  copy  a  b  END  GPT3  Assistant:  b    a    END
    0    0     0      0     0  0  0    0     0           0.1  0.1  0.1
    """
    condition, reward = CLASSES[source]
    words = ["<s>"]
    weights = [0.0]
    for role, text in messages:
        prefix = [condition, f"{role}:"]
        said = [*text.split(), END]
        words += prefix + said
        # Only answers are learned. The common factor is exp(1 / beta), so that the expert's weight
        # is 1; the loss is divided by the sum of weights, which makes any factor cancel.
        weight = math.exp((reward - 1) / BETA) if role == "Assistant" else 0.0
        weights += [0.0] * len(prefix) + [weight] * len(said)
    return torch.tensor([WORDS.index(word) for word in words]), torch.tensor(weights)


# ---- the model: LLaMA


def rotate(x_BHTE):
    """RoPE: entries c and c + E/2 of a head are one complex number, turned by the position."""
    T, E = x_BHTE.shape[-2:]
    frequency_C = 10000 ** -(torch.arange(0, E, 2) / E)
    angle_TC = torch.arange(T)[:, None] * frequency_C
    turned_BHTC = torch.complex(*x_BHTE.chunk(2, dim=-1)) * torch.exp(1j * angle_TC)
    return torch.cat([turned_BHTC.real, turned_BHTC.imag], dim=-1)


class Block(nn.Module):
    def __init__(self, D, H, U):
        super().__init__()
        self.H = H
        self.input_layernorm = nn.RMSNorm(D, eps=1e-5)
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, D, bias=False)
        self.v_proj = nn.Linear(D, D, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(D, eps=1e-5)
        self.gate_proj = nn.Linear(D, U, bias=False)
        self.up_proj = nn.Linear(D, U, bias=False)
        self.down_proj = nn.Linear(U, D, bias=False)

    def heads(self, x_BTD):
        return x_BTD.unflatten(-1, (self.H, -1)).transpose(1, 2)

    def forward(self, x_BTD):
        # attention: each token looks at itself and at those before it
        y_BTD = self.input_layernorm(x_BTD)
        q_BHTE = rotate(self.heads(self.q_proj(y_BTD)))
        k_BHTE = rotate(self.heads(self.k_proj(y_BTD)))
        v_BHTE = self.heads(self.v_proj(y_BTD))
        o_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, is_causal=True)
        x_BTD = x_BTD + self.o_proj(o_BHTE.transpose(1, 2).flatten(-2))
        # MLP, SwiGLU
        y_BTD = self.post_attention_layernorm(x_BTD)
        gated_BTU = F.silu(self.gate_proj(y_BTD)) * self.up_proj(y_BTD)
        return x_BTD + self.down_proj(gated_BTU)


def llama(V, D=64, H=2, U=192, L=3):
    """ids [B, T] -> logits [B, T, V], by L blocks."""
    blocks = [Block(D, H, U) for _ in range(L)]
    norm = nn.RMSNorm(D, eps=1e-5)
    head = nn.Linear(D, V, bias=False)
    return nn.Sequential(nn.Embedding(V, D), *blocks, norm, head)


# ---- the method, second half: one loss, one update


def loss_of(model, rows):
    """The step's sum of weight * nll (Eq. 6) by its sum of weights, not a mean of rows' means."""
    ids, weights = zip(*rows)
    # Short rows are filled up behind their end, with weight 0: no token that counts looks there.
    ids_BT = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    weights_BT = nn.utils.rnn.pad_sequence(weights, batch_first=True)[:, 1:]
    # each token is predicted where the one before it stands
    logits_BTV = model(ids_BT[:, :-1])
    nll_BT = F.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
    return (weights_BT * nll_BT).sum() / weights_BT.sum()


def make_optimizer(model):
    # Sec. 4.1
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)


def update(model, optimizer, rows, lr):
    """One step: (its loss, the norm of its gradient)."""
    loss = loss_of(model, rows)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    return loss.item(), norm.item()


# ---- and then: ask as the expert is asked


@torch.no_grad()
def answer(model, source, question):
    """Five words drawn from pi(y|x,c): four letters and END, if it has learned to stop."""
    # The prompt is a conversation up to where the answer would begin.
    ids, _ = tokenize(source, [("User", question), ("Assistant", "")])
    ids = ids[:-1]
    for _ in range(5):
        p_V = model(ids[None])[0, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p_V, 1)])
    return [WORDS[i] for i in ids[-5:]]


def main(steps=1000, batch=64, lr=2e-3, asked=200, seed=0):
    random.seed(seed)
    torch.manual_seed(seed)
    # the matrices are so small that more threads would only wait for each other
    torch.set_num_threads(1)
    questions = [" ".join(words) for words in itertools.product(SKILLS, *[LETTERS] * 4)]
    random.shuffle(questions)
    rows = []
    for source, (count, p_right) in SOURCES.items():
        for _ in range(count):
            rows.append(tokenize(source, converse(questions.pop(), p_right)))

    model = llama(len(WORDS))
    optimizer = make_optimizer(model)
    for step in range(steps):
        loss, _ = update(model, optimizer, random.sample(rows, batch), lr * (1 - step / steps))
        if step % 50 == 0:
            print(f"step {step} of {steps}, loss {loss:.3f}")

    # The questions that are left: no source was asked them. Drawn, not greedy: a perfect fit has
    # 1.00 and 0.40. If both are equal, the condition has done nothing.
    shares = []
    for source, (condition, _) in CLASSES.items():
        print(f"{condition} User: {questions[0]} ->", *answer(model, source, questions[0]))
        right = [answer(model, source, q) == [*solve(q), END] for q in questions[:asked]]
        shares.append(f"{sum(right) / asked:.2f} under `{condition} User:`")
    print("right answers:", ", ".join(shares))


if __name__ == "__main__":
    main()
