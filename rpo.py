"""The algorithm as pure tensor code: advantages, shared-prefix log-probs, objectives.

Sizes: B problems, G responses per problem, P context length (prompt + cached prefix), S suffix length,
N packed tokens, V vocabulary, R rows (responses) of a batch.

Departures from plain GRPO are marked [RPO-1], [RPO-2] ... where they happen; the README lists them.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

FUSED = ("cpu",)  # devices of these kernels, which give the log-sum-exp that parts are merged by
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
LOGITS_PER_CHUNK = 2**24  # float32 logits held at once, 64 MiB: the [R, S, V] tensor never exists

# What each algorithm sets; every value can be given on the command line, which then wins. Fields:
# advantage: std, (R - mean) / std; mean, R - mean; leave_one_out, R - mean of the others' R
# ratio_level: one ratio a token, or one a response (sequence: geometric mean of its tokens' ratios)
# surrogate: clip, min(r A, clip(r) A); cispo, the clipped ratio as a constant weight of A log pi
# aggregation: what is averaged, see `update_denominator`; dynamic_rounds 1: no dynamic sampling
_GRPO = dict(advantage="std", ratio_level="token", surrogate="clip", clip_low=0.2, clip_high=0.2,
             aggregation="response", kl_coef=0.0, dynamic_rounds=1, overlong_penalty=0.0)
ALGORITHMS: dict[str, dict] = {
    "grpo": _GRPO,  # arXiv 2402.03300, eq. 3; its beta is 0.04, here --kl-coef, off as in later work
    "dapo": _GRPO | dict(clip_high=0.28, aggregation="token", dynamic_rounds=10,
                         overlong_penalty=1.0),  # 2503.14476, eq. 8, 12, 13
    "dr_grpo": _GRPO | dict(advantage="mean", aggregation="budget"),  # 2503.20783
    "rloo": _GRPO | dict(advantage="leave_one_out", aggregation="sum"),  # 2402.14740
    "gspo": _GRPO | dict(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4),  # 2507.18071
    "cispo": _GRPO | dict(surrogate="cispo", clip_low=1.0, clip_high=4.0,
                          aggregation="token"),  # 2506.13585: ratio at most 5, no lower clip
}
ADVANTAGES, RATIO_LEVELS = ("std", "mean", "leave_one_out"), ("token", "sequence")
SURROGATES, AGGREGATIONS = ("clip", "cispo"), ("token", "response", "sum", "budget")


def group_advantages(rewards: Sequence[float], kind: str = "std") -> list[float]:
    """Advantages of the G responses of one group from their rewards.

    std: (R - mean) / (std + 1e-6), std unbiased (GRPO, arXiv 2402.03300, section 4.1); mean: R - mean (Dr.
    GRPO, 2503.20783); leave_one_out: R - mean of the others (RLOO, 2402.14740). All zero when the rewards do
    not differ.
    """
    values = torch.tensor(rewards, dtype=torch.float64)
    centred, g = values - values.mean(), len(rewards)
    if g < 2 or not centred.abs().max() > 1e-12:
        return [0.0] * g
    scale = {"std": 1 / (values.std() + 1e-6), "mean": 1.0, "leave_one_out": g / (g - 1)}[kind]
    return (centred * scale).tolist()


# ---------------------------------------------------------------------------------------- shared prefix

Span = tuple[int, int, int, int]  # (start, P, G, S): P context tokens, then G * S suffix tokens


@dataclass
class Packed:
    """Token layout of one packed row of N tokens: for each problem its context, then its suffixes one by one.

    A context attends causally to itself; a suffix to its context and causally to itself; nothing crosses
    problems. So a context is computed once for all its suffixes, with gradient, and there is no padding but
    the tails of the shorter suffixes of a problem. [RPO-2]
    """

    spans: list[Span]
    # for decoding, called in every layer: spans, layer, keys and values (1, H_kv, N, D)
    store: Callable[[list[Span], int, torch.Tensor, torch.Tensor], None] | None = None

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scaling: float) -> torch.Tensor:
        """query (1, H, N, D), key and value (1, H_kv, N, D) -> (1, N, H, D)."""
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast a norm leaves float32 behind
        if self.store is not None:
            self.store(self.spans, layer, key, value)
        parts = []
        for start, p, g, s in self.spans:
            q, k, v = (x[:, :, start:start + p] for x in (query, key, value))
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling,
                                                        enable_gqa=True))
            if g * s:
                own = (x[:, :, start + p:start + p + g * s] for x in (query, key, value))
                attend = _SplitAttention.apply if query.device.type in FUSED else _attend_copies
                parts.append(attend(*own, k, v, g, scaling))
        return torch.cat(parts, dim=2).transpose(1, 2)


def partial_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float,
                      mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to a part of the keys, and the log-sum-exp of its scores to merge it with other parts.

    query (B, H, T, D), key and value (B, H_kv, P, D), mask added to the scores -> (B, H, T, D), (B, H, T).
    """
    if query.device.type in FUSED:
        return _FLASH(query, key, value, attn_mask=mask, scale=scaling)
    folded = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # the heads that share keys: one product
    scores = (folded * scaling @ key.transpose(-1, -2)).float()
    lse = (scores if mask is None else scores + mask).logsumexp(-1)
    weights = ((scores if mask is None else scores + mask) - lse[..., None]).exp()
    return (weights.to(value.dtype) @ value).view(query.shape), lse.view(query.shape[:3])


