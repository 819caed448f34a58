"""Batched KV-cache generation that continues from cached prefixes.

The context of a problem (prompt + prefix) is computed and stored once, whatever the number of suffixes; each
suffix keeps only its own keys and values. Rows that finish leave, problems that wait enter."""
from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from data import say_once
from policy import (Packed, Policy, Span, Tree, device_bytes, gather, halve_to_fit, head_shape,
                    merge_attention, pack, padded, partial_attention, share, trim_heap)

PREFILL_TOKENS = 2**14  # contexts computed in one forward, which bounds its activations
PAGE = 256  # tokens, the fewest that the CUDA kernel for paged keys takes


@dataclass(frozen=True)
class Request:
    """One context to be continued `len(seeds)` times."""
    context: list[int]  # prompt + prefix token ids
    budget: int  # most new tokens of a row
    seeds: list[tuple[int, ...]]  # one per row: whatever else is in the batch, it draws the same numbers


@dataclass
class Suffix:
    """One sampled continuation."""
    ids: list[int] = field(default_factory=list)  # EOS included when it finished
    logprobs: list[float] = field(default_factory=list)  # at the sampling temperature; diagnosis only
    finished: bool = False  # ended by an EOS id, not by the budget


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn."""
    eos_ids: tuple[int, ...]
    vocab_size: int  # ids from there on (padded embedding rows) are never sampled
    temperature: float = 1.0  # 0: greedy
    truncate: Callable[[torch.Tensor], torch.Tensor] | None = None  # weights (R, V) -> 0 where never sampled


def sample(logits: torch.Tensor, uniforms: torch.Tensor, how: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (R, V), uniforms (R,) float32 in [0, 1) -> ids (R,) int64, log-probs (R,) float32.
    Draws by inverting the cumulative distribution, so that a row depends on its own logits and number only.
    The log-prob is that of the whole distribution at the temperature, before it is truncated."""
    logits = logits[:, :how.vocab_size].float()
    scaled = logits if how.temperature in (0, 1) else logits / how.temperature
    top = scaled.amax(-1, keepdim=True)
    weights = (scaled - top).exp_()
    normaliser = top[:, 0] + weights.sum(-1).log()
    if how.temperature == 0:
        ids = logits.argmax(-1)
    else:
        ids = _invert(how.truncate(weights) if how.truncate else weights, uniforms)
    return ids, scaled.gather(1, ids[:, None])[:, 0] - normaliser


def _invert(weights: torch.Tensor, uniforms: torch.Tensor, block: int = 256) -> torch.Tensor:
    """First column where the running sum of `weights` (R, V) exceeds `uniforms` (R,) of the total.
    In two steps, the block and then the column in it: running sums over a whole vocabulary are slow. The
    thresholds stay below the sums even after rounding, so that a weight of 0 is never reached."""
    blocks = F.pad(weights, (0, -weights.shape[1] % block)).unflatten(1, (-1, block))
    sums = blocks.sum(-1).cumsum(-1)
    threshold = (uniforms * (1 - 2**-22) * sums[:, -1])[:, None]
    which = torch.searchsorted(sums, threshold, right=True)
    inside = blocks.gather(1, which[..., None].expand(-1, -1, block))[:, 0].cumsum(-1)
    before = F.pad(sums, (1, 0)).gather(1, which)
    rest = torch.minimum(threshold - before, inside[:, -1:] * (1 - 2**-22))
    return (which * block + torch.searchsorted(inside, rest, right=True))[:, 0]


