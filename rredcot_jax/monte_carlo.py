"""v(s_k) by generation: k continuations of every state, judged; the baseline and the ground truth.

    v_hat(s) = 1/k sum_m R(s, c_m),   c_m ~ pi(. | s)

Unbiased, of variance v (1 - v) / k for rewards of 0 and 1, and dear: each value costs
k generated continuations, where scoring.py costs one pass over a few tokens. With k = 9
and `advantages.token_advantages(mode="difference")` this is VinePPO (arXiv 2410.01679);
with k >= 256 it is what other estimators are measured against.

A prompt is prefilled once, by the sampler that wrote the trace: a continuation reads the
trace's cache before its cut and keeps only its own tokens' keys and values. Its first
input is the last token of its prefix, run again, as in scoring.py.

Continuations end at different times, so they are not run in fixed chunks: a row has a
queue of (state, sample) and some slots, and a slot whose continuation has ended takes
the next. Memory grows with the slots and not with K k, states that do not exist are
never queued, and nothing waits for the longest but the queue's end.

Randomness: continuation m of state j of row i draws its token t with
fold_in(fold_in(fold_in(fold_in(key, i), j), m), t): no result depends on slots, rounds
or neighbours. State 0 of row i is what `sampling.sample` draws from the prompt in row m
under the key fold_in(fold_in(key, i), 0).
"""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rredcot_jax import distributed, redistribution, sampling, types
from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig

# (row, token ids of a whole trace, its end-of-sequence token included if it has one) -> rewards.
Judge = Callable[[Sequence[tuple[int, tuple[int, ...]]]], Sequence[float]]


@struct.dataclass
class Continuations:
  """`N` samples of how each state of a trace goes on; states that do not exist have length 0."""

  tokens: chex.Array  # [K, N, S] int32, right-padded, end-of-sequence token included.
  log_probs: chex.Array  # [K, N, S] float32, under the distribution sampled from (nats); 0 on padding.
  lengths: chex.Array  # [K, N] int32, at most the room that the state leaves.
  truncated: chex.Array  # [K, N] bool, True where the room ran out.

  @property
  def mask(self) -> chex.Array:
    """[..., K, N, S] bool, True on real tokens."""
    s = jax.lax.broadcasted_iota(jnp.int32, self.tokens.shape, self.tokens.ndim - 1)
    return s < self.lengths[..., None]


@dataclasses.dataclass(frozen=True)
class MonteCarloValues:
  """The rewards of all continuations of a batch's states, on the host, and what they cost."""

  rewards: np.ndarray  # [B, K, N] float32, of continuation n of state k; NaN where the state does not exist.
  returns: np.ndarray  # [B] float32, of the traces themselves.
  num_segments: np.ndarray  # [B] int32.
  generated_tokens: int  # Tokens of all continuations: the token-forwards they need.
  computed_tokens: int  # Token-forwards run for them, idle slots included.
  judged: int  # Distinct traces that the verifier saw.
  generation_seconds: float  # Wall time in generation, compiling included.
  seconds: float  # Wall time in all; the verifier runs beside the next round's generation.

  @property
  def exists(self) -> np.ndarray:
    """[B, K] bool, states that are not terminal."""
    return np.arange(self.rewards.shape[1]) < self.num_segments[:, None]

  @property
  def num_samples(self) -> int:
    """N; also the `first_sample` of a call that goes on from here."""
    return self.rewards.shape[2]

  @property
  def state_values(self) -> np.ndarray:
    """[B, K] float32, v(s_0) .. v(s_{K-1}) as `redistribution.redistribute` takes them; 0 where there is no state."""
    return np.where(self.exists, self.rewards.mean(axis=2, dtype=np.float64), 0.0).astype(np.float32)

  @property
  def values(self) -> np.ndarray:
    """[B, K + 1] float32, v(s_0) .. v(s_K); the trace's own return from `num_segments` on."""
    completed = jax.vmap(redistribution.state_values)(self.state_values, self.returns, self.num_segments)
    return np.asarray(completed)

  @property
  def standard_errors(self) -> np.ndarray:
    """[B, K + 1] float32 of `values`: s / sqrt(N), s with N - 1; 0 on terminal values, NaN if N = 1.

    0 also where all N rewards agree, which says less than it seems: after N
    successes of N, failures of probability up to about 3 / N are still plausible (95%).
    """
    if self.num_samples < 2:
      errors = np.full(self.exists.shape, np.nan)
    else:
      errors = self.rewards.std(axis=2, ddof=1, dtype=np.float64) / np.sqrt(self.num_samples)
    errors = np.where(self.exists, errors, 0.0)
    return np.pad(errors, [(0, 0), (0, 1)]).astype(np.float32)

  @property
  def successes(self) -> np.ndarray:
    """[B, K] int, continuations of reward 1."""
    return (self.rewards >= 1.0).sum(axis=2)

  def joined(self, other: "MonteCarloValues") -> "MonteCarloValues":
    """Both estimates as one, samples of `self` first; costs add up.

    Raises:
      ValueError: if they are not of the same traces, as far as returns and segments tell.
    """
    same = np.array_equal(self.returns, other.returns) and np.array_equal(self.num_segments, other.num_segments)
    if not same or self.rewards.shape[:2] != other.rewards.shape[:2]:
      raise ValueError("Monte Carlo estimates of different traces cannot be joined: returns or segments differ.")
    counts = ("generated_tokens", "computed_tokens", "judged", "generation_seconds", "seconds")
    return dataclasses.replace(
      self,
      rewards=np.concatenate([self.rewards, other.rewards], axis=2),
      **{name: getattr(self, name) + getattr(other, name) for name in counts},
    )


