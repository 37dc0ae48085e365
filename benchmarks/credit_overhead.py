"""What credit costs: an RREDCoT step over a GRPO step, on the demo's configuration or with longer traces.

    python benchmarks/credit_overhead.py
    python benchmarks/credit_overhead.py --chain_steps 64 --banks answer --repetitions 5

Claims with the `answer` bank: at most 1.10 on the demo's traces of 51 tokens, whose ten
states cost three tokens each; at most 1.05 on traces of 64 lines in 16 segments (392
tokens; the same small policy, which was never trained on that many lines, writes them with
the end of the sequence never taken, so that every trace fills its room). In one process, from the same
parameters, with the same key and so the same rollouts, each repetition times a
whole GRPO step (sample, verify, group advantage, update) and then the same with
each bank's credit in it (segment, bank, score, values, redistribution); the
figure is the median over repetitions of the ratio within one. Beside it the
ratio of token-forwards that explains it: a GRPO step runs every prompt and
trace token once to sample and three times (forward, and backward as two) to
update; a bank adds its branch tokens once.

The last line is {"overhead": {bank: ratio}, "token_forwards": {bank: ratio}, "trace_tokens": mean}.
"""

import argparse
import importlib.util
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from rredcot_jax.credit import assignment
from rredcot_jax.credit import rules as credit_lib
from rredcot_jax.data import batching, judging, tasks
from rredcot_jax.model import decoder, sampling
from rredcot_jax.ops import banks, losses, types
from rredcot_jax.parallel import sharding
from rredcot_jax.train import config as config_lib
from rredcot_jax.train import initial, train_step

_DEMO = pathlib.Path(__file__).parent.parent / "configs" / "demo.py"
_LONG_SEGMENTS = 16


def demo_config(arg: str, chain_steps: int) -> Any:
  """The demo's configuration, with `chain_steps` lines a trace if it is not 0."""
  spec = importlib.util.spec_from_file_location("demo", _DEMO)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(arg)
  if chain_steps:
    config.task.options.num_steps = chain_steps
    config.rollout.max_prompt_tokens = 2 * chain_steps + 2  # A digit, then an operator and a digit a step; <think>.
    config.rollout.max_tokens = 6 * chain_steps + 8  # Six tokens a line, then </think>, the answer, <eos>.
    config.segmentation.k_max = _LONG_SEGMENTS
    if config.credit.bank != "answer":
      config.credit.max_completion_tokens = config.rollout.max_tokens
  return config