class Decoder:
    """Keys and values of everything in flight, and the attention of one decode step over them.
    Slots for contexts (per layer keys (contexts, H_kv, P, D)) and for rows of suffixes ((rows, H_kv, S, D)),
    allocated once and written in place. The first ones are active; one that leaves is filled by the last.
    Memory grows as P + G*S, not G*(P + S)."""
    look = 1  # steps until the host looks at the tokens

    def __init__(self, policy: Policy, contexts: int, rows: int, context_len: int, suffix_len: int):
        self.policy, self.device, self.head = policy, policy.device, policy.head_weight()
        self.sizes = (contexts, rows, context_len, suffix_len)
        self.context_kv: torch.Tensor | None = None  # (2, layers, contexts, H_kv, context_len, D)
        self.suffix_kv: torch.Tensor | None = None  # (2, layers, rows, H_kv, suffix_len, D)
        self.names: list[int] = []  # per active context slot: whose it is
        self.context_lens: list[int] = []  # per active context slot
        self.owner: list[int] = []  # per active row: its context slot
        self.lens: list[int] = []  # per active row: suffix tokens stored

    def enter(self, name: int, context: list[int]) -> bool:
        """Take in a row of this context if there is room; a context that is new awaits prefill()."""
        if len(self.owner) == self.sizes[1] or name not in self.names and len(self.names) == self.sizes[0]:
            return False
        if name not in self.names:
            self.names.append(name)
            self.context_lens.append(len(context))
        self.owner.append(self.names.index(name))
        self.lens.append(0)
        return True

    def prefill(self, contexts: dict[int, list[int]]) -> torch.Tensor:
        """Compute the contexts, packed, and store their keys and values; logits (n, V) after each."""
        names, logits = list(contexts), []
        while names:
            ends = np.cumsum([len(contexts[name]) for name in names])
            fit = max(1, int(np.searchsorted(ends, PREFILL_TOKENS, side="right")))
            part, names = names[:fit], names[fit:]
            batch = pack([Tree(contexts[name], [[0]]) for name in part], self.device)  # predicts one token
            store = functools.partial(self._store_contexts, [self.names.index(name) for name in part])
            layout = Packed(batch, self.policy.kernel, store)
            states = self.policy.states(batch.input_ids, batch.position_ids, layout)
            logits.append(self.policy.logits(states[batch.index[:, 0]], self.head))
        return torch.cat(logits)

    def _store_contexts(self, slots: list[int], spans: list[Span], layer: int, key: torch.Tensor,
                        value: torch.Tensor) -> None:
        """Take the contexts' keys and values of one layer, (1, H_kv, N, D), while they are computed."""
        if self.context_kv is None:
            contexts, rows, context_len, suffix_len = self.sizes
            layers, (_, heads, _, dim) = self.policy.model.config.num_hidden_layers, value.shape
            make = value.new_zeros  # finite everywhere: a masked weight 0 times NaN would be NaN
            self.context_kv = make(2, layers, contexts, heads, context_len, dim)
            self.suffix_kv = make(2, layers, rows, heads, suffix_len, dim)
        for slot, (start, p, _, _) in zip(slots, spans):
            for kind, x in enumerate((key, value)):
                self.context_kv[kind, layer, slot, :, :p] = x[0, :, start:start + p]

    def start(self, steps: int) -> bool:
        """Is there room for so many more tokens of every row?"""
        return True

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed one token per row, (R,); logits (R, V) for the next."""
        positions = [self.context_lens[slot] + n for slot, n in zip(self.owner, self.lens)]
        self._start_step()
        states = self.policy.states(ids[:, None], torch.tensor(positions, device=self.device)[:, None], self)
        return self.policy.logits(states, self.head)

    def drop(self, rows: set[int], names: set[int]) -> list[int]:
        """Drop these rows and all contexts but `names`; which old row each new one was."""
        stay = self._order(len(self.owner), set(range(len(self.owner))) - rows)
        self.suffix_kv = self._move(self.suffix_kv, stay, max(self.lens))
        self.owner, self.lens = ([x[i] for i in stay] for x in (self.owner, self.lens))
        slots = self._order(len(self.names), {i for i, name in enumerate(self.names) if name in names})
        if len(slots) < len(self.names):
            self.context_kv = self._move(self.context_kv, slots, max(self.context_lens))
            self.context_lens, self.names = ([x[i] for i in slots] for x in (self.context_lens, self.names))
            new_slot = {old: new for new, old in enumerate(slots)}
            self.owner = [new_slot[i] for i in self.owner]
        return stay

    @staticmethod
    def _order(size: int, alive: set[int]) -> list[int]:
        """Order in which the survivors of 0..size-1 fill 0..len(alive)-1 with the fewest moves."""
        movers = sorted((i for i in alive if i >= len(alive)), reverse=True)
        return [i if i in alive else movers.pop() for i in range(len(alive))]

    def _move(self, kv: torch.Tensor, stay: list[int], length: int) -> torch.Tensor:
        moves = [(new, old) for new, old in enumerate(stay) if new != old]
        if moves:
            new, old = (list(x) for x in zip(*moves))
            kv[:, :, new, :, :length] = kv[:, :, old, :, :length]
        return kv

    def _start_step(self) -> None:
        """Fix what all layers of one decode step share: masks, and where each row's queries go."""
        n, device = len(self.context_lens), self.device
        lane, lanes = [], [0] * n
        for slot in self.owner:
            lane.append(lanes[slot])
            lanes[slot] += 1
        self.lanes = max(lanes)  # most rows of a context
        self.cells = torch.tensor([s * self.lanes + x for s, x in zip(self.owner, lane)], device=device)
        self.dense = self.cells.tolist() == list(range(n * self.lanes))
        positions = torch.tensor(self.lens, device=device)
        # rows of one length are written as a slice, which is faster
        self.place = (torch.arange(len(self.lens), device=device), slice(None), positions) \
            if len(set(self.lens)) > 1 else (slice(len(self.lens)), slice(None), self.lens[0])
        self.p, self.s = max(self.context_lens), max(self.lens) + 1
        p_lens = torch.tensor(self.context_lens, device=device)
        self.p_mask = self._mask(p_lens, self.p) if min(self.context_lens) < self.p else None
        self.s_mask = self._mask(positions + 1, self.s) if min(self.lens) + 1 < self.s else None
        self.lens = [x + 1 for x in self.lens]

    def _mask(self, lens: torch.Tensor, width: int) -> torch.Tensor:
        """(rows, 1, 1, width): what is added to the scores, -inf beyond a row's length."""
        mask = torch.zeros(len(lens), width, device=self.device)
        mask.masked_fill_(torch.arange(width, device=self.device) >= lens[:, None], float("-inf"))
        return mask[:, None, None].to(self.suffix_kv.dtype)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scaling: float) -> torch.Tensor:
        """One new token per row: query (R, H, 1, D), key and value (R, H_kv, 1, D) -> (R, 1, H, D).
        Attention to the context is one product per context for all its rows, merged with the attention to the
        row's own suffix by log-sum-exp (arXiv 2402.05099, 2403.08845): exact."""
        n = len(self.context_lens)
        for kind, x in enumerate((key, value)):
            self.suffix_kv[kind, layer][self.place] = x[:, :, 0].to(value.dtype)
        query = query.to(value.dtype)  # (R, H, 1, D)
        own_kv = self.suffix_kv[:, layer, :len(query), :, :self.s]
        own = partial_attention(query, *own_kv, scaling, self.s_mask, self.policy.fused)
        q = query[:, :, 0]
        if not self.dense:
            q = q.new_zeros(n * self.lanes, *q.shape[1:]).index_copy(0, self.cells, q)
        q = q.unflatten(0, (n, self.lanes)).transpose(1, 2)  # (n, H, lanes, D)
        context_kv = self.context_kv[:, layer, :n, :, :self.p]
        shared = partial_attention(q, *context_kv, scaling, self.p_mask, self.policy.fused)
        shared = (x.transpose(1, 2).flatten(0, 1).unsqueeze(2) for x in shared)
        if not self.dense:
            shared = (x[self.cells] for x in shared)
        return merge_attention(*own, *shared).to(value.dtype).transpose(1, 2)