def merge_attention(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor,
                    lse_b: torch.Tensor) -> torch.Tensor:
    """Attention to the keys of both parts, from what each gives: exact (arXiv 2402.05099, 2403.08845)."""
    share = torch.sigmoid(lse_b - lse_a)[..., None]  # of b: exp(lse_b) / (exp(lse_a) + exp(lse_b))
    return torch.lerp(out_a.to(share.dtype), out_b.to(share.dtype), share)


def _rows(x: torch.Tensor, g: int) -> torch.Tensor:
    """Suffixes as a batch: (1, heads, G*S, ...) -> (G, heads, S, ...)."""
    return x[0].unflatten(1, (g, -1)).transpose(0, 1)


def _packed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)


class _SplitAttention(torch.autograd.Function):
    """Attention of G suffixes to their one context and causally to themselves, without a copy of the context.

    query (1, H, G*S, D), key and value (1, H_kv, G*S, D), those of the context (1, H_kv, P, D)
    -> (1, H, G*S, D). Two fused calls merged by log-sum-exp (arXiv 2402.05099); the backward of each, given
    the merged output and log-sum-exp, is its exact share of the gradient. These calls exist on the CPU only.
    """

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context_key: torch.Tensor,
                context_value: torch.Tensor, g: int, scaling: float) -> torch.Tensor:
        shared, lse = _FLASH(query, context_key, context_value, scale=scaling)
        own = _FLASH(*(_rows(x, g) for x in (query, key, value)), is_causal=True, scale=scaling)
        own, own_lse = map(_packed, own)
        out = merge_attention(shared, lse, own, own_lse).to(query.dtype)
        lse = torch.logaddexp(lse, own_lse)
        ctx.save_for_backward(query, key, value, context_key, context_value, out, lse)
        ctx.g, ctx.scaling = g, scaling
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, context_key, context_value, out, lse = ctx.saved_tensors
        dq, d_context_key, d_context_value = _FLASH_BACKWARD(
            grad, query, context_key, context_value, out, lse, 0.0, False, scale=ctx.scaling)
        rows = [_rows(x, ctx.g) for x in (grad, query, key, value, out, lse)]
        own_dq, dk, dv = map(_packed, _FLASH_BACKWARD(*rows, 0.0, True, scale=ctx.scaling))
        return dq + own_dq, dk, dv, d_context_key, d_context_value, None, None


def _attend_copies(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context_key: torch.Tensor,
                   context_value: torch.Tensor, g: int, scaling: float) -> torch.Tensor:
    """The same for other devices, whose fused kernels want the context copied for every suffix."""
    query, key, value = (_rows(x, g) for x in (query, key, value))
    key = torch.cat([context_key.expand(g, -1, -1, -1), key], dim=2)
    value = torch.cat([context_value.expand(g, -1, -1, -1), value], dim=2)
    mask = causal_lower_right(query.shape[2], key.shape[2])
    return _packed(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling,
                                                  enable_gqa=True))


