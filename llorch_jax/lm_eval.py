"""`python -m llorch_jax.lm_eval` runs the evaluation harness with a model of this package."""

from llorch_jax.evaluation.lm_eval import HarnessModel, main, register

__all__ = ["HarnessModel", "main", "register"]

if __name__ == "__main__":
    main()
