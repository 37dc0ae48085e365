"""Rollouts judged: the verifier over a batch, and pass@k on held-out prompts."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rredcot_jax import metrics, sampling, sharding, tasks, types
from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.tasks import batching, chain


def trace_texts(task: tasks.Task, rollout: types.Rollout) -> list[str]:
  """The text of each trace without its end-of-sequence token; for verifiers and reports only."""
  tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
  keep = mask & (tokens != task.tokenizer.eos_token_id)
  return [tasks.decode(task.tokenizer, row[kept].tolist()) for row, kept in zip(tokens, keep)]


def returns_of(task: tasks.Task, examples: Sequence[tasks.Example], rollout: types.Rollout) -> np.ndarray:
  """[B] float32 rewards of the verifier; example i belongs to trace i."""
  texts = trace_texts(task, rollout)
  return np.array([task.reward(example, text) for example, text in zip(examples, texts, strict=True)], np.float32)


def evaluate(
  params: decoder.Params,
  config: ModelConfig,
  task: tasks.Task,
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
) -> dict[str, float]:
  """pass@1 and pass@`samples` on the first `num_prompts` prompts of `task`.

  Runs in batches of `rows` traces; the last is filled up and the filling not counted.

  Returns:
    eval/pass@1, eval/pass@1_se, eval/pass@k, eval/pass@k_se (standard errors over
    prompts), eval/length and eval/truncated.
  """
  if not 1 <= num_prompts <= len(task):
    raise ValueError(f"evaluation.num_prompts={num_prompts} must lie in [1, {len(task)}], the task's held-out prompts.")
  examples = [task[i] for i in range(num_prompts) for _ in range(samples)]
  rewards, lengths, truncated = [], [], []
  for start in range(0, len(examples), rows):
    real = examples[start : start + rows]
    filled = real + [real[-1]] * (rows - len(real))
    prompts = sharding.put_batch(mesh, batching.prompt_arrays(task, filled, max_prompt_tokens))
    rollout, _ = sampling.sample(
      params, config, *prompts, jax.random.fold_in(key, start), max_tokens=max_tokens,
      temperature=temperature, top_k=top_k, top_p=top_p,
      eos_id=task.tokenizer.eos_token_id, pad_id=task.tokenizer.pad_token_id,
    )  # fmt: skip
    rollout = jax.device_get(rollout)
    rewards.append(returns_of(task, filled, rollout)[: len(real)])
    lengths.append(rollout.mask.sum(axis=1)[: len(real)])
    truncated.append(rollout.truncated[: len(real)])
  correct = (np.concatenate(rewards) >= 1.0).reshape(num_prompts, samples).sum(axis=1)
  result: dict[str, float] = {}
  for k in sorted({1, samples}):
    mean, error = metrics.mean_and_error(metrics.pass_at_k(correct, samples, k))
    result |= {f"eval/pass@{k}": mean, f"eval/pass@{k}_se": error}
  return result | {
    "eval/length": float(np.concatenate(lengths).mean()),
    "eval/truncated": float(np.concatenate(truncated).mean()),
  }


def trace_record(
  step: int,
  task: tasks.Task,
  example: tasks.Example,
  rollout: types.Rollout,
  segments: types.Segments,
  credit: types.Credit,
  return_: float,
) -> dict[str, Any]:
  """One trace with its credit as plain JSON values, as the report reads it; fields of one row, on the host."""
  length, num_segments = int(rollout.mask.sum()), int(segments.num_segments)
  texts = [tasks.decode(task.tokenizer, [token]) for token in rollout.tokens[:length].tolist()]
  wrong = None
  if isinstance(task, chain.Chain):
    line = chain.first_wrong_step(example, "".join(texts))
    if line is not None:
      # The line's first token; a line ends with its newline token.
      ends = [t + 1 for t, text in enumerate(texts) if text == "\n"]
      wrong = int(segments.segment_ids[ends[line - 1] if line else 0])
  return {
    "step": step,
    "prompt": example.question,
    "tokens": texts,
    "segment_ids": segments.segment_ids[:length].tolist(),
    "values": credit.values[: num_segments + 1].tolist(),
    "rewards": credit.rewards[:num_segments].tolist(),
    "advantages": credit.advantages[:length].tolist(),
    "return": float(return_),
    "answer": example.answer,
    "first_wrong_segment": wrong,
  }
