"""Batched KV-cache generation that continues from cached prefixes.

The context of a problem (prompt + prefix) is computed and stored once, whatever the number of suffixes; each
suffix keeps only its own keys and values. Rows that finish leave, problems that wait enter.
"""
from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from data import Problem
from rpo import Packed, Span, hidden_states, is_shared

PREFILL_TOKENS = 2**14  # contexts computed in one forward, which bounds its activations


@dataclass
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


@dataclass
class Group:
    """One problem's rollout: everything that happened to it, as ragged lists."""

    problem: Problem
    prompt_ids: list[int]
    prefix_ids: list[int]  # the kept part of the cached path; empty: a full path
    suffixes: list[Suffix]
    accuracy: list[float] = field(default_factory=list)  # 1.0 where the final answer is right
    rewards: list[float] = field(default_factory=list)  # what the advantages are made of

    @property
    def responses(self) -> list[list[int]]:
        return [self.prefix_ids + suffix.ids for suffix in self.suffixes]


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. temperature 0 is greedy; top_k 0 and top_p 1 cut nothing off."""

    eos_ids: tuple[int, ...]
    vocab_size: int  # ids from there on (padded embedding rows) are never sampled
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def sample(logits: torch.Tensor, uniforms: torch.Tensor, how: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (R, V), uniforms (R,) float32 in [0, 1) -> ids (R,) int64, log-probs (R,) float32.

    Draws by inverting the cumulative distribution, so that a row depends on its own logits and number only.
    The log-prob is that of the whole distribution at the temperature, before top-k and top-p.
    """
    logits = logits[:, :how.vocab_size].float()
    if how.temperature == 0:
        ids = logits.argmax(-1)
        return ids, logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    logprobs = (logits / how.temperature).log_softmax(-1)
    probs = logprobs.exp()
    if how.top_k or how.top_p < 1:
        ranked, order = probs.sort(-1, descending=True)
        drop = ranked.cumsum(-1) - ranked >= how.top_p  # the token that crosses top_p stays
        if how.top_k:
            drop[:, how.top_k:] = True
        probs = probs.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), 0.0)
    cumulative = probs.cumsum(-1)
    # below the total even after rounding, so that an id of probability 0 is never reached
    threshold = uniforms * (1 - 2**-22) * cumulative[:, -1]
    ids = torch.searchsorted(cumulative, threshold[:, None], right=True)
    return ids[:, 0], logprobs.gather(1, ids)[:, 0]


