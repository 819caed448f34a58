"""The policy: a causal language model, checked at load, whose log-probs share each group's context.

Sizes: G suffixes of one context, P context tokens (prompt + cached prefix), S suffix length, N packed tokens,
V vocabulary, R rows (responses) of a batch."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from data import say_once

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
Span = tuple[int, int, int, int]  # (start, P, G, S): P context tokens, then G * S suffix tokens
LOGITS_PER_CHUNK = 2**24  # float32 logits held at once, 64 MiB: the [R, S, V] tensor never exists


@dataclass(frozen=True)
class Tree:
    """One context and the suffixes that continue it, as token ids; the context is computed once."""
    context: list[int]  # prompt + cached prefix, at least one token
    suffixes: list[list[int]]  # each at least one token

    @property
    def packed_tokens(self) -> int:
        """Tokens that its forward computes: the last token of a suffix is only predicted."""
        return len(self.context) + len(self.suffixes) * (max(map(len, self.suffixes)) - 1)


@dataclass(frozen=True)
class Batch:
    """Trees packed into one row of N tokens. R rows are suffixes, ragged ones right-padded to S."""
    spans: list[Span]
    input_ids: torch.Tensor  # (1, N) int64
    position_ids: torch.Tensor  # (1, N) int64
    index: torch.Tensor  # (R, S) int64: packed position whose logits predict this suffix token
    targets: torch.Tensor  # (R, S) int64: the suffix tokens
    mask: torch.Tensor  # (R, S) bool, from lengths: a sampled EOS is trained, padding is not


def pack(trees: Sequence[Tree], device: torch.device | str = "cpu") -> Batch:
    """Trees as one Batch: each context, then its suffixes one by one."""
    ids: list[int] = []
    positions: list[int] = []
    spans, index, targets = [], [], []
    for tree in trees:
        start, p, s = len(ids), len(tree.context), max(map(len, tree.suffixes)) - 1
        spans.append((start, p, len(tree.suffixes), s))
        ids += tree.context
        positions += range(p)
        for row, suffix in enumerate(tree.suffixes):
            block = start + p + row * s
            ids += suffix[:-1] + [suffix[0]] * (s + 1 - len(suffix))  # any id will do as padding
            positions += range(p, p + s)
            index.append([start + p - 1, *range(block, block + len(suffix) - 1)])
            targets.append(suffix)
    return Batch(spans, torch.tensor([ids], device=device), torch.tensor([positions], device=device),
                 padded(index, torch.long, device), padded(targets, torch.long, device),
                 padded([[True] * len(t) for t in targets], torch.bool, device))


def padded(rows: Sequence[Sequence], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Ragged rows as an (R, S) tensor, zeros on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype, device=device)


@dataclass(frozen=True)
class Packed:
    """Attention within a packed row: a context attends causally to itself, a suffix to its context and
    causally to itself, nothing crosses trees. [RPO-2]
    So a context is computed once for all its suffixes, with gradient, and the only padding is the tails of
    the shorter suffixes of a tree."""
    spans: list[Span]
    fused: bool  # by the CPU's fused kernels, else with a copy of the context for every suffix
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
                attend = _SplitAttention.apply if self.fused else _attend_copies
                parts.append(attend(*own, k, v, g, scaling))
        return torch.cat(parts, dim=2).transpose(1, 2)


def partial_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float,
                      mask: torch.Tensor | None, fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to some of the keys, and the log-sum-exp of its scores, by which parts are merged.
    query (B, H, T, D), key and value (B, H_kv, P, D), mask added to the scores -> (B, H, T, D), (B, H, T)."""
    if fused:
        return _FLASH(query, key, value, attn_mask=mask, scale=scaling)
    folded = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # the heads that share keys: one product
    scores = (folded * scaling @ key.transpose(-1, -2)).float()
    scores = scores if mask is None else scores + mask
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    return (weights.to(value.dtype) @ value).view(query.shape), lse.view(query.shape[:3])


def merge_attention(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor,
                    lse_b: torch.Tensor) -> torch.Tensor:
    """Attention to the keys of both parts, from the output of each: exact (arXiv 2402.05099, 2403.08845)."""
    share = torch.sigmoid(lse_b - lse_a)[..., None]  # of b: exp(lse_b) / (exp(lse_a) + exp(lse_b))
    return torch.lerp(out_a.to(share.dtype), out_b.to(share.dtype), share)


def _rows(x: torch.Tensor, g: int) -> torch.Tensor:
    """Suffixes as a batch: (1, heads, G*S, ...) -> (G, heads, S, ...)."""
    return x[0].unflatten(1, (g, -1)).transpose(0, 1)