class Step:
  """One training step of a configuration, repeatable from the same state."""

  def __init__(self, config: Any, *, endless: bool):
    self.config, self.rule = config, config_lib.credit_rule(config)
    self.task = tasks.make_task(**config_lib.task_options(config, "train"))
    self.model = config_lib.model_config(config, len(self.task.tokenizer))
    self.eos_id = -1 if endless else self.task.tokenizer.eos_token_id
    self.tables = batching.vocab_tables(self.task.tokenizer)
    self.mesh = sharding.make_mesh()
    optimizer = train_step.make_optimizer(**config_lib.optimizer_options(config))
    abstract = jax.eval_shape(lambda: decoder.init(self.model, jax.random.key(0)))
    params = initial.load_params(config.initial_params, abstract)
    # The branch and the baseline share one state, which is never donated here: each repetition starts alike.
    self.state = train_step.init_state(params, optimizer)
    steps = train_step.compile_steps(
      self.model,
      optimizer,
      sharding.infer(self.mesh, self.state),
      self.mesh,
      temperature=self.rule.temperature,
      eos_id=self.eos_id,
      segmentation_options=config_lib.segmentation_options(config),
      loss_options=config_lib.loss_options(config),
    )
    self.steps = steps
    self.assign = assignment.Assigner(self.task, self.model, self.mesh, **config_lib.assigner_options(config))

  def run(self, repetition: int) -> tuple[float, dict[str, int]]:
    """Seconds of the step, and its tokens by kind."""
    config, tokenizer = self.config, self.task.tokenizer
    group = config.rollout.group_size
    examples = [self.task[repetition * 64 + i] for i in range(config.rollout.prompts_per_step) for _ in range(group)]
    state = jax.tree.map(lambda x: x.copy(), jax.device_put(self.state, sharding.infer(self.mesh, self.state)))
    jax.block_until_ready(state)
    began = time.perf_counter()
    prompts = batching.prompt_arrays(self.task, examples, config.rollout.max_prompt_tokens)
    rollout, cache = sampling.sample(
      state.params,
      self.model,
      *sharding.put_batch(self.mesh, prompts),
      jax.random.key(repetition),
      max_tokens=config.rollout.max_tokens,
      temperature=config.rollout.temperature,
      eos_id=self.eos_id,
      pad_id=tokenizer.pad_token_id,
    )
    host = jax.device_get(rollout)
    returns = judging.returns_of(self.task, examples, host)
    segments = self.steps.segment(rollout, self.tables) if self.rule.redistributes else None
    assigned = self.assign(
      state.params, None, cache, rollout, segments, returns, jax.random.key(repetition),
      on_host=host, segments_on_host=jax.device_get(segments), examples=examples,
    )  # fmt: skip
    mask = losses.loss_mask(
      rollout.mask,
      rollout.truncated,
      credit_lib.zero_variance(returns, self.rule),
      mask_truncated=False,
      filter_zero_variance=False,
    )
    batch = types.TrainBatch(
      prompt_tokens=rollout.prompt_tokens,
      prompt_mask=rollout.prompt_mask,
      tokens=rollout.tokens,
      mask=rollout.mask,
      loss_mask=mask,
      old_log_probs=rollout.log_probs,
      reference_log_probs=rollout.log_probs,
      advantages=assigned.advantages,
    )
    jax.block_until_ready(self.steps.update(state, sharding.put_batch(self.mesh, batch)))
    seconds = time.perf_counter() - began
    columns = len(examples) * (config.rollout.max_prompt_tokens + config.rollout.max_tokens)
    trace = int(host.mask.sum()) // len(examples)
    return seconds, {"step": 4 * columns, "branches": assigned.metrics["token_forwards"], "trace": trace}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--repetitions", type=int, default=9)
  parser.add_argument("--chain_steps", type=int, default=0, help="lines of a trace; 0 is the demo's 8")
  parser.add_argument("--banks", nargs="+", choices=banks.BANKS, default=banks.BANKS)
  args = parser.parse_args()
  repetitions = args.repetitions
  make = lambda arg: Step(demo_config(arg, args.chain_steps), endless=args.chain_steps > 0)
  baseline, ours = make("grpo"), {bank: make(f"rredcot,bank={bank}") for bank in args.banks}
  _, counts = baseline.run(0)
  trace_tokens = counts["trace"]
  forwards = {}
  for bank, step in ours.items():
    _, counts = step.run(0)
    forwards[bank] = round(1 + counts["branches"] / counts["step"], 3)
  ratios: dict[str, list[float]] = {bank: [] for bank in ours}
  for repetition in range(repetitions):
    # A GRPO step on either side of each credited one, so that a drift of the machine's speed cancels.
    before, _ = baseline.run(repetition)
    for bank, step in ours.items():
      seconds, _ = step.run(repetition)
      after, _ = baseline.run(repetition)
      ratios[bank].append(seconds / (0.5 * (before + after)))
      before = after
  overhead = {bank: round(float(np.median(values)), 3) for bank, values in ratios.items()}
  for bank in ours:
    low, high = np.quantile(ratios[bank], [0.25, 0.75])
    print(
      f"{bank:10s} step time over GRPO {overhead[bank]:.3f} (quartiles {low:.3f} to {high:.3f}), "
      f"token-forwards over GRPO {forwards[bank]:.3f}"
    )
  print(f"mean trace {trace_tokens} tokens")
  print(json.dumps({"overhead": overhead, "token_forwards": forwards, "trace_tokens": trace_tokens}))


if __name__ == "__main__":
  main()
