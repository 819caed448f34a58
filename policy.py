"""The policy: a causal language model, checked at load, whose log-probs share each group's context; ranks.

Sizes: G suffixes of one context, P context tokens (prompt + cached prefix), S suffix length, N packed tokens,
V vocabulary, R rows (responses) of a batch."""
from __future__ import annotations

import atexit
import contextlib
import copy
import ctypes
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import (AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig,
                          PreTrainedModel)

from data import say_once

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# (start, P, stop, lengths): from `start` P context tokens, then suffixes of these lengths up to `stop`
Span = tuple[int, int, int, list[int]]
LOGITS_PER_CHUNK = {"cpu": 2**24, "cuda": 2**28}  # float32 logits held at once: [R, S, V] never exists


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
class Segments:
    """How a row of queries and a row of keys are cut: a part of the one attends to its part of the other."""
    query_lens: list[int]
    key_lens: list[int]
    causal: bool
    device: torch.device

    @functools.cached_property
    def varlen(self) -> tuple:
        """Arguments of CUDA's kernels: where the parts begin, the longest, no dropout."""
        ends = [torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=self.device)
                for lens in (self.query_lens, self.key_lens)]
        return *ends, max(self.query_lens), max(self.key_lens), 0.0, self.causal


@dataclass(frozen=True)
class Batch:
    """Trees packed into one row of N tokens. R rows are suffixes, right-padded to S."""
    spans: list[Span]
    input_ids: torch.Tensor  # (1, N) int64
    position_ids: torch.Tensor  # (1, N) int64
    index: torch.Tensor  # (R, S) int64: packed position whose logits predict this suffix token
    targets: torch.Tensor  # (R, S) int64: the suffix tokens
    mask: torch.Tensor  # (R, S) bool, from lengths: a sampled EOS is trained, padding is not

    @functools.cached_property
    def segments(self) -> tuple[Segments, Segments, torch.Tensor, torch.Tensor]:
        """(contexts and suffixes, each within itself; the suffixes of a tree within its context; where in the
        row these suffixes, and these contexts, are)."""
        device, shared = self.input_ids.device, [span for span in self.spans if span[3]]
        lens = [n for _, p, _, suffixes in self.spans for n in (p, *suffixes)]
        suffix = [i for start, p, stop, _ in shared for i in range(start + p, stop)]
        context = [i for start, p, _, _ in shared for i in range(start, start + p)]
        return (Segments(lens, lens, True, device),
                Segments([sum(x[3]) for x in shared], [x[1] for x in shared], False, device),
                *(torch.tensor(x, dtype=torch.long, device=device) for x in (suffix, context)))


def pack(trees: Sequence[Tree], device: torch.device | str = "cpu", ragged: bool | None = None) -> Batch:
    """Trees as one Batch: each context, then its suffixes one by one.
    ragged: suffixes keep their lengths; else those of a tree are padded to its longest, which makes them one
    batch for the kernels of a CPU. None: not on a CPU."""
    ids: list[int] = []
    positions: list[int] = []
    spans, index, targets = [], [], []
    ragged = torch.device(device).type != "cpu" if ragged is None else ragged
    for tree in trees:
        start, p, s = len(ids), len(tree.context), max(map(len, tree.suffixes)) - 1
        lens = [len(suffix) - 1 if ragged else s for suffix in tree.suffixes]
        ids += tree.context
        positions += range(p)
        for suffix, n in zip(tree.suffixes, lens):
            index.append([start + p - 1, *range(len(ids), len(ids) + len(suffix) - 1)])
            ids += suffix[:-1] + [suffix[0]] * (n + 1 - len(suffix))  # any id will do as padding
            positions += range(p, p + n)
            targets.append(suffix)
        spans.append((start, p, len(ids), [n for n in lens if n]))
    return Batch(spans, torch.tensor([ids], device=device), torch.tensor([positions], device=device),
                 padded(index, torch.long, device), padded(targets, torch.long, device),
                 padded([[True] * len(t) for t in targets], torch.bool, device))


