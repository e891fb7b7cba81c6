"""From prompts to new tokens: requests, compiled steps, loops, streams, sessions and searches."""
