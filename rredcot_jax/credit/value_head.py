"""A learned critic: one linear read-out of the policy's hidden states, trained on returns.

    V(s_t) = w . h_t + b

h_t is the decoder's final hidden state at the token before t, the one that predicts
token t, under the policy that sampled. PPO's critic (arXiv 1707.06347) with PPO's
advantages (`advantages.generalised_advantages`, arXiv 1506.02438). What is our choice [C]:

- The critic reads the policy's hidden states, and no gradient of the critic enters the policy.
  The policy's update is then the same function of its advantages as under every other source
  of credit, so a comparison compares credit alone. Only a few hundred parameters are learnt.
  The disadvantage is that the critic can use only what the policy's last layer holds. A
  critic with layers of its own is stronger and costs as much as another policy.
- w starts at 0 and b at a constant. Before it has learnt anything, V is that constant at
  every state, and every advantage but the last token's delta is 0.
- The target at every token is the observed return (lambda = 1). It is unbiased. With gamma = 1
  and one reward at the end it is the Monte Carlo return of every state.

It generates nothing. It costs one more pass over prompt and trace.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import optax

from rredcot_jax.credit import source
from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import advantages, types
from rredcot_jax.ops.masked import masked_mean
from rredcot_jax.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ValueHead:
  """The read-out's parameters."""

  weight: chex.Array  # [D] float32.
  bias: chex.Array  # [] float32.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Critic:
  """The critic and its optimizer's state; part of the train state."""

  head: ValueHead
  opt_state: optax.OptState


def make_optimizer(*, learning_rate: float) -> optax.GradientTransformation:
  """Adam at a constant rate."""
  return optax.adam(learning_rate)


def init(width: int, optimizer: optax.GradientTransformation, *, initial_value: float) -> Critic:
  """The critic that values every state at `initial_value`."""
  head = ValueHead(weight=jnp.zeros(width, jnp.float32), bias=jnp.float32(initial_value))
  return Critic(head=head, opt_state=optimizer.init(head))


def features(params: decoder.Params, config: ModelConfig, rollout: types.Rollout) -> chex.Array:
  """[B, T, D] float32, h_t of every trace token, without gradient; without meaning on padding."""
  tokens = jnp.concatenate([rollout.prompt_tokens, rollout.tokens], axis=1)
  mask = jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1)
  hidden, _ = decoder.forward(params, config, tokens, mask)
  width = rollout.prompt_tokens.shape[1]
  return jax.lax.stop_gradient(hidden[:, width - 1 : -1].astype(jnp.float32))


def predict(head: ValueHead, hidden: chex.Array) -> chex.Array:
  """[...] V of hidden states [..., D]."""
  return hidden @ head.weight + head.bias


def update(
  critic: Critic,
  hidden: chex.Array,
  returns: chex.Array,
  mask: chex.Array,
  *,
  optimizer: optax.GradientTransformation,
  num_updates: int,
) -> tuple[Critic, dict[str, chex.Array]]:
  """Regression of the returns on the hidden states: `num_updates` steps down one batch.

      loss = 1/2 mean_t (V(s_t) - R)^2   over the real tokens of all traces

  Args:
    critic: before.
    hidden: [B, T, D], from `features`.
    returns: [B] float32.
    mask: [B, T] bool.
    optimizer, num_updates: static.

  Returns:
    The critic after, and scalar metrics of the critic before: `critic_loss`, and
    `critic_explained_variance`, 1 - mean (R - V)^2 / var(R), 0 where all returns agree.
  """
  targets = jnp.broadcast_to(returns[:, None], mask.shape)
  # Masked places may hold any number, which must not reach a gradient.
  hidden = jnp.where(mask[..., None], hidden, 0.0)

  def loss_fn(head: ValueHead) -> chex.Array:
    return 0.5 * masked_mean((predict(head, hidden) - targets) ** 2, mask)

  def step(critic: Critic, _: None) -> tuple[Critic, chex.Array]:
    loss, gradient = jax.value_and_grad(loss_fn)(critic.head)
    updates, opt_state = optimizer.update(gradient, critic.opt_state, critic.head)
    return Critic(head=optax.apply_updates(critic.head, updates), opt_state=opt_state), loss

  learnt, losses = jax.lax.scan(step, critic, None, length=num_updates)
  spread = masked_mean((targets - masked_mean(targets, mask)) ** 2, mask)
  explained = jnp.where(spread > 0, 1 - 2 * losses[0] / jnp.where(spread > 0, spread, 1.0), 0.0)
  return learnt, {"critic_loss": losses[0], "critic_explained_variance": explained}