def _row(x: torch.Tensor) -> torch.Tensor:
    """The inverse of _rows."""
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)


class _SplitAttention(torch.autograd.Function):
    """Attention of G suffixes to their one context and causally to themselves; the context is not copied.
    query (1, H, G*S, D), key and value (1, H_kv, G*S, D), those of the context (1, H_kv, P, D)
    -> (1, H, G*S, D). Two fused calls, merged by log-sum-exp (arXiv 2402.05099). The backward of each call,
    given the merged output and log-sum-exp, is its exact share of the gradient. CPU only."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context_key: torch.Tensor,
                context_value: torch.Tensor, g: int, scaling: float) -> torch.Tensor:
        shared, lse = _FLASH(query, context_key, context_value, scale=scaling)
        own = _FLASH(*(_rows(x, g) for x in (query, key, value)), is_causal=True, scale=scaling)
        own, own_lse = map(_row, own)
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
        own_dq, dk, dv = map(_row, _FLASH_BACKWARD(*rows, 0.0, True, scale=ctx.scaling))
        return dq + own_dq, dk, dv, d_context_key, d_context_value, None, None


def _attend_copies(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context_key: torch.Tensor,
                   context_value: torch.Tensor, g: int, scaling: float) -> torch.Tensor:
    """The same on other devices, whose fused kernels need a copy of the context for every suffix."""
    query, key, value = (_rows(x, g) for x in (query, key, value))
    key = torch.cat([context_key.expand(g, -1, -1, -1), key], dim=2)
    value = torch.cat([context_value.expand(g, -1, -1, -1), value], dim=2)
    mask = causal_lower_right(query.shape[2], key.shape[2])
    return _row(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling,
                                               enable_gqa=True))


def _shared_prefix_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor,
                             value: torch.Tensor, attention_mask: torch.Tensor | None,
                             scaling: float | None = None, layout=None,
                             **unused) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer; `layout` is a Packed, or the Decoder of rollout.py."""
    if layout is None:
        raise ValueError("this model was loaded for shared-prefix attention: call it through Policy; "
                         "for ordinary use load it with AutoModelForCausalLM.from_pretrained")
    for option in ("sliding_window", "softcap"):
        if unused.get(option) is not None:
            raise ValueError(f"attention with {option} is not supported")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layout.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("shared_prefix", _shared_prefix_attention)


