"""What credit costs: an RREDCoT step over a GRPO step, on the demo's configuration or with longer traces.

    python benchmarks/credit_overhead.py
    python benchmarks/credit_overhead.py --chain_steps 64 --banks answer --repetitions 5

Targets with the `answer` bank: at most 1.10 on the demo's traces of 51 tokens, whose ten
states cost three tokens each, and at most 1.05 on traces of 64 lines in 16 segments (392
tokens). The same small policy writes those long traces. It was never trained on that many
lines, so its end-of-sequence token is ignored and every trace fills its room.

Everything runs in one process, from the same parameters, with the same key and so the same
rollouts. Each repetition times a whole GRPO step (sample, verify, group advantage, update),
and then the same step with each bank's credit in it (segment, bank, score, values,
redistribution). The figure is the median over repetitions of the ratio within one.

The ratio of token-forwards beside it explains it. A GRPO step runs every prompt and trace
token once to sample and three times to update (a backward pass counts as two). A bank adds
its branch tokens once.

The last line is {"overhead": {bank: ratio}, "token_forwards": {bank: ratio}, "trace_tokens": mean, "machine": ..}.
"""

import argparse
import dataclasses
import pathlib
import time
from typing import Any

import jax
import machine
import numpy as np

from rredcot_jax.credit.source import Batch
from rredcot_jax.data import batching, judging
from rredcot_jax.ops import banks, composition
from rredcot_jax.parallel import sharding
from rredcot_jax.train import launch, loop, train_step
from rredcot_jax.train.experiment import Experiment

_DEMO = pathlib.Path(__file__).parent.parent / "configs" / "demo.py"
_LONG_SEGMENTS = 16


def demo_config(arg: str, chain_steps: int) -> Any:
  """The demo's configuration, with `chain_steps` lines a trace if it is not 0."""
  config = launch.load_file(_DEMO).get_config(arg)
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
    self.config, self.experiment = config, Experiment(config)
    experiment = self.experiment
    # No token ends a trace, so that every trace fills its room.
    codec = dataclasses.replace(experiment.codec, end_ids=(-1,)) if endless else experiment.codec
    self.rollouts = train_step.compile_rollouts(
      experiment.model, experiment.mesh, experiment.rollout_mesh, codec,
      segmentation_options=config.segmentation.to_dict(), sampling_options=experiment.sampling_options,
    )  # fmt: skip
    # The state is never donated here: each repetition starts alike.
    self.state = experiment.init_state(experiment.start_params(jax.random.key(0)))

  def run(self, repetition: int) -> tuple[float, dict[str, int]]:
    """Seconds of the step, and its tokens by kind."""
    config, experiment, key = self.config, self.experiment, jax.random.key(repetition)
    task, codec, mesh, group = experiment.train_task, experiment.codec, experiment.mesh, config.rollout.group_size
    examples = [task[repetition * 64 + i] for i in range(config.rollout.prompts_per_step) for _ in range(group)]
    state = jax.tree.map(lambda x: x.copy(), jax.device_put(self.state, experiment.placement))
    jax.block_until_ready(state)
    began = time.perf_counter()
    prompts = sharding.put_batch(mesh, batching.prompt_arrays(codec, examples, config.rollout.max_prompt_tokens))
    rollout, cache = self.rollouts.sample(state.params, *prompts, key)
    host = jax.device_get(rollout)
    returns = judging.returns_of(task, codec, examples, host)
    if experiment.rule.redistributes:
      segments = self.rollouts.segment(rollout)
      on_host = (host, jax.device_get(segments))
      assigned = experiment.assigner(
        Batch(state.params, cache, rollout, segments, returns, examples, key, on_host=on_host)
      )
    else:
      assigned = experiment.assigner.uniform(rollout.mask, returns)
    zero_variance = np.asarray(composition.zero_variance(returns, group_size=group))
    batch = loop.train_batch(config, mesh, rollout, assigned.advantages, zero_variance)
    jax.block_until_ready(experiment.update_steps.update(state, batch))
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
    # A GRPO step before and after each credited step, so that a drift of the machine's speed cancels.
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
  machine.report({"overhead": overhead, "token_forwards": forwards, "trace_tokens": trace_tokens})


if __name__ == "__main__":
  main()
