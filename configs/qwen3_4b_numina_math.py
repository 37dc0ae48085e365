"""Qwen3-4B on NuminaMath-CoT with traces of 25k tokens: the larger of the paper's two settings, for 16 chips.

    python experiments/train.py --config configs/qwen3_4b_numina_math.py:rredcot --workdir runs/numina-rredcot
    python experiments/train.py --config configs/qwen3_4b_numina_math.py:grpo --workdir runs/numina-grpo
    python experiments/evaluate.py --config configs/qwen3_4b_numina_math.py:eval=aime --samples 64 \
        --workdir runs/numina-rredcot --output runs/numina-rredcot/aime.json

It needs the checkpoint in checkpoints/Qwen3-4B (Hugging Face's directory unchanged) and the
corpora in data/numina_math_cot and data/{math500,amc23,minerva,aime}. README.md says how
they are named there.

**Not run by us**, only compiled for TPUs, see below. The expected scores are the paper's
(arXiv 2606.06475). They are second-hand, as readers' summaries quote them. None is reproduced here:

    pass@1 in %     AIME24   AIME25   AIME26   Minerva   MATH-500
    the model         69.2
    GRPO              85.0     60.0     44.2      91.5       80.4
    RREDCoT           90.8     58.3     47.5      93.5       82.3

For the model itself see also the Qwen3 report (arXiv 2505.09388). Group, batch, k_max, learning
rate, form and mode are our choice, because the summaries do not give them; docs/method.md,
section 10, says of each choice whose it is. `bank=answer` is 32 times cheaper to score.

Training and evaluation have one temperature. Qwen recommends 0.6 with top_p 0.95 for thinking. A
policy gradient needs 1.0, so both are at 1.0 here. For figures that are comparable with Qwen's,
evaluate with `--config.rollout.temperature=0.6 --config.rollout.top_p=0.95`.

Memory, by arithmetic (4,022,468,096 parameters, 16 rows of 1,024 + 25,000 tokens,
fsdp = 16, so one row a chip; parameters and optimizer float32, the rest bfloat16):

    parameters and AdamW's two moments   3 x 4 bytes x 4.02 G                       48.3 GB    3.0 GB a chip
    the policy that samples and scores   2 bytes x 4.02 G, whole on every chip       8.0 GB    8.0 GB a chip
    keys and values                      147,456 bytes x 26,024 tokens x 16 rows   61.4 GB    3.8 GB a chip

What XLA allocates for 16 chips of a v5p (`python tools/tpu_compile.py --config
configs/qwen3_4b_numina_math.py --topology v5p:2x2x4`) is in docs/results.md. The update
is the largest of the three programs and takes 36 GiB of a chip's 95. It computes again
every layer's activations but attention's, and makes logits for 2,048 tokens at a time.
For 64 chips of 16 GB (v5e:8x8): `--config.mesh.fsdp=16 --config.mesh.sequence=4
--config.rollout_mesh.data=16 --config.rollout_mesh.tensor=4 --config.compute.remat=full
--config.compute.log_prob_chunk=1024`.
"""

from ml_collections import ConfigDict

from rredcot_jax.ops.banks import BANKS as _ALL_BANKS
from rredcot_jax.train.config import default_config, options_of, set_model

METHODS = ("rredcot", "grpo")
BANKS = ("solutions", *(bank for bank in _ALL_BANKS if bank != "solutions"))
BENCHMARKS = {"math500": 500, "amc23": 40, "minerva": 272, "aime": 30}  # Prompts; 30 is one year's AIME.

_MODEL = "checkpoints/Qwen3-4B"
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
  set_model(config, "Qwen3-4B")
  config.initial_params = _MODEL
  config.task.name = "dataset/numina_math_cot"
  config.task.options.update(_TASK_OPTIONS)
  config.task.options.skip_without_answer = True  # Proofs.
  config.num_steps = 200
  config.rollout.prompts_per_step = 2
  config.rollout.group_size = 8
  config.rollout.max_prompt_tokens = 1024
  config.rollout.overlong = "skip"
  config.rollout.max_tokens = 25_000
  config.segmentation.method = "hybrid"
  config.segmentation.k_max = 32
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
    config.credit.max_completion_tokens = 64 if options["bank"] == "answer" else 2048
    config.credit.chunk_size = 8 if options["bank"] == "answer" else 1
  config.evaluation.task.name = f"dataset/{options['eval']}"
  config.evaluation.task.options.update(_TASK_OPTIONS)
  config.evaluation.num_prompts = BENCHMARKS[options["eval"]]
  config.evaluation.samples = 4 if BENCHMARKS[options["eval"]] > 100 else 16
  config.evaluation.rows = 32
  config.evaluation.every = 50
  config.checkpoint.every = 10
  config.mesh.data = 1
  config.mesh.fsdp = 16
  config.rollout_mesh.data = 16  # Whole parameters on every chip: sampling reads all of them for every token.
  config.compute.dtype = "bfloat16"
  config.compute.remat = "attention"
  config.compute.log_prob_chunk = 2048
  return config
