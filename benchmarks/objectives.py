"""Every row of rpo.py:ALGORITHMS against TRL's own loss, on the same random log-probs, masks and rewards.

    pip install trl==1.16.0 && python benchmarks/objectives.py     # half a minute

float64, off-policy ratios between about 0.5 and 2, with and without KL penalty. Prints a table and one JSON
object; exit code 1 if a loss or a gradient differs by more than 1e-6.
"""
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

from common import head, need, parser, row

import torch

import rpo
from data import Problem
from policy import Tree, pack
from rewards import Group

GROUPS, GROUP, BUDGET, SEEDS, TOLERANCE = 5, 6, 20, 20, 1e-6


def random_groups(seed: int) -> tuple[list[Group], torch.Tensor, dict[str, torch.Tensor]]:
    """Groups of ragged responses; their mask (R, S); log-probs of policy, old policy and reference (R, S)."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for _ in range(GROUPS):
        lengths = torch.randint(1, BUDGET + 1, (GROUP,), generator=generator).tolist()
        rewards = torch.rand(GROUP, generator=generator).tolist()
        groups.append(Group(Problem("0", "", ""), [1], [], BUDGET, [[2] * n for n in lengths],
                            [[0.0] * n for n in lengths], [True] * GROUP, [True] * GROUP, rewards))
    mask = pack([Tree(group.context, group.suffixes) for group in groups]).mask
    now = -3 * torch.rand(mask.shape, generator=generator, dtype=torch.float64)
    old, ref = now + 0.3 * torch.randn((2, *mask.shape), generator=generator, dtype=torch.float64)
    return groups, mask, {"now": now, "old": old, "ref": ref}


def our_loss(groups: Sequence[Group], mask: torch.Tensor, values: dict[str, torch.Tensor],
             objective: rpo.Objective, on_policy: bool) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss, its gradient (R, S), advantages (R,)."""
    advantages = torch.tensor([x for group in groups for x in rpo.group_advantages(
        group.rewards, objective.advantage)], dtype=torch.float64)
    logprobs = values["now"].clone().requires_grad_()
    loss, _ = rpo.policy_loss(logprobs, mask, advantages, rpo.loss_denominator(groups, objective.aggregation),
                              objective, None if on_policy else values["old"], values["ref"])
    loss.backward()
    return loss.item(), logprobs.grad, advantages


def trl_loss(algo: str, mask: torch.Tensor, values: dict[str, torch.Tensor], objective: rpo.Objective,
             on_policy: bool, advantages: torch.Tensor) -> tuple[float, torch.Tensor]:
    """TRL's method, on an object that holds what it reads instead of a trainer: loss, gradient (R, S)."""
    logprobs = values["now"].clone().requires_grad_()
    metrics = {"eval": defaultdict(list), "train": defaultdict(list)}
    trainer = SimpleNamespace(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        beta=objective.kl_coef, importance_sampling_level=objective.ratio_level,
        loss_type="grpo" if algo == "gspo" else algo,
        epsilon_low=objective.clip_low, epsilon_high=objective.clip_high + (algo == "cispo"),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=False), max_completion_length=BUDGET, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, _metrics=metrics, use_vllm=False,
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None))
    ids = torch.ones(mask.shape, dtype=torch.long)
    old = logprobs.detach() if on_policy else values["old"]
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids,
              "completion_mask": mask.long(), "advantages": advantages, "ref_per_token_logps": values["ref"],
              "old_per_token_logps": old, "old_logps": (old * mask).sum(1), "num_items_in_batch": mask.sum()}
    method = need("trl.trainer.rloo_trainer").RLOOTrainer if algo == "rloo" else \
        need("trl.trainer.grpo_trainer").GRPOTrainer
    loss = method._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.item(), logprobs.grad


def largest_gaps(algo: str, on_policy: bool, kl_coef: float) -> tuple[float, float]:
    """Largest difference of the losses and of the gradients over all seeds."""
    gaps, objective = [], replace(rpo.ALGORITHMS[algo], kl_coef=kl_coef)
    for seed in range(SEEDS):
        groups, mask, values = random_groups(seed)
        ours, our_grad, advantages = our_loss(groups, mask, values, objective, on_policy)
        theirs, their_grad = trl_loss(algo, mask, values, objective, on_policy, advantages)
        gaps.append((abs(ours - theirs), (our_grad - their_grad).abs().max().item()))
    loss, gradient = map(max, zip(*gaps))
    return loss, gradient


def main() -> None:
    parser(__doc__).parse_args()
    print(f"TRL {need('trl').__version__}; largest difference over {SEEDS} seeds")
    print(head("algo", "on-policy", "kl_coef", "loss", "gradient"))
    worst = dict.fromkeys(rpo.ALGORITHMS, 0.0)
    for algo in rpo.ALGORITHMS:
        # RLOO in TRL has one ratio per response, of summed log-probs, and the KL in the reward; ours is per
        # token. On-policy the gradients are the same and the losses differ by a constant
        cases = [(True, 0.0)] if algo == "rloo" else [(p, k) for p in (True, False) for k in (0.0, 0.1)]
        for on_policy, kl_coef in cases:
            loss, gradient = largest_gaps(algo, on_policy, kl_coef)
            print(row(algo, on_policy, kl_coef, "a constant" if algo == "rloo" else f"{loss:.1e}",
                      f"{gradient:.1e}"))
            worst[algo] = max(worst[algo], gradient, 0.0 if algo == "rloo" else loss)
    print(json.dumps(worst))
    sys.exit(int(max(worst.values()) > TOLERANCE))


if __name__ == "__main__":
    main()
