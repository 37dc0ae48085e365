"""Rollouts judged: the verifier over a batch, answers as votes, and pass@k on held-out prompts."""

import dataclasses
import re
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rredcot_jax.data import batching, tasks, verifiers
from rredcot_jax.data.encoding import Codec
from rredcot_jax.model import decoder, sampling
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.parallel import processes, sharding
from rredcot_jax.report import statistics

# LaTeX that changes only the appearance: stretched brackets, spaces, fractions of another size.
_STRETCHED = re.compile(r"\\(?:left|right)(?![A-Za-z])")
_SPACES = re.compile(r"\s+|\\[,;:! ]")
_FRACTION = re.compile(r"\\[dt]frac(?![A-Za-z])")


@dataclasses.dataclass(frozen=True)
class Judged:
  """One sampled trace of a held-out prompt, judged."""

  prompt: int  # Index into the task.
  sample: int  # Of this prompt's.
  answer: str | None  # See `answer_of`.
  reward: float
  length: int  # Tokens, with the one that ends it.
  truncated: bool


def vote_of(answer: str | None) -> Hashable:
  """The same value for answers that are plainly the same; None, no vote, where there is no answer.

  Numbers are compared by value. Everything else is compared as text without dollar signs,
  white space and LaTeX that changes only the appearance. No verifier is asked. So `1/2` and
  `0.5` are two answers, whose votes are counted separately.
  """
  if answer is None:
    return None
  answer = verifiers.without_dollars(answer)
  number = verifiers.parse_number(answer)
  if number is not None:
    return number
  for pattern, replacement in ((_STRETCHED, ""), (_FRACTION, r"\\frac"), (_SPACES, "")):
    answer = pattern.sub(replacement, answer)
  return answer


def judged_batches(
  params: decoder.Params,
  config: ModelConfig,
  task: tasks.Task,
  codec: Codec,
  mesh: jax.sharding.Mesh,
  key: jax.Array,
  *,
  num_prompts: int,
  samples: int,
  rows: int,
  max_prompt_tokens: int,
  max_tokens: int,
  temperature: float,
  top_k: int,
  top_p: float,
  first: int = 0,
  notice: processes.StopNotice | None = None,
) -> Iterator[list[Judged]]:
  """Samples and judges the traces of the first `num_prompts` prompts of `task`, a batch at a time.

  Trace i is sample i % samples of prompt i // samples. It runs in batches of `rows`
  traces. The last batch is filled up, and the filling is left out of the result. A batch
  depends only on the parameters, the key and its first trace. So a pass that begins at a
  `first` which is a multiple of `rows` repeats the rest of a whole pass bit for bit.
  Another `rows` draws other traces.

  Args:
    params, config, task, codec, mesh: who answers, and what.
    key: of the whole pass.
    num_prompts, samples, rows: see above.
    max_prompt_tokens, max_tokens, temperature, top_k, top_p: see `config.rollout`.
    first: the trace to begin with; a multiple of `rows`, or all of them, which yields nothing.
    notice: is checked after every batch.

  Where there are several processes, each judges its share, and all yield the same.

  Raises:
    processes.Stopped: if `notice` was given to a process.
  """
  total = num_prompts * samples
  if not 1 <= num_prompts <= len(task):
    raise ValueError(f"evaluation.num_prompts={num_prompts} must lie in [1, {len(task)}], the task's held-out prompts.")
  if first % rows and first != total:
    raise ValueError(f"first={first} must be a multiple of evaluation.rows={rows}.")
  share = processes.rows_of(mesh, rows, pad=True)
  for start in range(first, total, rows):
    places = [divmod(i, samples) for i in range(start, min(start + rows, total))]
    examples = [task[prompt] for prompt, _ in places]
    filled = examples + [examples[-1]] * (share.count - len(examples))
    mine = [filled[row] for row in share.here]
    prompts = sharding.put_batch(mesh, batching.prompt_arrays(codec, mine, max_prompt_tokens))
    # Made outside, as the training loop makes its keys: one that lies otherwise would compile the sampler once more.
    batch_key = jax.random.fold_in(key, start)
    with sharding.use(mesh):
      rollout, _ = sampling.sample(
        params, config, *prompts, batch_key, max_tokens=max_tokens,
        temperature=temperature, top_k=top_k, top_p=top_p,
        eos_id=codec.end_ids, pad_id=codec.pad_id,
      )  # fmt: skip
    rollout = processes.whole(rollout)
    texts = codec.responses(rollout)
    # The filling is not judged.
    judged = [row for row in share.here[share.judged] if row < len(places)]
    (rewards,), stopped = share.gather(
      judged, [task.reward(examples[row], texts[row]) for row in judged], flag=notice is not None and notice.given
    )
    if stopped:
      raise processes.Stopped
    rollout = jax.tree.map(lambda x: x[: len(places)], rollout)  # noqa: B023
    columns = (
      map(verifiers.answer_of, texts[: len(places)]),
      rewards[: len(places)].tolist(),
      rollout.mask.sum(axis=1).tolist(),
      rollout.truncated.tolist(),
    )
    yield [Judged(*place, *of_trace) for place, *of_trace in zip(places, *columns, strict=True)]


def evaluate(
  params: decoder.Params,
  config: ModelConfig,
  task: tasks.Task,
  codec: Codec,
  mesh: jax.sharding.Mesh,
  key: jax.Array,
  *,
  num_prompts: int,
  samples: int,
  **options: Any,
) -> dict[str, float]:
  """pass@1 and pass@`samples` on the first `num_prompts` prompts of `task`; see `judged_batches` for the options.

  Returns:
    eval/pass@1, eval/pass@1_se, eval/pass@k, eval/pass@k_se (standard errors over
    prompts), eval/length and eval/truncated.
  """
  batches = judged_batches(params, config, task, codec, mesh, key, num_prompts=num_prompts, samples=samples, **options)
  judged = [one for batch in batches for one in batch]
  correct = is_correct(judged).reshape(num_prompts, samples).sum(axis=1)
  result: dict[str, float] = {}
  for k in sorted({1, samples}):
    mean, error = statistics.mean_and_error(statistics.pass_at_k(correct, samples, k))
    result |= {f"eval/pass@{k}": mean, f"eval/pass@{k}_se": error}
  return result | {
    "eval/length": float(np.mean([one.length for one in judged])),
    "eval/truncated": float(np.mean([one.truncated for one in judged])),
  }


def is_correct(judged: Sequence[Judged]) -> np.ndarray:
  """[N] bool, whether the reward is full; a part of it does not count."""
  return np.array([one.reward >= 1.0 for one in judged])


def votes_of(judged: Sequence[Judged]) -> np.ndarray:
  """[N] int for `statistics.maj_at_k`: one number for each answer, whatever the prompt; -1 where there is none."""
  numbers: dict[Hashable, int] = {None: -1}
  return np.array([numbers.setdefault(vote_of(one.answer), len(numbers) - 1) for one in judged])
