"""lm-evaluation-harness: `--model extrope`, a Hugging Face model extended by any method.

lm-eval finds it by its entry point from the release after 0.4.13 on. With that release
`python -m extrope_kernels.evaluation.lm_eval` takes the place of `lm_eval`.
"""
