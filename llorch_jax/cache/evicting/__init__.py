"""The evicting layout: the cache, the policies that say which tokens stay, and `evict` for the other layouts."""