@struct.dataclass
class _Slots:
  """What the slots of each row are working on; fields [B, M] but the last."""

  item: chex.Array  # int32, place in the row's queue; its length and beyond is idle.
  age: chex.Array  # int32, tokens that the continuation has.
  last: chex.Array  # int32, the newest of them.
  queued: chex.Array  # [B] int32, the next place in the queue.


@functools.partial(
  jax.jit,
  static_argnames=("config", "k", "max_tokens", "temperature", "top_k", "top_p", "eos_id", "pad_id", "chunk_size"),
)
def generate_from_states(
  params: decoder.Params,
  config: ModelConfig,
  cache: decoder.Cache,
  rollout: types.Rollout,
  segments: types.Segments,
  key: chex.PRNGKey,
  *,
  k: int,
  max_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  eos_id: int,
  pad_id: int,
  chunk_size: int | None = None,
  first_sample: chex.Numeric = 0,
) -> tuple[Continuations, chex.Array]:
  """Draws `k` independent continuations of every state s_0 .. s_{num_segments - 1} of every trace.

  Args:
    params, config: the policy that sampled `rollout`.
    cache: the traces' keys and values, P + T columns, from `sampling.sample` or `decoder.forward`.
    rollout: fields [B, ...]; prompts of at least one real token.
    segments: fields [B, ...]; state j is cut at `starts[j]`.
    key: the call's key; see the module's docstring.
    k: continuations a state.
    max_tokens: the most tokens of a trace, at least T: a continuation of state j has
      room for `max_tokens - starts[j]`, so that its success is the policy's under
      the limit it was sampled with.
    temperature, top_k, top_p: see `sampling.sampling_log_probs`; the rollout's own, to value its policy.
    eos_id: ends a continuation and belongs to it.
    pad_id: fills the places after it.
    chunk_size: slots a row, that is continuations of a row run at once; memory grows
      with it. None runs them all together.
    first_sample: [] int32, number of the first continuation; a call with
      `first_sample=n` goes on where one with k = n stopped, and repeats none.

  Returns:
    Continuations with fields [B, K, k, ...], S = `max_tokens`, and [] int32, the steps that
    the loop took, of B times the slots token-forwards each. Neither carries a gradient.

  Raises:
    ValueError: if k or `chunk_size` is below 1, or `max_tokens` below T.
  """
  chex.assert_rank([rollout.tokens, segments.ends, segments.num_segments], [2, 2, 1])
  batch, k_max = segments.ends.shape
  width = rollout.prompt_tokens.shape[1]
  slots = k_max * k if chunk_size is None else min(chunk_size, k_max * k)
  if k < 1 or slots < 1:
    raise ValueError(f"k={k} and chunk_size={chunk_size} must be at least 1, chunk_size may be None for all at once.")
  if max_tokens < rollout.tokens.shape[1]:
    raise ValueError(
      f"max_tokens={max_tokens} is below the rollout's room of {rollout.tokens.shape[1]}: states near its end would "
      "have nowhere to go. Give the limit that the traces were sampled with."
    )
  params, cache = jax.lax.stop_gradient((params, cache))
  tokens = jnp.concatenate([rollout.prompt_tokens, rollout.tokens], axis=1)
  real = jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1)
  starts, total = segments.starts, segments.num_segments * k
  state_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
    jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch)), jnp.arange(k_max)
  )
  columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, None]
  own_columns = jnp.arange(max_tokens, dtype=jnp.int32)
  take = functools.partial(jnp.take_along_axis, axis=1)
  fold_each = jax.vmap(jax.vmap(jax.random.fold_in))

  def working(loop: tuple) -> chex.Array:
    _, _, slot, _ = loop
    return jnp.any(slot.item < total[:, None])

  def step(loop: tuple) -> tuple:
    i, branches, slot, drawn = loop
    active = slot.item < total[:, None]
    state, sample = jnp.minimum(slot.item // k, k_max - 1), slot.item % k
    start = take(starts, state)
    # The column of the last prefix token, which is not read but run again.
    cut = start + (width - 1)
    token = jnp.where(slot.age == 0, take(tokens, cut), slot.last)
    prefix_mask = jnp.logical_and(real[:, None], columns < cut[..., None])
    # All slots write one column, and columns are reused in turn: a slot's own are the last `age` and this one.
    own_mask = ((i - own_columns) % max_tokens)[None, None] <= slot.age[..., None]
    hidden, branches = decoder.decode_branches(
      params, config, cache, prefix_mask, branches, token, i % max_tokens, own_mask
    )
    log_probs = sampling.sampling_log_probs(
      decoder.logits(params, hidden), temperature=temperature, top_k=top_k, top_p=top_p
    )
    keys = fold_each(fold_each(take(state_keys, state), sample + first_sample), slot.age)
    token = jax.vmap(jax.vmap(sampling.draw))(keys, log_probs)
    chosen = jnp.take_along_axis(log_probs, token[..., None], axis=-1)[..., 0]
    ended = jnp.logical_and(active, jnp.logical_or(token == eos_id, slot.age + 1 == max_tokens - start))
    # Places out of range are dropped: idle slots write nothing.
    place = jnp.where(active, slot.item, k_max * k)
    drawn = drawn.replace(
      tokens=_set_tokens(drawn.tokens, place, slot.age, token),
      log_probs=_set_tokens(drawn.log_probs, place, slot.age, chosen),
      lengths=_set(drawn.lengths, place, slot.age + 1),
      truncated=_set(drawn.truncated, place, token != eos_id),
    )
    slot = _Slots(
      item=jnp.where(ended, slot.queued[:, None] + jnp.cumsum(ended, axis=1) - 1, slot.item),
      age=jnp.where(jnp.logical_and(active, jnp.logical_not(ended)), slot.age + 1, 0),
      last=token,
      queued=slot.queued + jnp.sum(ended, axis=1),
    )
    return i + 1, branches, slot, drawn

  own = lambda x: jnp.zeros((x.shape[0], batch * slots, x.shape[2], max_tokens, x.shape[4]), x.dtype)
  each = (batch, k_max * k)
  drawn = Continuations(
    tokens=jnp.full((*each, max_tokens), pad_id, jnp.int32),
    log_probs=jnp.zeros((*each, max_tokens), jnp.float32),
    lengths=jnp.zeros(each, jnp.int32),
    truncated=jnp.zeros(each, bool),
  )
  zeros = jnp.zeros((batch, slots), jnp.int32)
  slot = _Slots(
    item=zeros + jnp.arange(slots, dtype=jnp.int32)[None], age=zeros, last=zeros, queued=jnp.full(batch, slots)
  )
  steps, _, _, drawn = jax.lax.while_loop(working, step, (jnp.int32(0), jax.tree.map(own, cache), slot, drawn))
  return jax.tree.map(lambda x: x.reshape(batch, k_max, k, *x.shape[2:]), drawn), steps


@jax.vmap
def _set(buffer: chex.Array, place: chex.Array, value: chex.Array) -> chex.Array:
  """[B, Q] with `value` [B, M] at `place` [B, M]; those out of range are dropped."""
  return buffer.at[place].set(value, mode="drop", unique_indices=False)


@jax.vmap
def _set_tokens(buffer: chex.Array, place: chex.Array, t: chex.Array, value: chex.Array) -> chex.Array:
  """[B, Q, S] with `value` [B, M] at (`place`, `t`), [B, M] each; those out of range are dropped."""
  return buffer.at[place, t].set(value, mode="drop", unique_indices=False)


def values_by_generation(
  params: decoder.Params,
  config: ModelConfig,
  cache: decoder.Cache,
  rollout: types.Rollout,
  segments: types.Segments,
  returns: np.ndarray,
  key: chex.PRNGKey,
  judge: Judge,
  *,
  k: int,
  first_sample: int = 0,
  samples_per_round: int | None = None,
  workers: int = 1,
  mesh: jax.sharding.Mesh | None = None,
  **options,
) -> MonteCarloValues:
  """Generates `k` continuations of every state and has them judged: v(s), and what it cost.

  Runs in rounds, so that k = 256 needs the memory of `samples_per_round`; the verifier
  judges one round in threads while the next is generated. Equal traces of a row are
  judged once: the verifier is taken to be a function of its arguments. Of several
  processes each judges its share of the rows, and all return the same.

  Args:
    params, config, cache, rollout, segments, key: see `generate_from_states`; on devices.
    returns: [B] float32, the traces' own rewards.
    judge: the verifier, safe to call from `workers` threads at once; asked about this process's rows.
    k: continuations a state in this call.
    first_sample: continuations a state that earlier calls with this key have drawn; their
      results and this call's go together by `joined`.
    samples_per_round: continuations a state in a round; None is k. Best a divisor of
      k: a last round of another size is compiled anew.
    workers: threads that judge.
    mesh: that the rows are split over; needed where there are several processes.
    **options: of `generate_from_states`: max_tokens, temperature, eos_id, chunk_size, ...

  Returns:
    The estimate; its `values` do not depend on rounds, workers or `chunk_size`.

  Raises:
    ValueError: on a number out of range, or if `judge` gives another number of rewards
      than it was asked for, or one that is not finite.
  """
  per_round = samples_per_round or k
  if min(k, per_round, workers) < 1 or first_sample < 0:
    raise ValueError(
      f"k={k}, samples_per_round={samples_per_round} and workers={workers} must be at least 1, "
      f"first_sample={first_sample} at least 0."
    )
  began = time.perf_counter()
  batch = len(returns)
  everything = np.arange(batch)
  rows = distributed.Rows(batch, everything, everything) if mesh is None else distributed.rows_of(mesh, batch)
  # From here on arrays on the host are of the rows that this process judges.
  on_host = lambda tree: jax.tree.map(lambda x: x[rows.judged], distributed.to_host(mesh, tree))
  traces, segments_here = on_host((rollout.tokens, segments))
  numbers, starts = rows.here[rows.judged], segments_here.starts
  places: dict[tuple[int, tuple[int, ...]], int] = {}  # Of each distinct trace among the verdicts.
  rounds: list[np.ndarray] = []
  futures: list[concurrent.futures.Future] = []
  generated, computed = np.zeros(len(numbers), int), 0  # Tokens: of each row, and run in all.
  generation_seconds = 0.0
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    for done in range(0, k, per_round):
      round_began = time.perf_counter()
      drawn, steps = generate_from_states(
        params, config, cache, rollout, segments, key, k=min(per_round, k - done),
        first_sample=np.int32(first_sample + done), **options,
      )  # fmt: skip
      drawn = on_host(drawn)
      generation_seconds += time.perf_counter() - round_began
      generated += drawn.lengths.sum(axis=(1, 2))
      continuations = drawn.lengths.shape[1] * drawn.lengths.shape[2]
      computed += int(steps) * batch * min(options.get("chunk_size") or continuations, continuations)
      verdict = np.full(drawn.lengths.shape, -1)
      known = len(places)
      for row, state, sample in np.argwhere(drawn.lengths > 0):
        ids = drawn.tokens[row, state, sample, : drawn.lengths[row, state, sample]]
        trace = (int(numbers[row]), (*traces[row, : starts[row, state]].tolist(), *ids.tolist()))
        verdict[row, state, sample] = places.setdefault(trace, len(places))
      rounds.append(verdict)
      # Dictionaries keep the order of insertion, so verdicts come in the order of their places.
      new = list(places)[known:]
      shares = [new[i * len(new) // workers : (i + 1) * len(new) // workers] for i in range(workers)]
      futures += [pool.submit(_ask, judge, share) for share in shares if share]
    verdicts = np.concatenate([np.zeros(0, np.float32), *(future.result() for future in futures)])
  place = np.concatenate(rounds, axis=2)
  rewards = np.where(place >= 0, np.append(verdicts, np.float32(np.nan))[place], np.float32(np.nan))
  judged = np.bincount([row for row, _ in places], minlength=batch)[numbers]
  each_row = (segments_here.num_segments, generated, judged, *rewards.reshape(len(numbers), -1).T)
  (num_segments, generated, judged, *columns), _ = rows.gather(numbers, *each_row)
  return MonteCarloValues(
    rewards=np.stack(columns, axis=1).reshape(batch, *place.shape[1:]),
    returns=np.asarray(returns, np.float32),
    num_segments=num_segments.astype(np.int32),
    generated_tokens=int(generated.sum(dtype=np.float64)),
    computed_tokens=computed,
    judged=int(judged.sum()),
    generation_seconds=generation_seconds,
    seconds=time.perf_counter() - began,
  )


def _ask(judge: Judge, traces: list[tuple[int, tuple[int, ...]]]) -> np.ndarray:
  rewards = np.asarray(judge(traces), np.float32)
  if rewards.shape != (len(traces),) or not np.isfinite(rewards).all():
    raise ValueError(f"the judge was asked for {len(traces)} finite rewards and gave {rewards.shape}: {rewards}.")
  return rewards