class _TokenLogprobs(torch.autograd.Function):
    """Log-probs of targets and entropies, (N,) each, from states (N, hidden) and a head, `rows` at a time.
    The backward pass computes the logits of a chunk again and turns them into their own gradient in place."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                targets: torch.Tensor, temperature: float, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        device = states.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        ctx.temperature, ctx.rows = temperature, rows
        logprobs, entropies, normalisers = [], [], []
        for x, target in zip(states.split(rows), targets.split(rows)):
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
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # None: the head is frozen
        d_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(states), ctx.rows):
            part = slice(start, start + ctx.rows)
            logits = _logits(states[part], weight, bias, ctx)
            scale = grad[part, None] / ctx.temperature  # d logprob / d logits = onehot - softmax
            d_logits = logits.sub_(normalisers[part, None]).exp_().mul_(-scale).scatter_add_(
                1, targets[part, None], scale).to(ctx.dtype)
            d_states[part] = d_logits @ compute_weight
            if d_weight is not None:
                d_weight += d_logits.T @ states[part].to(ctx.dtype)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        return d_states, d_weight, d_bias, None, None, None


def _logits(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ctx) -> torch.Tensor:
    logits = F.linear(*(x if x is None else x.to(ctx.dtype) for x in (states, weight, bias)))
    logits = logits.to(torch.promote_types(ctx.dtype, torch.float32))
    return logits if ctx.temperature == 1 else logits.div_(ctx.temperature)


class Policy(torch.nn.Module):
    """A causal language model whose contexts are shared by their suffixes.
    vocab_size: of the tokenizer; ids from there on (padded embedding rows) get no probability. dtype: of
    computation; the weights keep theirs. Raises ValueError for a model whose log-probs would not be those of
    its own plain forward: sliding windows or other special attention, soft caps or scales of the logits.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model, self.vocab_size, self.dtype = model, vocab_size, dtype
        self.fused = model.device.type == "cpu"  # kernels that return the log-sum-exp parts are merged by
        self.logits_per_chunk = LOGITS_PER_CHUNK
        self.paged_attention: Callable | None = None  # that of rollout.py:PagedDecoder, where it is used
        for module in model.modules():  # sampling and training forward must be the same function: no dropout
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for owner in (module, getattr(module, "config", None)):  # what some models call by F.dropout
                for name, value in list(vars(owner).items()) if owner else ():
                    if "drop" in name and isinstance(value, float):
                        setattr(owner, name, 0.0)
        self._verify()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def forward(self, batch: Batch, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the suffix tokens and the entropy of their distributions, at the sampling temperature.
        Returns two (R, S) float32 tensors, 0 where masked; the first carries gradient, the second does not.
        """
        with self.autocast():
            states = self.states(batch.input_ids, batch.position_ids, Packed(batch.spans, self.fused))
            head = self.model.get_output_embeddings()
            weight, bias = (x if x is None or self.vocab_size == len(x) else x[:self.vocab_size]
                            for x in (head.weight, head.bias))
            logprobs, entropy = _TokenLogprobs.apply(
                states[batch.index[batch.mask]], weight, bias, batch.targets[batch.mask], temperature,
                max(1, self.logits_per_chunk // len(weight)))
        zeros = logprobs.new_zeros(batch.mask.shape)
        return zeros.masked_scatter(batch.mask, logprobs), zeros.masked_scatter(batch.mask, entropy)

    def states(self, input_ids: torch.Tensor, position_ids: torch.Tensor, layout) -> torch.Tensor:
        """Last hidden states, flat: input_ids and position_ids (rows, T) int64 -> (rows * T, hidden).
        layout: has attend(layer, query, key, value, scaling), as Packed and rollout.py:Decoder."""
        out = self.model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False,
                                    layout=layout)
        return out.last_hidden_state.flatten(0, 1)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """states (n, hidden) -> (n, V), padded embedding rows included."""
        return self.model.get_output_embeddings()(states)

    @torch.no_grad()
    def _verify(self) -> None:
        """Switch the model to shared-prefix attention and compare its logits with its own plain forward."""
        tree = Tree([5, 3, 8, 2, 7, 1], [[4, 9, 6, 2], [1, 6, 3, 3]])
        batch, error = pack([tree], self.device), "its logits differ from those of its plain forward"
        try:
            self.eval()
            whole = [torch.tensor([tree.context + suffix], device=self.device) for suffix in tree.suffixes]
            plain = torch.stack([self.model(ids).logits[0, -2] for ids in whole])
            rope = getattr(self.model.config, "rope_parameters", None) or {}
            if {"longrope", "dynamic"} & {str(value) for value in (rope.get("rope_type"), *rope.values())}:
                raise ValueError("its rotary factors change with the length of the sequence")
            self.model.set_attn_implementation("shared_prefix")
            self.train()  # in which dropout would act
            states = self.states(batch.input_ids, batch.position_ids, Packed(batch.spans, self.fused))
            self.eval()
            if torch.allclose(self.logits(states[batch.index[:, -1]]), plain, rtol=1e-3,
                              atol=1e-3 * float(plain.abs().max())):
                return
        except Exception as reason:  # whatever a foreign architecture raises
            error = str(reason) if isinstance(reason, ValueError) else repr(reason)
        raise ValueError(f"--model: {type(self.model).__name__} cannot share prefixes ({error}); models with "
                         "full causal attention and a plain output layer can, such as Llama, Qwen2 and Qwen3")


def load_policy(folder: str | Path, vocab_size: int, device: torch.device,
                dtype: torch.dtype = torch.float32, weights: torch.dtype = torch.float32) -> Policy:
    """The causal language model in `folder` (safetensors only), computing in `dtype`.
    weights: their dtype; float32 for a policy that is trained (AdamW at 1e-6 moves no bfloat16 weight). They
    are verified in float32, which hides nothing. Raises ValueError if some are missing, or as Policy does."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True,
                                                           trust_remote_code=False, output_loading_info=True)
    except (ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(f"--model: {folder} cannot be loaded ({type(error).__name__}: {error})") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"--model: {folder} lacks weights, which would be random: {', '.join(missing[:9])}")
    return Policy(model.to(device), vocab_size, dtype).to(weights)


def halve_to_fit(work: Callable[[float], object], size: float, floor: float, option: str) -> object:
    """work(size), with half the size as often as the device runs out of memory, down to `floor`.
    Results do not depend on the size. Raises torch.OutOfMemoryError at the floor."""
    while True:
        try:
            return work(size)
        except torch.OutOfMemoryError:
            if size / 2 < floor:
                raise
        torch.cuda.empty_cache()  # here, not above: the error holds on to the tensors of the failed try
        say_once(f"out of memory: goes on with half of {option} {size:.6g}, which changes no result; give "
                 f"{option} {size / 2:.6g} to save the failed tries")
        size /= 2
