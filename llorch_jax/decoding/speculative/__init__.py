"""Speculative decoding: drafts, the verification of their guesses, and the loop."""