class Critique(source.Source):
  """PPO's token advantages from a learned critic."""

  name = "value_head"
  modes = ("difference",)
  needs = frozenset({"state"})
  estimates_values = True

  def __init__(
    self,
    setting: source.Setting,
    *,
    learning_rate: float = 1e-2,
    updates_per_rollout: int = 8,
    initial_value: float = 0.5,
    decay: float = 0.95,
  ):
    """
    Args:
      setting: see `source.Setting`.
      learning_rate: of the critic alone.
      updates_per_rollout: steps of its regression on each batch.
      initial_value: what it values every state at before it has learnt.
      decay: lambda of generalised advantage estimation, in [0, 1].
    """
    super().__init__(setting)
    if not 0 <= decay <= 1:
      raise ValueError(f"credit.options.decay={decay} must be in [0, 1].")
    if updates_per_rollout < 1:
      raise ValueError(f"credit.options.updates_per_rollout={updates_per_rollout} must be at least 1.")
    if not 0 < learning_rate < float("inf"):
      raise ValueError(f"credit.options.learning_rate={learning_rate} must be a finite number above 0.")
    self._optimizer = make_optimizer(learning_rate=learning_rate)
    self._num_updates, self._initial_value, self._decay = updates_per_rollout, initial_value, decay
    replicated = None if setting.mesh is None else sharding.replicated(setting.mesh)
    self._learn = jax.jit(self._assign, out_shardings=(None, None, replicated, None))

  @classmethod
  def why_not(cls, mode: str) -> str:
    """See `Source.why_not`."""
    return "its advantages are PPO's, one a token, with no sigma"

  def init_state(self) -> Critic:
    """The critic before it has learnt."""
    return init(self.setting.model.width, self._optimizer, initial_value=self._initial_value)

  def _assign(
    self,
    params: decoder.Params,
    critic: Critic,
    rollout: types.Rollout,
    segments: types.Segments,
    returns: chex.Array,
  ) -> tuple[chex.Array, chex.Array, Critic, dict[str, chex.Array]]:
    """Values at the segments' cuts, token advantages, the next critic and its metrics; pure.

    The advantages are made token by token by the critic as it was before this batch. The values
    at the cuts are for reports.
    """
    hidden = features(params, self.setting.model, rollout)
    values_t = jnp.where(rollout.mask, predict(critic.head, hidden), 0.0)
    estimate = functools.partial(advantages.generalised_advantages, decay=self._decay)
    token_advantages = jax.vmap(estimate)(values_t, returns, rollout.mask)
    # A segment that does not exist starts at the trace's end, which may be T.
    cuts = jnp.minimum(segments.starts, values_t.shape[1] - 1)
    at_cuts = jnp.where(segments.mask, jnp.take_along_axis(values_t, cuts, axis=1), 0.0)
    learnt, metrics = update(
      critic, hidden, returns, rollout.mask, optimizer=self._optimizer, num_updates=self._num_updates
    )
    return at_cuts, token_advantages, learnt, metrics

  def assign(self, batch: source.Batch) -> source.Found:
    """See `Source.assign`.

    Raises:
      ValueError: if the batch has no critic.
    """
    if batch.state is None:
      raise ValueError("credit.source='value_head' needs its critic, which lives in the train state.")
    returns = self.setting.put(batch.returns[batch.rows])
    values, token_advantages, critic, metrics = self._learn(
      batch.params, batch.state, batch.rollout, batch.segments, returns
    )
    return source.Found(
      values=values,
      advantages=token_advantages,
      state=critic,
      token_forwards=len(batch.returns) * (batch.rollout.prompt_tokens.shape[1] + batch.rollout.tokens.shape[1]),
      metrics=metrics,
    )