def padded(rows: Sequence[Sequence], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Ragged rows as an (R, S) tensor, zeros on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype, device=device)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in at least float32, also of bfloat16 factors and within autocast."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype == b.dtype in (torch.bfloat16, torch.float16):
            factors = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))
            return torch.bmm(*factors, out_dtype=torch.float32).view(*a.shape[:-1], b.shape[-1])
        dtype = torch.promote_types(a.dtype, torch.float32)
        return a.to(dtype) @ b.to(dtype)


def partial_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float,
                      mask: torch.Tensor | None, fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to some of the keys, and the log-sum-exp of its scores, by which parts are merged.
    query (B, H, T, D), key and value (B, H_kv, P, D), mask added to the scores -> (B, H, T, D), (B, H, T)."""
    if fused:
        return _FLASH(query, key, value, attn_mask=mask, scale=scaling)
    scores = product(_fold(query, key), key.mT) * scaling
    scores = scores if mask is None else scores + mask
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    return (weights.to(value.dtype) @ value).view(query.shape), lse.view(query.shape[:3])


def merge_attention(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor,
                    lse_b: torch.Tensor) -> torch.Tensor:
    """Attention to the keys of both parts, from the output of each: exact (arXiv 2402.05099, 2403.08845)."""
    share = torch.sigmoid(lse_b - lse_a)[..., None]  # of b: exp(lse_b) / (exp(lse_a) + exp(lse_b))
    return torch.lerp(out_a.to(share.dtype), out_b.to(share.dtype), share)


class Kernel(NamedTuple):
    """Attention within Segments. query, out (T, H, D), key, value (P, H_kv, D), lse (T, H): the log-sum-exp
    of the scores. With out and lse over more keys, `backward` gives these keys' exact share of the gradient.
    """
    forward: Callable  # (segments, scaling, query, key, value) -> out, lse
    backward: Callable  # (segments, scaling, query, key, value, out, lse, d_out) -> d_query, d_key, d_value


def _varlen_forward(op: Callable, segments: Segments, scaling: float,
                    *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = op(*tensors, *segments.varlen, False, scale=scaling)
    return out, lse.T


def _varlen_backward(op: Callable, segments: Segments, scaling: float, query: torch.Tensor, key: torch.Tensor,
                     value: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
                     d_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout: not read
    return op(d_out.contiguous(), query, key, value, out, lse.T.contiguous(), *segments.varlen,
              seed, seed[:0], scale=scaling)


def _in_batches(attend: Callable, segments: Segments, scaling: float,
                *tensors: torch.Tensor) -> list[torch.Tensor]:
    """A kernel from `attend`, which takes and gives (n, heads, T, ...): parts of equal lengths in a row."""
    results, starts = [], [0, 0]
    for lens, run in groupby(zip(segments.query_lens, segments.key_lens)):
        n = len(list(run))
        sizes = [n * length for length in lens]
        batch = [x.narrow(0, starts[i], sizes[i]).unflatten(0, (n, -1)).transpose(1, 2)
                 for x, i in zip(tensors, (0, 1, 1, 0, 0, 0))]  # key and value come second and third
        starts = [start + size for start, size in zip(starts, sizes)]
        results.append([x.transpose(1, 2).flatten(0, 1) for x in attend(segments.causal, scaling, *batch)])
    return [torch.cat(parts) for parts in zip(*results)]


def _fold(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The heads that share keys as rows of one product: (B, H, T, ...) -> (B, H_kv, H / H_kv * T, ...)."""
    return x.unflatten(1, (key.shape[1], -1)).flatten(2, 3)


