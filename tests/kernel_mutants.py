"""Wrong variants of the kernels, a line each, that their cases must notice.

A mutant that no case notices asks for a better case, not for leaving the list.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One line of a file of kernels/ in place of another.

    Attributes:
        cases: which kernel_*_cases.py must fail.
        old: occurs exactly once in the file.
    """

    name: str
    file: str
    cases: str
    old: str
    new: str


MUTANTS = (
    # --- group advantages
    Mutant(
        "std divides by all members",
        "token_terms.py",
        "sequence",
        "tl.sqrt(squares / tl.maximum(count - 1.0, 1.0))",
        "tl.sqrt(squares / tl.maximum(count, 1.0))",
    ),
    Mutant(
        "equal rewards are not looked for",
        "token_terms.py",
        "sequence",
        "return tl.where((highest > lowest) & (own == own), advantage, 0.0)",
        "return tl.where(own == own, advantage, 0.0)",
    ),
    Mutant(
        "an unjudged reward keeps its NaN",
        "token_terms.py",
        "sequence",
        "return tl.where((highest > lowest) & (own == own), advantage, 0.0)",
        "return tl.where(highest > lowest, advantage, 0.0)",
    ),
    Mutant(
        "the second pass forgets a block of the group",
        "token_terms.py",
        "sequence",
        "squares += tl.sum(centred * centred)",
        "squares = tl.sum(centred * centred)",
    ),
    Mutant(
        "unjudged rewards count in the mean",
        "token_terms.py",
        "sequence",
        "count += tl.sum(tl.where(is_judged, 1.0, 0.0))",
        "count += tl.sum(tl.where(here < group_end, 1.0, 0.0))",
    ),
    Mutant(
        "a group ends a reward late",
        "sequences.py",
        "sequence",
        "group_S2=torch.stack([bounds[first], bounds[first + 1]], dim=1),",
        "group_S2=torch.stack([bounds[first], bounds[first + 1] + 1], dim=1),",
    ),
    Mutant(
        "a group's first member belongs to the group before",
        "sequences.py",
        "sequence",
        "first = torch.searchsorted(bounds, index, right=True) - 1",
        "first = torch.searchsorted(bounds, index).sub(1).clamp(min=0)",
    ),
    Mutant(
        "closed form: std divides by all members",
        "closed_form.py",
        "sequence",
        "variance_S = centred_SN.square().sum(1) / (count_S - 1).clamp(min=1)",
        "variance_S = centred_SN.square().sum(1) / count_S.clamp(min=1)",
    ),
    Mutant(
        "closed form: equal rewards are not looked for",
        "closed_form.py",
        "sequence",
        "return torch.where((highest_S > lowest_S) & ~own_S.isnan(), advantages_S, 0.0)",
        "return torch.where(~own_S.isnan(), advantages_S, 0.0)",
    ),
    # --- a token's loss and gradient
    Mutant(
        "clip bounds change places",
        "token_terms.py",
        "sequence",
        "bounded = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)",
        "bounded = tl.minimum(tl.maximum(ratio, 1.0 - clip_high), 1.0 + clip_low)",
    ),
    Mutant(
        "dual clip leaves the gradient",
        "token_terms.py",
        "sequence",
        "is_moving = (objective == gain) & (tl.abs(shared) <= MAX_LOG_RATIO)",
        "is_moving = (objective >= gain) & (tl.abs(shared) <= MAX_LOG_RATIO)",
    ),
    Mutant(
        "dual clip at positive advantages too",
        "token_terms.py",
        "sequence",
        'least = tl.where(advantage < 0.0, dual_clip * advantage, -float("inf"))',
        'least = tl.where(advantage != 0.0, dual_clip * advantage, -float("inf"))',
    ),
    Mutant(
        "the clamped ratio keeps its gradient",
        "token_terms.py",
        "sequence",
        "is_moving = (objective == gain) & (tl.abs(shared) <= MAX_LOG_RATIO)",
        "is_moving = objective == gain",
    ),
    Mutant(
        "k3 keeps its gradient outside the clamp",
        "token_terms.py",
        "sequence",
        "slope = tl.where(tl.abs(x) <= MAX_LOG_RATIO, 1.0 - tl.exp(x), 0.0)",
        "slope = 1.0 - tl.exp(tl.minimum(x, MAX_LOG_RATIO))",
    ),
    Mutant(
        "k3 looks the other way",
        "token_terms.py",
        "sequence",
        "x = tl.where(is_used, ref - logprob, 0.0)",
        "x = tl.where(is_used, logprob - ref, 0.0)",
    ),
    Mutant(
        "k3's series misses a term",
        "token_terms.py",
        "sequence",
        "    series = 1.0 + x * (1.0 / 6.0) * series\n",
        "",
    ),
    Mutant(
        "the TIS ratio is upside down",
        "token_terms.py",
        "sequence",
        "tis = bounded_exp(tl.where(is_used, old - rollout, 0.0))",
        "tis = bounded_exp(tl.where(is_used, rollout - old, 0.0))",
    ),
    Mutant(
        "the TIS ratio has no cap",
        "token_terms.py",
        "sequence",
        "tis = tl.minimum(tis, tis_cap)",
        "tis = tl.minimum(tis, 1e30)",
    ),
    Mutant(
        "the engine's log-probs may be non-finite",
        "token_terms.py",
        "sequence",
        "finite = finite & is_finite(rollout)",
        "finite = finite & is_finite(old)",
    ),
    Mutant(
        "closed form: k3 keeps its gradient outside the clamp",
        "closed_form.py",
        "sequence",
        "d_kl_R = torch.where(x_R.abs() <= _MAX_LOG_RATIO, -x_R.expm1(), 0.0)",
        "d_kl_R = -x_R.clamp(max=_MAX_LOG_RATIO).expm1()",
    ),
    Mutant(
        "closed form: the clamped ratio keeps its gradient",
        "closed_form.py",
        "sequence",
        "is_moving_R = ~is_clipped_R & (shared_R.abs() <= _MAX_LOG_RATIO)",
        "is_moving_R = ~is_clipped_R",
    ),
    Mutant(
        "closed form: dual clip at positive advantages too",
        "closed_form.py",
        "sequence",
        "torch.where(advantages_R < 0, config.dual_clip * advantages_R, -torch.inf)",
        "torch.where(advantages_R != 0, config.dual_clip * advantages_R, -torch.inf)",
    ),
    Mutant(
        "closed form: a non-finite entropy of the bonus counts as finite",
        "closed_form.py",
        "sequence",
        "is_finite_R = is_finite_R & entropy_R.isfinite()",
        "is_finite_R = is_finite_R & old_R.isfinite()",
    ),
    Mutant(
        "closed form: GSPO's mean is over all tokens",
        "closed_form.py",
        "sequence",
        "count_R = _sequence_sum(is_used_R.to(dtype), sequence_R, num_S).clamp(min=1)",
        "count_R = _sequence_sum(is_weighted_R.to(dtype), sequence_R, num_S).clamp(min=1)",
    ),
    # --- the sequence kernel
    Mutant(
        "GSPO's mean is over all tokens",
        "sequence_kernel.py",
        "sequence",
        "counts += tl.where(is_used, 1.0, 0.0)",
        "counts += tl.where(mask, 1.0, 0.0)",
    ),
    Mutant(
        "GSPO's gradient has each token's own TIS weight",
        "sequence_kernel.py",
        "sequence",
        "slope = tl.broadcast_to(mean_tis, [BLOCK])",
        "slope = tis",
    ),
    Mutant(
        "a non-finite token spreads into the loss",
        "sequence_kernel.py",
        "sequence",
        "loss_sum += tl.where(is_used, weight * loss, 0.0)",
        "loss_sum += weight * tl.where(mask, loss, 0.0)",
    ),
    Mutant(
        "a non-finite token spreads into its gradient",
        "sequence_kernel.py",
        "sequence",
        "d_entropy = tl.where(is_used, -entropy_coefficient * weight, 0.0)",
        "d_entropy = tl.where(mask, -entropy_coefficient * weight, 0.0)",
    ),
    Mutant(
        "a later block takes the first block's place",
        "sequence_kernel.py",
        "sequence",
        "policy_kl_sum += tl.where(is_used, weight * k3(log_ratio), 0.0)",
        "policy_kl_sum = tl.where(is_used, weight * k3(log_ratio), 0.0)",
    ),
    Mutant(
        "the last program forgets a block of sequences",
        "sequence_kernel.py",
        "sequence",
        "total += tl.sum(part, axis=0)",
        "total = tl.sum(part, axis=0)",
    ),
    Mutant(
        "the last program forgets a block of maxima",
        "sequence_kernel.py",
        "sequence",
        "highest = tl.maximum(highest, tl.max(part, axis=0))",
        "highest = tl.max(part, axis=0)",
    ),
    Mutant(
        "the counter of programs is left where it was",
        "sequence_kernel.py",
        "sequence",
        "        tl.store(num_finished, 0)\n",
        "",
    ),
    # --- rows of logits
    Mutant(
        "the running sum is not rescaled",
        "row_kernels.py",
        "row",
        "total = total * factor + tl.sum(term, axis=1)",
        "total = total + tl.sum(term, axis=1)",
    ),
    Mutant(
        "the running spread is not moved to the new maximum",
        "row_kernels.py",
        "row",
        "spread = (spread + shift * total) * factor",
        "spread = spread * factor",
    ),
    Mutant(
        "threads' spreads are not moved to the row's maximum",
        "row_kernels.py",
        "row",
        "spread = tl.sum((spread + tl.maximum(shift, NOTHING) * total) * factor) * LN_2",
        "spread = tl.sum(spread * factor) * LN_2",
    ),
    Mutant(
        "padding columns take part in the softmax",
        "row_kernels.py",
        "row",
        'x = tl.where(here < num_tokens, x, -float("inf"))',
        'x = tl.where(here < num_columns, x, -float("inf"))',
    ),
    Mutant(
        "the last token is taken for padding",
        "row_kernels.py",
        "row",
        "y = tl.where(here < num_tokens, y, 0.0)",
        "y = tl.where(here < num_tokens - 1, y, 0.0)",
    ),
    Mutant(
        "zeros go past the row's end",
        "row_kernels.py",
        "row",
        "            tl.store(row + here, zeros, mask=here < num_columns)",
        "            tl.store(row + here, zeros, mask=here <= num_columns)",
    ),
    Mutant(
        "the tail's gradient is not cut at the row's end",
        "row_kernels.py",
        "row",
        "tl.store(row + here, y.to(logits.dtype.element_ty), mask=here < num_columns)",
        "tl.store(row + here, y.to(logits.dtype.element_ty), mask=here <= num_columns)",
    ),
    Mutant(
        "the first ban is skipped",
        "row_kernels.py",
        "row",
        "for i in range(num_banned):",
        "for i in range(1, num_banned):",
    ),
    Mutant(
        "the gradient misses the temperature",
        "row_kernels.py",
        "row",
        "a = -(d_logprob + d_entropy * entropy) * unit",
        "a = -(d_logprob + d_entropy * entropy)",
    ),
    Mutant(
        "the target's gradient misses the temperature",
        "row_kernels.py",
        "row",
        "tl.store(row + column, (y * unit).to(logits.dtype.element_ty), mask=is_here)",
        "tl.store(row + column, y.to(logits.dtype.element_ty), mask=is_here)",
    ),
    Mutant(
        "the entropy's gradient has the other sign",
        "row_kernels.py",
        "row",
        "b = -d_entropy * LN_2 * unit",
        "b = d_entropy * LN_2 * unit",
    ),
    Mutant(
        "the target's entropy gradient has the other sign",
        "row_kernels.py",
        "row",
        "y = d_logprob * (1.0 - p) - d_entropy * p * (logprob + entropy)",
        "y = d_logprob * (1.0 - p) + d_entropy * p * (logprob + entropy)",
    ),
    Mutant(
        "an entropy that is not finite has a gradient",
        "row_kernels.py",
        "row",
        "is_live = is_finite(logprob) & ((d_logprob != 0.0) | (d_entropy != 0.0))",
        "is_live = (d_logprob != 0.0) | (d_entropy != 0.0)",
    ),
    Mutant(
        "a chunk takes the first rows' constants",
        "row_kernels.py",
        "row",
        "r, logprob, entropy, first_row + r, sequence_R,",
        "r, logprob, entropy, r, sequence_R,",
    ),
    Mutant(
        "rows get no KL gradient",
        "row_kernels.py",
        "row",
        "slope += kl_coefficient * kl_slope",
        "slope += 0.0 * kl_slope",
    ),
    Mutant(
        "closed form: the target's column is left to the softmax",
        "closed_form.py",
        "row",
        "local_logits[index, column_R[index]] = at_target[index]",
        "local_logits[index, column_R[index]] += 0.0",
    ),
    Mutant(
        "closed form: the gradient misses the temperature",
        "closed_form.py",
        "row",
        ").div_(temperature)",
        ")",
    ),
    Mutant(
        "closed form: dead rows get what their logits hold",
        "closed_form.py",
        "row",
        "return gradient_RV.masked_fill_(is_dead_R.unsqueeze(1), 0.0)",
        "return gradient_RV",
    ),
    Mutant(
        "closed form: padding columns take part in the softmax",
        "closed_form.py",
        "row",
        "    local_logits[:, vocabulary.num_tokens :] = -torch.inf\n",
        "",
    ),
    Mutant(
        "the launch forgets the temperature",
        "triton_form.py",
        "row",
        "            LOG2_E.value / vocabulary.rule.temperature,\n            BLOCK=ROW_BLOCK,",
        "            LOG2_E.value,\n            BLOCK=ROW_BLOCK,",
    ),
    Mutant(
        "the launch turns dual clip off by 0",
        "triton_form.py",
        "sequence",
        'config.dual_clip or float("inf"),',
        "config.dual_clip,",
    ),
    # --- the cut vocabulary
    Mutant(
        "every rank has the target",
        "row_kernels.py",
        "layout",
        "return column, (column >= 0) & (column < num_tokens)",
        "return column, column < num_tokens",
    ),
    Mutant(
        "a target on a later rank is looked for here",
        "row_kernels.py",
        "layout",
        "return column, (column >= 0) & (column < num_tokens)",
        "return column, column >= 0",
    ),
    Mutant(
        "ranks' sums are not moved to the common maximum",
        "row_kernels.py",
        "layout",
        "total += factor * part",
        "total += part",
    ),
    Mutant(
        "ranks' spreads are not moved to the common maximum",
        "row_kernels.py",
        "layout",
        "spread += factor * (tl.load(gathered + (4 * k + 3) * num_rows + r) + shift * part)",
        "spread += factor * tl.load(gathered + (4 * k + 3) * num_rows + r)",
    ),
    Mutant(
        "contract: ranks' spreads are not moved to the common maximum",
        "contract.py",
        "layout",
        "spread_R = (scale_KR * (spread_KR + shift_KR * total_KR)).sum(0)",
        "spread_R = (scale_KR * spread_KR).sum(0)",
    ),
    Mutant(
        "contract: bans are global ids",
        "contract.py",
        "layout",
        "ids = (token_id - self.first for token_id in self.rule.banned_token_ids)",
        "ids = (token_id for token_id in self.rule.banned_token_ids)",
    ),
    Mutant(
        "closed form: every rank writes its first column for a target that it has not",
        "closed_form.py",
        "layout",
        "index = (is_here_R & is_live_R).nonzero().flatten()",
        "index = is_live_R.nonzero().flatten()",
    ),
    Mutant(
        "d hidden is not added up over ranks",
        "head.py",
        "layout",
        "            dist.all_reduce(d_hidden_RD, group=self.vocabulary.tp_group)\n",
        "            pass\n",
    ),
    # --- the output layer
    Mutant(
        "the last chunk is skipped",
        "head.py",
        "head",
        "for start in range(0, num_rows, chunk):",
        "for start in range(0, num_rows - chunk + 1, chunk):",
    ),
    Mutant(
        "a later chunk's weight gradient takes the place of the first's",
        "head.py",
        "head",
        "        total.addmm_(left, right)\n    elif",
        "        torch.mm(left, right, out=total)\n    elif",
    ),
    Mutant(
        "a float32 main_grad is overwritten",
        "head.py",
        "head",
        "total.addmm_(left.to(total.dtype), right.to(total.dtype))",
        "torch.mm(left.to(total.dtype), right.to(total.dtype), out=total)",
    ),
    Mutant(
        "a chunk of GRPO begins at the first row",
        "contract.py",
        "head",
        "return TokenGrpo(self.rows, self.sequence_R, self.config, part.start)",
        "return TokenGrpo(self.rows, self.sequence_R, self.config, 0)",
    ),
    Mutant(
        "a scaled loss leaves main_grad as it was",
        "head.py",
        "head",
        "            torch._assert_async(gradient == 1)",
        "            pass",
    ),
    Mutant(
        "the weight's gradient does not follow the loss's factor",
        "head.py",
        "head",
        "            d_weight.mul_(gradient)\n",
        "            pass\n",
    ),
    Mutant(
        "a frozen weight's main_grad is written",
        "head.py",
        "head",
        'getattr(weight, "main_grad", None) if weight.requires_grad else None',
        'getattr(weight, "main_grad", None)',
    ),
    # --- targets
    Mutant(
        "a target that no rank has counts as a logit of 0",
        "closed_form.py",
        "row",
        "statistics_4R[2] = torch.where(is_here_R, target_R, -torch.inf)",
        "statistics_4R[2] = torch.where(is_here_R, target_R, 0.0)",
    ),
    Mutant(
        "ranks' statistics of the target are not told apart",
        "row_kernels.py",
        "layout",
        "target = tl.maximum(target, tl.load(gathered + (4 * k + 2) * num_rows + r))",
        "target = tl.load(gathered + (4 * k + 2) * num_rows + r)",
    ),
)
