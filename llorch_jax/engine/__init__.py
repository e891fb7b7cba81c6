"""Many requests on one model: tokens in, tokens out, in slots over one paged cache."""