def _shared_prefix_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor,
                             value: torch.Tensor, attention_mask: torch.Tensor | None,
                             scaling: float | None = None, layout=None,
                             **unused) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer: hands over to `layout` (Packed here, Decoder in rollout.py)."""
    if layout is None:
        raise ValueError("this model was loaded for shared-prefix attention: call it by hidden_states(); "
                         "for ordinary use load it with AutoModelForCausalLM.from_pretrained")
    for option in ("sliding_window", "softcap"):
        if unused.get(option) is not None:
            raise ValueError(f"attention with {option} is not supported")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layout.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("shared_prefix", _shared_prefix_attention)


def load_policy(folder: str, device: torch.device, dtype: torch.dtype = torch.float32,
                trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model in `folder`, set up for shared-prefix attention if its architecture takes it.

    dtype: float32 for a policy that is trained (master weights; AdamW at 1e-6 moves no bfloat16 weight).
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True,
                                                 trust_remote_code=trust_remote_code)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # sampling and training forward must be the same function
    model.to(device).eval()
    reason = use_shared_prefix(model)
    if reason:
        print(f"note: {type(model).__name__} is sampled and trained the plain, slower way: {reason}")
    return model


def use_shared_prefix(model: PreTrainedModel) -> str:
    """Switch `model` to shared-prefix attention, unless that is something else than its own plain forward.

    Compares the two once and returns why the model keeps its own attention (sliding windows, soft caps, no
    such switch); "" where it is switched. `is_shared(model)` tells later. Raises ValueError where the logits
    are not those of the output layer (soft caps, scaling): then there is no way.
    """
    own = model.config._attn_implementation
    context, suffixes = [5, 3, 8, 2, 7, 1], [[4, 9, 6, 2], [1, 6, 3, 3]]
    batch = pack([Item(context, suffixes, [0.0, 0.0], [[], []])], model.device)

    def matches() -> bool:
        states = hidden_states(model, batch.input_ids, batch.position_ids, batch.layout)
        got = model.get_output_embeddings()(states[batch.index[:, -1]])
        return torch.allclose(got, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
    with torch.no_grad():
        plain = torch.stack([model(torch.tensor([context + s], device=model.device)).logits[0, -2]
                             for s in suffixes])
        try:
            model.set_attn_implementation("shared_prefix")
            if matches():
                return ""
            reason = "its attention is not plain causal attention"
        except (TypeError, AttributeError, ValueError) as error:
            reason = str(error)
        model.set_attn_implementation(own)
        if not matches():
            raise ValueError(f"--model: {type(model).__name__} does more to its logits than its output layer "
                             "(a soft cap, a scale): such models are not supported")
    return reason


def is_shared(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation == "shared_prefix"


def hidden_states(model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor,
                  layout) -> torch.Tensor:
    """Last hidden states, flat: input_ids and position_ids (rows, T) int64 -> (rows * T, hidden)."""
    if not is_shared(model):
        return _plain_states(model, input_ids[0], layout.spans)
    out = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, layout=layout)
    return out.last_hidden_state.flatten(0, 1)


def _plain_states(model: PreTrainedModel, ids: torch.Tensor, spans: list[Span]) -> torch.Tensor:
    """The same from whole sequences, context repeated for each suffix: for any architecture. ids (N,)."""
    rows = [torch.cat([ids[start:start + p], ids[start + p + row * s:start + p + (row + 1) * s]])
            for start, p, g, s in spans for row in range(g)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    mask = torch.arange(padded.shape[1], device=ids.device) < lengths[:, None]
    states = model.base_model(input_ids=padded, attention_mask=mask.long(), use_cache=False).last_hidden_state
    parts, row = [], 0
    for _, p, g, s in spans:
        parts += [states[row, :p], states[row:row + g, p:p + s].flatten(0, 1)]
        row += g
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    """Some groups, packed for one forward. Rows are responses, ragged suffixes right-padded to S."""

    layout: Packed
    input_ids: torch.Tensor  # (1, N) int64
    position_ids: torch.Tensor  # (1, N) int64
    index: torch.Tensor  # (R, S) int64: packed position whose logits predict this suffix token
    targets: torch.Tensor  # (R, S) int64: the suffix tokens
    mask: torch.Tensor  # (R, S) bool, from lengths: a sampled EOS is trained, padding is not
    advantages: torch.Tensor  # (R,) float32
    sampled_logprobs: torch.Tensor  # (R, S) float32
    old_logprobs: torch.Tensor | None  # (R, S) float32
    ref_logprobs: torch.Tensor | None  # (R, S) float32


@dataclass(frozen=True)
class Item:
    """One group, or some rows of it, as the update sees it: ragged token ids, one advantage per suffix."""

    context: Sequence[int]  # prompt + prefix
    suffixes: Sequence[Sequence[int]]
    advantages: Sequence[float]
    sampled_logprobs: Sequence[Sequence[float]]  # of the sampling forward: only compared, never trained on
    old_logprobs: Sequence[Sequence[float]] | None = None  # of the policy that sampled; None: it is this one
    ref_logprobs: Sequence[Sequence[float]] | None = None  # of the reference policy, where there is one
    budget: int = 0  # tokens that a suffix could have had

    @property
    def packed_tokens(self) -> int:
        """Tokens that its packed forward computes."""
        return len(self.context) + len(self.suffixes) * (max(map(len, self.suffixes)) - 1)

    def rows(self, part: slice) -> Item:
        _, *per_row, _ = vars(self).values()
        return Item(self.context, *(x and x[part] for x in per_row), self.budget)


def pack(items: Sequence[Item], device: torch.device | str = "cpu") -> Batch:
    """Token lists to one packed Batch. The last token of a suffix is only predicted, never fed."""
    ids: list[int] = []
    positions: list[int] = []
    spans, index, targets = [], [], []
    for item in items:
        start, p, s = len(ids), len(item.context), max(map(len, item.suffixes)) - 1
        spans.append((start, p, len(item.suffixes), s))
        ids += item.context
        positions += range(p)
        for row, suffix in enumerate(item.suffixes):
            block = start + p + row * s
            ids += list(suffix[:-1]) + [suffix[0]] * (s + 1 - len(suffix))  # any id will do as padding
            positions += range(p, p + s)
            index.append([start + p - 1, *range(block, block + len(suffix) - 1)])
            targets.append(suffix)
    width = max(map(len, targets))
    mask = torch.arange(width) < torch.tensor([[len(t)] for t in targets])

    def padded(rows: Sequence[Sequence], dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype, device=device)

    def logprobs(name: str) -> torch.Tensor | None:
        lists = [getattr(item, name) for item in items]
        return None if None in lists else padded([row for rows in lists for row in rows], torch.float32)

    advantages = torch.tensor([a for item in items for a in item.advantages], device=device)
    return Batch(Packed(spans), torch.tensor([ids], device=device), torch.tensor([positions], device=device),
                 padded(index), padded(targets), mask.to(device), advantages.float(),
                 *(logprobs(name) for name in ("sampled_logprobs", "old_logprobs", "ref_logprobs")))


def micro_batches(items: Sequence[Item], tokens_per_forward: int) -> list[list[Item]]:
    """Split into lists of at most `tokens_per_forward` packed tokens, longest first: the same gradient.

    A group that is too long alone is split by rows (its context is then computed once per part).
    """
    pieces: list[Item] = []
    for item in items:
        rows = max(1, (tokens_per_forward - len(item.context)) // max(map(len, item.suffixes)))
        pieces += [item.rows(slice(i, i + rows)) for i in range(0, len(item.suffixes), rows)]
    batches: list[list[Item]] = []
    used = tokens_per_forward + 1
    for piece in sorted(pieces, key=lambda x: x.packed_tokens, reverse=True):
        if used + piece.packed_tokens > tokens_per_forward:
            batches.append([])
            used = 0
        batches[-1].append(piece)
        used += piece.packed_tokens
    return batches


# -------------------------------------------------------------------------------------------- log-probs


class _TokenLogprobs(torch.autograd.Function):
    """Log-probs of targets and entropies, (N,) each, from states (N, hidden) and a head, chunk by chunk.

    The logits of a chunk are computed again in the backward pass and become their own gradient in place.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        device = states.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        ctx.temperature, ctx.rows = temperature, max(1, LOGITS_PER_CHUNK // len(weight))
        logprobs, entropies, normalisers = [], [], []
        for x, target in zip(states.split(ctx.rows), targets.split(ctx.rows)):
            logits = _logits(x, weight, bias, ctx)
            top = logits.amax(-1, keepdim=True)
            weights = logits.sub_(top).exp()
            total = weights.sum(-1)
            log_total = total.log()
            logprobs.append(logits.gather(1, target[:, None])[:, 0] - log_total)
            entropies.append(log_total - weights.mul_(logits).sum(-1) / total)
            normalisers.append(top[:, 0] + log_total)
        ctx.save_for_backward(states, weight, bias, targets, torch.cat(normalisers))
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx, grad: torch.Tensor, _) -> tuple[torch.Tensor | None, ...]:
        states, weight, bias, targets, normalisers = ctx.saved_tensors
        compute_weight, d_states = weight.to(ctx.dtype), torch.empty_like(states)
        d_weight, d_bias = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        for start in range(0, len(states), ctx.rows):
            part = slice(start, start + ctx.rows)
            logits = _logits(states[part], weight, bias, ctx)
            scale = grad[part, None] / ctx.temperature  # d logprob / d logits = onehot - softmax
            d_logits = logits.sub_(normalisers[part, None]).exp_().mul_(-scale).scatter_add_(
                1, targets[part, None], scale).to(ctx.dtype)
            d_states[part] = d_logits @ compute_weight
            d_weight += d_logits.T @ states[part].to(ctx.dtype)
            if bias is not None:
                d_bias += d_logits.sum(0)
        return d_states, d_weight, d_bias, None, None


