"""From a rollout to its token advantages, as pure functions: one for each source of credit.

    scoring        segments, completions -> log p(c | s) -> v(s) -> r -> A      RREDCoT: nothing is generated
    monte_carlo    v(s) from monte_carlo.py ->  r -> A                         with mode "difference": VinePPO
    attribution    segments, reference answer -> r -> A                        each of `attribution.ATTRIBUTIONS`
    value_head     V(s_t) of a learned critic -> A                             PPO

Each takes a batch of groups, is jitted by the caller, and returns `types.Credit`;
`assignment.py` calls them with what they need from the host.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import optax

from rredcot_jax.credit import attribution, value_head
from rredcot_jax.model import decoder, scoring
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import advantages, redistribution, types, values
from rredcot_jax.ops.masked import masked_mean

SOURCES = ("scoring", "monte_carlo", *attribution.ATTRIBUTIONS, "value_head")


@dataclasses.dataclass(frozen=True)
class CreditRule:
  """The choices of docs/method.md, sections 3 and 5, as one static argument."""

  group_size: int
  temperature: float
  mode: str = "uniform"  # advantages.MODES; uniform is GRPO and reads no source.
  source: str = "scoring"  # SOURCES
  form: str = "plain"  # values.FORMS
  max_weight: float = 1.0
  initial_value: str = "baseline"  # redistribution.INITIAL_VALUES
  state_baseline: bool = True  # Off: mode "difference" takes v(s_{k+1}) and not v(s_{k+1}) - v(s_k).
  floor: float = 0.0
  scale: float = 1.0
  baseline: str = "mean"  # advantages.BASELINES
  advantage_scale: str = "std"  # advantages.SCALES
  chunk_size: int | None = None
  space: str | None = None  # attribution.SPACES; None is the attribution's own.
  attribution_steps: int = 64
  gae_decay: float = 0.95

  @property
  def redistributes(self) -> bool:
    """Whether credit is anything but GRPO's."""
    return self.mode != "uniform"

  @property
  def attributes(self) -> bool:
    """Whether the source explains a reference answer instead of valuing states."""
    return self.redistributes and self.source in attribution.ATTRIBUTIONS

  @property
  def needs_bank(self) -> bool:
    return self.attributes or (self.redistributes and self.source == "scoring")

  @property
  def learns_values(self) -> bool:
    return self.redistributes and self.source == "value_head"


def check_combination(source: str, mode: str, bank: str, space: str | None) -> None:
  """Refuses what a source cannot give; see `attribution` for why.

  Raises:
    ValueError: naming the keys of the configuration and the fix.
  """
  types.check_option("credit.source", source, SOURCES)
  types.check_option("credit.mode", mode, advantages.MODES)
  if mode == "uniform":
    return
  wrong = f"credit.mode={mode!r} with credit.source={source!r}"
  if source == "value_head" and mode != "difference":
    raise ValueError(f"{wrong}: its advantages are PPO's, one a token, with no sigma; set credit.mode='difference'.")
  if source not in attribution.ATTRIBUTIONS:
    return
  if bank != "answer":
    raise ValueError(
      f"credit.bank={bank!r} with credit.source={source!r}: attribution explains one completion after a finished "
      "thought; set credit.bank='answer'."
    )
  if source in ("attention", "attention_rollout") and mode != "magnitude":
    raise ValueError(
      f"{wrong}: attention is never negative, so it says where to look and not which way; set credit.mode='magnitude'."
    )
  unit = space or ("probability" if source == "leave_one_out" else "log")
  if mode == "difference" and unit != "probability":
    raise ValueError(
      f"{wrong} in space {unit!r}: 'difference' takes credit as it is, so it must be in the return's units; set "
      "credit.attribution.space='probability', or another credit.mode."
    )


def group_advantages(returns: chex.Array, rule: CreditRule) -> chex.Array:
  """[B] group-relative advantages of [B] returns, rows of a group together."""
  grouped = jax.vmap(functools.partial(advantages.group_advantages, baseline=rule.baseline, scale=rule.advantage_scale))
  return grouped(returns.reshape(-1, rule.group_size)).reshape(-1)


def zero_variance(returns: chex.Array, rule: CreditRule) -> chex.Array:
  """[B] bool: whether all returns of the row's group are the same."""
  return jnp.repeat(jax.vmap(advantages.zero_variance)(returns.reshape(-1, rule.group_size)), rule.group_size)