def _causal_mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """For folded heads: (H / H_kv * T, T)."""
    mask = query.new_full((query.shape[2], key.shape[2]), float("-inf")).triu(1)
    return mask.repeat(query.shape[1] // key.shape[1], 1)


def _plain_forward(causal: bool, scaling: float, query: torch.Tensor, key: torch.Tensor,
                   value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return partial_attention(query, key, value, scaling, _causal_mask(query, key) if causal else None, False)


def _plain_backward(causal: bool, scaling: float, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                    out: torch.Tensor, lse: torch.Tensor, d_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q, grad, lse, delta = (_fold(x, key) for x in (query, d_out, lse, (d_out.to(lse.dtype) * out).sum(-1)))
    scores = product(q, key.mT) * scaling + (_causal_mask(query, key) if causal else 0)
    weights = (scores - lse[..., None]).exp()
    d_scores = (weights * (product(grad, value.mT) - delta[..., None]) * scaling).to(key.dtype)
    return (product(d_scores, key).view(query.shape), product(d_scores.mT, q),
            product(weights.to(grad.dtype).mT, grad))


CUDA = Kernel(partial(_varlen_forward, torch.ops.aten._flash_attention_forward),  # of bfloat16 and float16
              partial(_varlen_backward, torch.ops.aten._flash_attention_backward))
CPU = Kernel(partial(_in_batches, lambda causal, scale, *x: _FLASH(*x, is_causal=causal, scale=scale)),
             partial(_in_batches, lambda causal, scale, *x: _FLASH_BACKWARD(x[-1], *x[:-1], 0.0, causal,
                                                                            scale=scale)))
PLAIN = Kernel(partial(_in_batches, _plain_forward), partial(_in_batches, _plain_backward))  # slow, anywhere


class _TreeAttention(torch.autograd.Function):
    """query (N, H, D), key and value (N, H_kv, D) -> (N, H, D). Two calls of a kernel, each token within its
    own segment and the suffixes within their context, merged by log-sum-exp (arXiv 2402.05099)."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Batch,
                kernel: Kernel, scaling: float) -> torch.Tensor:
        own, shared, suffix, context = batch.segments
        out, lse = kernel.forward(own, scaling, query, key, value)
        if len(suffix):
            part, part_lse = kernel.forward(shared, scaling, query[suffix], key[context], value[context])
            own_lse = lse[suffix]
            out[suffix] = merge_attention(part, part_lse, out[suffix], own_lse).to(out.dtype)
            lse[suffix] = torch.logaddexp(part_lse, own_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.batch, ctx.kernel, ctx.scaling = batch, kernel, scaling
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (query, key, value, out, lse), kernel = ctx.saved_tensors, ctx.kernel
        own, shared, suffix, context = ctx.batch.segments
        grads = kernel.backward(own, ctx.scaling, query, key, value, out, lse, grad)
        if len(suffix):
            parts = kernel.backward(shared, ctx.scaling, query[suffix], key[context], value[context],
                                    out[suffix], lse[suffix], grad[suffix])
            for whole, part, where in zip(grads, parts, (suffix, context, context)):
                whole[where] += part
        return *grads, None, None, None


@dataclass(frozen=True)
class Packed:
    """Attention within a packed row: a context attends causally to itself, a suffix to its context and
    causally to itself, nothing crosses trees. [RPO-2]
    So a context is computed once for all its suffixes, with gradient."""
    batch: Batch
    kernel: Kernel
    # for decoding, called in every layer: spans, layer, keys and values (1, H_kv, N, D)
    store: Callable[[list[Span], int, torch.Tensor, torch.Tensor], None] | None = None

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scaling: float) -> torch.Tensor:
        """query (1, H, N, D), key and value (1, H_kv, N, D) -> (1, N, H, D)."""
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast a norm leaves float32 behind
        if self.store is not None:
            self.store(self.batch.spans, layer, key, value)
        row = (x[0].transpose(0, 1) for x in (query, key, value))
        return _TreeAttention.apply(*row, self.batch, self.kernel, scaling)[None]


def head_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """(heads, heads of keys and values, dimension of a head)."""
    heads = config.num_attention_heads
    return (heads, getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads)


def kernel_error(kernel: Kernel, heads: int, kv_heads: int, dim: int, dtype: torch.dtype,
                 device: torch.device) -> str:
    """What is wrong with its attention and gradient, compared with a dense float64 mask; "" if nothing."""
    trees = [Tree([0] * p, [[0] * (s + 1)] * g) for p, g, s in ((37, 3, 11), (150, 2, 129), (5, 1, 0))]
    batch, generator, results = pack(trees, device), torch.Generator().manual_seed(0), []
    n = batch.input_ids.numel()
    sizes = ((heads, n, dim), (kv_heads, n, dim), (kv_heads, n, dim), (n, heads, dim))
    *leaves, grad = (torch.randn(1, *size, generator=generator).to(device, dtype) for size in sizes)
    mask = torch.zeros(n, n, dtype=torch.bool, device=device)
    for start, p, stop, lens in batch.spans:
        mask[start:stop, start:start + p] = True
        for end, length in zip(accumulate(lens, initial=start + p), lens):
            mask[end:end + length, end:end + length] = True
    try:
        for exact in (False, True):
            inputs = [x.to(torch.float64 if exact else dtype, copy=True).requires_grad_() for x in leaves]
            out = Packed(batch, kernel).attend(0, *inputs, dim ** -0.5) if not exact else \
                F.scaled_dot_product_attention(*inputs, mask.tril(), enable_gqa=True).transpose(1, 2)
            results.append([out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))])
    except (RuntimeError, NotImplementedError) as error:
        return str(error).partition("\n")[0][:200]
    worst = float(torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(*results)]).max())
    bound = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}.get(dtype, 1e-10)
    return "" if worst < bound else f"it is off by {worst:.1g} of the exact result"  # NaN, too


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
    Ids from vocab_size on have no probability, whether or not the head has `width` columns for more. dtype:
    of the factors of products. The backward pass computes the logits of a chunk again and turns them into
    their own gradient in place."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                targets: torch.Tensor, temperature: float, vocab_size: int, width: int, dtype: torch.dtype,
                rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.temperature, ctx.vocab_size, ctx.width, ctx.dtype = temperature, vocab_size, width, dtype
        ctx.rows, cast = rows, weight[:width].to(dtype)  # once, not for every chunk
        logprobs, entropies, normalisers = [], [], []
        for x, target in zip(states.to(dtype).split(rows), targets.split(rows)):
            logits = _logits(x, cast, bias, temperature)[:, :vocab_size]
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
        cast, inputs = weight[:ctx.width].to(ctx.dtype), states.to(ctx.dtype)
        d_states = torch.empty_like(states)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # None: the head is frozen
        d_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(states), ctx.rows):
            part = slice(start, start + ctx.rows)
            logits = _logits(inputs[part], cast, bias, ctx.temperature)
            logits[:, ctx.vocab_size:] = float("-inf")
            scale = grad[part, None] / ctx.temperature  # d logprob / d logits = onehot - softmax
            d_logits = logits.sub_(normalisers[part, None]).exp_().mul_(-scale).scatter_add_(
                1, targets[part, None], scale)
            if d_bias is not None:
                d_bias[:ctx.width] += d_logits.sum(0)
            d_logits = d_logits.to(ctx.dtype)
            d_states[part] = d_logits @ cast
            if d_weight is not None:
                d_weight[:ctx.width] += product(d_logits.T, inputs[part])
        return d_states, d_weight, d_bias, *[None] * 6


def _logits(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
            temperature: float = 1.0) -> torch.Tensor:
    logits = product(states, weight.T)
    logits = logits if bias is None else logits.add_(bias[:len(weight)])
    return logits if temperature == 1 else logits.div_(temperature)


class Policy(torch.nn.Module):
    """A causal language model whose contexts are shared by their suffixes.
    vocab_size: of the tokenizer; ids from there on (padded embedding rows) get no probability. dtype: of
    computation; the weights keep theirs. kernel: of attention in packed rows, None: the device's; one that is
    wrong here, in forward or gradient, is replaced by PLAIN, with a note. Raises ValueError for a model whose
    log-probs would not be those of its own plain forward: sliding windows or other special attention, soft
    caps or scales of the logits."""

    def __init__(self, model: PreTrainedModel, vocab_size: int, dtype: torch.dtype = torch.float32,
                 kernel: Kernel | None = None) -> None:
        super().__init__()
        self.model, self.vocab_size, self.dtype = model, vocab_size, dtype
        self.fused = model.device.type == "cpu"  # kernels that return the log-sum-exp parts are merged by
        self.kernel = kernel or (CPU if self.fused else CUDA)
        if error := kernel_error(self.kernel, *head_shape(model.config), dtype, model.device):
            say_once(f"attention in the update is slower, without the fused kernel: on {model.device} in "
                     f"{dtype}, {error}")
            self.kernel = PLAIN
        self.logits_per_chunk = LOGITS_PER_CHUNK["cpu" if self.fused else "cuda"]
        self.copies: list[Policy] = []  # one, made by `shard`; in a list, so that it is no submodule
        self.stale = False  # the weights have changed since they were copied
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

    @property
    def head_dtype(self) -> torch.dtype:
        """Of the factors of logits: on CUDA that of computation, whose products are float32 anyway."""
        return torch.promote_types(self.model.dtype, torch.float32) if self.fused else self.dtype

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def forward(self, batch: Batch, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the suffix tokens and the entropy of their distributions, at the sampling temperature.
        Returns two (R, S) float32 tensors, 0 where masked; the first carries gradient, the second does not.
        """
        with self.autocast():
            states = self.states(batch.input_ids, batch.position_ids, Packed(batch, self.kernel))
        head = self.model.get_output_embeddings()
        width = self.vocab_size if self.fused else len(head.weight)  # an odd one makes products slow on CUDA
        logprobs, entropy = _TokenLogprobs.apply(
            states[batch.index[batch.mask]], head.weight, head.bias, batch.targets[batch.mask], temperature,
            self.vocab_size, width, self.head_dtype, max(1, self.logits_per_chunk // width))
        zeros = logprobs.new_zeros(batch.mask.shape)
        return zeros.masked_scatter(batch.mask, logprobs), zeros.masked_scatter(batch.mask, entropy)

    def states(self, input_ids: torch.Tensor, position_ids: torch.Tensor, layout) -> torch.Tensor:
        """Last hidden states, flat: input_ids and position_ids (rows, T) int64 -> (rows * T, hidden).
        layout: has attend(layer, query, key, value, scaling), as Packed and rollout.py:Decoder."""
        out = self.model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False,
                                    layout=layout)
        return out.last_hidden_state.flatten(0, 1)

    def shard(self) -> None:
        """Spread weights, gradients and Adam states over the ranks (FSDP2). Log-probs with gradient then come
        from `forward` only, which all ranks must call equally often; everything else uses `whole`."""
        mesh = init_device_mesh(self.device.type, (ranks()[1],))
        dtypes = MixedPrecisionPolicy(self.dtype, torch.float32, cast_forward_inputs=False)
        layers = next(m for m in self.model.base_model.children() if isinstance(m, torch.nn.ModuleList))
        copies = torch.nn.ModuleList()  # layer by layer: a device cannot hold all of them twice
        whole = copy.deepcopy(self, {id(layers): copies})
        for layer in layers:
            copies.append(cast_weights(copy.deepcopy(layer), self.dtype))
            fully_shard(layer, mesh=mesh, mp_policy=dtypes)
        fully_shard(self, mesh=mesh)
        self.copies = [whole]

    @torch.no_grad()
    def whole(self) -> Policy:
        """This policy; if it is sharded, a copy with whole weights as they are now. All ranks call it."""
        for whole in self.copies if self.stale else ():
            for p, full in zip(self.parameters(), whole.parameters()):
                full.copy_(p.full_tensor())
            self.stale = False
        return self.copies[0] if self.copies else self

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's state dict, whole, with tied weights once. All ranks call it."""
        once = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        return whole_tensors({name: x for name, x in self.model.state_dict().items() if name in once})

    def add_gradients(self) -> None:
        """Give every rank the sum of all ranks' gradients, where they are not sharded."""
        for p in self.parameters() if ranks()[1] > 1 and not self.copies else ():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)

    def head_weight(self) -> torch.Tensor:
        """The head's weight in the dtype of its products, to be cast once for all steps of decoding."""
        return self.model.get_output_embeddings().weight.to(self.head_dtype)

    def logits(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """states (n, hidden), weight: `head_weight` -> (n, V) float32, padded embedding rows included."""
        head = self.model.get_output_embeddings()
        if weight is head.weight and weight.dtype.itemsize >= 4:
            with torch.autocast(self.device.type, enabled=False):
                return head(states.to(weight.dtype))  # its forward may be that of rollout.py:packed_weights
        return _logits(states.to(weight.dtype), weight, head.bias)

    @torch.no_grad()
    def _verify(self) -> None:
        """Switch the model to shared-prefix attention and compare its logits with its own plain forward."""
        ids = [self.vocab_size * i // 15 for i in range(1, 15)]  # ordinary tokens: special ones have outliers
        tree = Tree(ids[:6], [ids[6:10], ids[10:]])
        batch, error = pack([tree], self.device), "its logits differ from those of its plain forward"
        try:
            self.eval()
            whole = [torch.tensor([tree.context + suffix], device=self.device) for suffix in tree.suffixes]
            plain = torch.stack([self.model(ids).logits[0, -2] for ids in whole])
            if not plain.isfinite().all():
                raise ValueError("its logits are not finite")
            rope = getattr(self.model.config, "rope_parameters", None) or {}
            if {"longrope", "dynamic"} & {str(value) for value in (rope.get("rope_type"), *rope.values())}:
                raise ValueError("its rotary factors change with the length of the sequence")
            self.model.set_attn_implementation("shared_prefix")
            self.train()  # in which dropout would act
            called: set[int] = set()
            layout = Packed(batch, PLAIN, lambda spans, layer, *_: called.add(layer))
            states = self.states(batch.input_ids, batch.position_ids, layout)
            self.eval()
            if len(called) < self.model.config.get_text_config().num_hidden_layers:
                raise ValueError("not all of its layers attend through the interface of transformers")
            logits = self.model.get_output_embeddings()(states[batch.index[:, -1]])
            if torch.allclose(logits, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())):
                return
        except Exception as reason:  # whatever a foreign architecture raises
            error = str(reason) if isinstance(reason, ValueError) else repr(reason)
        raise ValueError(f"--model: {type(self.model).__name__} cannot share prefixes ({error}); models with "
                         "full causal attention and a plain output layer can, such as Llama, Qwen2 and Qwen3")


@contextlib.contextmanager
def _loading(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(f"--model: {folder} cannot be loaded ({str(error).partition('. ')[0]})") from error


def load_shape(folder: str | Path) -> PreTrainedModel:
    """The model in `folder` without weights, from its config alone. Raises ValueError."""
    with _loading(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if {"quantization_config", "quantization"} & vars(config).keys():
            raise ValueError("its weights are quantized: give the folder of the original model")
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise ValueError(f"a {config.model_type} model is no language model of text alone")
        if not hasattr(config, "num_attention_heads"):
            raise ValueError(f"a {config.model_type} model has no attention, which shares prefixes here")
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_policy(folder: str | Path, vocab_size: int, device: torch.device,
                dtype: torch.dtype = torch.float32, weights: torch.dtype = torch.float32) -> Policy:
    """The causal language model in `folder` (safetensors only), computing in `dtype`.
    weights: their dtype; float32 for a policy that is trained (AdamW at 1e-6 moves no bfloat16 weight). They
    are verified in float32, which hides nothing. Raises ValueError if some are missing, or as Policy does."""
    load_shape(folder)  # refuses what has no such weights
    with _loading(folder):
        for path in Path(folder).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                codes = [n for n in file.keys() if n.endswith("weight") and file.get_slice(n).get_dtype() in
                         ("I8", "U8", "I32", "F8_E4M3", "F8_E5M2")]
            if codes:
                raise ValueError(f"{codes[0]} is quantized: give the folder of the original model")
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True)
    if missing := sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}):
        raise ValueError(f"--model: {folder} lacks weights, which would be random, or has them in another "
                         f"shape: {', '.join(missing[:9])}")
    if (rows := len(model.get_input_embeddings().weight)) < vocab_size:
        raise ValueError(f"--model: {folder} has {vocab_size} tokens but embeddings for {rows}: resize them")
    return cast_weights(Policy(model.to(device), vocab_size, dtype), weights)


def cast_weights(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The module with its weights in dtype. Its buffers stay: rotary frequencies are wrong in bfloat16."""
    for p in module.parameters():
        p.data = p.data.to(dtype)
    return module


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


# What is random, timed or expensive is computed by one of torchrun's processes (ranks) and given to all by
# `gather`; all else they compute alike from the same numbers. So only rounding depends on how many there are.
def ranks() -> tuple[int, int]:
    """(the number of this process, how many there are); without torchrun (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(costs: Sequence[float]) -> list[int]:
    """Which of these items this rank works on: the heaviest first, each to the rank with the least to do."""
    rank, world = ranks()
    load, mine = [0.0] * world, []
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = load.index(min(load))
        load[least] += costs[i]
        mine += [i] * (least == rank)
    return sorted(mine)


def gather(part: dict) -> dict:
    """The parts of all ranks as one, on every rank. All ranks call it."""
    parts = [part] * ranks()[1]
    if len(parts) > 1:
        dist.all_gather_object(parts, part)
    return {key: value for part in parts for key, value in part.items()}


@contextlib.contextmanager
def agreed(*kinds: type[Exception]) -> Iterator[None]:
    """An error of these kinds on one rank in here is raised on all: none waits for one that has given up."""
    error = None
    try:
        yield
    except kinds as reason:
        error = reason
    errors = gather({ranks()[0]: str(error)} if error else {})
    if errors:
        raise error or kinds[0](errors[min(errors)])


def join_ranks() -> None:
    """Under torchrun, connect its processes: objects go by gloo, CUDA tensors by NCCL. Only rank 0 prints."""
    if dist.is_initialized() or not dist.is_torchelastic_launched():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=7))  # long; _watch sees those that have died
    atexit.register(dist.destroy_process_group)  # its threads must end before Python does
    if dist.get_rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")
    pids = {rank: pid for rank, (machine, pid) in
            gather({dist.get_rank(): (os.environ["GROUP_RANK"], os.getpid())}).items()
            if machine == os.environ["GROUP_RANK"]}
    threading.Thread(target=_watch, args=(pids,), daemon=True).start()

    def report(*error: object) -> None:
        time.sleep(9)  # if a collective failed because another rank has died, _watch says so
        sys.stderr = sys.__stderr__
        sys.__excepthook__(*error)
    sys.excepthook = report
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(9), sys.exit(143)))  # by torchrun, likewise


def end(code: int) -> None:
    """End this process. One of several does so without the end of Python, which aborts it (std::terminate) where
    a thread of gloo still frees a tensor."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _watch(pids: dict[int, int]) -> None:
    """End this process when another rank of this machine is gone: NCCL would wait for it for ever."""
    while True:
        time.sleep(1)
        for rank, pid in pids.items():
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                time.sleep(3)  # for a run that ends on all ranks
                print(f"error: rank {rank} has ended early, and this one with it; train.py goes on with "
                      "--resume, eval.py with the same command", file=sys.__stderr__, flush=True)
                os._exit(1)


def whole_tensors(values: dict) -> dict:
    """A state dict with each sharded tensor whole, on rank 0 only. All ranks call it."""
    def whole(x: object) -> object:
        if isinstance(x, DTensor):
            full = x.full_tensor()
            return full.cpu() if ranks()[0] == 0 else None
        return {key: whole(item) for key, item in x.items()} if isinstance(x, dict) else x
    return whole(values)


def device_of(name: str) -> torch.device:
    """auto: cuda if there is any, else cpu. Under torchrun each rank has the CUDA device of its number."""
    device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and ranks()[1] > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--nproc-per-node: there are only {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(device)
    return device


def device_bytes(device: torch.device) -> int:
    """All memory of a device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else \
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def trim_heap(device: torch.device) -> None:
    """On a CPU, give freed memory back to the system: glibc keeps it, gigabytes after an update."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if device.type == "cpu" else None
    if trim:
        trim(0)
