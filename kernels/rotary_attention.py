"""Rotary attention over packed conversations: causal within each conversation, blind across them.

    q'_t, k'_t = R_t q_t, R_t k_t        R_t turns pair (c, c + E/2) by the angle position_t / theta^(2c / E)
    o_t = sum_j softmax_j(q'_t . k'_j / sqrt(E)) v_j      j <= t, j in the conversation of t

Conversation n holds rows cu_seqlens[n] to cu_seqlens[n + 1]; rows after the last one are padding and come out as zeros.
Grouped queries: H query heads share G <= H heads of k and v.

Shapes: q and o [T, H, E], k and v [T, G, E], cos and sin [T, C] in fp32, cu_seqlens int32 [N + 1].
T packed tokens, N conversations, H query heads, G key-value heads, E head size, C = E / 2 rotation pairs.
"""

import torch
import torch.nn.functional as F


def rotate(x_TAE, cos_TC, sin_TC):
    """R_t x_t for every head A of x: LLaMA's "half" rotation, in fp32, back in the dtype of x."""
    lo_TAC, hi_TAC = x_TAE.float().chunk(2, -1)
    cos_T1C, sin_T1C = cos_TC[:, None], sin_TC[:, None]
    return torch.cat([lo_TAC * cos_T1C - hi_TAC * sin_T1C, hi_TAC * cos_T1C + lo_TAC * sin_T1C], -1).to(x_TAE.dtype)


def rotary_attention_ref(q_THE, k_TGE, v_TGE, cos_TC, sin_TC, cu_seqlens):
    q_THE, k_TGE = rotate(q_THE, cos_TC, sin_TC), rotate(k_TGE, cos_TC, sin_TC)
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(ends, ends[1:])]
    lengths.append(len(q_THE) - ends[-1])  # the padding
    # One small attention per conversation, never a T x T mask; split, because slices would each get a T-row gradient.
    pieces = list(zip(q_THE.split(lengths), k_TGE.split(lengths), v_TGE.split(lengths)))
    outputs = []
    for piece in pieces[:-1]:
        q_1HLE, k_1GLE, v_1GLE = (x.transpose(0, 1)[None] for x in piece)
        o_1HLE = F.scaled_dot_product_attention(q_1HLE, k_1GLE, v_1GLE, is_causal=True, enable_gqa=True)
        outputs.append(o_1HLE[0].transpose(0, 1))
    outputs.append(torch.zeros_like(pieces[-1][0]))
    return torch.cat(outputs)


def rotary_attention(q_THE, k_TGE, v_TGE, cos_TC, sin_TC, cu_seqlens, max_seqlen=None):
    """o_THE. `max_seqlen`, the longest conversation, spares a kernel the question to the device."""
    return rotary_attention_ref(q_THE, k_TGE, v_TGE, cos_TC, sin_TC, cu_seqlens)
