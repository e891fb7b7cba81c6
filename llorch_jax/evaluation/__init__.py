"""How good a model, or a cache, is: perplexity, log-likelihoods, fidelity, validation."""