def paged_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor,
                    longest: int, used: torch.Tensor, pages: torch.Tensor, scaling: float
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of segments of queries, each to the keys and values in its own pages: a flash kernel of CUDA.
    query (T, H_kv, D), key and value (pages, PAGE, H_kv, D), all float16 or bfloat16; int32: starts (n + 1,)
    of the segments, the longest of which has `longest` queries, used (n,) keys of each, pages (n, M).
    -> (T, H_kv, D), log-sum-exp (T, H_kv) float32; both undefined beyond the last segment."""
    # starts of keys are asked for, but not read with pages; splits are wrong for segments of several queries
    out, lse = torch.ops.aten._flash_attention_forward(
        query, key, value, starts, starts, longest, pages.shape[1] * PAGE, 0.0, False, False,
        scale=scaling, seqused_k=used, block_table=pages, num_splits=1)[:2]
    return out, lse.T


class PagedDecoder(Decoder):
    """The same in static shapes, so that a step is one CUDA graph per number of rows (a power of two).
    Keys and values lie in pages, which suffixes take as they grow; context_kv and suffix_kv are lists of page
    numbers. Rows keep the order in which they entered: those of a context are one segment of queries. The
    host looks every `look` steps and drops what a row drew after its end. Page 0 is that of unused rows."""
    look = 16

    def __init__(self, policy: Policy, requests: Sequence[Request], memory: float):
        config, seeds = policy.model.config, [len(r.seeds) for r in requests]
        contexts = [_pages(len(r.context)) for r in requests]
        suffixes = [_pages(r.budget + self.look) for r in requests]
        logits = 16 * config.vocab_size  # bytes of a row: float32, and three copies
        rows = max(1, min(sum(seeds), int(memory * 2**28) // logits))
        fit = (memory * 2**30 - rows * logits) / (PAGE * token_bytes(config, policy.dtype))
        all_of_them = sum(c + g * s for c, g, s in zip(contexts, seeds, suffixes))
        one_row = 2 * max(contexts) + max(suffixes)  # and a context that waits for room
        self.free = list(range(1, 1 + max(one_row, min(all_of_them, int(fit)))))
        super().__init__(policy, len(requests), rows, max(contexts), max(suffixes))
        self.context_kv, self.suffix_kv, self.kv = [], [], None  # (layers, 2, pages, PAGE, H_kv, D)
        self.fold = config.num_attention_heads // head_shape(config)[1]  # query heads that share keys
        self.group, self.window = max(seeds), getattr(config, "max_position_embeddings", None) or 2**30
        most = _bucket(rows)
        self.ids = torch.zeros(most, dtype=torch.long, device=self.device)
        self.numbers = torch.zeros(4, most + 1, dtype=torch.int32, device=self.device)
        self.pages = torch.zeros(2, most, max(self.sizes[2:]), dtype=torch.int32, device=self.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor] | None] = {}

    def enter(self, name: int, context: list[int]) -> bool:
        need = 1 + (name not in self.names) * _pages(len(context))
        if need > len(self.free) - len(self.owner) or not super().enter(name, context):  # a page to grow each
            return False
        if len(self.context_kv) < len(self.names):
            self.context_kv.append([self.free.pop() for _ in range(need - 1)])
        self.suffix_kv.append([])
        return True

    def _store_contexts(self, slots: list[int], spans: list[Span], layer: int, key: torch.Tensor,
                        value: torch.Tensor) -> None:
        if self.kv is None:
            layers, (_, heads, _, dim) = self.policy.model.config.num_hidden_layers, value.shape
            self.kv = value.new_zeros(layers, 2, len(self.free) + sum(map(len, self.context_kv)) + 1, PAGE,
                                      heads, dim)
        if layer == 0:
            places = [(np.array(self.context_kv[slot])[:, None] * PAGE + np.arange(PAGE)).ravel()[:p]
                      for slot, (_, p, _, _) in zip(slots, spans)]
            self.place = torch.from_numpy(np.concatenate(places)).to(self.device)
        for kind, x in enumerate((key, value)):
            self.kv[layer, kind].flatten(0, 1)[self.place] = x[0].transpose(0, 1)

    def start(self, steps: int) -> bool:
        """Give every row the pages for so many more tokens, if there are enough; tell the device of them."""
        for pages, n in zip(self.suffix_kv, self.lens):
            while len(pages) < _pages(n + steps):
                if not self.free:
                    return False
                pages.append(self.free.pop())
        rows, (slots, counts) = len(self.owner), np.unique(self.owner, return_counts=True)
        lens = np.array(self.context_lens)
        numbers, pages = (np.zeros(x.shape, np.int32) for x in (self.numbers, self.pages))
        numbers[0, :rows], numbers[1, :rows] = self.lens, lens[self.owner]
        numbers[2, :len(slots)] = lens[slots]
        numbers[3] = rows * self.fold
        numbers[3, :len(slots) + 1] = np.cumsum([0, *counts]) * self.fold
        for kind, lists in enumerate((self.suffix_kv, [self.context_kv[slot] for slot in slots])):
            for row, x in enumerate(lists):
                pages[kind, row, :len(x)] = x
        self.numbers.copy_(torch.from_numpy(numbers))
        self.pages.copy_(torch.from_numpy(pages))
        return True

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        self.ids[:len(ids)] = ids
        self.lens = [n + 1 for n in self.lens]
        bucket = _bucket(len(ids))
        if self.device.type != "cuda" or bucket not in self.graphs:  # once without: nothing is set up later
            self.graphs[bucket] = None
            return self._step(bucket)[:len(ids)]
        if self.graphs[bucket] is None:
            graph, others = torch.cuda.CUDAGraph(), [x[0].pool() for x in self.graphs.values() if x]
            with torch.cuda.graph(graph, pool=others[0] if others else None):
                self.graphs[bucket] = graph, self._step(bucket)
        graph, logits = self.graphs[bucket]
        graph.replay()
        return logits[:len(ids)]

    def _step(self, bucket: int) -> torch.Tensor:
        """Logits (bucket, V) after self.ids. The autocast of generate() has cast the weights once and keeps
        the copies as long as these graphs are there, so that their addresses stay."""
        lens, context_lens, self.context_used, _ = self.numbers[:, :bucket]
        self.starts = self.numbers[3, :bucket + 1]
        self.used = lens + 1
        self.row_starts = torch.arange(bucket + 1, dtype=torch.int32, device=self.device) * self.fold
        page = self.pages[0, :bucket].gather(1, (lens // PAGE)[:, None].long())[:, 0]
        self.place = (page * PAGE + lens % PAGE).long()
        positions = (context_lens + lens).long().clamp(max=self.window - 1)  # after its end a row goes on
        states = self.policy.states(self.ids[:bucket, None], positions[:, None], self)
        lens += 1
        return self.policy.logits(states, self.head)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scaling: float) -> torch.Tensor:
        kv, bucket = self.kv[layer], len(query)
        for kind, x in enumerate((key, value)):
            kv[kind].flatten(0, 1)[self.place] = x[:, :, 0].to(kv.dtype)
        heads = query[:, :, 0].to(kv.dtype).unflatten(1, (-1, self.fold))  # those that share keys: as queries
        q = heads.transpose(1, 2).flatten(0, 1)
        own, shared = (self.policy.paged_attention(q, *kv, starts, longest * self.fold, used,
                                                   pages[:bucket], scaling)
                       for starts, longest, used, pages in
                       ((self.row_starts, 1, self.used, self.pages[0]),
                        (self.starts, self.group, self.context_used, self.pages[1])))
        out = merge_attention(*own, *shared).to(value.dtype)
        return out.unflatten(0, (bucket, self.fold)).transpose(1, 2).flatten(1, 2)[:, None]

    _order = staticmethod(lambda size, alive: sorted(alive))

    def _move(self, kv: list[list[int]], stay: list[int], length: int) -> list[list[int]]:
        self.free += [page for i in set(range(len(kv))) - set(stay) for page in kv[i]]
        return [kv[i] for i in stay]


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE)


def _bucket(rows: int) -> int:
    return 1 << max(3, (rows - 1).bit_length())


def default_memory(device: torch.device, reserved: float = 0) -> float:
    """GiB for keys and values: 0.8 of what a CUDA device has free now besides `reserved` bytes; on a CPU a
    quarter of all memory."""
    if device.type == "cuda":
        return 0.8 * max(0, torch.cuda.mem_get_info(device)[0] - reserved) / 2**30
    return device_bytes(device) / 4 / 2**30


def group_bytes(config: PreTrainedConfig, context_len: int, suffix_len: int, group: int,
                dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of (one context, its group's rows): keys and values in dtype, float32 logits and three copies."""
    token = token_bytes(config, dtype)
    return (context_len * token + 4 * config.vocab_size,
            group * (suffix_len * token + 16 * config.vocab_size))


