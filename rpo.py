"""The algorithm as pure functions: advantages, the objective, micro-batches, one update of the policy.

Departures from plain GRPO are marked [RPO-n] where they happen; train.py lists them."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from policy import Policy, Tree, gather, halve_to_fit, pack, padded, ranks, share, trim_heap
from rewards import Group

GRAD_CLIP = 1.0  # largest gradient norm
SMALLEST_FORWARD = 64  # tokens: a device that does not hold these is too small
Piece = tuple[int, range]  # (which tree, which of its rows)
Logprobs = Sequence[Sequence[Sequence[float]]]  # by group, suffix and token


@dataclass(frozen=True)
class Objective:
    """What an algorithm sets. A new one is a row of ALGORITHMS and, if need be, a branch below."""
    advantage: str = "std"  # std: (R - mean) / std; mean: R - mean; leave_one_out: R - mean of the others' R
    ratio_level: str = "token"  # one ratio per token; sequence: the geometric mean of a response's
    surrogate: str = "clip"  # min(r A, clip(r) A); cispo: the clipped ratio as a constant weight of A log pi
    clip_low: float = 0.2  # the ratio is clipped to 1 - clip_low ... 1 + clip_high
    clip_high: float = 0.2
    aggregation: str = "response"  # what the loss is a mean over: see `loss_denominator`
    dynamic_rounds: int = 1  # most rounds of sampling that replace groups all right or all wrong; 1: none
    overlong_penalty: float = 0.0  # largest penalty near the longest response
    kl_coef: float = 0.0  # weight of the KL penalty to the initial policy; 0: no reference policy


ALGORITHMS: dict[str, Objective] = {
    "grpo": Objective(),  # arXiv 2402.03300, eq. 3; its KL weight is 0.04, off here as in later work
    "dapo": Objective(clip_high=0.28, aggregation="token", dynamic_rounds=10,
                      overlong_penalty=1.0),  # 2503.14476, eq. 8, 12, 13
    "dr_grpo": Objective(advantage="mean", aggregation="budget"),  # 2503.20783
    "rloo": Objective(advantage="leave_one_out", aggregation="sum"),  # 2402.14740
    "gspo": Objective(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4),  # 2507.18071
    "cispo": Objective(surrogate="cispo", clip_low=1.0, clip_high=4.0,
                       aggregation="token"),  # 2506.13585: ratio at most 5, no lower clip
}


def group_advantages(rewards: Sequence[float], kind: str = "std") -> list[float]:
    """Advantages of the G responses of one group from their rewards.
    std: (R - mean) / (std + 1e-6), std unbiased (GRPO, arXiv 2402.03300, section 4.1); mean: R - mean (Dr.
    GRPO, 2503.20783); leave_one_out: R - mean of the others (RLOO, 2402.14740). All zero when the rewards do
    not differ."""
    values = torch.tensor(rewards, dtype=torch.float64)
    centred, g = values - values.mean(), len(rewards)
    if g < 2 or not centred.abs().max() > 1e-12:
        return [0.0] * g
    scale = {"std": 1 / (values.std() + 1e-6), "mean": 1.0, "leave_one_out": g / (g - 1)}[kind]
    return (centred * scale).tolist()


def step_weight(groups: Sequence[Group], missing: int) -> float:
    """How much a step that continues paths counts: the share of its suffixes in their whole responses, times
    that of its groups in a step that lacks none. [RPO-11]
    The mean over a few short suffixes is ten times as large as over a full step, and would drown the others.
    """
    suffixes = sum(len(suffix) for g in groups for suffix in g.suffixes)
    whole = sum(len(response) for g in groups for response in g.responses)
    return suffixes / max(1, whole) * len(groups) / max(1, len(groups) + missing)


def loss_denominator(groups: Sequence[Group], aggregation: str) -> int:
    """What the summed loss of one optimiser update is divided by, fixed before it is split.
    token: the number of its suffix tokens (DAPO). response: of its responses, each counted by the mean over
    its tokens (GRPO). sum: of its responses, each by its sum (RLOO). budget: responses times the tokens that
    the longest suffix could have had, so that a token's weight does not depend on its response (Dr. GRPO)."""
    responses = sum(len(group.suffixes) for group in groups)
    if aggregation == "token":
        return sum(len(suffix) for group in groups for suffix in group.suffixes)
    return responses * (max(group.budget for group in groups) if aggregation == "budget" else 1)