def uniform_advantages(mask: chex.Array, returns: chex.Array, rule: CreditRule) -> chex.Array:
  """GRPO's token advantages: [B, T], A_i on every token of `mask` [B, T]."""
  return jnp.where(mask, rule.scale * group_advantages(returns, rule)[:, None], 0.0)


def assign_credit(
  params: decoder.Params,
  config: ModelConfig,
  cache: decoder.Cache,
  rollout: types.Rollout,
  segments: types.Segments,
  completions: types.Completions,
  returns: chex.Array,
  uniform_rows: chex.Array,
  *,
  rule: CreditRule,
) -> types.Credit:
  """Redistributes each trace's return over its tokens.

  Args:
    params, config, cache: the policy that sampled, and the traces' keys and values.
    rollout, segments, completions: fields [B, ...], rows of a group together.
    returns: [B] float32, the verifier's rewards.
    uniform_rows: [B] bool, rows that get GRPO's uniform credit because their bank is empty.
    rule: static; the choices.

  Returns:
    Credit with fields [B, ...].
  """
  chex.assert_rank([returns, uniform_rows], 1)
  log_p = scoring.score_with_cache(
    params, config, cache, rollout, segments, completions,
    temperature=rule.temperature, chunk_size=rule.chunk_size,
  )  # fmt: skip
  estimate = functools.partial(values.estimate_values, form=rule.form, max_weight=rule.max_weight)
  lengths = jnp.sum(completions.scored, axis=-1)
  estimated, ess = jax.vmap(estimate)(log_p, completions.utilities, completions.log_q, completions.valid, lengths)
  return credit_of_values(estimated, ess, rollout.mask, segments, returns, uniform_rows, rule=rule)


def credit_of_values(
  estimated: chex.Array,
  effective_sample_size: chex.Array,
  mask: chex.Array,
  segments: types.Segments,
  returns: chex.Array,
  uniform_rows: chex.Array,
  *,
  rule: CreditRule,
) -> types.Credit:
  """The arrows from state values to token advantages, whatever the values were estimated with.

  Args:
    estimated: [B, K] float32, v(s_0) .. v(s_{K-1}): by `values.estimate_values`, or by generation
      (`monte_carlo.MonteCarloValues.state_values`), which with mode="difference" is VinePPO (arXiv 2410.01679).
    effective_sample_size: [B, K] float32, behind each value; k for k generated continuations.
    mask: [B, T] bool, real trace tokens.
    segments, returns, uniform_rows, rule: see `assign_credit`.

  Returns:
    Credit with fields [B, ...].
  """
  redistribute = functools.partial(redistribution.redistribute, initial_value=rule.initial_value)
  rewards = jax.vmap(redistribute)(estimated, returns, segments.num_segments)
  completed = jax.vmap(redistribution.state_values)(estimated, returns, segments.num_segments)
  # A state's value is a baseline: with or without it the expected gradient is the same, and the variance is not.
  credited = rewards if rule.state_baseline else jnp.where(segments.mask, completed[:, 1:], 0.0)
  return types.Credit(
    values=completed,
    rewards=rewards,
    advantages=_advantages_of_rewards(credited, mask, segments, returns, uniform_rows, rule),
    effective_sample_size=jnp.where(segments.mask, effective_sample_size, 0.0),
  )


def attribute_credit(
  params: decoder.Params,
  config: ModelConfig,
  rollout: types.Rollout,
  segments: types.Segments,
  completions: types.Completions,
  returns: chex.Array,
  uniform_rows: chex.Array,
  exit_ids: chex.Array,
  *,
  rule: CreditRule,
) -> types.Credit:
  """Attribution's credit of each segment in the place of redistributed rewards.

  Args:
    params, config, rollout, segments, returns, uniform_rows, rule: see `assign_credit`.
    completions: fields [B, 1, 1, ...], the answer bank's.
    exit_ids: [E] int32, the tokens that leave the thought.

  Returns:
    Credit with fields [B, ...]; values are NaN, since none are estimated, and the
    effective sample size 1 where the reference could be scored.
  """
  rewards = attribution.attribute(
    rule.source, params, config, rollout, segments, completions, exit_ids=exit_ids, temperature=rule.temperature,
    space=rule.space, chunk_size=rule.chunk_size, steps=rule.attribution_steps,
  )  # fmt: skip
  asked = jnp.logical_and(segments.mask, completions.valid[:, 0])
  return types.Credit(
    values=jnp.full((rewards.shape[0], rewards.shape[1] + 1), jnp.nan, jnp.float32),
    rewards=rewards,
    advantages=_advantages_of_rewards(rewards, rollout.mask, segments, returns, uniform_rows, rule),
    effective_sample_size=asked.astype(jnp.float32),
  )


