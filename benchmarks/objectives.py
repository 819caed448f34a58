"""The six objectives against TRL's own loss functions on the same random log-probs, masks and rewards.

    pip install trl==1.16.0 && python benchmarks/objectives.py

float64, off-policy ratios between about 0.5 and 2, with and without KL. Fails where a loss or gradient
differs by more than 1e-6. The last line is one JSON object.
"""
from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rpo  # noqa: E402

GROUPS, GROUP, BUDGET = 5, 6, 20
OBJECTIVE = ("clip_low", "clip_high", "aggregation", "ratio_level", "surrogate")


def tensors(seed: int) -> tuple[list[rpo.Item], dict[str, torch.Tensor]]:
    """Groups of ragged responses with rewards; log-probs of policy, old policy and reference (R, S)."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(GROUPS):
        lengths = torch.randint(1, BUDGET + 1, (GROUP,), generator=generator).tolist()
        rewards = torch.rand(GROUP, generator=generator).tolist()
        items.append(rpo.Item([1], [[2] * n for n in lengths], rewards, [[0.0] * n for n in lengths],
                              budget=BUDGET))
    shape = rpo.pack(items).mask.shape
    now = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return items, {"now": now,
                   "old": now + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64),
                   "ref": now + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)}


def our_loss(items: list[rpo.Item], values: dict[str, torch.Tensor], algo: str, kl_coef: float,
             on_policy: bool) -> tuple[float, torch.Tensor, torch.Tensor]:
    settings = rpo.ALGORITHMS[algo]
    batch = rpo.pack(items)
    rewards = [item.advantages for item in items]
    batch.advantages = torch.tensor(
        [a for r in rewards for a in rpo.group_advantages(r, settings["advantage"])], dtype=torch.float64)
    batch.old_logprobs = None if on_policy else values["old"]
    batch.ref_logprobs = values["ref"]
    logprobs = values["now"].clone().requires_grad_()
    denominator = rpo.update_denominator(items, settings["aggregation"])
    loss, _ = rpo.policy_loss(logprobs, batch, denominator, kl_coef=kl_coef,
                              **{k: settings[k] for k in OBJECTIVE})
    loss.backward()
    return loss.item(), logprobs.grad, batch.advantages


def trl_loss(items: list[rpo.Item], values: dict[str, torch.Tensor], algo: str, kl_coef: float,
             on_policy: bool, advantages: torch.Tensor) -> tuple[float, torch.Tensor]:
    """TRL's method, on an object that holds what it reads instead of a trainer."""
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    settings, mask = rpo.ALGORITHMS[algo], rpo.pack(items).mask
    logprobs = values["now"].clone().requires_grad_()
    metrics = {"eval": defaultdict(list), "train": defaultdict(list)}
    trainer = SimpleNamespace(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=kl_coef,
        importance_sampling_level=settings["ratio_level"], loss_type="grpo" if algo == "gspo" else algo,
        epsilon_low=settings["clip_low"], epsilon_high=settings["clip_high"] + (algo == "cispo"),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=False), max_completion_length=BUDGET, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, _metrics=metrics, use_vllm=False,
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None))
    ids = torch.ones(mask.shape, dtype=torch.long)
    old = logprobs.detach() if on_policy else values["old"]
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids,
              "completion_mask": mask.long(), "advantages": advantages, "ref_per_token_logps": values["ref"],
              "old_per_token_logps": old, "old_logps": (old * mask).sum(1),
              "num_items_in_batch": mask.sum()}
    method = RLOOTrainer if algo == "rloo" else GRPOTrainer
    loss = method._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.item(), logprobs.grad


def main() -> None:
    try:
        import trl
    except ImportError as error:
        sys.exit(f"this benchmark compares with TRL: pip install trl==1.16.0 ({error})")
    print(f"TRL {trl.__version__}; largest difference over 20 seeds\n"
          "| algo | on-policy | kl_coef | loss | gradient |\n|---|---|---|---|---|")
    worst, failed = {}, False
    for algo in rpo.ALGORITHMS:
        # RLOO in TRL: one ratio for a whole response, its sum; ours is per token. On-policy the gradient is
        # the same (the losses differ by a constant), and TRL has its KL in the reward
        cases = [(True, 0.0)] if algo == "rloo" else [(p, k) for p in (True, False) for k in (0.0, 0.1)]
        for on_policy, kl_coef in cases:
            gaps = []
            for seed in range(20):
                items, values = tensors(seed)
                ours, our_grad, advantages = our_loss(items, values, algo, kl_coef, on_policy)
                theirs, their_grad = trl_loss(items, values, algo, kl_coef, on_policy, advantages)
                gaps.append((abs(ours - theirs), (our_grad - their_grad).abs().max().item()))
            loss, gradient = map(max, zip(*gaps))
            print(f"| {algo} | {on_policy} | {kl_coef} | {'a constant' if algo == 'rloo' else f'{loss:.1e}'} "
                  f"| {gradient:.1e} |")
            worst[algo] = max(worst.get(algo, 0.0), gradient, 0.0 if algo == "rloo" else loss)
            failed |= worst[algo] > 1e-6
    print(json.dumps(worst))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