class Decoder:
    """Keys and values of everything in flight, and the attention of one decode step over them.

    Slots: n contexts (per layer keys of shape (n, H_kv, P, D)) and R rows of suffixes ((R, H_kv, S, D)). The
    first ones are active; one that leaves is filled by the last. Memory grows as P + G*S, not G*(P + S).
    """

    def __init__(self, model: PreTrainedModel, contexts: int, rows: int, context_len: int, suffix_len: int):
        self.model, self.device = model, model.device
        self.sizes = (contexts, rows, context_len, suffix_len)
        self.context_kv: torch.Tensor | None = None  # (2, layers, contexts, H_kv, context_len, D)
        self.suffix_kv: torch.Tensor | None = None  # (2, layers, rows, H_kv, suffix_len, D)
        self.context_lens: list[int] = []  # per active context slot
        self.owner: list[int] = []  # per active row: its context slot
        self.lens: list[int] = []  # per active row: suffix tokens stored

    def prefill(self, requests: list[Request]) -> torch.Tensor:
        """Compute and keep the contexts' keys and values, packed; logits (rows, V) of the first tokens."""
        logits = []
        while requests:
            ends = np.cumsum([len(r.context) for r in requests])
            fit = max(1, int(np.searchsorted(ends, PREFILL_TOKENS, side="right")))
            part, ends, requests = requests[:fit], ends[:fit], requests[fit:]
            ids = torch.tensor([[t for r in part for t in r.context]], device=self.device)
            positions = torch.tensor([[t for r in part for t in range(len(r.context))]], device=self.device)
            spans = [(int(end) - len(r.context), len(r.context), 0, 0) for r, end in zip(part, ends)]
            packed = Packed(spans, keep_kv=True)
            states = hidden_states(self.model, ids, positions, packed)
            for request, span in zip(part, spans):
                self._store_context(packed, span, len(request.seeds))
            last = self.model.get_output_embeddings()(states[torch.tensor(ends - 1, device=self.device)])
            rows = torch.tensor([len(r.seeds) for r in part], device=self.device)
            logits.append(last.repeat_interleave(rows, dim=0))
        return torch.cat(logits)

    def decode(self, ids: list[int]) -> torch.Tensor:
        """Feed one token per row; logits (R, V) for the next."""
        positions = [self.context_lens[slot] + n for slot, n in zip(self.owner, self.lens)]
        self._start_step()
        states = hidden_states(self.model, torch.tensor(ids, device=self.device)[:, None],
                               torch.tensor(positions, device=self.device)[:, None], self)
        return self.model.get_output_embeddings()(states)

    def _store_context(self, packed: Packed, span: Span, rows: int) -> None:
        """Take one context's keys and values out of a prefill and give it `rows` rows."""
        start, p, _, _ = span
        if self.context_kv is None:
            _, heads, _, dim = packed.keys[0].shape
            contexts, all_rows, context_len, suffix_len = self.sizes
            make = packed.keys[0].new_zeros  # finite everywhere: a masked weight 0 times NaN would be NaN
            self.context_kv = make(2, len(packed.keys), contexts, heads, context_len, dim)
            self.suffix_kv = make(2, len(packed.keys), all_rows, heads, suffix_len, dim)
        slot = len(self.context_lens)
        for kind, layers in enumerate((packed.keys, packed.values)):
            for layer, x in enumerate(layers):
                self.context_kv[kind, layer, slot, :, :p] = x[0, :, start:start + p]
        self.context_lens.append(p)
        self.owner += [slot] * rows
        self.lens += [0] * rows

    def keep_rows(self, keep: list[int]) -> None:
        """Drop all rows but `keep`; the new row i is the old row keep[i]. Contexts without rows go too."""
        self._move(self.suffix_kv, keep, max(self.lens))
        self.owner = [self.owner[i] for i in keep]
        self.lens = [self.lens[i] for i in keep]
        slots = _fill_holes(len(self.context_lens), set(self.owner))
        if len(slots) < len(self.context_lens):
            self._move(self.context_kv, slots, max(self.context_lens))
            self.context_lens = [self.context_lens[i] for i in slots]
            new_slot = {old: new for new, old in enumerate(slots)}
            self.owner = [new_slot[i] for i in self.owner]

    @staticmethod
    def _move(kv: torch.Tensor, keep: list[int], length: int) -> None:
        moves = [(new, old) for new, old in enumerate(keep) if new != old]
        if moves:
            new, old = (list(x) for x in zip(*moves))
            kv[:, :, new, :, :length] = kv[:, :, old, :, :length]

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
        self.positions = torch.tensor(self.lens, device=device)
        self.p, self.s = max(self.context_lens), max(self.lens) + 1
        p_lens = torch.tensor(self.context_lens, device=device)
        self.p_mask = (torch.arange(self.p, device=device) >= p_lens[:, None])[:, None, None] \
            if min(self.context_lens) < self.p else None
        self.s_mask = (torch.arange(self.s, device=device) > self.positions[:, None])[:, None, None] \
            if min(self.lens) + 1 < self.s else None
        self.lens = [x + 1 for x in self.lens]

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scaling: float) -> torch.Tensor:
        """One new token per row: query (R, H, 1, D), key and value (R, H_kv, 1, D) -> (R, 1, H, D).

        Attention to the context is one product per context for all its rows, merged with the attention to the
        row's own suffix by log-sum-exp (arXiv 2402.05099, 2403.08845): exact.
        """
        rows, heads, _, dim = query.shape
        kv_heads, n = key.shape[1], len(self.context_lens)
        for kind, x in enumerate((key, value)):
            self.suffix_kv[kind, layer, torch.arange(rows, device=x.device), :, self.positions] = x[:, :, 0]
        q = (query[:, :, 0] * scaling).view(rows, kv_heads, heads // kv_heads, dim)
        own = _partial(q, *self.suffix_kv[:, layer, :rows, :, :self.s], self.s_mask)
        if not self.dense:
            q = q.new_zeros(n * self.lanes, *q.shape[1:]).index_copy(0, self.cells, q)
        q = q.view(n, self.lanes, *q.shape[1:]).transpose(1, 2).flatten(2, 3)  # (n, H_kv, lanes * H/H_kv, D)
        shared = _partial(q, *self.context_kv[:, layer, :n, :, :self.p], self.p_mask)
        shared = [x.unflatten(2, (self.lanes, -1)).transpose(1, 2).flatten(0, 1) for x in shared]
        if not self.dense:
            shared = [x[self.cells] for x in shared]
        return _merge(own, shared).to(value.dtype).reshape(rows, 1, heads, dim)


class PlainDecoder:
    """For other architectures, slower: transformers' own cache, one per context."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.device = model, model.device
        self.caches: dict[int, Cache] = {}
        self.owner: list[int] = []  # per row: its cache
        self.entered = 0

    def prefill(self, requests: list[Request]) -> torch.Tensor:
        logits = []
        for request in requests:
            ids = torch.tensor([request.context], device=self.device)
            out = self.model(ids, use_cache=True, logits_to_keep=1)
            out.past_key_values.batch_repeat_interleave(len(request.seeds))
            self.caches[self.entered] = out.past_key_values
            self.owner += [self.entered] * len(request.seeds)
            logits.append(out.logits[0].expand(len(request.seeds), -1))
            self.entered += 1
        return torch.cat(logits)

    def decode(self, ids: list[int]) -> torch.Tensor:
        logits: list[torch.Tensor] = [None] * len(ids)
        for owner, kv in self.caches.items():
            rows = [i for i, o in enumerate(self.owner) if o == owner]  # of one length: no padding, no mask
            tokens = torch.tensor([[ids[i]] for i in rows], device=self.device)
            for i, row in zip(rows, self.model(tokens, past_key_values=kv, use_cache=True).logits[:, -1]):
                logits[i] = row
        return torch.stack(logits)

    def keep_rows(self, keep: list[int]) -> None:
        for owner in list(self.caches):
            rows = [i for i, o in enumerate(self.owner) if o == owner]
            left = [rows.index(i) for i in keep if self.owner[i] == owner]
            if not left:
                del self.caches[owner]
            elif left != list(range(len(rows))):
                self.caches[owner].batch_select_indices(torch.tensor(left, device=self.device))
        self.owner = [self.owner[i] for i in keep]


def _partial(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None):
    """Unnormalised attention over a part of the keys: (sum of exp * v, sum of exp, top score), float32."""
    scores = (q @ k.transpose(-1, -2)).float()
    if mask is not None:
        scores = scores.masked_fill(mask, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp_()
    return (weights.to(v.dtype) @ v).float(), weights.sum(-1, keepdim=True), top


def _merge(a, b) -> torch.Tensor:
    """Attention over both parts from their partial sums."""
    top = torch.maximum(a[2], b[2])
    scale_a, scale_b = (a[2] - top).exp(), (b[2] - top).exp()
    return (a[0] * scale_a + b[0] * scale_b) / (a[1] * scale_a + b[1] * scale_b)


def _fill_holes(size: int, alive: set[int]) -> list[int]:
    """Order in which the survivors of slots 0..size-1 fill 0..len(alive)-1 with the fewest moves."""
    movers = sorted((i for i in alive if i >= len(alive)), reverse=True)
    return [i if i in alive else movers.pop() for i in range(len(alive))]


def default_memory(device: torch.device) -> float:
    """GiB for keys and values: half of what a CUDA device has free now; on a CPU a quarter of all memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2 / 2**30
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4 / 2**30


def check_memory(config: PreTrainedConfig, context_len: int, suffix_len: int, group: int,
                 memory: float, shared: bool = True) -> int:
    """How many groups of those sizes fit into `memory` GiB. Raises ValueError where not even one does.

    config: of the model. shared: the context is stored once, not once per row. Counts keys and values, each
    row's logits and three copies of them, all in float32.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4
    contexts = 1 if shared else group
    group_bytes = token_bytes * (contexts * context_len + group * suffix_len) + group * config.vocab_size * 16
    groups = int(memory * 2**30 / group_bytes)
    if groups < 1:
        raise ValueError(f"--rollout-memory {memory:.3g} GiB does not hold one group, which can need "
                         f"{group_bytes / 2**30:.3g}: lower --group-size or --max-response, or give more")
    return groups


@torch.no_grad()
def generate(model: PreTrainedModel, requests: Sequence[Request], how: Sampling, memory: float,
             label: str = "") -> list[list[Suffix]]:
    """Continue each request's context once per seed; returns one list of suffixes per request, in order.

    memory: GiB for keys and values. label: names the progress bar, which appears after 5 seconds. Raises
    ValueError where one group alone does not fit into the memory or a budget is below 1.
    """
    if not requests:
        return []
    if min(r.budget for r in requests) < 1 or not all(r.context for r in requests):
        raise ValueError("every request needs a context and room for at least one new token")
    context_len, suffix_len = max(len(r.context) for r in requests), max(r.budget for r in requests)
    group = max(len(r.seeds) for r in requests)
    shared = is_shared(model)
    contexts = min(check_memory(model.config, context_len, suffix_len, group, memory, shared), len(requests))
    rows_max = min(contexts * group, sum(len(r.seeds) for r in requests))
    decoder = Decoder(model, contexts, rows_max, context_len, suffix_len) if shared else PlainDecoder(model)
    results = [[Suffix() for _ in r.seeds] for r in requests]
    # neighbours of similar length share their padding
    waiting = deque(sorted(range(len(requests)), key=lambda i: -len(requests[i].context)))
    active: list[tuple[int, int]] = []  # (request, row in it) per decoder row
    uniforms: list[np.ndarray] = []
    bar = tqdm(total=sum(len(r.seeds) for r in requests), desc=label, unit="row", leave=False, delay=5)
    logits = torch.empty(0, device=model.device)
    while waiting or active:
        free_contexts = contexts - len(set(decoder.owner))
        entering = []
        while waiting and len(entering) < free_contexts and \
                len(active) + len(requests[waiting[0]].seeds) <= rows_max:
            i = waiting.popleft()
            entering.append(i)
            active += [(i, row) for row in range(len(requests[i].seeds))]
            uniforms += [np.random.default_rng(seed).random(requests[i].budget, dtype=np.float32)
                         for seed in requests[i].seeds]
        if entering:
            logits = torch.cat([logits, decoder.prefill([requests[i] for i in entering])])
        suffixes = [results[i][row] for i, row in active]
        draws = torch.tensor([u[len(s.ids)] for u, s in zip(uniforms, suffixes)], device=model.device)
        ids, logprobs = (x.tolist() for x in sample(logits, draws, how))
        done = set()
        for row, suffix in enumerate(suffixes):
            suffix.ids.append(ids[row])
            suffix.logprobs.append(logprobs[row])
            suffix.finished = ids[row] in how.eos_ids
            if suffix.finished or len(suffix.ids) == requests[active[row][0]].budget:
                done.add(row)
        if done:
            keep = _fill_holes(len(active), set(range(len(active))) - done)
            decoder.keep_rows(keep)
            active, uniforms, ids = ([x[i] for i in keep] for x in (active, uniforms, ids))
            bar.update(len(done))
        logits = decoder.decode(ids) if active else torch.empty(0, device=model.device)
    bar.close()
    return results