def value_head_credit(
  params: decoder.Params,
  config: ModelConfig,
  critic: value_head.Critic,
  rollout: types.Rollout,
  segments: types.Segments,
  returns: chex.Array,
  *,
  rule: CreditRule,
  optimizer: optax.GradientTransformation,
  num_updates: int,
) -> tuple[types.Credit, value_head.Critic, dict[str, chex.Array]]:
  """PPO's token advantages from the critic as it was, and the critic after learning from this batch.

  Args:
    params, config, rollout, segments, returns, rule: see `assign_credit`.
    critic: before this batch.
    optimizer, num_updates: of `value_head.update`, static.

  Returns:
    Credit with fields [B, ...], whose values and rewards are those at the segments' cuts (for
    reports; the advantages are made token by token), the next critic, and its metrics.
  """
  hidden = value_head.features(params, config, rollout)
  values_t = jnp.where(rollout.mask, value_head.predict(critic.head, hidden), 0.0)
  estimate = functools.partial(advantages.generalised_advantages, decay=rule.gae_decay)
  token_advantages = jax.vmap(estimate)(values_t, returns, rollout.mask)
  # A segment that does not exist starts at the trace's end, which may be T.
  cuts = jnp.minimum(segments.starts, values_t.shape[1] - 1)
  at_cuts = jnp.where(segments.mask, jnp.take_along_axis(values_t, cuts, axis=1), 0.0)
  redistribute = functools.partial(redistribution.redistribute, initial_value=rule.initial_value)
  credit = types.Credit(
    values=jax.vmap(redistribution.state_values)(at_cuts, returns, segments.num_segments),
    rewards=jax.vmap(redistribute)(at_cuts, returns, segments.num_segments),
    advantages=rule.scale * token_advantages,
    effective_sample_size=segments.mask.astype(jnp.float32),
  )
  learnt, metrics = value_head.update(
    critic, hidden, returns, rollout.mask, optimizer=optimizer, num_updates=num_updates
  )
  return credit, learnt, metrics


def summary(credit: types.Credit, segments: types.Segments) -> dict[str, chex.Array]:
  """Scalars: the share of states with a value behind them, its mean effective sample size, the mean v(s_0)."""
  size = credit.effective_sample_size
  return {
    "covered_states": masked_mean((size > 0).astype(jnp.float32), segments.mask),
    "effective_sample_size": masked_mean(size, segments.mask),
    "initial_value": jnp.mean(credit.values[:, 0]),
  }


def token_forwards(
  rule: CreditRule, *, batch: int, prompt: int, trace: int, states: int, completions: int, completion_tokens: int
) -> int:
  """Tokens that a model runs forward to assign credit to `batch` traces, padding included.

  A backward pass counts as two. Monte Carlo's depend on what was generated
  (`monte_carlo.MonteCarloValues.computed_tokens`): 0 here.

  Args:
    rule: static.
    batch, prompt, trace, states: B, P, T and K.
    completions, completion_tokens: N and S; read where there is a bank.
  """
  if not rule.redistributes or rule.source == "monte_carlo":
    return 0
  if rule.source == "scoring":
    return batch * states * completions * completion_tokens
  if rule.source == "value_head":
    return batch * (prompt + trace)
  whole = batch * (prompt + trace + completion_tokens)
  passes = {"leave_one_out": states + 1, "gradient_x_input": 3, "integrated_gradients": 3 * rule.attribution_steps}
  return whole * passes.get(rule.source, 1)


def _advantages_of_rewards(
  rewards: chex.Array,
  mask: chex.Array,
  segments: types.Segments,
  returns: chex.Array,
  uniform_rows: chex.Array,
  rule: CreditRule,
) -> chex.Array:
  """[B, T] from [B, K] rewards, uniform where the row asks for it."""
  to_tokens = functools.partial(advantages.token_advantages, mode=rule.mode, floor=rule.floor, scale=rule.scale)
  token_advantages = jax.vmap(to_tokens)(rewards, group_advantages(returns, rule), segments)
  return jnp.where(uniform_rows[:, None], uniform_advantages(mask, returns, rule), token_advantages)
