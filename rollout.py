"""Batched KV-cache generation that continues from cached prefixes.

The context of a problem (prompt + prefix) is computed and stored once, whatever the number of suffixes; each
suffix keeps only its own keys and values. Rows that finish leave, problems that wait enter."""
from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from policy import (Packed, Policy, Span, Tree, gather, halve_to_fit, head_shape, merge_attention, pack,
                    partial_attention, share)

PREFILL_TOKENS = 2**14  # contexts computed in one forward, which bounds its activations


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

    def __init__(self, policy: Policy, contexts: int, rows: int, context_len: int, suffix_len: int):
        self.policy, self.device = policy, policy.device
        self.sizes = (contexts, rows, context_len, suffix_len)
        self.context_kv: torch.Tensor | None = None  # (2, layers, contexts, H_kv, context_len, D)
        self.suffix_kv: torch.Tensor | None = None  # (2, layers, rows, H_kv, suffix_len, D)
        self.names: list[int] = []  # per active context slot: whose it is
        self.context_lens: list[int] = []  # per active context slot
        self.owner: list[int] = []  # per active row: its context slot
        self.lens: list[int] = []  # per active row: suffix tokens stored

    def prefill(self, contexts: dict[int, list[int]]) -> torch.Tensor:
        """Compute the contexts, packed, and store their keys and values; logits (n, V) after each."""
        names, logits = list(contexts), []
        while names:
            ends = np.cumsum([len(contexts[name]) for name in names])
            fit = max(1, int(np.searchsorted(ends, PREFILL_TOKENS, side="right")))
            part, names = names[:fit], names[fit:]
            batch = pack([Tree(contexts[name], [[0]]) for name in part], self.device)  # predicts one token
            layout = Packed(batch, self.policy.kernel, self._store_contexts)
            states = self.policy.states(batch.input_ids, batch.position_ids, layout)
            logits.append(self.policy.logits(states[batch.index[:, 0]]))
            self.names += part
            self.context_lens += [len(contexts[name]) for name in part]
        return torch.cat(logits)

    def _store_contexts(self, spans: list[Span], layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take the contexts' keys and values of one layer, (1, H_kv, N, D), while they are computed."""
        if self.context_kv is None:
            contexts, rows, context_len, suffix_len = self.sizes
            layers, (_, heads, _, dim) = self.policy.model.config.num_hidden_layers, value.shape
            make = value.new_zeros  # finite everywhere: a masked weight 0 times NaN would be NaN
            self.context_kv = make(2, layers, contexts, heads, context_len, dim)
            self.suffix_kv = make(2, layers, rows, heads, suffix_len, dim)
        for slot, (start, p, _, _) in enumerate(spans, len(self.names)):
            for kind, x in enumerate((key, value)):
                self.context_kv[kind, layer, slot, :, :p] = x[0, :, start:start + p]

    def add_row(self, name: int) -> None:
        self.owner.append(self.names.index(name))
        self.lens.append(0)

    def decode(self, ids: list[int]) -> torch.Tensor:
        """Feed one token per row; logits (R, V) for the next."""
        positions = [self.context_lens[slot] + n for slot, n in zip(self.owner, self.lens)]
        self._start_step()
        states = self.policy.states(torch.tensor(ids, device=self.device)[:, None],
                                    torch.tensor(positions, device=self.device)[:, None], self)
        return self.policy.logits(states)

    def keep(self, rows: list[int], names: set[int]) -> None:
        """Drop all rows but `rows`, the new row i being the old rows[i], and all contexts but `names`."""
        self._move(self.suffix_kv, rows, max(self.lens))
        self.owner = [self.owner[i] for i in rows]
        self.lens = [self.lens[i] for i in rows]
        slots = _fill_holes(len(self.names), {i for i, name in enumerate(self.names) if name in names})
        if len(slots) < len(self.names):
            self._move(self.context_kv, slots, max(self.context_lens))
            self.context_lens, self.names = ([x[i] for i in slots] for x in (self.context_lens, self.names))
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


def _fill_holes(size: int, alive: set[int]) -> list[int]:
    """Order in which the survivors of slots 0..size-1 fill 0..len(alive)-1 with the fewest moves."""
    movers = sorted((i for i in alive if i >= len(alive)), reverse=True)
    return [i if i in alive else movers.pop() for i in range(len(alive))]


def default_memory(device: torch.device, reserved: float = 0) -> float:
    """GiB for keys and values: 0.8 of what a CUDA device has free now besides `reserved` bytes; on a CPU a
    quarter of all memory."""
    if device.type == "cuda":
        return 0.8 * max(0, torch.cuda.mem_get_info(device)[0] - reserved) / 2**30
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4 / 2**30


def group_bytes(config: PreTrainedConfig, context_len: int, suffix_len: int, group: int,
                dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of (one context, its group's rows): keys and values in dtype, float32 logits and three copies."""
    _, heads, head_dim = head_shape(config)
    token_bytes = 2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize
    return (context_len * token_bytes + 4 * config.vocab_size,
            group * (suffix_len * token_bytes + 16 * config.vocab_size))


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
        contexts, rows = slots(*size, group, memory)
        contexts, rows = min(contexts, len(waiting)), min(rows, sum(len(r.seeds) for r in waiting.values()))
        decoder = Decoder(policy, contexts, rows, context_len, suffix_len)
        _generate(decoder, waiting, how, label, finish)

    with policy.autocast(), packed_weights(policy.model, suffix_len):
        halve_to_fit(attempt, memory, sum(size) / 2**30, "--rollout-memory")
    results = gather(results)
    return [results[i] for i in range(len(requests))]


def _generate(decoder: Decoder, requests: dict[int, Request], how: Sampling, label: str,
              finish: Callable[[int, list[Suffix]], None]) -> None:
    contexts, rows_max, device = *decoder.sizes[:2], decoder.device
    results = {i: [Suffix() for _ in r.seeds] for i, r in requests.items()}
    # longest budgets first, so that the end is not one row; contexts of similar length share their padding
    order = sorted(requests, key=lambda i: (-requests[i].budget, -len(requests[i].context)))
    waiting = deque((i, row) for i in order for row in range(len(requests[i].seeds)))
    active: list[tuple[int, int]] = []  # (request, row in it) per decoder row
    uniforms: list[np.ndarray] = []
    first_logits: dict[int, torch.Tensor] = {}  # of contexts whose rows have not all entered
    rows_left = {i: len(r.seeds) for i, r in requests.items()}
    bar = tqdm(total=len(waiting), desc=label, unit="row", leave=False, delay=5)
    logits = torch.empty(0, device=device)
    while waiting or active:
        entering, loaded = [], set(decoder.names)
        while waiting and len(active) + len(entering) < rows_max:
            i = waiting[0][0]
            if i not in loaded and len(loaded) == contexts:
                break
            loaded.add(i)
            entering.append(waiting.popleft())
        new = {i: requests[i].context for i, _ in entering if i not in decoder.names}
        if new:
            first_logits |= zip(new, decoder.prefill(new))
        for i, row in entering:
            decoder.add_row(i)
            active.append((i, row))
            rng = np.random.default_rng(requests[i].seeds[row])
            uniforms.append(rng.random(requests[i].budget, np.float32))
        if entering:
            logits = torch.cat([logits, torch.stack([first_logits[i] for i, _ in entering])])
            first_logits = {i: x for i, x in first_logits.items() if waiting and waiting[0][0] == i}
        suffixes = [results[i][row] for i, row in active]
        draws = torch.tensor([u[len(s.ids)] for u, s in zip(uniforms, suffixes)], device=device)
        ids, logprobs = (x.tolist() for x in sample(logits, draws, how))
        done = set()
        for place, suffix in enumerate(suffixes):
            suffix.ids.append(ids[place])
            suffix.logprobs.append(logprobs[place])
            suffix.finished = ids[place] in how.eos_ids
            if suffix.finished or len(suffix.ids) == requests[active[place][0]].budget:
                done.add(place)
        for place in done:
            i = active[place][0]
            rows_left[i] -= 1
            if not rows_left[i]:
                finish(i, results[i])
        if done:
            keep = _fill_holes(len(active), set(range(len(active))) - done)
            active, uniforms, ids = ([x[i] for i in keep] for x in (active, uniforms, ids))
            decoder.keep(keep, {i for i, _ in active} | set(first_logits))
            bar.update(len(done))
        logits = decoder.decode(ids) if active else torch.empty(0, device=device)
    bar.close()