def _logits(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ctx) -> torch.Tensor:
    logits = F.linear(*(x if x is None else x.to(ctx.dtype) for x in (states, weight, bias)))
    logits = logits.to(torch.promote_types(ctx.dtype, torch.float32))
    return logits if ctx.temperature == 1 else logits.div_(ctx.temperature)


def shared_logprobs(model: PreTrainedModel, batch: Batch, temperature: float = 1.0,
                    vocab_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the suffix tokens and the entropy of their distributions, at the sampling temperature.

    Returns two (R, S) float32 tensors, 0 where masked; the first carries gradient, the second does not.
    vocab_size: ids from there on are never sampled (padded embedding rows) and get no probability.
    """
    states = hidden_states(model, batch.input_ids, batch.position_ids, batch.layout)
    head = model.get_output_embeddings()
    weight, bias = (x if x is None or vocab_size in (None, len(x)) else x[:vocab_size]
                    for x in (head.weight, head.bias))
    logprobs, entropy = _TokenLogprobs.apply(states[batch.index[batch.mask]], weight, bias,
                                             batch.targets[batch.mask], temperature)
    zeros = logprobs.new_zeros(batch.mask.shape)
    return zeros.masked_scatter(batch.mask, logprobs), zeros.masked_scatter(batch.mask, entropy)


# ------------------------------------------------------------------------------------------- objectives


def update_denominator(items: Sequence[Item], aggregation: str) -> int:
    """What the summed loss of a whole optimiser update is divided by, fixed before it is split.

    token: the number of its tokens (DAPO). response: of its responses, each counted by the mean over its
    tokens (GRPO). sum: of its responses, each by its sum (RLOO). budget: responses times the tokens that the
    longest suffix could have had, so that a response's weight does not depend on its length (Dr. GRPO).
    """
    responses = sum(len(item.suffixes) for item in items)
    if aggregation == "token":
        return sum(len(suffix) for item in items for suffix in item.suffixes)
    return responses * (max(item.budget for item in items) if aggregation == "budget" else 1)


def policy_loss(logprobs: torch.Tensor, batch: Batch, denominator: int, *, clip_low: float, clip_high: float,
                aggregation: str, ratio_level: str = "token", surrogate: str = "clip",
                kl_coef: float = 0.0) -> tuple[torch.Tensor, dict[str, float]]:
    """The objective of ALGORITHMS with optional KL penalty (k3), to be minimised; suffix tokens only. [RPO-3]

    logprobs (R, S) with gradient. batch.old_logprobs None means on-policy: the ratio is 1, its gradient that
    of the log-prob. Returns the scalar loss, divided by `denominator` (see update_denominator), and sums over
    tokens for the log: clip_fraction, approx_kl, kl_ref. Source: the papers beside ALGORITHMS.
    """
    mask = batch.mask
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    log_ratio = (logprobs - old).clamp(-20, 20)
    sums = {"approx_kl": ((log_ratio.exp() - 1 - log_ratio) * mask).sum().item()}
    if ratio_level == "sequence":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1))[:, None]
    ratio = log_ratio.exp().expand(mask.shape)
    advantages = batch.advantages.to(logprobs.dtype)[:, None]
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    if surrogate == "cispo":
        token_objective = clipped_ratio.detach() * advantages * logprobs
        clipped = clipped_ratio != ratio
    else:
        token_objective = torch.minimum(ratio * advantages, clipped_ratio * advantages)
        clipped = clipped_ratio * advantages < ratio * advantages
    sums["clip_fraction"] = (clipped & mask).sum().item()
    if kl_coef > 0:
        ref_ratio = (batch.ref_logprobs - logprobs).clamp(-20, 20)
        k3 = ref_ratio.exp() - ref_ratio - 1
        token_objective = token_objective - kl_coef * k3
        sums["kl_ref"] = (k3 * mask).sum().item()
    per_response = (token_objective * mask).sum(1)
    if aggregation == "response":
        per_response = per_response / mask.sum(1)
    return -per_response.sum() / denominator, sums