def policy_loss(logprobs: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor, denominator: int,
                objective: Objective, old_logprobs: torch.Tensor | None = None,
                ref_logprobs: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, float]]:
    """The objective with optional KL penalty (k3), to be minimised; suffix tokens only. [RPO-3]
    logprobs (R, S) with gradient, mask (R, S) bool, advantages (R,). old_logprobs (R, S): of the policy that
    sampled; None means on-policy: the ratio is 1, its gradient that of the log-prob. Returns the scalar loss,
    divided by `denominator` (see `loss_denominator`), and sums over tokens for the log: clip_fraction,
    approx_kl, kl_ref. Source: the papers beside ALGORITHMS."""
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    log_ratio = (logprobs - old).clamp(-20, 20)
    sums = {"approx_kl": ((log_ratio.expm1() - log_ratio) * mask).sum().item()}
    if objective.ratio_level == "sequence":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1))[:, None]
    ratio = log_ratio.exp().expand(mask.shape)
    advantages = advantages.to(logprobs.dtype)[:, None]
    clipped_ratio = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    if objective.surrogate == "cispo":
        token_objective = clipped_ratio.detach() * advantages * logprobs
        clipped = clipped_ratio != ratio
    else:
        token_objective = torch.minimum(ratio * advantages, clipped_ratio * advantages)
        clipped = clipped_ratio * advantages < ratio * advantages
    sums["clip_fraction"] = (clipped & mask).sum().item()
    if objective.kl_coef > 0:
        ref_ratio = (ref_logprobs - logprobs).clamp(-20, 20)
        k3 = ref_ratio.exp() - ref_ratio - 1
        token_objective = token_objective - objective.kl_coef * k3
        sums["kl_ref"] = (k3 * mask).sum().item()
    per_response = (token_objective * mask).sum(1)
    if objective.aggregation == "response":
        per_response = per_response / mask.sum(1)
    return -per_response.sum() / denominator, sums


def micro_batches(trees: Sequence[Tree], tokens_per_forward: float) -> list[list[Piece]]:
    """Split this rank's share into lists of at most `tokens_per_forward` packed tokens, longest first.
    A tree that is too long alone is split by rows (its context is then computed once per piece)."""
    pieces: list[tuple[int, Piece]] = []
    for i in share([tree.packed_tokens for tree in trees]):
        tree = trees[i]
        rows = max(1, int((tokens_per_forward - len(tree.context)) // max(map(len, tree.suffixes))))
        for start in range(0, len(tree.suffixes), rows):
            piece = i, range(start, min(start + rows, len(tree.suffixes)))
            pieces.append((rows_of(trees, piece).packed_tokens, piece))
    batches: list[list[Piece]] = []
    used = tokens_per_forward + 1
    for size, piece in sorted(pieces, key=lambda x: x[0], reverse=True):
        if used + size > tokens_per_forward:
            batches.append([])
            used = 0
        batches[-1].append(piece)
        used += size
    return batches


def rows_of(trees: Sequence[Tree], piece: Piece) -> Tree:
    tree, rows = trees[piece[0]], piece[1]
    return Tree(tree.context, tree.suffixes[rows.start:rows.stop])


@torch.no_grad()
def score(policy: Policy, trees: Sequence[Tree], temperature: float,
          tokens_per_forward: int) -> list[list[list[float]]]:
    """Log-probs of every suffix token under the policy, by tree and suffix."""
    policy, mine = policy.whole(), share([tree.packed_tokens for tree in trees])
    scores = {i: [[0.0] * len(suffix) for suffix in trees[i].suffixes] for i in mine}

    def work(size: float) -> None:
        for part in micro_batches(trees, size):
            logprobs, _ = policy(pack([rows_of(trees, piece) for piece in part], policy.device), temperature)
            for (i, row), values in zip([(i, row) for i, rows in part for row in rows], logprobs.tolist()):
                scores[i][row] = values[:len(trees[i].suffixes[row])]
    halve_to_fit(work, tokens_per_forward, SMALLEST_FORWARD, "--tokens-per-forward")
    scores = gather(scores)
    return [scores[i] for i in range(len(trees))]


def update(policy: Policy, ref_policy: Policy | None, optimizer: torch.optim.Optimizer,
           groups: Sequence[Group], advantages: Sequence[Sequence[float]], objective: Objective,
           temperature: float, updates: int, tokens_per_forward: int) -> tuple[dict[str, float], list[float]]:
    """`updates` optimiser steps, the i-th on groups[i::updates], which change the policy.
    advantages: by group and response. temperature: of the sampling. Returns metrics of all steps together and
    the gradient norm of each; a step whose norm is not finite is left out."""
    updates = min(updates, len(groups))
    trees = [Tree(group.context, group.suffixes) for group in groups]
    policy.train()  # gradient checkpointing works in train mode only; there is no dropout
    # before the first step, which is on-policy: there its own forward gives the old log-probs
    old = [score(policy, trees[i::updates], temperature, tokens_per_forward) if i else None
           for i in range(updates)]
    ref = [score(ref_policy, trees[i::updates], temperature, tokens_per_forward) if ref_policy else None
           for i in range(updates)]
    sums, norms, diff_max = Counter(), [], 0.0
    for i in range(updates):
        def work(size: float) -> tuple[Counter, float]:
            return accumulate_gradient(policy, groups[i::updates], advantages[i::updates], old[i], ref[i],
                                       objective, temperature, size)
        floor = tokens_per_forward if policy.copies else SMALLEST_FORWARD  # FSDP: not on one rank alone
        part = halve_to_fit(work, tokens_per_forward, floor, "--tokens-per-forward")
        policy.add_gradients()
        norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), GRAD_CLIP)))
        if math.isfinite(norms[-1]):
            optimizer.step()
            policy.stale = True
            sums["norm"] += norms[-1]
            for stats, diff in gather({ranks()[0]: part}).values():
                sums.update(stats)
                diff_max = max(diff_max, diff)
        optimizer.zero_grad()
    policy.eval()
    finite = sum(map(math.isfinite, norms))
    metrics: dict[str, float] = {"policy/skipped_updates": len(norms) - finite}
    if tokens := sums["tokens"]:
        means = ("entropy", "clip_fraction", "approx_kl", "kl_ref", "sampling_gap_mean")
        metrics |= {f"policy/{name}": sums[name] / tokens for name in means} | {
            "policy/grad_norm": sums["norm"] / finite, "policy/probs_diff_max": diff_max,
            "tokens/trained": tokens, "tokens/forwarded": sums["forwarded"]}
    return metrics, norms


