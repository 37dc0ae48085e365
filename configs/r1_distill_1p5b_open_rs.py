"""DeepSeek-R1-Distill-Qwen-1.5B on open-rs with traces of 1,024 tokens: the smaller of the paper's two settings.

    python experiments/train.py --config configs/r1_distill_1p5b_open_rs.py:rredcot --workdir runs/open-rs-rredcot
    python experiments/train.py --config configs/r1_distill_1p5b_open_rs.py:grpo --workdir runs/open-rs-grpo
    python experiments/evaluate.py --config configs/r1_distill_1p5b_open_rs.py:eval=amc23 --samples 16 \
        --workdir runs/open-rs-rredcot --output runs/open-rs-rredcot/amc23.json

For 8 chips of 80 GB. It needs the checkpoint in checkpoints/DeepSeek-R1-Distill-Qwen-1.5B
(Hugging Face's directory unchanged) and the corpora in data/open_rs and
data/{math500,amc23,minerva,aime}. README.md says how they are named there.

**Not run by us.** The expected scores are the paper's (arXiv 2606.06475). They are second-hand, as
readers' summaries quote them, and not reproduced here: MATH-500 85.8 with RREDCoT and 84.8 with
GRPO, AMC23 80.0 and 72.5. For the model itself DeepSeek's report (arXiv 2501.12948) has pass@1 28.9
on AIME 2024 and 83.9 on MATH-500, with 32,768 tokens, temperature 0.6 and top_p 0.95. This
configuration has 1,024 tokens and temperature 1.0, so most traces are truncated. Expect far less
before training, and do not read the paper's figures as this evaluation's. To check the model
against the report, use `--config.rollout.max_tokens=32768 --config.rollout.temperature=0.6
--config.rollout.top_p=0.95 --config.evaluation.rows=16`. Group, batch, k_max, learning rate, form
and mode are our choice, because the summaries of the paper do not give them; docs/method.md,
section 10, says of each choice whose it is. `bank=answer` is 16 times cheaper to score.

Memory, by arithmetic (1,777,088,000 parameters, 64 rows of 1,024 + 1,024 tokens,
fsdp = 8, so 8 rows a chip; parameters and optimizer float32, the rest bfloat16):

    parameters and AdamW's two moments   3 x 4 bytes x 1.78 G                     21.3 GB   2.7 GB a chip
    the policy that samples and scores   2 bytes x 1.78 G, whole on every chip     3.6 GB   3.6 GB a chip
    keys and values                      28,672 bytes x 2,048 tokens x 64 rows     3.8 GB   0.5 GB a chip

What XLA allocates for 8 chips of a v5p (`python tools/tpu_compile.py --config
configs/r1_distill_1p5b_open_rs.py --topology v5p:2x2x2`) is in docs/results.md.
"""

from ml_collections import ConfigDict

from rredcot_jax.ops.banks import BANKS as _ALL_BANKS
from rredcot_jax.train.config import default_config, options_of, set_model

METHODS = ("rredcot", "grpo")
BANKS = ("solutions", *(bank for bank in _ALL_BANKS if bank != "solutions"))
BENCHMARKS = {"math500": 500, "amc23": 40, "minerva": 272, "aime": 30}  # Prompts; 30 is one year's AIME.

_MODEL = "checkpoints/DeepSeek-R1-Distill-Qwen-1.5B"
_TASK_OPTIONS = {
  "data_dir": "data",
  "instruction": "Please reason step by step, and put your final answer within \\boxed{}.",
}


def get_config(arg: str = "rredcot") -> ConfigDict:
  """Builds the configuration.

  Options: method (rredcot, grpo), bank (solutions, answer, solution, suffix, rollouts, own),
  eval (math500, amc23, minerva, aime).
  """
  options = options_of(arg, {"method": METHODS, "bank": BANKS, "eval": tuple(BENCHMARKS)})
  config = default_config()
  set_model(config, "DeepSeek-R1-Distill-Qwen-1.5B")
  config.initial_params = _MODEL
  config.task.name = "dataset/open_rs"
  config.task.options.update(_TASK_OPTIONS)
  config.task.options.skip_without_answer = True
  config.num_steps = 500
  config.rollout.prompts_per_step = 8
  config.rollout.group_size = 8
  config.rollout.max_prompt_tokens = 1024
  config.rollout.overlong = "skip"
  config.rollout.max_tokens = 1024
  config.segmentation.method = "hybrid"
  config.segmentation.k_max = 16
  config.optimizer.learning_rate = 1e-6
  if options["method"] == "rredcot":
    config.credit.mode = "signed"
    config.credit.bank = options["bank"]
    config.credit.bank_size = 4 if options["bank"] in ("rollouts", "own") else 1  # The corpus has one solution a row.
    config.credit.initial_value = "first_segment"  # So that sum_k r_k = R, as the paper states it.
    if options["bank"] != "rollouts":
      # After </think> the model tends to write a summary and a box, so the likelihood of a bare reference is tiny. The
      # step from it to R would give a correct trace's credit to its last segment. A mean over tokens is not tiny.
      config.credit.form = "length_normalised"
    config.credit.scored = "all" if options["bank"] == "rollouts" else "body"  # The log q of rollouts is of all tokens.
    config.credit.max_completion_tokens = 64 if options["bank"] == "answer" else 1024
    config.credit.chunk_size = 4 if options["bank"] == "answer" else 1
  config.evaluation.task.name = f"dataset/{options['eval']}"
  config.evaluation.task.options.update(_TASK_OPTIONS)
  config.evaluation.num_prompts = BENCHMARKS[options["eval"]]
  config.evaluation.samples = 4 if BENCHMARKS[options["eval"]] > 100 else 16
  config.evaluation.rows = 128
  config.evaluation.every = 50
  config.checkpoint.every = 20
  config.mesh.data = 1
  config.mesh.fsdp = 8
  config.rollout_mesh.data = 8  # Whole parameters on every chip: sampling reads all of them for every token.
  config.compute.dtype = "bfloat16"
  config.compute.log_prob_chunk = 256
  return config