def token_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Of the keys and values of one token."""
    _, heads, head_dim = head_shape(config)
    return 2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize


def slots(context_bytes: int, rows_bytes: int, group: int, memory: float) -> tuple[int, int]:
    """How many (contexts, rows) `memory` GiB hold. Raises ValueError if they do not hold one group.
    Three times the contexts that the rows need at the start: those with a long last row stay while new ones
    enter."""
    groups = int(memory * 2**30 / (3 * context_bytes + rows_bytes))
    if groups >= 1:
        return 3 * groups, groups * group
    if context_bytes + rows_bytes > memory * 2**30:
        raise ValueError(f"--rollout-memory {memory:.3g} GiB does not hold one group, which can need "
                         f"{(context_bytes + rows_bytes) / 2**30:.3g}: lower --group-size or --max-response, "
                         "or give more")
    return 1, group


@contextlib.contextmanager
def packed_weights(model: PreTrainedModel, tokens: int, smallest: int = 2**18) -> Iterator[None]:
    """On a CPU in float32: in here, linear layers use a copy of their weights that is laid out for oneDNN.
    That is up to twice as fast for the few rows of a decode step. For fewer than 16 tokens a row the copying
    does not pay, nor for matrices of fewer than `smallest` elements."""
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear and m.weight.numel() >= smallest]
    if model.device.type != "cpu" or model.dtype != torch.float32 or tokens < 16 or \
            not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        layers = []
    try:
        for layer in layers:
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 64)
            layer.forward = lambda x, packed=packed, bias=layer.bias: torch.ops.mkldnn._linear_pointwise(
                x, packed, bias, "none", [], "")
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


@torch.no_grad()
def use_pages(policy: Policy, attention: Callable | None = None) -> None:
    """Decode with PagedDecoder from now on, if that works here; by default it is tried on CUDA only.
    Works: the log-probs of what it samples differ from those of the update's forward by no more than twice
    what those of the ordinary decoding differ, and 1e-3. If not, a note says so."""
    attention = attention or (paged_attention if policy.device.type == "cuda" else None)
    if attention is None:
        return
    rng, window = np.random.default_rng(0), getattr(policy.model.config, "max_position_embeddings", None)
    most = min(PAGE + 9, (window or 1024) // 2)  # a context and a suffix of more than a page
    requests = [Request(rng.integers(policy.vocab_size // 4, policy.vocab_size, min(n, most)).tolist(),
                        min(budget, most), [(row,) for row in range(rows)])
                for n, budget, rows in ((7, most, 3), (most, 20, 5), (40, 30, 1))]

    def gap(longest: int) -> float:
        short = [replace(r, budget=min(r.budget, longest)) for r in requests]
        rows = generate(policy, short, Sampling((), policy.vocab_size), 1.0)
        trees = [Tree(r.context, [x.ids for x in row]) for r, row in zip(requests, rows)]
        batch = pack(trees, policy.device)
        sampled = padded([x.logprobs for row in rows for x in row], torch.float32, policy.device)
        return float((policy(batch)[0] - sampled)[batch.mask].square().mean().sqrt())

    plain = gap(30)  # tokens: without graphs, each takes long
    try:  # NaN would be drawn from, which ends a CUDA process
        policy.paged_attention = lambda *arguments: [x.nan_to_num() for x in attention(*arguments)]
        found = gap(most)
        reason = "" if found <= 2 * plain + 1e-3 else f"log-probs differ by {found:.2g}, not by {plain:.2g}"
    except RuntimeError as error:  # of a kernel or a graph
        reason = str(error).partition("\n")[0]
    policy.paged_attention = None if reason else attention
    if reason:
        say_once(f"sampling goes on without CUDA graphs, which is slower: {reason}")


@torch.no_grad()
def generate(policy: Policy, requests: Sequence[Request], how: Sampling, memory: float, label: str = "",
             done_with: Callable[[int, list[Suffix]], None] | None = None) -> list[list[Suffix]]:
    """Continue each request's context once per seed; returns one list of suffixes per request, in order.
    memory: GiB for keys and values, halved when the device runs out of it. label: of the progress bar, which
    appears after 5 seconds. done_with: called with the number of a request and its suffixes once complete, on
    the rank that sampled them.
    Raises ValueError if a request has no context or no budget, or if a group alone does not fit into memory.
    """
    results: dict[int, list[Suffix]] = {}
    if not requests:
        return []
    if min(r.budget for r in requests) < 1 or not all(r.context for r in requests):
        raise ValueError("every request needs a context and room for at least one new token")
    context_len, suffix_len, group = (max(column) for column in zip(
        *((len(r.context), r.budget, len(r.seeds)) for r in requests)))
    policy = policy.whole()
    size = group_bytes(policy.model.config, context_len, suffix_len, group, policy.dtype)
    mine = share([len(r.context) + len(r.seeds) * r.budget for r in requests])

    def finish(i: int, suffixes: list[Suffix]) -> None:
        results[i] = suffixes
        if done_with:
            done_with(i, suffixes)

    def attempt(memory: float) -> None:
        waiting = {i: requests[i] for i in mine if i not in results}  # finished ones are kept
        if not waiting:
            return
        if policy.paged_attention:
            decoder = PagedDecoder(policy, list(waiting.values()), memory)
        else:
            contexts, rows = slots(*size, group, memory)
            rows = min(rows, sum(len(r.seeds) for r in waiting.values()))
            decoder = Decoder(policy, min(contexts, len(waiting)), rows, context_len, suffix_len)
        _generate(decoder, waiting, how, label, finish)

    with policy.autocast(), packed_weights(policy.model, suffix_len):
        halve_to_fit(attempt, memory, sum(size) / 2**30, "--rollout-memory")
    trim_heap(policy.device)
    results = gather(results)
    return [results[i] for i in range(len(requests))]


def _generate(decoder: Decoder, requests: dict[int, Request], how: Sampling, label: str,
              finish: Callable[[int, list[Suffix]], None]) -> None:
    results = {i: [Suffix() for _ in r.seeds] for i, r in requests.items()}
    # longest budgets first, so that the end is not one row; contexts of similar length share their padding
    order = sorted(requests, key=lambda i: (-requests[i].budget, -len(requests[i].context)))
    waiting = deque((i, np.random.default_rng(seed).random(requests[i].budget + decoder.look, np.float32), x)
                    for i in order for seed, x in zip(requests[i].seeds, results[i]))
    active: list[tuple[int, np.ndarray, Suffix]] = []  # (request, its numbers, suffix so far) per decoder row
    first_logits: dict[int, torch.Tensor] = {}  # of the contexts in the decoder
    rows_left = {i: len(r.seeds) for i, r in requests.items()}
    bar = tqdm(total=len(waiting), desc=label, unit="row", leave=False, delay=5)

    def draws(rows: slice, steps: int) -> torch.Tensor:
        """Uniform numbers (steps, rows) for the next tokens of these rows."""
        numbers = [u[len(x.ids):len(x.ids) + steps] for _, u, x in active[rows]]
        return torch.from_numpy(np.array(numbers)).T.to(decoder.device)

    def record(rows: slice, drawn: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Append the (ids, logprobs) of each step to the suffixes of these rows, up to their end."""
        for (i, _, suffix), *tokens in zip(active[rows], *(torch.stack(x, 1).tolist() for x in zip(*drawn))):
            for token, logprob in zip(*tokens):
                suffix.ids.append(token)
                suffix.logprobs.append(logprob)
                suffix.finished = token in how.eos_ids
                if suffix.finished or len(suffix.ids) == requests[i].budget:
                    break

    while waiting or active:
        new_rows = slice(len(active), None)
        while waiting and decoder.enter(waiting[0][0], requests[waiting[0][0]].context):
            active.append(waiting.popleft())
        if new := {i: requests[i].context for i in decoder.names if i not in first_logits}:
            first_logits |= zip(new, decoder.prefill(new))
        if active[new_rows]:
            logits = torch.stack([first_logits[i] for i, _, _ in active[new_rows]])
            record(new_rows, [sample(logits, draws(new_rows, 1)[0], how)])
        left = [0 if x.finished else requests[i].budget - len(x.ids) for i, _, x in active]
        done = {place for place, tokens in enumerate(left) if not tokens}
        for place in done:
            i = active[place][0]
            rows_left[i] -= 1
            if not rows_left[i]:
                finish(i, results[i])
        if done:
            alive = [x for x, tokens in zip(active, left) if tokens] + list(waiting)[:1]
            stay = decoder.drop(done, {i for i, _, _ in alive})
            active = [active[i] for i in stay]
            bar.update(len(done))
        steps = min(decoder.look, max(left))
        while active and not decoder.start(steps):  # the last row makes room and begins anew later
            waiting.appendleft(active.pop())
            waiting[0][2].ids.clear()
            waiting[0][2].logprobs.clear()
            decoder.drop({len(active)}, {i for i, _, _ in [*active, waiting[0]]})
        first_logits = {i: first_logits[i] for i in decoder.names}
        if active:
            ids, drawn = torch.tensor([x.ids[-1] for _, _, x in active], device=decoder.device), []
            for numbers in draws(slice(None), steps):
                ids, logprobs = sample(decoder.decode(ids), numbers, how)
                drawn.append((ids, logprobs))
            record(slice(None), drawn)
    bar.close()
