"""The evicting layout: the cache, the policies that decide which tokens stay, and `evict` for the other layouts."""