def accumulate_gradient(policy: Policy, groups: Sequence[Group], advantages: Sequence[Sequence[float]],
                        old: Logprobs | None, ref: Logprobs | None, objective: Objective, temperature: float,
                        tokens_per_forward: float) -> tuple[Counter, float]:
    """Leave this rank's part of a gradient in the policy; sums over its tokens, and the largest difference of
    a token's probability in sampling and here.
    old: log-probs of the policy that sampled, None if it is this one; ref: of the reference policy, if any.
    """
    policy.zero_grad()
    sums, diff_max, denominator = Counter(), 0.0, loss_denominator(groups, objective.aggregation)
    trees, sampled = [Tree(g.context, g.suffixes) for g in groups], [g.logprobs for g in groups]
    batches = micro_batches(trees, tokens_per_forward)
    if policy.copies:  # FSDP takes the mean over the ranks, which need equally many micro-batches
        denominator /= ranks()[1]
        for _ in range(max(gather({ranks()[0]: len(batches)}).values()) - len(batches)):
            policy(pack([Tree([0], [[0]])], policy.device))[0].sum().mul(0).backward()
    for part in batches:
        def tensor(values: Logprobs | None) -> torch.Tensor | None:
            return values and padded([values[i][row] for i, rows in part for row in rows], torch.float32,
                                     policy.device)
        batch = pack([rows_of(trees, piece) for piece in part], policy.device)
        logprobs, entropy = policy(batch, temperature)
        per_row = torch.tensor([advantages[i][row] for i, rows in part for row in rows], dtype=torch.float32,
                               device=policy.device)
        loss, stats = policy_loss(logprobs, batch.mask, per_row, denominator, objective, tensor(old),
                                  tensor(ref))
        loss.backward()
        here, there = (x[batch.mask] for x in (logprobs.detach() if old is None else tensor(old),
                                               tensor(sampled)))
        gap, diff_max = (here - there).abs(), max(diff_max, (here.exp() - there.exp()).abs().max().item())
        sums.update(stats)
        sums.update(tokens=len(gap), entropy=entropy.sum().item(), sampling_gap_mean=gap.sum().item(),
                    forwarded=batch.input_ids.numel())
        trim_heap(policy.device)
    return sums, diff_max
