"""Many requests on one model: tokens in, tokens out, in slots that share one paged cache."""
