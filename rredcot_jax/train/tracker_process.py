"""The process that talks to Weights & Biases or trackio; `tracking.Tracker` starts it and never waits for it.

It reads JSON lines from standard input: first what the run is, then a step each. To each step it answers a line:
"+", or "-" and the reason. It imports nothing of this package, so that it starts without JAX.
"""

import contextlib
import importlib
import json
import os
import signal
from typing import Any

_LAST_SECONDS = 60  # A tracker that hangs when the run has ended, or was killed, is left after so long.


def main() -> None:
  # The package gets an empty standard input, where no question of it can be answered, and prints to the log.
  lines, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.dup(1)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  os.dup2(2, 1)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Of a whole pod: the run saves, and then ends its tracker.

  def answer(kind: str, error: Exception | None = None) -> None:
    reason = "" if error is None else f"{type(error).__name__}: {error}"
    with contextlib.suppress(BrokenPipeError):  # The run was killed. What it had sent is recorded all the same.
      os.write(answers, (kind + " ".join(reason.split())[:500] + "\n").encode(errors="replace"))

  try:
    run = json.loads(next(lines))
    module = importlib.import_module(run["tracker"])
    begin(module, run)
  except Exception as error:
    answer("!", error)
    raise
  for line in lines:
    if not line.endswith("\n"):  # The run was killed while it wrote.
      break
    item = json.loads(line)
    try:
      if run["tracker"] == "wandb":
        module.log(item["values"])
      else:
        module.log(item["values"], step=item["step"])
    except Exception as error:
      answer("-", error)
    else:
      answer("+")
  signal.alarm(_LAST_SECONDS)
  module.finish()


def begin(module: Any, run: dict[str, Any]) -> None:
  """Begins or goes on with the run `run["id"]`."""
  project = os.environ.get(f"{run['tracker'].upper()}_PROJECT", "rredcot-jax")
  if run["tracker"] == "wandb":
    module.init(
      project=project, id=run["id"], name=run["name"], dir=run["dir"], config=run["config"], resume="allow"
    )  # fmt: skip
    # A resumed run repeats some steps, which W&B's own count of calls would refuse.
    module.define_metric("*", step_metric="train/global_step")
  else:
    # trackio knows a run by its name.
    module.init(project=project, name=f"{run['name']}-{run['id']}", config=run["config"], resume="allow")


if __name__ == "__main__":
  main()
